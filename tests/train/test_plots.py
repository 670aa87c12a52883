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
    assert (right - left) / 1200 == pytest.approx(np.log2(23.5 / 12) / (1.24 * np.log2(90 / 12)), abs=0.05)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    found, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.append(figure) or save(figure, path))
    return found


@pytest.mark.parametrize("count, names", [(1, True), (3, True), (12, False)])
def test_labels_do_not_overlap_and_stay_inside(drawn, tmp_path, monkeypatch, count, names):
    boxes, place = [], plots._place
    monkeypatch.setattr(plots, "_place", lambda *args: boxes.append(place(*args)) or boxes[-1])
    points = [(f"model {i}", (20 + i % 3) * MIB, 0.8 + 0.001 * i) for i in range(count)]
    plots.plot_accuracy_against_size([("fp32", 90 * MIB, 0.8), *points], tmp_path / "plot.png", ("linear", 0.7))
    assert len(boxes) == count + 2 + (not names)  # the largest has its name on the line, and a number if all have
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    right, top = drawn[0].get_size_inches() * drawn[0].dpi
    assert all(0 < box.x0 and box.x1 < right and 0 < box.y0 and box.y1 < top for box in boxes)
    legend = [text.get_text() for found in drawn[0].legends for text in found.get_texts()]
    assert [line.split()[:2] for line in legend[:2]] == ([] if names else [["1", "fp32"], ["2", "model"]])
    assert names or legend[12] == "13  model 11 (0.811)"


def test_names_without_room_are_numbers(drawn, tmp_path):
    """A study whose sizes are nearly those of its embeddings: all models stand in one column."""
    names = ["binary weights in all layers but the last, and one epoch before" + "!" * i for i in range(7)]
    points = [(name, (15.2 + i / 1000) * MIB, 0.8 + i / 1e5) for i, name in enumerate(names)]
    plots.plot_accuracy_against_size([*points, ("worst", 15.2 * MIB, 0.2)], tmp_path / "plot.png", full_precision=None)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == [str(number) for number in range(1, 9)]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert [line.split("  ")[1].rpartition(" ")[0] for line in legend] == [*names, "worst"]


@pytest.mark.parametrize(
    "sizes", [(15.2, 15.3, 16.3), (0.04, 0.05, 1.1), (1.0, 2.0, 7.9), (3.0, 3.0, 3.0), (0.01, 1, 9e3)]
)
def test_three_sizes_or_more_are_written_at_the_axis(drawn, tmp_path, sizes):
    points = [(f"model {i}", size * MIB, i / 10) for i, size in enumerate(sizes)]
    plots.plot_accuracy_against_size(points, tmp_path / "plot.png", xlabel="weights without embeddings")
    (axes,) = drawn[0].axes
    low, high = axes.get_xlim()
    span = np.log2(max(sizes) / min(sizes))
    assert low < min(sizes) and max(sizes) < high and np.log2(high / low) < 1.25 * span + 0.05  # by the data
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 3 <= len(ticks) <= 13 and len({f"{tick:.4g}" for tick in ticks}) == len(ticks)
    assert axes.get_xlabel() == "weights without embeddings (MiB, log scale)"


def dashed_of(axes):
    """Heights of the horizontal lines."""
    return [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]


def test_the_dashed_line_is_full_precision(drawn, tmp_path):
    same = [("first", 90 * MIB, 0.8), ("second", 90 * MIB, 0.9), ("small", 9 * MIB, 0.7)]
    given = [(POINTS, ""), (same, ""), (same, "first"), (same, "second"), (same, "small"), (POINTS, None)]
    for points, name in given:
        plots.plot_accuracy_against_size(points, tmp_path / "plot.png", full_precision=name)
    assert [dashed_of(figure.axes[0]) for figure in drawn] == [[0.845], [], [0.8], [0.9], [0.7], []]
    lines = [[text.get_text() for text in figure.axes[0].texts][:1] for figure in drawn[2:5]]
    assert lines == [["first (0.8)"], ["second (0.9)"], ["small (0.7)"]]
    with pytest.raises(UserError, match="no model to plot is called 'frist'.*first"):
        plots.plot_accuracy_against_size(same, tmp_path / "plot.png", full_precision="frist")


def test_plot_input(tmp_path):
    with pytest.raises(UserError, match="no models"):
        plots.plot_accuracy_against_size([], tmp_path / "plot.png")
    with pytest.raises(UserError, match="'int8' has size 0"):
        plots.plot_accuracy_against_size([("int8", 0, 0.5)], tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn(drawn, tmp_path):
    curves = training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    plots.plot_curves(curves, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape == (900, 1200, 4)
    loss, metrics = drawn[0].axes
    lines = [line for line in loss.lines if len(line.get_xdata())]
    first, second, border = (
        [*map(list, zip(*line.get_xydata(), strict=True))] for line in (lines[0], lines[1], lines[2])
    )
    assert loss.get_yscale() == "linear"
    assert (first, second) == ([[0.5, 1.0], [0.5, 0.25]], [[2.0], [0.125]]) and border[0] == [1.0, 1.0]
    assert lines[0].get_color() != lines[1].get_color()
    named = [text.get_text() for text in metrics.get_legend().get_texts()]
    assert named == ["accuracy", "test_accuracy"], "a score that is the accuracy is not drawn again"
    plots.plot_curves(training_curves(LINES[:1], ["a"], 4), tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1
    (dot,) = (line for line in drawn[1].axes[0].lines if len(line.get_xdata()))
    assert dot.get_marker() == "o" and dot.get_markersize() == 4, "one entry of the log can be seen"
    steep = [{"step": step, "a/loss": value} for step, value in ((2, 200.0), (4, 1.0))]
    plots.plot_curves(training_curves(steep, ["a"], 4), tmp_path / "steep.png")
    assert drawn[2].axes[0].get_yscale() == "log"


def drawn_of(axes):
    """What an axes shows, legend entries left out: (x, y, style of the line, colour) of each line."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    return [(list(x.get_xdata()), list(x.get_ydata()), x.get_linestyle(), x.get_color()) for x in lines]


def test_runs_are_drawn_together(drawn, tmp_path):
    latent = training_curves(LINES, ["a", "b"], batches_per_epoch=4)
    plain = training_curves([{"step": 4, "a/loss": 100.0}], ["a"], 4)
    plots.plot_runs({"latent": latent, "plain": plain}, tmp_path / "curves.png")
    assert image.imread(tmp_path / "curves.png").shape == (675, 2550, 4)
    left, middle, right = drawn[0].axes
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "score on validation", "test accuracy"]
    loss, other, barrier = drawn_of(left)
    assert loss[:3] == ([0.5, 1.0, 2.0], [0.5, 0.25, 0.125], "-") and other[:2] == ([1.0], [100.0])
    assert barrier[0] == [1.0, 1.0] and barrier[3] == loss[3] != other[3]
    assert [line.get_marker() for line in left.lines[:2]] == ["None", "o"], "one entry of the log is a dot"
    assert left.get_yscale() == "log"  # 100 is more than a hundred times 0.125
    score, barrier, *others = drawn_of(middle)
    assert score[:3] == ([1.0, 2.0], [0.5, 0.75], "-") and barrier[0] == [1.0, 1.0]
    assert not others, "a run that was not evaluated has no line there"
    assert [found[:2] for found in drawn_of(right)[:-1]] == [([2.0], [0.625])]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["latent", "plain", "begins a later phase"]
    plots.plot_runs({"plain": plain}, tmp_path / "loss.png")
    assert len(drawn[1].axes) == 1 and drawn[1].axes[0].get_yscale() == "linear"
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["plain"]
    with pytest.raises(UserError, match="no curves"):
        plots.plot_runs({"nothing": training_curves([], ["a"], 4)}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_a_score_without_test_data_has_one_panel(drawn, tmp_path):
    plots.plot_runs({"a": training_curves(LINES[:2], ["a"], 4)}, tmp_path / "curves.png")
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "score on validation"]


def test_each_of_many_runs_looks_different(drawn, tmp_path):
    runs = {f"run {i}": training_curves(LINES, ["a", "b"], 4) for i in range(25)}
    plots.plot_runs(runs, tmp_path / "curves.png")
    loss, score, test = drawn[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines[:25]}) == 25
    for axes in (score, test):
        lines = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines[:25]}
        assert len(lines) == 25 and ":" not in {style for _, style, _ in lines}, "dots are for the marks"
    shown = {(line.get_color(), line.get_linestyle()) for line in drawn[0].legends[0].get_lines()[:25]}
    assert len(shown) == 25


def test_a_run_that_goes_on_from_another_begins_where_that_ended(drawn, tmp_path):
    first = training_curves(LINES[:3], ["a"], 4)
    runs = {"first": first, "low": first, "lower": first, "later": training_curves(LINES, ["a", "b"], 4)}
    plots.plot_runs(runs, tmp_path / "curves.png", before={"first": 0.0, "low": 1.0, "lower": 1.0, "later": 2.5})
    for axes in drawn[0].axes[:2]:
        lines = drawn_of(axes)
        offset = 0.0 if axes is drawn[0].axes[1] else 0.5
        assert [x[0] for x, *_ in lines[:4]] == [1.0 - offset, 2.0 - offset, 2.0 - offset, 3.5 - offset]
        marks = {x[0]: color for x, _, style, color in lines if style == ":"}
        assert marks == {1.0: plots.GREY, 2.5: lines[3][3], 3.5: lines[3][3]}, "grey where two of them begin"
    legend = drawn[0].legends[0].get_texts()
    assert legend[-1].get_text() == "begins a later phase, or goes on from another row"
