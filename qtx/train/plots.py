"""Plots of runs, and the style of all plots: colours, a figure, where labels go."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from qtx.errors import UserError
from qtx.files import whole_file
from qtx.train.report import LOSS, Table

INK, ACCENT, GREY, AMBER = "#1f2933", "#2563eb", "#7b8794", "#c2610c"
_PHASES = (ACCENT, AMBER, "#15803d", "#7c3aed")
RUN_COLORS = (*_PHASES, "#be185d", "#0e7490", "#854d0e", "#4b5563", "#84cc16", "#f472b6")
_STYLES = ("o-", "s--", "^:", "v-.")  # marker and line

# Offset in points and alignment of a label, best first: along a horizontal line, and around a dot.
_FRACTION = {"left": 0.0, "center": 0.5, "right": 1.0}
_ALONG = [
    (dx, dy, ha, va)
    for ha, dx in (("left", 4), ("right", -4), ("center", 0))
    for dy, va in ((3, "bottom"), (-4, "top"))
]
_AROUND = [
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    *(
        (dx, dy, "center", "bottom" if dy > 0 else "top")
        for far in (20, 34, 48, 62)  # with a leader line
        for dy in (far, -far)
        for dx in (0, 30, -30, 60, -60)
    ),
]


def _place(axes, canvas, text: str, candidates: Sequence[tuple], transform, color: str, taken: Sequence[Bbox]) -> Bbox:
    """Writes `text` where it covers least of what is `taken` and stays within the axes; returns its box in pixels.

    Each candidate is (x, y) under `transform`, (dx, dy) in points and the two alignments; the first best one wins.
    """
    frame, best = axes.get_window_extent(), None
    for x, y, dx, dy, ha, va in candidates:
        halo = [withStroke(linewidth=3, foreground="white")]
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6} if abs(dy) >= 20 else None
        style = {"ha": ha, "va": va, "color": color, "fontsize": 9, "path_effects": halo, "arrowprops": leader}
        note = axes.annotate(text, (x, y), (dx, dy), transform, "offset points", **style)
        note.update_positions(canvas.get_renderer())
        box = Text.get_window_extent(note, canvas.get_renderer()).padded(2)  # of the text, without its leader line
        inside = Bbox.intersection(box, frame)
        cost = box.width * box.height - (inside.width * inside.height if inside else 0.0)
        overlaps = [overlap for other in taken if (overlap := Bbox.intersection(box, other))]
        cost += sum(overlap.width * overlap.height for overlap in overlaps)
        if best is None or cost < best[0]:
            if best:
                best[1].remove()
            best = cost, note, box
        else:
            note.remove()
    assert best is not None
    return best[2]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Returns a figure in the style of all plots of a run, and its axes `[rows, columns]`.

    Args:
      width: in inches; so is `height`.
      height: see `width`.
      rows: of axes.
      columns: of axes.
      **options: for `Figure.subplots`, such as `sharex`.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cbd2d9")
        axes.tick_params(colors=GREY, labelcolor=INK)
        axes.set_axisbelow(True)
    return figure, grid


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG atomically; its directories are made."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")


def plot_accuracy_against_size(
    points: Sequence[tuple[str, float, float]],
    path: str | os.PathLike[str],
    baseline: tuple[str, float] | None = None,
    ylabel: str = "accuracy",
) -> None:
    """Draws what each size of a model is worth, as a PNG written atomically.

    Args:
      points: (label, size in bytes, score) of each model. The largest is taken as full precision, and its score is
        drawn as a dashed line for the others to be held against.
      path: of the PNG; its directories are made.
      baseline: (label, score) of something else to beat, such as a linear model: a second dashed line.
      ylabel: what the score is.

    Raises:
      UserError: no point, or a size that is not positive.
    """
    if not points:
        raise UserError("no models to plot: give at least one point (label, bytes, score)")
    for label, size, _ in points:
        if size <= 0:
            raise UserError(f"model {label!r} has size {size}: sizes are bytes, above 0")
    points = sorted(points, key=lambda point: point[1])
    figure, ((axes,),) = new_figure(8, 5)
    canvas: Any = figure.canvas
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.set_xlabel("model size (MiB, log scale)", color=INK)
    axes.set_ylabel(ylabel, color=INK)

    sizes, scores = [size / 2**20 for _, size, _ in points], [float(score) for _, _, score in points]
    axes.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
    levels = scores + ([baseline[1]] if baseline else [])
    margin = 0.12 * (max(levels) - min(levels)) or 0.05 * abs(levels[0]) or 0.05
    axes.set_ylim(min(levels) - margin, max(levels) + margin)
    colors = [ACCENT] * (len(points) - 1) + [GREY]
    axes.scatter(sizes, scores, s=54, color=colors, edgecolor="white", linewidth=1.2, zorder=3)

    canvas.draw()  # fixes the layout, which the placing of labels measures
    dots = axes.transData.transform(list(zip(sizes, scores, strict=True)))
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in dots]
    lines = [(f"{points[-1][0]} ({scores[-1]:.4g})", scores[-1], GREY)]
    if baseline:
        lines.append((f"{baseline[0]} ({baseline[1]:.4g})", baseline[1], AMBER))
    for text, level, color in lines:
        axes.axhline(level, color=color, linestyle=(0, (5, 4)), linewidth=1.2, zorder=1)
        ends = [(_FRACTION[place[2]], level, *place) for place in _ALONG]
        taken.append(_place(axes, canvas, text, ends, axes.get_yaxis_transform(), color, taken))
    for (label, _, _), x, y in zip(points[:-1], sizes, scores, strict=False):  # the largest is named on its line
        around = [(x, y, *place) for place in _AROUND]
        taken.append(_place(axes, canvas, label, around, axes.transData, INK, taken))

    save_figure(figure, path)


def plot_curves(curves: Table, path: str | os.PathLike[str]) -> None:
    """Draws what `training_curves` returns over the epochs: the loss, and below it the metrics, if there are any.

    Every phase has a colour, every metric a style of line, and a vertical line stands where a later phase begins.

    Args:
      curves: the table.
      path: of the PNG, which is written atomically; its directories are made.
    """
    phases = list(dict.fromkeys(row[0] for row in curves.rows))
    columns = list(zip(*curves.rows, strict=True))[4:]
    # The score of a task with one metric is that metric.
    metrics = [name for i, name in enumerate(curves.columns[4:]) if columns[i] not in columns[:i]]
    figure, grid = new_figure(8, 6 if metrics else 3.5, rows=2 if metrics else 1, sharex=True)
    for (axes,), names in zip(grid, [[LOSS], metrics], strict=False):
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_ylabel("evaluation" if names is metrics else "training loss", color=INK)
        for number, (phase, start) in enumerate(zip(phases, _starts(curves), strict=False)):
            color = _PHASES[number % len(_PHASES)]
            of_phase = Table(curves.columns, [row for row in curves.rows if row[0] == phase])
            for style, name in zip(itertools.cycle(_STYLES), names, strict=False):
                axes.plot(*_points(of_phase, name), style, color=color, markersize=2 if name == LOSS else 4)
            if number:
                axes.axvline(start, color=GREY, linewidth=0.8)
            axes.annotate(phase, (start, 1), (3, 2), axes.get_xaxis_transform(), "offset points", color=color)
        if names is metrics:
            for style, name in zip(itertools.cycle(_STYLES), names, strict=False):
                axes.plot([], [], style, color=INK, markersize=4, label=name)
            axes.legend(frameon=False)
    grid[-1, 0].set_xlim(left=0)
    grid[-1, 0].set_xlabel("epochs", color=INK)
    save_figure(figure, path)


def plot_runs(runs: Mapping[str, Table], path: str | os.PathLike[str]) -> None:
    """Draws the curves of several runs over the epochs: training loss to the left, evaluations to the right.

    Every run has a colour. The score has a solid line and the test metric (the first one, if the task has several) a
    dashed one, with dots; a vertical line in a run's colour stands where a later phase of it begins. A loss that spans
    more than two powers of ten has a logarithmic axis. Without evaluations there is no right side.

    Args:
      runs: what `training_curves` returns, by the name of the run.
      path: of the PNG, which is written atomically; its directories are made.

    Raises:
      UserError: nothing was measured in any run.
    """
    if not any(curves.rows for curves in runs.values()):
        raise UserError("no curves to plot: give at least one run in which something was measured")
    tests = {label: [name for name in curves.columns if name.startswith("test_")][:1] for label, curves in runs.items()}
    evaluated = any({"score", *tests[label]} & set(curves.columns) for label, curves in runs.items())
    figure, ((left, *right),) = new_figure(12 if evaluated else 7, 4.5, columns=2 if evaluated else 1)
    losses: list[float] = []
    for number, (label, curves) in enumerate(runs.items()):
        line: dict[str, Any] = {"color": RUN_COLORS[number % len(RUN_COLORS)], "linewidth": 1.2}
        x, y = _points(curves, LOSS)
        losses += y
        left.plot(x, y, "-", label=label, **line)
        for axes in right:
            for style, name in (("o-", "score"), *(("o--", name) for name in tests[label])):
                axes.plot(*_points(curves, name), style, markersize=4, **line)
        starts = _starts(curves)[1:]
        for axes in (left, *right):
            for start in starts:
                axes.axvline(start, linestyle=":", **line)
    positive = [loss for loss in losses if loss > 0]
    if len(positive) == len(losses) > 0 and max(positive) > 100 * min(positive):
        left.set_yscale("log")
    for axes, title in zip((left, *right), ("training loss", "evaluation"), strict=False):
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_xlabel("epochs", color=INK)
        axes.set_ylabel(title, color=INK)
    for axes in right:
        named = list(dict.fromkeys(name for found in tests.values() for name in found))
        for style, name in (("o-", "score on validation"), *(("o--", name.replace("_", " ")) for name in named)):
            axes.plot([], [], style, color=INK, markersize=4, label=name)
        axes.legend(frameon=False, fontsize=8, handlelength=3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path)


def _points(curves: Table, name: str) -> tuple[list[float], list[float]]:
    """Returns epochs and values of a column where it has one; nothing if there is no such column."""
    if name not in curves.columns:
        return [], []
    column = list(curves.columns).index(name)
    found = [(row[2], row[column]) for row in curves.rows if row[column] is not None]
    return [x for x, _ in found], [y for _, y in found]


def _starts(curves: Table) -> list[float]:
    """Returns the epoch at which each phase begins, in order."""
    ends = {row[0]: row[2] for row in sorted(curves.rows, key=lambda row: row[2])}
    return [0.0, *sorted(ends.values())[:-1]]
