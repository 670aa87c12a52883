"""Plots of what a setting is worth and what a model costs: scores along an axis, scores against costs, costs of two models."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from qtx.errors import UserError, near_misses
from qtx.train.plots import ACCENT, GREY, INK, RUN_COLORS, new_figure, save_figure

_STYLES = ("-o", "--s", "-.^", ":D", "-v", "--P")
_MARKERS = ("s", "o", "*", "^", "D", "v", "P")


class Series(NamedTuple):
    """Scores along an axis.

    Attributes:
      x: values of the axis `[N]`, in any order.
      y: scores `[N]`.
      low: lower end of their spread `[N]`, such as the least of all seeds; None: they have none.
      high: its upper end.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def read_series(path: str | Path, x: str, by: str = "row", **where: str) -> dict[str, Series]:
    """Reads lines to plot from the `cells.csv` of a sweep: medians over seeds, with the least and the greatest.

    Args:
      path: of the file.
      x: column with the numbers of the axis, such as `lambda`.
      by: column that tells lines apart, such as `row` or an axis with bit widths.
      **where: columns and the value that they must have, such as `task='mr'`.

    Raises:
      UserError: no such file, column or number, or no row is left.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"there is no {path}: name the cells.csv of a sweep's directory") from None
    for name in (x, by, "median", *where):
        if rows and name not in rows[0]:
            raise UserError(f"{path} has no column {name!r}{near_misses(name, rows[0])}")
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        if row["median"] and all(row[name] == str(value) for name, value in where.items()):
            try:
                values = [float(row[name]) for name in (x, "median", "min", "max")]
            except ValueError as error:
                raise UserError(f"{path}: column {x!r} is no axis of numbers ({error})") from None
            found.setdefault(row[by], []).append(values)
    if not found:
        raise UserError(f"{path} holds no scores{f' where {where}' if where else ''}: run the sweep first")
    return {label: Series(*zip(*values, strict=True)) for label, values in found.items()}


def plot_series(
    series: Mapping[str, Series], path: str | Path, xlabel: str = "lambda", ylabel: str = "accuracy"
) -> None:
    """Draws scores along an axis, such as accuracy against lambda: a line each, a star at its maximum.

    Args:
      series: by name, such as the width of the weights.
      path: of the PNG, which is written atomically; its directories are made.
      xlabel: what the axis is.
      ylabel: what the scores are.

    Raises:
      UserError: nothing to plot.
    """
    if not series or any(len(line.x) == 0 for line in series.values()):
        raise UserError("no scores to plot: give at least one series, none of them empty")
    figure, ((axes,),) = new_figure(8, 5)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    styles = zip(itertools.cycle(_STYLES), itertools.cycle(RUN_COLORS), strict=False)
    for (label, line), (style, color) in zip(series.items(), styles, strict=False):
        order = np.argsort(line.x, kind="stable")
        x, y = (np.asarray(values, np.float64)[order] for values in (line.x, line.y))
        best = int(np.argmax(y))
        axes.plot(x, y, style, color=color, markersize=5, linewidth=1.6, label=f"{label} (best {y[best]:.4g})")
        if line.low is not None and line.high is not None:
            low, high = (np.asarray(values, np.float64)[order] for values in (line.low, line.high))
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(x[best], y[best], "*", color=color, markersize=17, markeredgecolor="white", zorder=4)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    figure.legend(loc="outside upper center", ncols=min(len(series), 4), frameon=False, fontsize=9)
    save_figure(figure, path)


class Point(NamedTuple):
    """What a model costs and scores.

    Attributes:
      method: how it was made; methods have colours.
      width: of its weights, such as `'1.58 bits'`; widths have markers.
      cost: bytes, joule, seconds: above 0.
      score: more is better.
    """

    method: str
    width: str
    cost: float
    score: float


def plot_tradeoff(
    points: Iterable[Point], path: str | Path, xlabel: str, ylabel: str = "accuracy", log: bool = True
) -> None:
    """Draws scores against a cost: a colour for each method, a marker for each width, a line through a method's widths.

    Args:
      points: the models.
      path: of the PNG, which is written atomically; its directories are made.
      xlabel: what the cost is, with its unit.
      ylabel: what the score is.
      log: whether the cost has a logarithmic axis, to base 2.

    Raises:
      UserError: nothing to plot, or a cost that is not positive.
    """
    models = list(points)
    if not models:
        raise UserError("no models to plot: give at least one point (method, width, cost, score)")
    for point in models:
        if not point.cost > 0:
            raise UserError(f"{point.method}, {point.width} costs {point.cost}: costs are above 0")
    methods = list(dict.fromkeys(point.method for point in models))
    widths = list(dict.fromkeys(point.width for point in models))
    figure, ((axes,),) = new_figure(9, 5)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    colors = dict(zip(methods, itertools.cycle(RUN_COLORS), strict=False))
    markers = dict(zip(widths, itertools.cycle(_MARKERS), strict=False))
    for method in methods:
        its = sorted((point for point in models if point.method == method), key=lambda point: point.cost)
        costs, scores = [point.cost for point in its], [point.score for point in its]
        axes.plot(costs, scores, color=colors[method], linewidth=0.8, alpha=0.4, zorder=2)
        for point in its:
            size = 13 if markers[point.width] == "*" else 8
            mark = dict(marker=markers[point.width], markersize=size, color=colors[method])
            axes.plot(point.cost, point.score, markeredgecolor="white", zorder=3, **mark)
    axes.set_xlabel(f"{xlabel}{', log scale' * log}", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    handles = [Line2D([], [], color=colors[m], linewidth=3, label=m) for m in methods]
    handles += [
        Line2D([], [], linestyle="", marker=markers[w], markersize=10 if markers[w] == "*" else 7, color=GREY, label=w)
        for w in widths
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_costs(costs: Mapping[str, tuple[float, float]], path: str | Path, names: tuple[str, str]) -> None:
    """Draws what a model costs relative to another, a bar for each kind of cost, on a logarithmic axis.

    Args:
      costs: (of the one that is held against, of the other), both above 0, by what it is, such as `bytes` or `latency`.
      path: of the PNG, which is written atomically; its directories are made.
      names: of the two models.

    Raises:
      UserError: nothing to plot, or a cost that is not positive.
    """
    if not costs:
        raise UserError("no costs to plot: give at least one")
    for name, pair in costs.items():
        if not min(pair) > 0:
            raise UserError(f"cost {name!r} is {min(pair)}: costs are above 0")
    ratios = [other / one for one, other in costs.values()]
    figure, ((axes,),) = new_figure(8, 1.2 + 0.42 * len(costs))
    places: Any = np.arange(len(costs))[::-1]
    # From 1, which is where the other model stands: shorter is cheaper, to the left; dearer goes to the right.
    axes.barh(places, np.asarray(ratios) - 1, left=1, height=0.62, color=[ACCENT if r <= 1 else GREY for r in ratios])
    axes.set_xscale("log")
    low, high = min(*ratios, 1.0), max(*ratios, 1.0)
    axes.set_xlim(low / 2.2, high * 2.2)
    for place, ratio in zip(places, ratios, strict=True):
        text = f"{1 / ratio:.3g} times less" if ratio < 0.995 else f"{ratio:.3g} times"
        axes.annotate(
            text,
            (ratio, place),
            (-5 if ratio < 1 else 5, 0),
            textcoords="offset points",
            va="center",
            ha="right" if ratio < 1 else "left",
            fontsize=8,
            color=INK,
        )
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(places, list(costs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{names[1]} relative to {names[0]}, log scale", color=INK)
    save_figure(figure, path)
