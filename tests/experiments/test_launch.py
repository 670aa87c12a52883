"""The entries behind the launchers, end to end, and every config file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from qtx.errors import UserError
from qtx.experiments.classification import load_dataset
from qtx.experiments.compare import compare, tfidf_predictions
from qtx.experiments.config import base
from qtx.experiments.from_config import policy_from
from qtx.experiments.run import evaluate, quantize, train_and_evaluate
from qtx.experiments.sweep import sweep
from qtx.models import load

ROOT = Path(__file__).parents[2]
ARGUMENTS = {
    "agnews": [
        "full_precision",
        "w4",
        "fully8+bert",
        "ir_net_ALL+latent",
        "published_w8",
        "patterns",
        "minilm",
        "orderings+small",
        "smoke",
    ],
    "analyze": ["w8a8", "paper", "efficiency", "curvature", "landscape", "layer_errors", "smoke"],
    "bittransgnn": [
        "r8",
        "mr+encoder",
        "mrpc+dynamic+smoke",
        "ohsumed+online",
        "mr+dynamic+analysis",
        "r8+sweep",
        "mr+lambda",
    ],
    "finetune": ["film_reviews", "bbc_news", "rte", "smoke"],
    "outlier_suppression": ["w8a8_os", "w6a6_os+", "w4a4_os+_as_published", "smoke"],
    "ptq": ["w8a8", "w8a8_mixed", "w8a8_peg", "w8a32", "w4a8", "w4a32", "ternary", "published", "smoke"],
    "efficient_transformer_quantization": ["table1", "mixed", "peg", "main", "low_bit", "minilm", "smoke"],
    "qat": ["w8a8", "w4a8", "w4a32", "w4a8_e2", "ternary", "smoke"],
    "quickstart": ["full", "smoke"],
    "results": ["rte", "mrpc", "smoke"],
    "teacher_intervention": [
        "ternary",
        "cola+gradual+quarter",
        "sst2+full_precision",
        "stsb+published_map",
        "glue",
        "cola",
        "smoke",
    ],
    "translation": [
        "full_precision",
        "attention_4+warm",
        "published_binary_all",
        "attention_8+base",
        "attention_4+base+warm",
        "multi30k",
        "tuned",
        "ptq",
        "smoke",
    ],
    "vit": ["cifar10", "mnist+ternary", "cifar10+gradual+quarter", "mnist+pretrained", "table", "table+small", "smoke"],
}


def get_config(name, argument):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"configs/{name}.py" in module.__doc__ or "launch/quickstart.py" in module.__doc__, (
        "no command in the docstring"
    )
    return module.get_config(argument)


def on_tiny(config, tiny):
    """Puts a config file's experiment on the tiny model and data."""
    for name in ("name",):
        config.model[name] = tiny.model[name]
    config.task = "table"
    config.data.train, config.data.validation = tiny.data.train, tiny.data.validation
    config.data.max_length = 16
    config.calibration.batch_size = 8
    return config


@pytest.mark.parametrize(("name", "argument"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args])
def test_every_config_resolves(name, argument):
    config = get_config(name, argument)
    assert set(base()) <= set(config)
    for phase in config.recipe:
        assert phase in config.phases
    if name in ("ptq", "qat", "outlier_suppression") or (name == "agnews" and "sweep" not in config):
        assert policy_from(config.quant, 6) is not None


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """A trained tiny model: its run directory and the metric it reached."""
    tiny = request.getfixturevalue("tiny_config_of_module")
    workdir = tmp_path_factory.mktemp("trained")
    tiny.phases.finetune.steps = 40
    tiny.phases.finetune.optimizer.learning_rate = 5e-3
    return workdir, train_and_evaluate(tiny, workdir)["metrics"]["finetune"], tiny


@pytest.fixture(scope="module")
def tiny_config_of_module(tiny_checkpoint, tiny_data):
    from tests.conftest import make_tiny_config

    return make_tiny_config(tiny_checkpoint, tiny_data)


def ready(trained, config=None):
    workdir, _, tiny = trained
    config = on_tiny(config or base(), tiny)
    config.model.name = str(workdir / "model")
    config.model.fresh_head = False
    return config


def test_train_quantize_evaluate(trained, tmp_path):
    workdir, reached, _ = trained
    config = ready(trained)
    assert evaluate(config, str(tmp_path / "full"))["score"] == pytest.approx(reached["score"])
    result = quantize(config, tmp_path / "w8a8")
    assert result["full_precision"]["score"] == pytest.approx(reached["score"])
    assert result["quantized"]["score"] > 0.85
    assert (tmp_path / "w8a8" / "sites.txt").read_text().count("encoder/") > 5
    packed = tmp_path / "w8a8" / "quantized"
    config = ready(trained)
    config.model.name = str(packed)
    assert evaluate(config)["score"] == pytest.approx(result["quantized"]["score"])
    full = sum(x.size * 4 for x in load_leaves(workdir / "model"))
    assert result["weight_bytes"] < 0.45 * full


def load_leaves(directory):
    import jax

    return jax.tree.leaves(load(str(directory)).params)


@pytest.mark.parametrize("argument", ["w8a8_mixed", "w8a32", "w4a8", "ternary"])
def test_settings_of_the_ptq_config(trained, tmp_path, argument):
    config = ready(trained, get_config("ptq", argument))
    config.calibration.batches = 1
    result = quantize(config, tmp_path)
    assert np.isfinite(result["quantized"]["score"])
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_outlier_suppression_leaves_a_model_to_go_on_from(trained, tmp_path):
    config = ready(trained, get_config("outlier_suppression", "smoke"))
    config.data.limit_train = config.data.limit_eval = 0
    result = quantize(config, tmp_path)
    assert "calibrated" in (tmp_path / "suppression.md").read_text()
    for name, score in (("model", result["full_precision"]), ("quantized", result["quantized"])):
        config = ready(trained)
        config.model.name = str(tmp_path / name)
        assert evaluate(config)["score"] == pytest.approx(score["score"])
    assert load(str(tmp_path / "model")).config.shortcuts


@pytest.mark.parametrize("name", ["finetune", "qat", "teacher_intervention", "agnews"])
def test_smoke_of_training(trained, tmp_path, name):
    config = get_config(name, "smoke")
    own = config.model.name
    config = ready(trained, config)
    config.data.limit_train = config.data.limit_eval = 0
    if name == "agnews":  # a model from nothing, with the tokenizer of a checkpoint
        config.model.update(tokenizer=config.model.name, name=own, fresh_head=True)
        config.evaluate_test = False
    result = train_and_evaluate(config, tmp_path)
    assert set(result["metrics"]) == set(config.recipe)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "quantized" / "model.qtx.safetensors").is_file() == (name != "finetune")


def test_smoke_of_ptq(trained, tmp_path):
    config = ready(trained, get_config("ptq", "smoke"))
    config.data.limit_train = config.data.limit_eval = 0
    assert np.isfinite(quantize(config, tmp_path)["quantized"]["score"])


def test_smoke_of_results(trained, tmp_path):
    config = ready(trained, get_config("results", "smoke"))
    config.data.limit_train = config.data.limit_eval = 0
    report = sweep(config, tmp_path)
    assert not report.missing
    assert {"full precision", "W8A32 PTQ", "W8A8 PTQ"} <= {row[0] for row in report.table.rows}


def test_compare_leaves_table_plot_and_models(tiny_config, tmp_path):
    config = on_tiny(get_config("quickstart", "smoke"), tiny_config)
    config.data.limit_train = config.data.limit_eval = 0
    config.phases.finetune.trainable = ("**",)
    config.rows = ({"name": "W8A8"}, {"name": "ternary", "weight_scheme": "ternary", "activation_bits": 32})
    returned = compare(config, tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["TF-IDF baseline", "full precision", "W8A8", "ternary"]
    assert [row.score for row in returned] == [row["score"] for row in rows]
    assert [row["weight_bits"] for row in rows[2:]] == ["8", "1.58"]
    assert rows[3]["weight_bytes"] < rows[2]["weight_bytes"] < rows[1]["weight_bytes"]
    table = (tmp_path / "table.md").read_text()
    assert all(row["method"] in table for row in rows)
    for name in ("table.csv", "accuracy_size.png", "rows.json", "model/model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_size > 0
    for name in ("W8A8", "ternary"):
        assert (tmp_path / "quantized" / name / "model.qtx.safetensors").is_file()


def test_a_directory_with_another_run_is_not_resumed(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path)
    tiny_config.phases.finetune.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="learning_rate=0.001, not 0.5; use another workdir"):
        train_and_evaluate(tiny_config, tmp_path)


def test_tfidf_baseline_learns(tiny_config):
    dataset = load_dataset(tiny_config)
    assert np.mean(tfidf_predictions(dataset) == dataset.splits["validation"].labels) > 0.7
