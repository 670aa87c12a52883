"""What a run directory needs to explain itself: its config, its tables and its plots."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import numbers
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import rich.console
import rich.table
import rich.text
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from qtx.errors import UserError
from qtx.files import whole_file, write_text

_CONFIG = "config.json"


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> Path:
    """Writes the resolved config to `workdir/config.json`, sorted and indented, atomically, and returns the path.

    References are resolved, NumPy values become numbers and lists, and what JSON has no word for becomes its `str`: a
    run is never refused because of its record. Tuples come back as lists.
    """
    path = Path(workdir) / _CONFIG
    write_text(path, _config_text(config))
    return path


def _config_text(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, indent=2, default=_jsonable) + "\n"


def check_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Raises a `UserError` that names a difference if a run directory holds the config of another run."""
    found = first_difference(load_config(workdir).to_dict(), config_record(config))
    if found is not None:
        name, old, new = found
        raise UserError(f"{Path(workdir)} holds a run with {name}={old!r}, not {new!r}; use another workdir")


def config_record(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as `save_config` writes it: nested dicts of what JSON can say."""
    return json.loads(_config_text(config))


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns (dotted name, old value, new value) of the first field that differs between two records, or None."""
    old, new = _flat(old), _flat(new)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def load_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Reads what `save_config` wrote.

    Raises:
      UserError: there is no config in the directory, or it is not a JSON object.
    """
    path = Path(workdir) / _CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {_CONFIG} in {Path(workdir)}: name the directory of a run") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or train again in another workdir") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}, not an object of fields: name the directory of a run")
    return ml_collections.ConfigDict(fields)


@dataclasses.dataclass(frozen=True)
class Table:
    """Results as a table, to look at (`print`), to paste (`markdown`) and to compute with (`csv`).

    Attributes:
      columns: headers.
      rows: one value for each column: a string, a number, or None for an empty cell.
      formats: by column, how its numbers are shown (`".3f"`, `",d"`, `".1%"`); strings are shown as they are, and
        numbers without a format with up to six digits. `csv` keeps full precision.
      title: shown by `print`.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {list(row)} has {len(row)} values for {len(self.columns)} columns")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"formats for columns that do not exist: {sorted(unknown)}")

    def markdown(self) -> str:
        """Returns a GitHub table with aligned columns, numbers to the right, ending in a newline."""
        grid = [[str(c) for c in self.columns], *([*map(self._show, self.columns, row)] for row in self.rows)]
        grid = [[cell.replace("|", "\\|") for cell in row] for row in grid]
        widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
        numeric = self._numeric()
        rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
        padded = [
            [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
            for row in grid
        ]
        return "".join("| " + " | ".join(row) + " |\n" for row in [padded[0], rule, *padded[1:]])

    def csv(self) -> str:
        """Returns comma-separated values with a header, unrounded, None as an empty field."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table to standard output, or to `console`."""
        table = rich.table.Table(title=self.title or None)
        for column, right in zip(self.columns, self._numeric(), strict=True):
            table.add_column(rich.text.Text(str(column)), justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*(rich.text.Text(self._show(*pair)) for pair in zip(self.columns, row, strict=True)))
        # Logs have no width of their own; 80 columns would break every cell.
        console = console or rich.console.Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)

    def save(self, directory: str | os.PathLike[str], name: str) -> None:
        """Writes `directory/name.md` and `directory/name.csv`, each atomically."""
        write_text(Path(directory) / f"{name}.md", self.markdown())
        write_text(Path(directory) / f"{name}.csv", self.csv())

    def _show(self, column: str, value: Any) -> str:
        if value is None:
            return ""
        if not _is_number(value):
            return str(value)
        return format(value, self.formats.get(column, "d" if isinstance(value, numbers.Integral) else ".6g"))

    def _numeric(self) -> list[bool]:
        filled = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(values) and all(map(_is_number, values)) for values in filled]


INK, ACCENT, GREY, AMBER = "#1f2933", "#2563eb", "#7b8794", "#c2610c"


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


def training_curves(lines: Iterable[Mapping[str, Any]], phases: Sequence[str], batches_per_epoch: int) -> Table:
    """Returns the training loss and the evaluations of a run, one row for each step at which something was measured.

    Args:
      lines: of `metrics.jsonl`, see `qtx.train.logging.read_metrics`.
      phases: names of the phases, in order.
      batches_per_epoch: steps in an epoch.

    Returns:
      Columns `phase`, `step` and `epoch` (both since the beginning of the run), `training_loss`, and every metric of an
      evaluation.
    """
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        for phase in phases:
            prefix = f"{phase}/eval/"
            values = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
            values.pop("epoch", None)  # within the phase; here it is that of the run
            if f"{phase}/loss" in line:
                values[_LOSS] = line[f"{phase}/loss"]
            if values:
                found.setdefault((phase, line["step"]), {}).update(values)
    names = [_LOSS, *dict.fromkeys(name for values in found.values() for name in values if name != _LOSS)]
    rows = [[phase, step, step / batches_per_epoch, *map(values.get, names)] for (phase, step), values in found.items()]
    return Table([*_OF_CURVES[:-1], *names], rows)


def load_curves(path: str | os.PathLike[str]) -> Table:
    """Reads what `training_curves(...).csv()` wrote.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            columns, *lines = csv.reader(file)
        if columns[: len(_OF_CURVES)] != _OF_CURVES:
            raise ValueError(f"its columns are {', '.join(columns) or 'none'}")
        rows = [[phase, int(step), *(float(x) if x else None for x in values)] for phase, step, *values in lines]
        return Table(columns, rows)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: the run is not done, or lies elsewhere") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} holds no curves ({error}): train again in another workdir") from None


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
    for (axes,), names in zip(grid, [[_LOSS], metrics], strict=False):
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.set_ylabel("evaluation" if names is metrics else "training loss", color=INK)
        for number, (phase, start) in enumerate(zip(phases, _starts(curves), strict=False)):
            color = _PHASES[number % len(_PHASES)]
            of_phase = Table(curves.columns, [row for row in curves.rows if row[0] == phase])
            for style, name in zip(itertools.cycle(_STYLES), names, strict=False):
                axes.plot(*_points(of_phase, name), style, color=color, markersize=2 if name == _LOSS else 4)
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
        x, y = _points(curves, _LOSS)
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


_LOSS = "training_loss"
_OF_CURVES = ["phase", "step", "epoch", _LOSS]
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


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
