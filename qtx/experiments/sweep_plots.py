"""The plots of a sweep: how its rows were trained, and what each size of a model is worth.

A point of the grid has figures of its own, named by the point, `curves_rte.png`. A sweep with one row has one of each,
which compares the points. An axis of numbers, such as the lambda of a model with a graph, has a figure with a line for each
row, `along_lambda.png`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qtx.analysis.tradeoffs import Series, plot_series
from qtx.errors import UserError
from qtx.experiments.plan import ANY, Trial
from qtx.experiments.study import Attempt
from qtx.experiments.sweep_report import Cell
from qtx.train.plots import plot_accuracy_against_size, plot_runs
from qtx.train.report import Table, load_curves


def plot_sweep(
    trials: Sequence[Trial], attempts: Mapping[str, Attempt], cells: Sequence[Cell], metric: str, workdir: Path
) -> list[str]:
    """Writes `curves.png` and `accuracy_size.png`, or one of each for every point, where there is something to plot.

    Curves are those of the first seed of each row that is done; samples of a search have none. A row that starts from
    another on the same task is drawn from where that one ended. Sizes need at least two models that know theirs, and are
    those without embeddings if all of them know these; an axis of numbers needs at least three values.

    Args:
      trials: of the sweep.
      attempts: of each trial, by name.
      cells: of its tables.
      metric: name of their scores.
      workdir: of the sweep.

    Returns:
      A line for each run that trained but has no curves to read, or is not drawn from where it began.
    """
    left_out: list[str] = []
    runs: dict[str, dict[str, Table]] = {}
    before: dict[str, dict[str, float]] = {}
    one_row = len({trial.row.name for trial in trials}) == 1
    by_name = {trial.name: trial for trial in trials}
    read = functools.cache(lambda name: load_curves(workdir / name / "curves.csv"))
    seen: set[str] = set()
    for trial in trials:
        trained = trial.row.entry in ("train", "compare") and attempts[trial.name].state == "done"
        if not trained or trial.search or trial.group in seen:
            continue
        seen.add(trial.group)
        try:
            curves = read(trial.name)
        except UserError as error:
            left_out.append(f"no curves of {trial.name}: {error}")
            continue
        if curves.rows:
            figure, label = _place(one_row, trial.point, trial.row.name)
            runs.setdefault(figure, {})[label or trial.name] = curves
            try:
                before.setdefault(figure, {})[label or trial.name] = _epochs_before(trial, by_name, read)
            except UserError as error:
                left_out.append(f"{trial.name} is drawn from epoch 0 on, not from where its start ended: {error}")
    for figure, found in runs.items():
        plot_runs(found, workdir / f"curves{figure}.png", before=before.get(figure))
    sized: dict[str, list[tuple[str, Cell]]] = {}
    for cell in cells:
        if cell.mebibytes and cell.median is not None:
            figure, label = _place(one_row, cell.point, cell.row)
            sized.setdefault(figure, []).append((label, cell))
    for figure, models in sized.items():
        if len(models) > 1:
            _plot_sizes(models, workdir / f"accuracy_size{figure}.png", metric)
    for axis in cells[0].labels if cells else ():
        for figure, lines in _along(cells, axis, one_row).items():
            plot_series(lines, workdir / figure, xlabel=axis.rpartition(".")[-1], ylabel=metric)
    return left_out


def _epochs_before(trial: Trial, by_name: Mapping[str, Trial], read: Callable[[str], Table]) -> float:
    """Returns for how many epochs the model that a trial starts from was trained in this sweep, its own start included.

    Those on another task do not count: their epochs are others. Raises a `UserError` if its curves cannot be read.
    """
    source = by_name.get(trial.start_trial)
    if source is None or source.config.task != trial.config.task:
        return 0.0
    own = max((row[2] for row in read(source.name).rows), default=0.0)
    return own + _epochs_before(source, by_name, read)


def _plot_sizes(models: Sequence[tuple[str, Cell]], path: Path, metric: str) -> None:
    """Draws scores against sizes without embeddings, if all models know theirs: sizes of two kinds do not compare."""
    rest = all(cell.without_embeddings for _, cell in models)

    def point(label: str, cell: Cell) -> tuple[str, float, float]:
        size = cell.without_embeddings if rest else cell.mebibytes
        assert size is not None and cell.median is not None  # or it would not be among the models
        return label, size * 2**20, cell.median

    references = [label for label, cell in models if cell.full_precision]
    plot_accuracy_against_size(
        [point(*model) for model in models],
        path,
        ylabel=metric,
        full_precision=references[0] if len(references) == 1 else None,
        xlabel=f"weights{' without embeddings' if rest else ''}",
    )


def _along(cells: Sequence[Cell], axis: str, one_row: bool) -> dict[str, dict[str, Series]]:
    """Returns medians along an axis of numbers, with the spread of the seeds, by figure and line; none for another axis.

    A row that ignores the axis is level, from one end to the other.
    """
    try:
        numbers = {cell.labels[axis]: float(cell.labels[axis]) for cell in cells if cell.labels[axis] != ANY}
    except ValueError:
        return {}
    if len(numbers) < 3:
        return {}
    ends = min(numbers.values()), max(numbers.values())
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for cell in cells:
        if cell.median is not None:
            others = ",".join(label.replace("/", ",") for name, label in cell.labels.items() if name != axis)
            figure, line = ("", others or cell.row) if one_row else (others and f"_{others}", cell.row)
            spread = min(cell.scores.values()), max(cell.scores.values())
            lines = found.setdefault(f"along_{axis.rpartition('.')[-1]}{figure}.png", {})
            places = ends if cell.labels[axis] == ANY else (numbers[cell.labels[axis]],)
            lines.setdefault(line, []).extend((place, cell.median, *spread) for place in places)
    return {
        figure: {line: Series(*zip(*values, strict=True)) for line, values in lines.items()}
        for figure, lines in found.items()
    }


def _place(one_row: bool, point: str, row: str) -> tuple[str, str]:
    """Returns what the name of a figure has at its end, and the label in it."""
    if one_row:
        return "", ", ".join(filter(None, (point, row)))
    return point and "_" + point.replace("/", ","), row
