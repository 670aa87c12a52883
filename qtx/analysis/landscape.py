"""The loss around a model's parameters, along random directions of one or two dimensions.

    found = evaluate(loss, params, batches, directions(jax.random.key(0), params, 2), (axis, axis))
    plot_contours({"ternary": found}, "landscape.png")

Directions are Gaussian and normalized by filter (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", section 4),
so that a step has the same relative size everywhere: `d |w| / (|d| + 1e-7)` in each slice of a matrix. Which slices is
`norms`: `'inputs'` takes one norm for all weights of an input, along the outputs, as the published code behind Kim et al.
2023, figure 2 (a), does; `'outputs'` takes one for all weights of an output, the filter of the paper. In tables of
embeddings an input is a column, and an output a row. Vectors, which are biases and norms, do not move.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from matplotlib.ticker import MaxNLocator

from qtx.analysis.losses import Loss, bound, mean_loss
from qtx.errors import UserError, near_misses
from qtx.quant.policy import matches
from qtx.train.logging import progress
from qtx.train.plots import INK, RUN_COLORS, new_figure, save_figure
from qtx.train.report import Table

Norms = Literal["inputs", "outputs"]
POSITIONS = ("**/embeddings/position/table",)
_EPS = 1e-7  # as published


# --- Directions ---


def directions(
    key: jax.Array, params: Mapping[str, Any], count: int = 2, *, still: Sequence[str] = (), norms: Norms = "inputs"
) -> tuple[dict[str, Any], ...]:
    """Draws normalized directions.

    Args:
      key: for the draw.
      params: nested parameters; kernels `[..., in, out]` are called `kernel`, everything else is a table `[rows, width]`.
      count: how many.
      still: patterns of names that do not move, such as `POSITIONS`, which the published code leaves out.
      norms: what shares a norm, see above.

    Returns:
      As many pytrees of the shape of `params`.

    Raises:
      UserError: a pattern that matches nothing, or unknown norms.
    """
    flat = traverse_util.flatten_dict(params, sep="/")

    def draw(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, len(flat))
        drawn = {
            name: jax.random.normal(k, flat[name].shape, flat[name].dtype) for k, name in zip(keys, flat, strict=True)
        }
        return normalized(traverse_util.unflatten_dict(drawn, sep="/"), params, still=still, norms=norms)

    return tuple(draw(key) for key in jax.random.split(key, count))


def check_directions(params: Mapping[str, Any], still: Sequence[str], norms: str) -> None:
    """Raises the errors of `directions`, without drawing any."""
    if norms not in get_args(Norms):
        raise UserError(f"unknown norms {norms!r}{near_misses(norms, get_args(Norms))}")
    names = traverse_util.flatten_dict(params, sep="/")
    for pattern in still:
        if not any(matches(pattern, name) for name in names):
            raise UserError(f"{pattern!r}, which is not to move, matches no parameter{near_misses(pattern, names)}")


def normalized(
    direction: Mapping[str, Any], params: Mapping[str, Any], *, still: Sequence[str] = (), norms: Norms = "inputs"
) -> dict[str, Any]:
    """Returns a direction with the norms of the parameters; arguments and errors are those of `directions`."""
    check_directions(params, still, norms)
    weights, given = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, direction))

    def norm(name: str, x: jax.Array) -> jax.Array:
        outputs = x.ndim - 1 if name.split("/")[-1] == "kernel" else 0
        along = (outputs,) if norms == "inputs" else tuple(axis for axis in range(x.ndim) if axis != outputs)
        return jnp.sqrt(jnp.sum(jnp.square(x), along, keepdims=True))

    moved = {}
    for name, w in weights.items():
        d = jnp.asarray(given[name])
        fixed = d.ndim < 2 or any(matches(pattern, name) for pattern in still)
        moved[name] = jnp.zeros_like(d) if fixed else d * norm(name, w) / (norm(name, d) + _EPS)
    return traverse_util.unflatten_dict(moved, sep="/")


# --- Losses ---


class Landscape(NamedTuple):
    """Losses on a grid.

    Attributes:
      axes: `[X]`, or `[X]` and `[Y]`: multiples of the directions, in their order.
      losses: `[X]`, or `[Y, X]`.
    """

    axes: tuple[np.ndarray, ...]
    losses: np.ndarray

    def table(self) -> Table:
        """Returns a row for each point, `x`, `y` and `loss`; without `y` for a curve."""
        points = _points(self.axes)
        rows = [[*map(float, point), float(loss)] for point, loss in zip(points, self.losses.ravel(), strict=True)]
        return Table([*"xy"[: len(self.axes)], "loss"], rows)


def _points(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Returns `[points, axes]`, the first axis fastest."""
    grids = np.meshgrid(*axes[::-1], indexing="ij")[::-1]
    return np.stack([grid.ravel() for grid in grids], -1)


def evaluate(
    loss: Loss,
    params: Mapping[str, Any],
    batches: Any,
    directions: Sequence[Any],
    axes: Sequence[Any],
    *,
    together: int = 4,
) -> Landscape:
    """Evaluates the mean loss over batches at `params + x d_0 + y d_1`, with one compiled program for all points.

    Args:
      loss: `(params, batch) -> scalar`, see `qtx.analysis.losses`.
      params: nested parameters.
      batches: arrays `[N, ...]`.
      directions: one or two pytrees like `params`.
      axes: for each, coordinates in rising order; 21 from -0.5 to 0.5 are usual.
      together: how many points run side by side, each with parameters of its own.

    Raises:
      UserError: not one axis for each of one or two directions, an axis that does not rise, or nothing to run side by side.
    """
    axes = tuple(np.asarray(axis, np.float64) for axis in axes)
    check(len(directions), axes, together)
    points = _points(axes)
    together = min(together, len(points))
    padded = np.resize(points, (-(-len(points) // together), together, len(axes)))  # the rest is computed again
    found: list[jax.Array] = []
    with progress(len(points), "landscape") as bar:
        for side_by_side in padded:
            found.append(_evaluate(bound(loss), params, batches, tuple(directions), side_by_side))
            if len(found) > 1:  # the device has the next points before this waits
                bar.update((len(found) - 1) * together, loss=float(found[-2][0]))
        losses = np.concatenate(jax.device_get(found))[: len(points)]
        bar.update(len(points))
    return Landscape(axes, losses.reshape([len(axis) for axis in axes[::-1]]))


def check(directions: int, axes: Sequence[np.ndarray], together: int) -> None:
    """Raises a `UserError` unless there are one or two directions, an axis that rises for each, and points side by side."""
    if len(axes) not in (1, 2) or directions != len(axes):
        raise UserError(
            f"a landscape of {directions} directions and {len(axes)} axes: give one or two of each, equally many"
        )
    for axis in axes:
        if axis.ndim != 1 or axis.size == 0 or not np.isfinite(axis).all() or not (np.diff(axis) > 0).all():
            raise UserError(f"the axis {axis.tolist()} of a landscape must hold numbers in rising order")
    if together < 1:
        raise UserError(f"together={together}: give at least 1 point")


@jax.jit
def _evaluate(loss, params, batches, directions, points):
    def at(point):
        def move(w, *ds):
            return w + sum(x.astype(w.dtype) * d for x, d in zip(point, ds, strict=True))

        return mean_loss(loss, jax.tree.map(move, params, *directions), batches)

    return jax.vmap(at)(points)


# --- Reports ---


def summary_table(found: Mapping[str, Landscape], centers: Mapping[str, float]) -> Table:
    """Returns a row for each model: the loss at its parameters, and the lowest, mean and highest on the grid.

    Args:
      found: by model.
      centers: the losses at the parameters themselves.
    """
    rows = []
    for name, each in found.items():
        finite = each.losses[np.isfinite(each.losses)]
        numbers = [float(f(finite)) for f in (np.min, np.mean, np.max)] if finite.size else [None] * 3
        rows.append([name, centers[name], *numbers, each.losses.size - finite.size])
    columns = ["model", "loss", "lowest", "mean", "highest", "not finite"]
    return Table(columns, rows, dict.fromkeys(columns[1:5], ".4f"))


def plot_contours(found: Mapping[str, Landscape], path: str | os.PathLike[str], levels: int = 20) -> None:
    """Draws two-dimensional landscapes side by side, with the same colours; what is not finite stays white.

    Args:
      found: by model.
      path: of the PNG.
      levels: how many steps of colour at most.

    Raises:
      UserError: a landscape that is not two by two points at least, or no finite loss.
    """
    for name, each in found.items():
        if len(each.axes) != 2 or min(each.losses.shape) < 2:
            raise UserError(f"{name!r}: contours need a grid of two axes with two points or more; draw curves instead")
    finite = np.concatenate([np.zeros(0), *(each.losses[np.isfinite(each.losses)] for each in found.values())])
    if not finite.size:
        raise UserError("no finite loss to plot: look at the parameters and the reach of the axes")
    low, high = float(finite.min()), float(finite.max())
    edges = MaxNLocator(levels).tick_values(low, high if high > low else low + 1.0)
    figure, grid = new_figure(3.9 * len(found) + 0.8, 3.9, columns=len(found))
    for axes, (name, each) in zip(grid[0], found.items(), strict=True):
        drawn = axes.contourf(*each.axes, each.losses, levels=edges, cmap="viridis")
        axes.contour(*each.axes, each.losses, levels=edges, colors="white", linewidths=0.4)
        axes.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.6)  # the model itself
        axes.set_aspect("equal")
        axes.set_title(name, fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7)
    bar = figure.colorbar(drawn, ax=list(grid[0]), shrink=0.85, pad=0.02)
    bar.set_label("loss", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.supxlabel("multiple of the first direction", fontsize=9, color=INK)
    figure.supylabel("of the second", fontsize=9, color=INK)
    save_figure(figure, path)


def plot_curves(found: Mapping[str, Landscape], path: str | os.PathLike[str]) -> None:
    """Draws one-dimensional landscapes over each other.

    Args:
      found: by model.
      path: of the PNG.

    Raises:
      UserError: a landscape of two dimensions.
    """
    for name, each in found.items():
        if len(each.axes) != 1:
            raise UserError(f"{name!r}: a curve needs a landscape of one axis; draw contours instead")
    figure, ((axes,),) = new_figure(6, 4)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    for color, (name, each) in zip(RUN_COLORS * len(found), found.items(), strict=False):
        axes.plot(each.axes[0], each.losses, "o-", color=color, markersize=3, linewidth=1.2, label=name)
    axes.set_xlabel("multiple of the direction", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
