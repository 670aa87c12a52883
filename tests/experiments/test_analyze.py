"""The analyses of a trained model, end to end, through the launcher's entry."""

import csv
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qtx import models
from qtx.analysis import landscape, layer_errors
from qtx.errors import UserError
from qtx.experiments import analyze as module
from qtx.experiments.analyze import analyze
from qtx.experiments.from_config import policy_from
from qtx.methods.teacher_intervention import student_policy

ROOT = Path(__file__).parents[2]


def get_config(argument, tiny_checkpoint, tiny_data):
    """The config file's experiment on the tiny model, whose random head counts as trained."""
    spec = importlib.util.spec_from_file_location("analyze", ROOT / "configs" / "analyze.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    config = found.get_config(argument)
    config.model.name, config.task = str(tiny_checkpoint), "table"
    config.data.train, config.data.validation = str(tiny_data / "train.csv"), str(tiny_data / "validation.csv")
    config.data.max_length = 16
    config.data.limit_train = config.data.limit_eval = 0
    config.calibration.batch_size = 8
    config.analysis.memory.tokens = 8
    return config


@pytest.fixture
def config(tiny_checkpoint, tiny_data):
    return get_config("smoke", tiny_checkpoint, tiny_data)


def test_smoke_leaves_a_report_and_resumes(config, tmp_path, monkeypatch):
    config.analysis.outliers.k = 3.0
    config.analysis.memory.compiled = False  # four programs that another test compiles
    text = analyze(config, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    for picture in ("sensitivity.png", "ranges.png", "outliers.png", "weights.png"):
        assert f"({picture})" in text and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert all(f"## {name.capitalize()}" in text for name in config.analyses) and "## Curvature" not in text

    with open(tmp_path / "sensitivity.csv", newline="") as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"full precision", "everything", "x", "h", "y"}
    lines = [json.loads(line) for line in (tmp_path / "sensitivity.jsonl").read_text().splitlines()]
    scores = {line["variant"]: line for line in lines}
    assert float(rows["y"]["all but it"]) == pytest.approx(scores["all but y"]["score"])
    assert float(rows["y"]["error alone"]) == scores["only y"]["error"] > 1e-4
    assert scores["full precision"]["error"] < 1e-5
    with open(tmp_path / "outlier_sites.csv", newline="") as file:
        assert [row["site"] for row in csv.DictReader(file)] == ["h0", "y0"]
    with open(tmp_path / "weights.csv", newline="") as file:
        assert {"attention", "attention, quantized", "ffn", "embeddings"} < {
            row["part"] for row in csv.DictReader(file)
        }
    with open(tmp_path / "memory.csv", newline="") as file:
        factors = {row["counted"]: float(row["smaller by"]) for row in csv.DictReader(file)}
    assert factors["plain"] == 4 > factors["biases at 32"] > factors["stored"] > 2

    # A variant that stands in the file is not measured again, and another configuration is refused.
    (tmp_path / "sensitivity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    measured = []
    monkeypatch.setattr(
        module.Classification,
        "metrics",
        lambda self, logits: measured.append(1) or {"score": scores["only y"]["score"]},
    )
    analyze(config, tmp_path)
    assert len(measured) == 1
    config.analysis.sensitivity.groups = ("x",)
    with pytest.raises(UserError, match="use another workdir"):
        analyze(config, tmp_path)


def test_one_analysis_alone(config, tmp_path):
    config.analyses = ("memory",)
    text = analyze(config, tmp_path)
    assert "Sensitivity" not in text and "stored" in text and not (tmp_path / "sensitivity.jsonl").exists()
    with open(tmp_path / "memory_run.csv", newline="") as file:
        found = {row["counted"]: row for row in csv.DictReader(file)}
    assert float(found["activations"]["quantized, MiB"]) < float(found["activations"]["full precision, MiB"])
    both = found["forward and backward: output"]
    assert float(both["quantized, MiB"]) >= float(both["full precision, MiB"]) > 0
    assert found["forward: arguments"]["full precision, MiB"] == found["arguments"]["full precision, MiB"]
    assert found["forward: arguments"]["quantized, MiB"] == found["arguments"]["quantized, MiB"]
    assert [row["bits"] for row in rows_of(tmp_path / "memory_widths.csv")] == ["32", "8", "4", "2", "1", "policy"]
    config.analysis.memory.compiled = False
    config.analysis.memory.bits = (4,)
    text = analyze(config, tmp_path / "counted")
    assert "forward:" not in text and "XLA: " not in text
    four, own = rows_of(tmp_path / "counted" / "memory_widths.csv")
    # W8A8 everywhere: the policy's own row is twice the one of 4 bits.
    assert float(own["activations at peak, MiB"]) == 2 * float(four["activations at peak, MiB"]) > 0
    live = rows_of(tmp_path / "counted" / "memory_live.csv")
    assert max(int(row["live at 4 bits"]) for row in live) == 2**20 * float(four["activations at peak, MiB"])
    for wrong in ((), (17,), ("8",), (0,)):
        config.analysis.memory.bits = wrong
        with pytest.raises(UserError, match="1 to 16 bits, or 32"):
            analyze(config, tmp_path / "wrong")


def test_a_config_that_says_nothing_of_analyses(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(module.ANALYSES, "memory", lambda *_: lambda workdir: ["counted"])
    tiny_config.quant.update(activation_sites="inputs", weight_bits=4, activation_bits=4)
    text = analyze(tiny_config, tmp_path)
    assert "## Weights" in text and "counted" in text and "## Sensitivity" not in text
    assert "weights and memory are done" in capsys.readouterr().out
    assert "analyses" not in tiny_config and tiny_config.model.fresh_head, "the caller's config stays as it is"
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["analyses"] == ["weights", "memory"] and not stored["model"]["fresh_head"]


def test_any_config_file_has_the_fields_of_analyses(tiny_checkpoint, tiny_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = get_config("configs/agnews.py:fully4", tiny_checkpoint, tiny_data)
    assert found.analyses == ("weights", "memory") and found.analysis.memory.bits == (32, 8, 4, 2, 1)
    assert found.quant.activation_sites == "inputs" and not found.model.fresh_head
    kept = get_config("configs/bittransgnn.py:mr+analysis", tiny_checkpoint, tiny_data)
    assert kept.analyses == ("features",), "its own"
    with pytest.raises(UserError, match=r"there is no file configs/agnew\.py"):
        get_config("configs/agnew.py:fully4", tiny_checkpoint, tiny_data)


def test_a_quantized_input_counts_where_all_readers_quantize_it(config, tmp_path):
    config.analyses, config.analysis.memory.compiled = ("memory",), False
    config.quant.update(activation_sites="inputs", weight_granularity="tensor")
    config.calibration.share_permutation = ""
    analyze(config, tmp_path)
    found = {row["counted"]: row for row in rows_of(tmp_path / "memory_run.csv")}
    assert float(found["activations"]["quantized, MiB"]) < float(found["activations"]["full precision, MiB"])
    bits = {(row["what"], float(row["bits"])) for row in rows_of(tmp_path / "memory_bits.csv")}
    assert bits == {(what, size) for what in ("tensors", "inputs of products") for size in (8, 32)}


@pytest.fixture
def versions(tiny_checkpoint, tiny_data, tmp_path):
    """The analyses of the loss, of the tiny model and of another one."""
    config = get_config("curvature", tiny_checkpoint, tiny_data)
    c = config.analysis
    c.curvature.update(batches=2, eigenvalues=1, iterations=2, samples=2, steps=3, params=("encoder/layer_0/ffn/**",))
    c.landscape.update(batches=1, batch_size=8, points=3, together=2)
    c.layer_errors.update(batches=2, batch_size=8)
    other = models.load(str(tiny_checkpoint))
    params = jax.tree.map(lambda x: 1.1 * x, other.params)
    models.save(tmp_path / "other", other.family, other.config, params)
    c.also = (("other", str(tmp_path / "other")),)
    return config


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_curvature_of_some_parameters(versions, tmp_path):
    versions.analysis.models = ("quantized",)
    versions.quant.student = "published"
    text = analyze(versions, tmp_path)
    for picture in ("eigenvalues.png", "trace.png", "density.png"):
        assert f"({picture})" in text and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert [row["model"] for row in rows_of(tmp_path / "curvature.csv")] == ["quantized", "other"]
    traces = [row for row in rows_of(tmp_path / "trace.csv") if row["model"] == "other"]
    assert [row["part"] for row in traces] == ["layer 0", "all"]
    assert int(traces[0]["parameters"]) == 2 * 16 * 32 + 32 + 16 + 2 * 16  # kernels, biases and the norm
    assert float(traces[0]["trace"]) == float(traces[1]["trace"]) != 0
    assert len(rows_of(tmp_path / "eigenvalues.csv")) == 2 * 2
    density = json.loads((tmp_path / "curvature_other.json").read_text())["density_weights"]
    assert np.shape(density) == (1, 3) and abs(np.sum(density) - 1) < 1e-4


def test_landscapes_and_errors_of_layers(versions, tmp_path, monkeypatch):
    versions.analyses = ("landscape", "layer_errors")
    versions.analysis.landscape.directions = 1
    text = analyze(versions, tmp_path)
    assert "## Layer errors" in text and "(landscape.png)" in text and "(layer_errors.png)" in text
    found = {row["model"]: row for row in rows_of(tmp_path / "landscape.csv")}
    assert list(found) == ["full precision", "quantized", "other"]
    for name in found:
        points = rows_of(tmp_path / f"landscape_points_{name.replace(' ', '_')}.csv")
        assert [float(row["x"]) for row in points] == [-0.5, 0, 0.5]
        assert float(points[1]["loss"]) == pytest.approx(float(found[name]["loss"]), rel=1e-5)
        assert float(points[0]["loss"]) != pytest.approx(float(found[name]["loss"]), rel=1e-4)
    errors = {row["model"]: row for row in rows_of(tmp_path / "layer_errors.csv")}
    assert list(errors) == ["quantized", "other"]  # in full precision it is the teacher itself
    assert all(float(row["hidden_states"]) > 1e-4 for row in errors.values())
    assert all(float(row["attention_output"]) > 1e-4 for row in errors.values())

    # What stands in a file is not measured again, and the report is the same.
    (tmp_path / "layer_errors_other.json").unlink()
    measured = []
    real = layer_errors.layer_errors
    monkeypatch.setattr(layer_errors, "layer_errors", lambda *a, **k: measured.append(1) or real(*a, **k))
    monkeypatch.setattr(landscape, "evaluate", lambda *a, **k: pytest.fail("measured again"))
    assert analyze(versions, tmp_path) == text and len(measured) == 1


@pytest.mark.parametrize("argument", ["curvature", "landscape", "layer_errors"])
def test_analyses_of_the_loss_are_settings(argument, tiny_checkpoint, tiny_data):
    found = get_config(argument, tiny_checkpoint, tiny_data)
    assert found.analyses == (argument,) and policy_from(found.quant, 1) == student_policy()


@pytest.mark.parametrize("argument", ["w8a8", "paper"])
def test_settings_resolve(argument, tiny_checkpoint, tiny_data):
    found = get_config(argument, tiny_checkpoint, tiny_data)
    assert found.quant.weight_bits == (32 if argument == "paper" else None)
    assert found.analysis.sensitivity.calibration == ("variant" if argument == "paper" else "full_precision")
