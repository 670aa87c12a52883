"""Granularity as rows: every estimator sees `[rows, ...]`, where each row shares one range.

`to_rows` brings any tensor into that form, `expand` takes one value per row back to something that broadcasts against
the tensor. Whole-tensor granularity has no row axis in its parameters: they are scalars.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qtx.errors import UserError
from qtx.quant.exact import divide
from qtx.quant.spec import Granularity


def _axes(granularity: Granularity, ndim: int) -> tuple[int, ...]:
    axis = granularity.axis
    if axis is None:
        return ()
    if isinstance(axis, str):
        raise UserError(f"granularity axis {axis!r} is symbolic; resolve it with Spec.at(channel_axis, ndim) first")
    axes = (axis,) if isinstance(axis, int) else axis
    for a in axes:
        if not -ndim <= a < ndim:
            raise UserError(f"granularity axis {a} does not exist in a tensor with {ndim} axes")
    return tuple(a % ndim for a in axes)


def row_count(granularity: Granularity, shape: tuple[int, ...]) -> int | None:
    """Returns how many ranges a tensor of this shape has; None stands for one range in scalar form."""
    axes = _axes(granularity, len(shape))
    if not axes:
        return None
    if granularity.groups is None:
        count = 1
        for a in axes:
            count *= shape[a]
        return count
    size, groups = shape[axes[0]], granularity.groups
    if size % groups:
        raise UserError(f"{groups} groups do not divide the width {size}; choose a divisor of {size}")
    return groups


def to_rows(x: jax.Array, granularity: Granularity, group: jax.Array | None = None) -> jax.Array:
    """Rearranges `x` so that axis 0 runs over ranges; the other axes keep their order.

    Args:
      x: any tensor.
      granularity: with a concrete axis.
      group: `[d]` int32 group of each channel, for permuted groups; each group has `d / K` members.

    Returns:
      `[rows, ...]`; `[1, *x.shape]` for one range in all.
    """
    axes = _axes(granularity, x.ndim)
    rows = row_count(granularity, x.shape)
    if rows is None:
        return x[None]
    front = jnp.moveaxis(x, axes, range(len(axes)))
    if group is not None:
        front = jnp.take(front, jnp.argsort(group, stable=True), axis=0)
    if granularity.groups is None:
        return front.reshape(rows, *front.shape[len(axes) :])
    return front.reshape(rows, front.shape[0] // rows, *front.shape[1:])


def expand(
    values: jax.Array, granularity: Granularity, shape: tuple[int, ...], group: jax.Array | None = None
) -> jax.Array:
    """Spreads one value per row over a tensor.

    Args:
      values: `[rows]`, or a scalar for one range in all.
      granularity: with a concrete axis.
      shape: of the tensor.
      group: as in `to_rows`.

    Returns:
      An array that broadcasts against `shape`: a scalar, or length 1 on every axis that shares the ranges.
    """
    axes = _axes(granularity, len(shape))
    if not axes or values.ndim == 0:
        return values
    if group is not None:
        values = values[group]
    elif granularity.groups is not None:
        values = jnp.repeat(values, shape[axes[0]] // granularity.groups)
    return values.reshape([shape[a] if a in axes else 1 for a in range(len(shape))])


def groups_by_range(ranges: jax.Array, groups: int) -> jax.Array:
    """Assigns channels to groups by ascending range, so that the widest channels share the last group.

    Args:
      ranges: `[d]` maximum minus minimum of every channel.
      groups: `K`, a divisor of `d`.

    Returns:
      `[d]` int32, the group of each channel. Ties keep channel order.
    """
    size = ranges.shape[0]
    if size % groups:
        raise UserError(f"{groups} groups do not divide the width {size}; choose a divisor of {size}")
    order = jnp.argsort(ranges, stable=True)
    return jnp.zeros(size, jnp.int32).at[order].set(jnp.arange(size, dtype=jnp.int32) // (size // groups))


def mean(x: jax.Array, granularity: Granularity, where: jax.Array | None = None) -> jax.Array:
    """Returns the mean over the elements that share a range, broadcastable to `x`; 0 where none is selected.

    Args:
      x: any tensor.
      granularity: with a concrete axis.
      where: bool, shape of `x`: the elements that count.
    """
    weight = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    total, count = (to_rows(v, granularity) for v in (x * weight, weight))
    axes = tuple(range(1, total.ndim))
    # Exactly: the mean of equal values is that value.
    result = divide(jnp.sum(total, axes), jnp.maximum(jnp.sum(count, axes), 1))
    return expand(result[0] if granularity.axis is None else result, granularity, x.shape)


def largest(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Returns the greatest element of those that share a range, broadcastable to `x`."""
    rows = to_rows(x, granularity)
    result = jnp.max(rows, tuple(range(1, rows.ndim)))
    return expand(result[0] if granularity.axis is None else result, granularity, x.shape)


def norm(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Returns the Euclidean norm of the elements that share a range, broadcastable to `x`."""
    rows = to_rows(x, granularity)
    result = jnp.sqrt(jnp.sum(jnp.square(rows), tuple(range(1, rows.ndim))))
    return expand(result[0] if granularity.axis is None else result, granularity, x.shape)


def extremes(x: jax.Array, axis: int, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the least and greatest value at every index of `axis`, each `[d]`; `where` marks the elements that count."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    if where is None:
        return jnp.min(x, others), jnp.max(x, others)
    counts = jnp.broadcast_to(where, x.shape)
    low = jnp.min(x, others, where=counts, initial=jnp.inf)
    return low, jnp.max(x, others, where=counts, initial=-jnp.inf)
