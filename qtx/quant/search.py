"""Ranges of least quantization error, for all rows at once.

A candidate is a range per row. Its loss is the squared error of fake quantization with that range (or the cross-entropy
of the softmax), summed over the row. The grid of candidates is walked by one `lax.scan`, so that only the tensor and
one loss per row and candidate are ever in memory.

Grid, one-sided data or a symmetric scheme, `S` the extent and `N` candidates, `i = 1..N`:

    high = i S/N,  low = -high (0 if one-sided)

Grid, asymmetric scheme on two-sided data, also shifted by whole steps, `k = 0..floor(2^b/4) - 1` and both signs:

    low = max(-i S/N + shift, min - margin),  high = min(i S/N + shift, max + margin),  shift = +-k 2i S/N / (2^b - 1)

(Bondarenko et al. 2021 follow Nagel et al. 2021, section 3.1, with these candidates.)
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qtx.quant import grid
from qtx.quant.exact import divide
from qtx.quant.minimize import minimize_bounded
from qtx.quant.spec import Granularity, MinMax, Search, Spec

BLOCK = 2**15  # elements that stay in cache, with what is computed of them


class SearchState(NamedTuple):
    """What a search remembers between batches.

    Attributes:
      low: `[rows]` lower end of the best range.
      high: `[rows]` upper end.
      least: `[rows]` minimum of the first batch; the search stays one-sided if none is negative.
      greatest: `[rows]` maximum of the first batch.
      losses: `[rows, candidates]` summed over batches (grid), or `[rows, 1]` the last minimum (Brent).
      batches: how many there were, a float32 scalar.
    """

    low: jax.Array
    high: jax.Array
    least: jax.Array
    greatest: jax.Array
    losses: jax.Array
    batches: jax.Array

    @property
    def one_sided(self) -> jax.Array:
        """Scalar bool: the first batch held no negative value."""
        return jnp.min(self.least) >= 0


def extent(how: Search, state: SearchState) -> tuple[jax.Array, jax.Array]:
    """Returns the widest candidate and the margin, `[rows]` each, in the precision in force."""
    precise = jnp.result_type(float)
    magnitude = jnp.maximum(jnp.abs(state.least), jnp.abs(state.greatest)).astype(precise)
    margin = how.margin * magnitude if how.relative_margin else jnp.full_like(magnitude, how.margin)
    return magnitude + margin, margin


def max_shift(spec: Spec) -> int:
    """Number of shifts (of one grid step each) tried to either side: a quarter of the grid."""
    return 2**spec.bits // 4


def row_losses(spec: Spec, x: jax.Array, weight: jax.Array | None, low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the loss of one candidate range per row, `[rows]`.

    Args:
      spec: its estimator is a `Search`.
      x: `[rows, ...]`.
      weight: like `x`, 0 where elements do not count, or None.
      low: `[rows]`.
      high: `[rows]`.
    """
    assert isinstance(spec.estimator, Search)
    by_row = dataclasses.replace(spec, granularity=Granularity(axis=0), estimator=MinMax(), range="static")
    quantized = grid.fake_quant(by_row, x, grid.qparams(by_row, low, high))
    if spec.estimator.loss == "mse":
        loss = jnp.square(quantized - x)
    else:
        loss = -jax.nn.softmax(x, -1) * jax.nn.log_softmax(quantized, -1)
    if weight is not None:
        loss = jnp.where(weight > 0, loss, 0)  # not a product: padding may hold anything
    return jnp.sum(loss, tuple(range(1, x.ndim)))


def _walk(spec: Spec, x: jax.Array, weight: jax.Array | None, low: jax.Array, high: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda _, c: (None, row_losses(spec, x, weight, *c)), None, (low, high))[1]


def _walk_blocks(spec: Spec, x: jax.Array, weight: jax.Array | None, low: jax.Array, high: jax.Array) -> jax.Array:
    """`_walk` for an element-wise loss, one block after the other: long rows in pieces, short rows several at a time."""
    count, rows = low.shape
    length = math.prod(x.shape[1:])
    x, weight = x.reshape(rows, length), None if weight is None else weight.reshape(rows, length)
    pieces, height = -(-length // BLOCK), min(max(BLOCK // length, 1), rows)
    width = length // pieces

    def add(number: jax.Array, losses: jax.Array) -> jax.Array:
        row, column = number // pieces * height, number % pieces * width

        def block(v: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(v, (row, column), (height, width))

        low_here, high_here, so_far = (jax.lax.dynamic_slice(v, (0, row), (count, height)) for v in (low, high, losses))
        so_far = so_far + _walk(spec, block(x), None if weight is None else block(weight), low_here, high_here)
        return jax.lax.dynamic_update_slice(losses, so_far, (0, row))

    losses = jax.lax.fori_loop(0, rows // height * pieces, add, jnp.zeros((count, rows), jnp.float32))
    # What does not fill a block: the last rows, or the end of every row.
    if rest := rows % height:
        tail = _walk(spec, x[-rest:], None if weight is None else weight[-rest:], low[:, -rest:], high[:, -rest:])
        losses = losses.at[:, -rest:].set(tail)
    if rest := length % width:
        losses = losses + _walk(spec, x[:, -rest:], None if weight is None else weight[:, -rest:], low, high)
    return losses


def candidate_losses(spec: Spec, x: jax.Array, weight: jax.Array | None, low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the losses of all candidates, `[candidates, rows]`; arguments as in `row_losses`, ends `[candidates, rows]`.

    A CPU tries all candidates on a block of the tensor while it is in cache: twice as fast as one pass per candidate,
    and sums of blocks are more precise.
    """
    assert isinstance(spec.estimator, Search)
    if spec.estimator.loss != "mse" or x.size == 0:
        return _walk(spec, x, weight, low, high)
    whole, blocked = partial(_walk, spec), partial(_walk_blocks, spec)
    return jax.lax.platform_dependent(x, weight, low, high, cpu=blocked, default=whole)


def _candidates(spec: Spec, state: SearchState) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns (low, high) of the one-sided or symmetric grid `[N, rows]` and of the shifted grid `[N * 2K, rows]`.

    In float64: shifts are whole steps, so every other zero point is exactly half-way between two integers, and which way
    it rounds is decided by the last bit of the candidate.
    """
    how = spec.estimator
    assert isinstance(how, Search)
    n = how.candidates
    widest, margin = extent(how, state)
    width = jnp.arange(1, n + 1)[:, None] * divide(widest, n)
    plain = jnp.where(state.one_sided, jnp.zeros_like(width), -width), width
    if spec.scheme != "asymmetric":
        return _float32(plain), _float32(plain)
    steps = jnp.arange(max_shift(spec))
    shifts = jnp.stack([steps, -steps], -1).reshape(-1)
    width = jnp.broadcast_to(width[:, None], (n, shifts.size, width.shape[1]))
    shift = shifts[None, :, None] * divide(2 * width, 2**spec.bits - 1)
    low = jnp.maximum(-width + shift, state.least - margin).reshape(-1, width.shape[2])
    high = jnp.minimum(width + shift, state.greatest + margin).reshape(-1, width.shape[2])
    return _float32(plain), _float32((low, high))


def _float32(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return ends[0].astype(jnp.float32), ends[1].astype(jnp.float32)


def _grid(spec: Spec, state: SearchState, x: jax.Array, weight: jax.Array | None) -> SearchState:
    def losses_of(low: jax.Array, high: jax.Array) -> jax.Array:
        return candidate_losses(spec, x, weight, low, high).T

    with jax.enable_x64(True):
        plain, shifted = _candidates(spec, state)
    if spec.scheme != "asymmetric":
        losses, (low, high) = losses_of(*plain), plain
    else:
        extra = shifted[0].shape[0] - plain[0].shape[0]
        pad = [jnp.pad(end, ((0, extra), (0, 0))) for end in plain]

        def one_sided():
            return jnp.pad(losses_of(*plain), ((0, 0), (0, extra)), constant_values=jnp.inf)

        losses = jax.lax.cond(state.one_sided, one_sided, lambda: losses_of(*shifted))
        low, high = (jnp.where(state.one_sided, p, s) for p, s in zip(pad, shifted, strict=True))
    losses = state.losses + losses
    best = jnp.argmin(losses, axis=1)[None]
    low, high = (jnp.take_along_axis(end, best, axis=0)[0] for end in (low, high))
    return state._replace(low=low, high=high, losses=losses)


def _brent(spec: Spec, state: SearchState, x: jax.Array, weight: jax.Array | None) -> SearchState:
    how = spec.estimator
    assert isinstance(how, Search)

    def loss(row, row_weight, low, high):
        weights = None if row_weight is None else row_weight[None]
        low, high = _float32((low[None], high[None]))
        return row_losses(spec, row[None], weights, low, high)[0]

    def plain(row, row_weight, widest):
        def ends(radius):
            return jnp.where(state.one_sided, jnp.zeros_like(radius), -radius), radius

        best = minimize_bounded(lambda r: loss(row, row_weight, *ends(r)), 0.01 * widest, widest)
        return *_float32(ends(best.x)), best.fun.astype(jnp.float32)

    def shifted(row, row_weight, widest):
        def best_shift(radius):
            bound = divide(max_shift(spec) * 2 * radius, 2**spec.bits - 1)
            return minimize_bounded(lambda t: loss(row, row_weight, t - radius, t + radius), -bound, bound)

        radius = minimize_bounded(lambda r: best_shift(r).fun, 0.01 * widest, widest).x
        shift = best_shift(radius)
        return *_float32((shift.x - radius, shift.x + radius)), shift.fun.astype(jnp.float32)

    # The points of the search are float64 scalars, the loss is float32 as the model will see it.
    with jax.enable_x64(True):
        widest, _ = extent(how, state)
        in_axes = (0, None if weight is None else 0, 0)

        def run(search):
            return lambda: jax.vmap(search, in_axes)(x, weight, widest)

        if spec.scheme == "asymmetric":
            low, high, fun = jax.lax.cond(state.one_sided, run(plain), run(shifted))
        else:
            low, high, fun = run(plain)()
    return state._replace(low=low, high=high, losses=fun[:, None])


def start(spec: Spec, x: jax.Array, weight: jax.Array | None) -> SearchState:
    """Fixes extent and sidedness from the first batch.

    Args:
      spec: its estimator is a `Search`.
      x: `[rows, ...]`.
      weight: like `x`, or None.
    """
    how = spec.estimator
    assert isinstance(how, Search)
    axes = tuple(range(1, x.ndim))
    if weight is None:
        least, greatest = jnp.min(x, axes), jnp.max(x, axes)
    else:
        counts = weight > 0
        least = jnp.min(x, axes, where=counts, initial=jnp.inf)
        greatest = jnp.max(x, axes, where=counts, initial=-jnp.inf)
        empty = least > greatest
        least, greatest = jnp.where(empty, 0, least), jnp.where(empty, 0, greatest)
    if how.extent == "tensor":
        least = jnp.full_like(least, jnp.min(least))
        greatest = jnp.full_like(greatest, jnp.max(greatest))
    columns = 1
    if how.method == "grid":
        columns = how.candidates * (2 * max_shift(spec) if spec.scheme == "asymmetric" else 1)
    return SearchState(least, greatest, least, greatest, jnp.zeros((x.shape[0], columns), jnp.float32), jnp.float32(1))


def averaged(state: SearchState, last: SearchState) -> SearchState:
    """Returns the state of the last batch with the mean of the ranges that were found on it and on those before."""
    batches = state.batches + 1
    ends = {end: getattr(state, end) + (getattr(last, end) - getattr(state, end)) / batches for end in ("low", "high")}
    return last._replace(**ends, batches=batches)


def _sampled(x: jax.Array, weight: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns at most `count` elements of every row, `[rows, count]`; the steps have no factor in common with the length."""
    length = math.prod(x.shape[1:])
    if length <= count:
        return x, weight
    step = round(length * (5**0.5 - 1) / 2)
    while math.gcd(step, length) > 1:
        step += 1
    places = np.arange(count) * step % length

    def taken(v: jax.Array) -> jax.Array:
        return v.reshape(v.shape[0], length)[:, places]

    return taken(x), None if weight is None else taken(weight)


# Sites of one shape share what is traced and lowered.
@partial(jax.jit, static_argnums=0)
def search(spec: Spec, state: SearchState, x: jax.Array, weight: jax.Array | None) -> SearchState:
    """Takes one more batch into account; arguments as in `start`. NaN or infinity in a row makes its range NaN."""
    assert isinstance(spec.estimator, Search)
    seen = (x, weight) if not spec.estimator.sample else _sampled(x, weight, spec.estimator.sample)
    state = (_grid if spec.estimator.method == "grid" else _brent)(spec, state, *seen)
    finite = jnp.isfinite(x) if weight is None else jnp.isfinite(x) | (weight <= 0)
    sound = jnp.all(finite, tuple(range(1, x.ndim)))
    return state._replace(low=jnp.where(sound, state.low, jnp.nan), high=jnp.where(sound, state.high, jnp.nan))
