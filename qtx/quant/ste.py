"""Straight-through estimators: rounding and clamping whose gradients are chosen, not derived.

`jnp.clip` splits the gradient at ties and `lax.clamp` drops it, but a min-max range puts the extreme element exactly on
the edge every time. The masks of grids are inclusive: an element on the edge keeps its gradient. That of `clip_inside` is not.

Every forward rule computes its value by the function that it belongs to. JAX differentiates the code of a forward rule when a
gradient is differentiated again, and so finds the straight-through rule there, too, and not the zero slope of rounding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from qtx.quant.exact import divide


@jax.custom_vjp
def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even; the gradient passes unchanged."""
    return jnp.round(x)


round_ste.defvjp(lambda x: (round_ste(x), None), lambda _, g: (g,))


@jax.custom_vjp
def scale_gradient(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Returns `x`; its gradient is multiplied by `factor`."""
    del factor
    return x


scale_gradient.defvjp(
    lambda x, factor: (scale_gradient(x, factor), factor), lambda factor, g: (g * factor, jnp.zeros_like(factor))
)


def clip_ste(x: jax.Array, low: jax.Array | float, high: jax.Array | float) -> jax.Array:
    """Clamps `x`; the gradient is 1 inside and on both edges, 0 strictly outside."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def clip_inside(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clamps `x`; the gradient is 1 strictly inside, 0 on both edges and beyond. NaN stays NaN."""
    return jnp.where((x > low) & (x < high), x, jnp.clip(jax.lax.stop_gradient(x), low, high))


@jax.custom_vjp
def identity_ste(x: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns `quantized` forward and sends the whole gradient to `x`."""
    del x
    return quantized


identity_ste.defvjp(lambda x, q: (identity_ste(x, q), None), lambda _, g: (g, jnp.zeros_like(g)))


@jax.custom_vjp
def scaled_ste(x: jax.Array, quantized: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `quantized` forward and sends the gradient, times `factor` (of the shape of `x`), to `x`."""
    del x, factor
    return quantized


def _scaled_bwd(saved, g):
    factor, like = saved
    return (g * factor).astype(like.dtype), jnp.zeros_like(g), jnp.zeros_like(factor)


scaled_ste.defvjp(lambda x, q, f: (scaled_ste(x, q, f), (f, jnp.zeros((), x.dtype))), _scaled_bwd)


def _sums_to(a: jax.Array, b: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums two tensors over the axes along which `like` was broadcast.

    As one reduction, which XLA fuses with what computes the tensors. Two of them become calls of a library on CPU, for which
    both tensors are written to memory. The last axis comes last: sums into a vector run over all lanes of a processor.
    """
    lead = a.ndim - like.ndim
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(like.shape) if n == 1 and a.shape[lead + i] != 1)
    rows = tuple(axis for axis in axes if axis != a.ndim - 1)

    def by_parts(a, b):
        return _add_up(_few_rows(a, b) if a.ndim - 2 in rows else (a, b), rows)

    totals = jax.lax.platform_dependent(a, b, cpu=by_parts, default=lambda a, b: _add_up((a, b), rows))
    if a.ndim - 1 in axes:
        totals = _add_up(totals, (totals[0].ndim - 1,))
    return totals[0].reshape(like.shape).astype(like.dtype), totals[1].reshape(like.shape).astype(like.dtype)


def _add_up(pair: tuple[jax.Array, jax.Array], axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Sums both tensors over `axes` in one reduction."""
    zeros = (jnp.zeros((), pair[0].dtype), jnp.zeros((), pair[1].dtype))
    return jax.lax.reduce(pair, zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)


def _few_rows(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums up to eight rows (of the axis before the last) at a time until few are left.

    XLA's CPU compiler sums one column after the other. With many rows every element is then in a page of memory of its own,
    which took six times as long. Nothing but that axis is split, as batches may be spread over devices.
    """
    pair = a, b
    while (rows := pair[0].shape[-2]) > 8 and (few := max(n for n in range(1, 9) if rows % n == 0)) > 1:
        a, b = (x.reshape(*x.shape[:-2], rows // few, few, x.shape[-1]) for x in pair)
        pair = _add_up((a, b), (a.ndim - 2,))
    return pair


def _stored(mask: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns a mask, or codes, and makes the compiler keep them for the backward pass.

    XLA's CPU compiler ignores optimization barriers: left alone it keeps the float tensor instead and repeats the division in
    every consumer of the gradient, at a quarter of the time of a whole train step. It cannot see through a loop that never
    runs, as scales are not negative. Elsewhere such a loop would wait for the host, and is not needed.
    """

    def behind_a_loop(mask, scale):
        return jax.lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, ~c[1]), (jnp.max(scale), mask))[1]

    return jax.lax.platform_dependent(mask, scale, cpu=behind_a_loop, default=lambda mask, scale: mask)


def _levels(x, scale, zero_point, q_min, q_max):
    """Integer grid values (as floats), clamped and not."""
    level = jnp.round(divide(x.astype(scale.dtype), scale)) + zero_point
    return level, jnp.clip(level, q_min, q_max)


@partial(jax.custom_vjp)
def uniform(x: jax.Array, scale: jax.Array, zero_point: jax.Array, q_min: jax.Array, q_max: jax.Array) -> jax.Array:
    """Fake quantization `s (clip([x/s] + z, q_min, q_max) - z)`, with gradients to `x`, the scale and the zero point.

    With `r = x/s`, upstream gradient `g` and the inclusive mask `m = q_min <= [r] + z <= q_max`:

        d/dx = g m
        d/ds = sum over sharing elements of g ([r] - r) where m, g (q_max - z) above, g (q_min - z) below
        d/dz = sum of -s g where not m

    (Esser et al. 2020 for the scale, Bhalgat et al. 2020 for the zero point; no gradient scaling.)

    Args:
      x: any tensor; arithmetic is in the dtype of `scale`, the result in that of `x`.
      scale: positive, broadcastable to `x`.
      zero_point: integer-valued, broadcastable to `x`; 0 for symmetric grids.
      q_min: least integer of the grid.
      q_max: greatest integer of the grid.

    Returns:
      The tensor on its grid, same shape and dtype as `x`.
    """
    _, level = _levels(x, scale, zero_point, q_min, q_max)
    return (scale * (level - zero_point)).astype(x.dtype)


def _uniform_fwd(x, scale, zero_point, q_min, q_max):
    level, clipped = _levels(x, scale, zero_point, q_min, q_max)
    inside = _stored(level == clipped, scale)  # NaN counts as outside
    return uniform(x, scale, zero_point, q_min, q_max), (x, inside, scale, zero_point, q_min, q_max)


def _uniform_bwd(saved, g):
    x, inside, scale, zero_point, q_min, q_max = saved
    level, _ = _levels(x, scale, zero_point, q_min, q_max)
    below, above = level < q_min, level > q_max
    ratio = divide(x.astype(scale.dtype), scale)
    g_scale = g.astype(scale.dtype)
    rounding = jnp.where(above, q_max - zero_point, jnp.where(below, q_min - zero_point, jnp.round(ratio) - ratio))
    d_scale, d_zero = _sums_to(g_scale * rounding, jnp.where(inside, 0, -scale * g_scale), scale)
    return jnp.where(inside, g, 0), d_scale, d_zero, jnp.zeros_like(q_min), jnp.zeros_like(q_max)


uniform.defvjp(_uniform_fwd, _uniform_bwd)


@jax.custom_vjp
def uniform_compact(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, q_min: jax.Array, q_max: jax.Array
) -> jax.Array:
    """`uniform` that keeps one byte an element for the backward pass instead of the tensor.

    Values and the gradients to `x` and the zero point are the same. The gradient to the scale takes `[r] - r`, in
    [-1/2, 1/2], from a grid of 252 steps: its error is at most `sum |g| / 504`, and averages out (the rounding of
    `[r] - r` has no preferred sign).
    """
    return uniform(x, scale, zero_point, q_min, q_max)


_STEPS = 252  # of the stored remainder: -126 to 126; -127 and 127 stand for below and above the grid


def _compact_fwd(x, scale, zero_point, q_min, q_max):
    ratio = divide(x.astype(scale.dtype), scale)
    whole = jnp.round(ratio)
    level = whole + zero_point
    clipped = jnp.clip(level, q_min, q_max)
    remainder = jnp.round((whole - ratio) * _STEPS)
    # NaN is outside as well: it compares with nothing.
    code = jnp.where(level == clipped, remainder, jnp.where(level < q_min, -127, 127)).astype(jnp.int8)
    y = uniform_compact(x, scale, zero_point, q_min, q_max)
    return y, (_stored(code, scale), scale, zero_point, q_min, q_max)


def _compact_bwd(saved, g):
    code, scale, zero_point, q_min, q_max = saved
    inside = jnp.abs(code) < 127
    g_scale = g.astype(scale.dtype)
    end = jnp.where(code > 0, q_max - zero_point, q_min - zero_point)
    rounding = jnp.where(inside, code.astype(scale.dtype) / _STEPS, end)
    d_scale, d_zero = _sums_to(g_scale * rounding, jnp.where(inside, 0, -scale * g_scale), scale)
    # All at once: sums that are put off until the end of the step keep `g` beside the gradient of every kernel.
    d_x, d_scale, d_zero = jax.lax.optimization_barrier((jnp.where(inside, g, 0), d_scale, d_zero))
    return d_x, d_scale, d_zero, jnp.zeros_like(q_min), jnp.zeros_like(q_max)


uniform_compact.defvjp(_compact_fwd, _compact_bwd)


@jax.custom_vjp
def uniform_fixed(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, q_min: jax.Array, q_max: jax.Array
) -> jax.Array:
    """`uniform` for ranges that are not trained: the same values and input gradient, with one saved bit per element.

    The cotangents of everything but `x` are zero.
    """
    return uniform(x, scale, zero_point, q_min, q_max)


def _fixed_fwd(x, scale, zero_point, q_min, q_max):
    level, clipped = _levels(x, scale, zero_point, q_min, q_max)
    inside = _stored(level == clipped, scale)
    return uniform_fixed(x, scale, zero_point, q_min, q_max), (inside, scale, zero_point, q_min, q_max)


def _fixed_bwd(saved, g):
    inside, *others = saved
    return jnp.where(inside, g, 0), *(jnp.zeros_like(other) for other in others)


uniform_fixed.defvjp(_fixed_fwd, _fixed_bwd)
