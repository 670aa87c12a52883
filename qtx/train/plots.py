"""Plots of runs, and the style of all plots: colours, a figure, where labels go."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from qtx.errors import UserError, near_misses
from qtx.files import whole_file
from qtx.train.report import LOSS, Table

INK, ACCENT, GREY, AMBER = "#1f2933", "#2563eb", "#7b8794", "#c2610c"
_PHASES = (ACCENT, AMBER, "#15803d", "#7c3aed")
RUN_COLORS = (*_PHASES, "#be185d", "#0e7490", "#854d0e", "#4b5563", "#84cc16", "#f472b6")
_STYLES = ("o-", "s--", "^:", "v-.")  # marker and line
# Of runs in one figure, when their colours are used up. Dots are for the marks of phases.
_RUN_LINES, _RUN_MARKERS = ("-", "--", "-."), ("o", "s", "^", "D")
_NAMED = 8  # models with their names in a plot of sizes; more have numbers

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
    full_precision: str | None = "",
    xlabel: str = "model size",
) -> None:
    """Draws what each size of a model is worth, as a PNG written atomically.

    Models have their names beside them. Where there are more than eight, or there is no room for a name, they have the
    numbers of a legend, in which they stand as given.

    Args:
      points: (label, size in bytes, score) of each model.
      path: of the PNG; its directories are made.
      baseline: (label, score) of something else to beat, such as a linear model: a second dashed line.
      ylabel: what the score is.
      full_precision: label of the model whose score is drawn as a dashed line for the others to be held against; '': the
        largest, if no other is as large; None: there is none.
      xlabel: what the sizes are of; the unit, MiB, is added.

    Raises:
      UserError: no point, a size that is not positive, or no model of the label `full_precision`.
    """
    if not points:
        raise UserError("no models to plot: give at least one point (label, bytes, score)")
    for label, size, _ in points:
        if size <= 0:
            raise UserError(f"model {label!r} has size {size}: sizes are bytes, above 0")
    labels = [label for label, _, _ in points]
    if full_precision and full_precision not in labels:
        raise UserError(f"no model to plot is called {full_precision!r}{near_misses(full_precision, labels)}")
    reference = None if full_precision is None else labels.index(full_precision) if full_precision else _largest(points)
    options = points, reference, baseline, ylabel, xlabel
    figure, crowded = _sizes_figure(*options, numbered=len(points) > _NAMED)
    if crowded and len(points) <= _NAMED:
        figure, _ = _sizes_figure(*options, numbered=True)
    save_figure(figure, path)


def _largest(points: Sequence[tuple[str, float, float]]) -> int | None:
    """Returns the index of the largest model; None if two are as large."""
    sizes = [size for _, size, _ in points]
    return sizes.index(max(sizes)) if sizes.count(max(sizes)) == 1 else None


def _sizes_figure(
    points: Sequence[tuple[str, float, float]],
    reference: int | None,
    baseline: tuple[str, float] | None,
    ylabel: str,
    xlabel: str,
    numbered: bool,
) -> tuple[Figure, bool]:
    """Returns the figure of `plot_accuracy_against_size`, and whether labels have too little room."""
    height = max(5.0, 0.8 + 0.19 * len(points)) if numbered else 5.0
    figure, ((axes,),) = new_figure(10 if numbered else 8, height)
    canvas: Any = figure.canvas
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"{xlabel} (MiB, log scale)", color=INK)
    axes.set_ylabel(ylabel, color=INK)

    sizes, scores = [size / 2**20 for _, size, _ in points], [float(score) for _, _, score in points]
    margin = 2 ** max(0.12 * math.log2(max(sizes) / min(sizes)), 0.02)
    low, high = min(sizes) / margin, max(sizes) * margin
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_size_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.4g}"))
    levels = scores + ([baseline[1]] if baseline else [])
    margin = 0.12 * (max(levels) - min(levels)) or 0.05 * abs(levels[0]) or 0.05
    axes.set_ylim(min(levels) - margin, max(levels) + margin)
    for number, (x, y) in enumerate(zip(sizes, scores, strict=True)):
        color, above = (GREY, 3.5) if number == reference else (ACCENT, 3)  # not hidden by another of its size
        axes.scatter(x, y, s=54, color=color, edgecolor="white", linewidth=1.2, zorder=above)
    if numbered:
        named = [f"{number}  {label} ({score:.4g})" for number, (label, _, score) in enumerate(points, 1)]
        handles = [Line2D([], [], linestyle="", label=text) for text in named]
        options: dict[str, Any] = dict(frameon=False, fontsize=8, handlelength=0, handletextpad=0)
        figure.legend(handles=handles, loc="outside right upper", **options)

    canvas.draw()  # fixes the layout, which the placing of labels measures
    dots = axes.transData.transform(list(zip(sizes, scores, strict=True)))
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in dots]
    lines = [] if reference is None else [(points[reference][0], scores[reference], GREY)]
    lines += [(*baseline, AMBER)] if baseline else []
    for name, level, color in lines:
        text = f"{name} ({level:.4g})"
        axes.axhline(level, color=color, linestyle=(0, (5, 4)), linewidth=1.2, zorder=1)
        ends = [(_FRACTION[place[2]], level, *place) for place in _ALONG]
        taken.append(_place(axes, canvas, text, ends, axes.get_yaxis_transform(), color, taken))
    placed: list[tuple[Path, Bbox]] = []  # leader line and box of each label
    crowded, frame = False, axes.get_window_extent()
    for number, ((label, _, _), x, y) in enumerate(zip(points, sizes, scores, strict=True)):
        if number == reference and not numbered:
            continue  # is named on its line
        around = [(x, y, *place) for place in _AROUND]
        text = str(number + 1) if numbered else label
        box = _place(axes, canvas, text, around, axes.transData, INK, taken)
        outside = not all(frame.contains(*corner) for corner in box.corners())
        crowded = crowded or outside or any(box.overlaps(other) for other in taken)
        taken.append(box)
        placed.append((Path([dots[number], box.get_points().mean(axis=0)]), box))
    crossing = any(line.intersects_bbox(box) for line, own in placed for _, box in placed if box is not own)
    return figure, crowded or crossing


def _size_ticks(low: float, high: float) -> list[float]:
    """Returns three to twelve or so round sizes between two: powers of two, if three or more of them lie there."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    powers = [2.0**power for power in range(first, last + 1)]
    if len(powers) >= 3:
        return powers[:: math.ceil(len(powers) / 12)]
    return [float(x) for x in MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= x <= high]


def plot_curves(curves: Table, path: str | os.PathLike[str]) -> None:
    """Draws what `training_curves` returns over the epochs: the loss, and below it the metrics, if there are any.

    Every phase has a colour, every metric a style of line, and a vertical line stands where a later phase begins. A loss that
    spans more than two powers of ten has a logarithmic axis.

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
                x, y = _points(of_phase, name)
                axes.plot(x, y, style, color=color, markersize=2 if name == LOSS and len(x) > 1 else 4)
            if number:
                axes.axvline(start, color=GREY, linewidth=0.8)
            axes.annotate(phase, (start, 1), (3, 2), axes.get_xaxis_transform(), "offset points", color=color)
        if names is not metrics:
            _scale_losses(axes, _points(curves, LOSS)[1])
        if names is metrics:
            for style, name in zip(itertools.cycle(_STYLES), names, strict=False):
                axes.plot([], [], style, color=INK, markersize=4, label=name)
            axes.legend(frameon=False)
    grid[-1, 0].set_xlim(left=0)
    grid[-1, 0].set_xlabel("epochs", color=INK)
    save_figure(figure, path)


def plot_runs(
    runs: Mapping[str, Table], path: str | os.PathLike[str], before: Mapping[str, float] | None = None
) -> None:
    """Draws the curves of several runs over the epochs: training loss, score on validation, and test metric.

    Every run has a colour; after the tenth, colours come again with other lines and markers. Of several test metrics the
    first one is drawn. A dotted vertical line stands where a later phase begins, or a run goes on from another; it has the
    colour of its run, or is grey if several runs share it. A loss that spans more than two powers of ten has a logarithmic
    axis, and one that was logged once is a dot. What no run has measured has no panel.

    Args:
      runs: what `training_curves` returns, by the name of the run.
      path: of the PNG, which is written atomically; its directories are made.
      before: by the name of a run, for how many epochs another run had trained the model that it began with: it is drawn
        from there on.

    Raises:
      UserError: nothing was measured in any run.
    """
    if not any(curves.rows for curves in runs.values()):
        raise UserError("no curves to plot: give at least one run in which something was measured")
    before = before or {}
    tests = {label: [name for name in curves.columns if name.startswith("test_")][:1] for label, curves in runs.items()}
    panels = {"training loss": dict.fromkeys(runs, LOSS)}
    if scored := [label for label, curves in runs.items() if "score" in curves.columns]:
        panels["score on validation"] = dict.fromkeys(scored, "score")
    if tested := {label: names[0] for label, names in tests.items() if names}:
        panels[", ".join(dict.fromkeys(name.replace("_", " ") for name in tested.values()))] = tested
    figure, (row,) = new_figure(2 + 5 * len(panels), 4.5, columns=len(panels), sharex=True)
    styles = {label: _run_style(number) for number, label in enumerate(runs)}
    marks: dict[float, list[str]] = {}  # which runs go on at an epoch
    for label, curves in runs.items():
        shift = before.get(label, 0.0)
        for start in _starts(curves)[0 if shift else 1 :]:
            marks.setdefault(round(start + shift, 6), []).append(label)
    losses: list[float] = []
    for axes, (title, names) in zip(row, panels.items(), strict=True):
        for label, name in names.items():
            x, y = _points(runs[label], name)
            style = dict(styles[label])
            if name == LOSS:
                losses += y
                if len(x) > 1:
                    del style["marker"]
            axes.plot([epoch + before.get(label, 0.0) for epoch in x], y, label=label, **style)
        for epoch, going_on in marks.items():
            color = styles[going_on[0]]["color"] if len(going_on) == 1 else GREY
            axes.axvline(epoch, color=color, linestyle=":", linewidth=1.2, zorder=1)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_xlabel("epochs", color=INK)
        axes.set_ylabel(title, color=INK)
    _scale_losses(row[0], losses)
    handles = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    if marks:
        kinds = ["begins a later phase"] * any(len(_starts(curves)) > 1 for curves in runs.values())
        kinds += ["goes on from another row"] * any(before.get(label) for label in runs)
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=", or ".join(kinds)))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8, handlelength=3)
    save_figure(figure, path)


def _scale_losses(axes: Any, losses: Sequence[float]) -> None:
    """Gives losses that are positive and span more than two powers of ten a logarithmic axis."""
    if losses and 0 < min(losses) < max(losses) / 100:
        axes.set_yscale("log")


def _run_style(number: int) -> dict[str, Any]:
    """Returns colour, line and marker of a run; those of the first 120 differ."""
    again = number // len(RUN_COLORS)
    return {
        "color": RUN_COLORS[number % len(RUN_COLORS)],
        "linestyle": _RUN_LINES[again % len(_RUN_LINES)],
        "marker": _RUN_MARKERS[again % len(_RUN_MARKERS)],
        "linewidth": 1.2,
        "markersize": 4,
    }


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
