"""Bounded scalar minimisation as one compiled loop.

Brent's method without derivatives on an interval: golden-section steps, and a parabola through the best three points
when it promises more (Brent 1973, chapter 5; the variant of Forsythe, Malcolm and Moler that SciPy calls "bounded").
It maps over batches: `jax.vmap` runs one search per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_GOLDEN = 0.5 * (3.0 - 5.0**0.5)


class Minimum(NamedTuple):
    """Result of `minimize_bounded`.

    Attributes:
      x: scalar, the best point.
      fun: scalar, its value.
      evaluations: scalar int32, how often the function was called.
      points: `[max_evaluations]` all points in order (NaN beyond the last), or None unless asked for.
    """

    x: jax.Array
    fun: jax.Array
    evaluations: jax.Array
    points: jax.Array | None


class _State(NamedTuple):
    low: jax.Array
    high: jax.Array
    best: jax.Array
    f_best: jax.Array
    second: jax.Array
    f_second: jax.Array
    third: jax.Array
    f_third: jax.Array
    step: jax.Array  # last step
    before: jax.Array  # step before last
    calls: jax.Array
    points: jax.Array | None


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, 1.0, -1.0).astype(x.dtype)


def minimize_bounded(
    function: Callable[[jax.Array], jax.Array],
    low: jax.Array,
    high: jax.Array,
    tolerance: float = 1e-5,
    max_evaluations: int = 500,
    keep_points: bool = False,
) -> Minimum:
    """Minimises a function of one variable on `[low, high]`.

    Args:
      function: scalar to scalar, traceable.
      low: scalar lower bound; its dtype is that of the search.
      high: scalar upper bound.
      tolerance: absolute tolerance on `x`.
      max_evaluations: stops after so many calls.
      keep_points: record every evaluation point.
    """
    low = jnp.asarray(low)
    dtype = jnp.promote_types(low.dtype, jnp.float32)
    low, high = low.astype(dtype), jnp.asarray(high, dtype)
    # A step below the spacing of floats would not move: float32 needs a wider relative tolerance than float64's 1.5e-8.
    relative = max(2.2e-16**0.5, 2 * float(jnp.finfo(dtype).eps))

    def tolerances(state: _State) -> tuple[jax.Array, jax.Array, jax.Array]:
        tol1 = relative * jnp.abs(state.best) + tolerance / 3.0
        return tol1, 2.0 * tol1, 0.5 * (state.low + state.high)

    def unfinished(state: _State) -> jax.Array:
        _, tol2, middle = tolerances(state)
        return (jnp.abs(state.best - middle) > tol2 - 0.5 * (state.high - state.low)) & (state.calls < max_evaluations)

    def advance(s: _State) -> _State:
        tol1, tol2, middle = tolerances(s)
        # Parabola through the best three points.
        r = (s.best - s.second) * (s.f_best - s.f_third)
        q = (s.best - s.third) * (s.f_best - s.f_second)
        p = (s.best - s.third) * q - (s.best - s.second) * r
        q = 2.0 * (q - r)
        p = jnp.where(q > 0, -p, p)
        q = jnp.abs(q)
        fits = (jnp.abs(p) < jnp.abs(0.5 * q * s.before)) & (p > q * (s.low - s.best)) & (p < q * (s.high - s.best))
        parabolic = (jnp.abs(s.before) > tol1) & fits
        leap = p / jnp.where(q == 0, 1, q)
        candidate = s.best + leap
        crowded = (candidate - s.low < tol2) | (s.high - candidate < tol2)
        leap = jnp.where(crowded, tol1 * _sign(middle - s.best), leap)
        # Golden section of the longer side.
        side = jnp.where(s.best >= middle, s.low - s.best, s.high - s.best)
        step = jnp.where(parabolic, leap, _GOLDEN * side)
        before = jnp.where(parabolic, s.step, side)
        u = s.best + _sign(step) * jnp.maximum(jnp.abs(step), tol1)
        fu = function(u).astype(dtype)

        better = fu <= s.f_best
        edge = jnp.where(better, s.best, u)  # the point that becomes an end of the bracket
        to_low = jnp.where(better, u >= s.best, u < s.best)
        runner_up = ~better & ((fu <= s.f_second) | (s.second == s.best))
        also_ran = ~better & ~runner_up & ((fu <= s.f_third) | (s.third == s.best) | (s.third == s.second))

        def pick(new, shifted, placed, kept):
            return jnp.where(better, new, jnp.where(runner_up, shifted, jnp.where(also_ran, placed, kept)))

        points = None if s.points is None else s.points.at[s.calls].set(u)
        return _State(
            low=jnp.where(to_low, edge, s.low),
            high=jnp.where(to_low, s.high, edge),
            best=jnp.where(better, u, s.best),
            f_best=jnp.where(better, fu, s.f_best),
            second=pick(s.best, u, s.second, s.second),
            f_second=pick(s.f_best, fu, s.f_second, s.f_second),
            third=pick(s.second, s.second, u, s.third),
            f_third=pick(s.f_second, s.f_second, fu, s.f_third),
            step=step,
            before=before,
            calls=s.calls + 1,
            points=points,
        )

    x = low + _GOLDEN * (high - low)
    fx = function(x).astype(dtype)
    zero = jnp.zeros_like(x)
    points = jnp.full(max_evaluations, jnp.nan, dtype).at[0].set(x) if keep_points else None
    start = _State(low, high, x, fx, x, fx, x, fx, zero, zero, jnp.int32(1), points)
    end = jax.lax.while_loop(unfinished, advance, start)
    return Minimum(end.best, end.f_best, end.calls, end.points)
