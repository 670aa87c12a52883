import csv
import io
import json

import ml_collections
import numpy as np
import pytest
import rich.console
from ml_collections import config_dict

from qtx.errors import UserError
from qtx.train import report


def test_config_round_trip(tmp_path):
    config = ml_collections.ConfigDict({"optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}, "seed": 3})
    config.steps = config_dict.placeholder(int)
    config.warmup = config.get_ref("seed") * 2
    path = report.save_config(config, tmp_path / "run")
    assert path == tmp_path / "run" / "config.json"
    loaded = report.load_config(tmp_path / "run")
    assert isinstance(loaded.optimizer, ml_collections.ConfigDict)
    assert loaded.optimizer.lr == 1e-3 and list(loaded.optimizer.betas) == [0.9, 0.999]
    assert loaded.warmup == 6 and loaded.steps is None
    text = path.read_text()
    assert text.index('"optimizer"') < text.index('"seed"') < text.index('"steps"') and '\n  "seed": 3' in text


def test_no_config_is_refused(tmp_path):
    config = ml_collections.ConfigDict({"rate": np.float32(0.5), "grid": np.arange(2), "home": tmp_path, "f": max})
    stored = json.loads(report.save_config(config, tmp_path).read_text())
    assert stored == {"rate": 0.5, "grid": [0, 1], "home": str(tmp_path), "f": str(max)}


def test_a_run_is_as_old_as_its_config(tmp_path):
    """A field that came later is worth its default in a run from before; any other value is another run."""
    report.save_config(ml_collections.ConfigDict({"data": {"rows": 8}, "seed": 3}), tmp_path)
    defaults = ml_collections.ConfigDict({"data": {"rows": 4, "flip": False}, "graph": {"width": 2}})
    config = ml_collections.ConfigDict({"data": {"rows": 8, "flip": False}, "seed": 3})
    report.check_config(config, tmp_path, defaults)
    with pytest.raises(UserError, match="data.flip=None, not False"):
        report.check_config(config, tmp_path)
    config.data.flip = True
    with pytest.raises(UserError, match="data.flip=False, not True"):
        report.check_config(config, tmp_path, defaults)
    config.data.update(rows=4, flip=False)
    with pytest.raises(UserError, match="data.rows=8, not 4"):
        report.check_config(config, tmp_path, defaults)


@pytest.mark.parametrize("text, message", [(None, "no config.json"), ("{", "not JSON"), ("[1]", "holds a list")])
def test_a_config_that_cannot_be_loaded(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        report.load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


TABLE = report.Table(
    columns=["method", "bits", "accuracy", "size"],
    rows=[["W8|A8", 8, 0.84449, 23_500_000], ["none, at all", None, 0.5, 90]],
    formats={"accuracy": ".3f", "size": ",d"},
    title="Results",
)


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        "| method       | bits | accuracy |       size |",
        "| ------------ | ---: | -------: | ---------: |",
        "| W8\\|A8       |    8 |    0.844 | 23,500,000 |",
        "| none, at all |      |    0.500 |         90 |",
    ]


def test_csv_keeps_full_precision():
    header, first, second = csv.reader(io.StringIO(TABLE.csv()))
    assert header == TABLE.columns
    assert first == ["W8|A8", "8", "0.84449", "23500000"]
    assert second == ["none, at all", "", "0.5", "90"]


def test_print_aligns_numbers_to_the_right():
    table = report.Table(["name", "score"], [["[bold]a[/]", 0.5], ["b", 12.25]], {"score": ".1f"}, "Results")
    console = rich.console.Console(file=io.StringIO(), width=80)
    table.print(console)
    text = console.file.getvalue()
    assert "Results" in text and "[bold]a[/]" in text, "cells are not markup"
    first, second = (line for line in text.splitlines() if "0.5" in line or "12.2" in line)
    assert first.index("0.5") + 3 == second.index("12.2") + 4


def test_save(tmp_path):
    TABLE.save(tmp_path / "tables", "results")
    assert (tmp_path / "tables" / "results.md").read_text() == TABLE.markdown()
    assert (tmp_path / "tables" / "results.csv").read_text() == TABLE.csv()


def test_a_table_that_does_not_add_up():
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        report.Table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="acc"):
        report.Table(["a"], [[1]], {"acc": ".3f"})
    assert report.Table(["a"], []).markdown() == "| a   |\n| --- |\n"
    mixed = report.Table(["a"], [["n/a"], [0.5]], {"a": ".2f"})
    assert "| n/a  |" in mixed.markdown() and "| 0.50 |" in mixed.markdown()


LINES = [
    {"step": 2, "a/loss": 0.5, "a/grad_norm": 1.0},
    {"step": 4, "a/eval/epoch": 1.0, "a/eval/accuracy": 0.5, "a/eval/score": 0.5},
    {"step": 4, "a/loss": 0.25},
    {"step": 8, "b/loss": 0.125},
    {"step": 8, "b/eval/epoch": 1.0, "b/eval/accuracy": 0.75, "b/eval/test_accuracy": 0.625, "b/eval/score": 0.75},
]


def test_curves_have_a_row_for_each_step(tmp_path):
    curves = report.training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    assert curves.columns == ["phase", "step", "epoch", "training_loss", "accuracy", "score", "test_accuracy"]
    assert [list(row) for row in curves.rows] == [
        ["a", 2, 0.5, 0.5, None, None, None],
        ["a", 4, 1.0, 0.25, 0.5, 0.5, None],
        ["b", 8, 2.0, 0.125, 0.75, 0.75, 0.625],
    ]
    assert report.training_curves([], ["a"], 4).rows == []
    classes = report.training_curves([{"step": 2, "a/loss": 0.5, "a/accuracy": 0.75}], ["a"], 4)
    assert classes.columns[3:] == ["training_loss", "training_accuracy"] and classes.rows[0][3:] == [0.5, 0.75]


def test_curves_are_read_back(tmp_path):
    curves = report.training_curves([*LINES, {"step": 9, "b/loss": float("nan")}], ["a", "b"], batches_per_epoch=4)
    path = tmp_path / "curves.csv"
    path.write_text(curves.csv())
    found = report.load_curves(path)
    assert list(found.columns) == list(curves.columns) and found.csv() == curves.csv()


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "phase,step,epoch,training_loss\na,1,0.5\n", "\0"])
def test_files_that_are_no_curves(tmp_path, text):
    (tmp_path / "curves.csv").write_text(text)
    with pytest.raises(UserError, match=r"curves\.csv holds no curves"):
        report.load_curves(tmp_path / "curves.csv")
    with pytest.raises(UserError, match="the run is not done"):
        report.load_curves(tmp_path / "none.csv")
