"""Range estimation: `observe` batches one after the other, then read the range.

    state = None
    for x in batches:
        state = observe(spec, state, x)
    params = qparams(spec, *estimated_range(spec, state))

Every estimator works at every granularity, because it sees rows (see `rows`). All results carry no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qtx.quant import grid, rows, search
from qtx.quant.spec import MinMax, Spec


class MinMaxState(NamedTuple):
    """`[rows]` lower and upper ends so far, and the number of batches, a float32 scalar."""

    low: jax.Array
    high: jax.Array
    batches: jax.Array


State = MinMaxState | search.SearchState


def _extremes(how: MinMax, x: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(1, x.ndim))
    if how.token_quantile < 1:
        low, high = token_extremes(x[0], None if weight is None else weight[0] > 0)
        low, high = pruned_range(low, high, how.token_quantile)
        return low[None], high[None]
    if how.deviations:
        counts = None if weight is None else weight > 0
        mean = jnp.mean(x, axes, where=counts)
        spread = how.deviations * jnp.std(x, axes, ddof=1, where=counts)
        empty = False if counts is None else ~jnp.any(counts, axes)
        return jnp.where(empty, 0.0, mean - spread), jnp.where(empty, 0.0, mean + spread)
    if how.percentile:
        flat = x.reshape(x.shape[0], -1)
        if weight is not None:
            flat = jnp.where(weight.reshape(flat.shape) > 0, flat, jnp.nan)
        upper = 100.0 if how.ends == "lower" else 100.0 - how.percentile
        # Only padding is NaN on purpose; NaN in the data itself must not be averaged away.
        percentile = jnp.percentile if weight is None else jnp.nanpercentile
        low, high = percentile(flat, jnp.array([how.percentile, upper], jnp.float32), axis=1)
        if weight is not None:
            broken = jnp.any(jnp.isnan(x) & (weight > 0), axes)
            empty = ~jnp.any(weight > 0, axes)
            low, high = (jnp.where(empty, 0.0, jnp.where(broken, jnp.nan, v)) for v in (low, high))
        return low, high
    if weight is None:
        return jnp.min(x, axes), jnp.max(x, axes)
    counts = weight > 0
    low = jnp.min(x, axes, where=counts, initial=jnp.inf)
    high = jnp.max(x, axes, where=counts, initial=-jnp.inf)
    empty = low > high
    return jnp.where(empty, 0.0, low), jnp.where(empty, 0.0, high)


def token_extremes(x: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the least and greatest element of every token, each `[tokens]`; NaN for tokens that do not count.

    Args:
      x: `[..., D]`: a token is a vector along the last axis.
      where: bool, broadcastable to `x`: elements that count.
    """
    if where is None:
        return jnp.min(x, -1).ravel(), jnp.max(x, -1).ravel()
    where = jnp.broadcast_to(where, x.shape)
    low = jnp.min(x, -1, where=where, initial=jnp.inf)
    high = jnp.max(x, -1, where=where, initial=-jnp.inf)
    empty = ~jnp.any(where, -1)
    return jnp.where(empty, jnp.nan, low).ravel(), jnp.where(empty, jnp.nan, high).ravel()


def pruned_range(low: jax.Array, high: jax.Array, quantile: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Returns the range, two scalars, of the tokens that a quantile leaves (Wei et al. 2022, "Outlier suppression").

    Args:
      low: `[tokens]` from `token_extremes`.
      high: likewise.
      quantile: in (0, 1]; may be traced.
    """
    upper, lower = jnp.nanquantile(jnp.abs(high), quantile), -jnp.nanquantile(jnp.abs(low), quantile)
    # Quantiles are interpolated, and the extremes of tokens that lie on them are to stay.
    slack = 4 * jnp.finfo(high.dtype).eps
    top = jnp.max(high, where=high <= upper + slack * jnp.abs(upper), initial=-jnp.inf)
    bottom = jnp.min(low, where=low >= lower - slack * jnp.abs(lower), initial=jnp.inf)
    return jnp.where(jnp.isfinite(bottom), bottom, 0.0), jnp.where(jnp.isfinite(top), top, 0.0)


def observe(
    spec: Spec,
    state: State | None,
    x: jax.Array,
    where: jax.Array | None = None,
    group: jax.Array | None = None,
) -> State:
    """Takes one batch into account.

    Args:
      spec: a uniform spec with concrete axes.
      state: of the batches before, or None at the first.
      x: any float tensor.
      where: bool, broadcastable to `x`: elements that count (tokens that are not padding). A row without any counts as
        zeros. Not used when the estimator's `padding` is `'include'`.
      group: `[d]` int32, for permuted groups.
    """
    x = jax.lax.stop_gradient(x)
    x = x if spec.clip is None else jnp.clip(x, *spec.clip)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32) if isinstance(spec.estimator, MinMax) else jnp.float32)
    weight = None
    if where is not None and spec.estimator.padding == "ignore":
        weight = rows.to_rows(jnp.broadcast_to(where, x.shape).astype(x.dtype), spec.granularity, group)
    x = rows.to_rows(x, spec.granularity, group)
    how = spec.estimator
    if not isinstance(how, MinMax):
        assert state is None or isinstance(state, search.SearchState)
        if state is None or how.over == "mean":
            found = search.search(spec, search.start(spec, x, weight), x, weight)
            return found if state is None else search.averaged(state, found)
        return search.search(spec, state, x, weight)
    low, high = _extremes(how, x, weight)
    if how.from_zero:
        low = jnp.zeros_like(low)
    if state is None:
        return MinMaxState(low, high, jnp.float32(1))
    batches = state.batches + 1
    if how.over == "current":
        return MinMaxState(low, high, batches)
    if how.over == "all":
        return MinMaxState(jnp.minimum(state.low, low), jnp.maximum(state.high, high), batches)
    keep = 1 - 1 / batches if how.over == "mean" else how.momentum
    mean = MinMaxState((1 - keep) * low + keep * state.low, (1 - keep) * high + keep * state.high, batches)
    if how.over == "restarting":
        restart = state.low * state.high == 0
        return MinMaxState(jnp.where(restart, low, mean.low), jnp.where(restart, high, mean.high), batches)
    return mean


def estimated_range(spec: Spec, state: State) -> tuple[jax.Array, jax.Array]:
    """Returns the lower and upper end: `[rows]`, or scalars for one range in all."""
    if spec.granularity.axis is None:
        return state.low[0], state.high[0]
    return state.low, state.high


def estimate(spec: Spec, x: jax.Array, where: jax.Array | None = None, group: jax.Array | None = None) -> grid.QParams:
    """Returns the quantizer parameters for one tensor; arguments as in `observe`."""
    return grid.qparams(spec, *estimated_range(spec, observe(spec, None, x, where, group)), group)
