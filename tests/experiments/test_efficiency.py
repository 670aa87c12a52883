"""Theory beside measurement, through the launcher's entry."""

import csv

import pytest

from qtx.analysis import efficiency_as_published as published
from qtx.errors import UserError
from qtx.experiments import efficiency as module
from qtx.experiments.analyze import analyze
from qtx.export.packed import WEIGHTS_FILE
from tests.experiments.test_analyze import get_config


@pytest.fixture
def config(tiny_checkpoint, tiny_data):
    config = get_config("efficiency", tiny_checkpoint, tiny_data)
    config.analysis.efficiency.tokens = 8
    config.analysis.efficiency.repeats = 3
    return config


def table(workdir):
    with open(workdir / "efficiency.csv", newline="") as file:
        return {row["figure"]: row for row in csv.DictReader(file)}


def test_report(config, tmp_path):
    config.quant.weight_scheme, config.quant.activation_bits = "binary", 32
    config.analysis.efficiency.graph.update(nodes=50, entries=400, bits=1.0)
    config.analysis.efficiency.sequences = 1
    text = analyze(config, tmp_path)
    assert "## Efficiency" in text and (tmp_path / "efficiency.png").is_file()
    rows = table(tmp_path)
    full, quantized = (
        {name: float(row[of] or 0) for name, row in rows.items()} for of in ("full precision", "quantized")
    )
    size = (tmp_path / "quantized" / WEIGHTS_FILE).stat().st_size
    assert quantized["weights, in their file"] == size / 2**20
    assert full["weights, in their file"] > full["weights, with scales"] == full["weights, at their bits"]
    assert {row["from"] for row in rows.values()} == {"theory", "measured"} and "additions, int8" not in rows
    assert quantized["weights, at their bits"] < quantized["weights, with scales"] < quantized["weights, in their file"]
    assert full["MACs, linear"] == quantized["MACs, linear"] > 0
    bits = {name: full[f"MACs, {name}"] * 32 * 32 / 1e3 for name in ("linear", "scores", "context")}
    assert full["bit multiplications"] == pytest.approx(sum(bits.values()))
    assert quantized["bit multiplications"] == pytest.approx(sum(bits.values()) - bits["linear"] * 31 / 32)
    assert quantized["energy, 7nm"] < full["energy, 7nm"] < full["energy with the graph, 7nm"]
    assert float(rows["graph, weights"]["smaller by"]) > 10
    assert (
        0
        < quantized["latency, 5th percentile"]
        <= quantized["latency, median"]
        <= quantized["latency, 95th percentile"]
    )


def test_as_published_needs_a_published_encoder(config, tmp_path, monkeypatch):
    config.analysis.efficiency.rule = "as_published"
    with pytest.raises(UserError, match="use rule='corrected'"):
        analyze(config, tmp_path)
    monkeypatch.setattr(published, "encoder_of", lambda family, sizes: published.Encoder())
    with pytest.raises(UserError, match="no published operations for 8 bits"):
        analyze(config, tmp_path)
    config.quant.weight_scheme, config.quant.activation_bits = "binary", 32
    monkeypatch.setattr(module, "_latency", lambda *args: [])  # what another test measures
    config.analysis.efficiency.graph.update(nodes=50, entries=400, hidden=256)
    config.analysis.efficiency.sequences = 1
    config.save_models = False
    analyze(config, tmp_path)
    row = table(tmp_path)["energy, 7nm, as published"]
    assert float(row["full precision"]) == pytest.approx(18.892, abs=5e-4)
    assert float(row["quantized"]) == pytest.approx(8.791, abs=5e-4)
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rule": "published"}, "'as_published'"),
        ({"repeats": 0}, "at least 1"),
        ({"tokens": 1000}, "at most 32 tokens"),
        ({"process": "3nm"}, "'3nm'"),
        ({"graph": {"nodes": 5}, "sequences": 4}, "0 entries"),
        ({"graph": {"nodes": 5, "entries": 9}}, "give the documents among them as analysis.efficiency.sequences"),
        ({"sequences": -1}, "at least 1"),
    ],
)
def test_settings_that_cannot_be(config, tmp_path, changes, named):
    config.analysis.efficiency.update(changes)
    with pytest.raises(UserError, match=named):
        analyze(config, tmp_path)
    assert not (tmp_path / "config.json").exists()
