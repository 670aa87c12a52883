import csv
import io
import json

import ml_collections
import numpy as np
import pytest
import rich.console
from matplotlib import image
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


MIB = 2**20
POINTS = [("full precision", 90 * MIB, 0.845), ("int8", 23.5 * MIB, 0.844), ("int4", 12 * MIB, 0.7)]


def amber(png) -> int:
    """Counts pixels of the baseline's colour."""
    return int((np.abs(png[..., :3] - np.array([0xC2, 0x61, 0x0C]) / 255).max(axis=-1) < 0.05).sum())


def test_plot_draws_models_and_lines(tmp_path):
    report.plot_accuracy_against_size(POINTS, tmp_path / "plots" / "size.png", ("TF-IDF", 0.768), "accuracy")
    report.plot_accuracy_against_size(POINTS, tmp_path / "alone.png")
    both, alone = image.imread(tmp_path / "plots" / "size.png"), image.imread(tmp_path / "alone.png")
    assert both.shape == alone.shape == (750, 1200, 4)
    assert amber(both) > 500 and amber(alone) == 0
    blue = np.abs(both[..., :3] - np.array([0x25, 0x63, 0xEB]) / 255).max(axis=-1) < 0.05
    columns = np.flatnonzero(blue.any(axis=0))
    assert (np.diff(columns) > 1).sum() == 1, "two dots apart from that of full precision"
    left, right = columns[0], columns[-1]
    assert (right - left) / 1200 == pytest.approx(np.log2(23.5 / 12) / np.log2(1.8**2 * 90 / 12), abs=0.05)


@pytest.mark.parametrize("count", [1, 6])
def test_labels_do_not_overlap_and_stay_inside(tmp_path, monkeypatch, count):
    boxes, place = [], report._place
    monkeypatch.setattr(report, "_place", lambda *args: boxes.append(place(*args)) or boxes[-1])
    points = [(f"model {i}", (20 + i % 3) * MIB, 0.8 + 0.001 * i) for i in range(count)]
    report.plot_accuracy_against_size([("fp32", 90 * MIB, 0.8), *points], tmp_path / "plot.png", ("linear", 0.7))
    assert len(boxes) == count + 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 < box.x0 and box.x1 < 1200 and 0 < box.y0 and box.y1 < 750 for box in boxes)


def test_plot_input(tmp_path):
    with pytest.raises(UserError, match="no models"):
        report.plot_accuracy_against_size([], tmp_path / "plot.png")
    with pytest.raises(UserError, match="'int8' has size 0"):
        report.plot_accuracy_against_size([("int8", 0, 0.5)], tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


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


def test_curves_are_drawn(tmp_path, monkeypatch):
    drawn, save = [], report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    curves = report.training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    report.plot_curves(curves, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape == (900, 1200, 4)
    loss, metrics = drawn[0].axes
    lines = [line for line in loss.lines if len(line.get_xdata())]
    first, second, border = (
        [*map(list, zip(*line.get_xydata(), strict=True))] for line in (lines[0], lines[1], lines[2])
    )
    assert (first, second) == ([[0.5, 1.0], [0.5, 0.25]], [[2.0], [0.125]]) and border[0] == [1.0, 1.0]
    assert lines[0].get_color() != lines[1].get_color()
    named = [text.get_text() for text in metrics.get_legend().get_texts()]
    assert named == ["accuracy", "test_accuracy"], "a score that is the accuracy is not drawn again"
    report.plot_curves(report.training_curves(LINES[:1], ["a"], 4), tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1


def drawn_of(axes):
    """What an axes shows, legend entries left out: (x, y, style of the line, colour) of each line."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    return [(list(x.get_xdata()), list(x.get_ydata()), x.get_linestyle(), x.get_color()) for x in lines]


def test_runs_are_drawn_together(tmp_path, monkeypatch):
    drawn, save = [], report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    latent = report.training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    plain = report.training_curves([{"step": 4, "a/loss": 100.0}], ["a"], 4)
    report.plot_runs({"latent": latent, "plain": plain}, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape == (675, 1800, 4)
    left, right = drawn[0].axes
    loss, barrier, other = drawn_of(left)
    assert loss[:3] == ([0.5, 1.0, 2.0], [0.5, 0.25, 0.125], "-") and other[:2] == ([1.0], [100.0])
    assert barrier[0] == [1.0, 1.0] and barrier[3] == loss[3] != other[3]
    assert left.get_yscale() == "log"  # 100 is more than a hundred times 0.125
    score, test, barrier, *others = drawn_of(right)
    assert score[:3] == ([1.0, 2.0], [0.5, 0.75], "-") and test[:3] == ([2.0], [0.625], "--")
    assert barrier[0] == [1.0, 1.0] and not others, "a run that was not evaluated has no line there"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["latent", "plain"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["score on validation", "test accuracy"]
    report.plot_runs({"plain": plain}, tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1 and drawn[1].axes[0].get_yscale() == "linear"
    with pytest.raises(UserError, match="no curves"):
        report.plot_runs({"nothing": report.training_curves([], ["a"], 4)}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


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
