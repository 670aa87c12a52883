import numpy as np
import pytest
from matplotlib import image

from qtx.errors import UserError
from qtx.train import plots
from qtx.train.report import training_curves
from tests.train.test_report import LINES

MIB = 2**20
POINTS = [("full precision", 90 * MIB, 0.845), ("int8", 23.5 * MIB, 0.844), ("int4", 12 * MIB, 0.7)]


def amber(png) -> int:
    """Counts pixels of the baseline's colour."""
    return int((np.abs(png[..., :3] - np.array([0xC2, 0x61, 0x0C]) / 255).max(axis=-1) < 0.05).sum())


def test_plot_draws_models_and_lines(tmp_path):
    plots.plot_accuracy_against_size(POINTS, tmp_path / "plots" / "size.png", ("TF-IDF", 0.768), "accuracy")
    plots.plot_accuracy_against_size(POINTS, tmp_path / "alone.png")
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
    boxes, place = [], plots._place
    monkeypatch.setattr(plots, "_place", lambda *args: boxes.append(place(*args)) or boxes[-1])
    points = [(f"model {i}", (20 + i % 3) * MIB, 0.8 + 0.001 * i) for i in range(count)]
    plots.plot_accuracy_against_size([("fp32", 90 * MIB, 0.8), *points], tmp_path / "plot.png", ("linear", 0.7))
    assert len(boxes) == count + 2
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(0 < box.x0 and box.x1 < 1200 and 0 < box.y0 and box.y1 < 750 for box in boxes)


def test_plot_input(tmp_path):
    with pytest.raises(UserError, match="no models"):
        plots.plot_accuracy_against_size([], tmp_path / "plot.png")
    with pytest.raises(UserError, match="'int8' has size 0"):
        plots.plot_accuracy_against_size([("int8", 0, 0.5)], tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn(tmp_path, monkeypatch):
    drawn, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    curves = training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    plots.plot_curves(curves, tmp_path / "curves.png")
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
    plots.plot_curves(training_curves(LINES[:1], ["a"], 4), tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1


def drawn_of(axes):
    """What an axes shows, legend entries left out: (x, y, style of the line, colour) of each line."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    return [(list(x.get_xdata()), list(x.get_ydata()), x.get_linestyle(), x.get_color()) for x in lines]


def test_runs_are_drawn_together(tmp_path, monkeypatch):
    drawn, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    latent = training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    plain = training_curves([{"step": 4, "a/loss": 100.0}], ["a"], 4)
    plots.plot_runs({"latent": latent, "plain": plain}, tmp_path / "curves.png")
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
    plots.plot_runs({"plain": plain}, tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1 and drawn[1].axes[0].get_yscale() == "linear"
    with pytest.raises(UserError, match="no curves"):
        plots.plot_runs({"nothing": training_curves([], ["a"], 4)}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
