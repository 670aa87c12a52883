"""Uniform grids: from a range to scale and zero point, and from floats to integers and back.

Notation: `b` bits, scale `s`, zero point `z`, `[.]` rounds half to even.

    asymmetric    q in [0, 2^b - 1]             x_q = s (clip([x/s] + [z], 0, 2^b - 1) - [z])
    symmetric     q in [-2^(b-1), 2^(b-1) - 1]  x_q = s clip([x/s], q_min, q_max)
    one-sided     q in [0, 2^b - 1]             when a symmetric range has no negative part
    full          q in [-2^(b-1), 2^(b-1) - 1], one-sided or not, and s = 2 max|x| / (2^b - 1)
    narrow        q in [1 - 2^(b-1), 2^(b-1) - 1], otherwise as symmetric, one-sided or not
    offset        q in [0, 2^b - 1]             x_q = s [(clip(x, low, high) - low)/s] + low
    shifted       as published in the AG_NEWS study: s trunc(clip(x, low, high)/s) + low, all gradient passes

Rounding comes before the integer zero point is added, and the zero point is stored as a real number, so that both can be
trained independently (reference: Bondarenko et al. 2021, section 2). The last two store `z = -low/s` and never round it.
Stochastic rounding adds `(u - 1/2) s` with uniform `u` before rounding to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qtx.errors import UserError
from qtx.quant import codebook, rows, ste
from qtx.quant.exact import divide
from qtx.quant.spec import Spec


class QParams(NamedTuple):
    """The stored parameters of one quantizer.

    Attributes:
      scale: `[rows]` or a scalar; in the spec's scale domain, before the floor.
      zero_point: like `scale`; a real number, rounded when it is read. Zeros for symmetric grids.
      signed: scalar bool; symmetric grids only: one decision for all rows (narrow and full ones always are).
      group: `[d]` int32, the group of each channel, or None; permuted groups only.
      top: like `scale`, the upper end of the range in steps, whose last bit decides on the greatest level; `'shifted'` only.
    """

    scale: jax.Array
    zero_point: jax.Array
    signed: jax.Array
    group: jax.Array | None = None
    top: jax.Array | None = None

    def stored(self) -> dict[str, jax.Array | None]:
        """Returns the fields by name, as a collection of ranges has them: without `top` where there is none."""
        found = self._asdict()
        return found if self.top is not None else {name: value for name, value in found.items() if name != "top"}


def limits(spec: Spec, signed: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    """Returns the least and greatest integer of the grid as float32 scalars."""
    full = float(2**spec.bits - 1)
    if spec.has_zero_point:
        return jnp.float32(0), jnp.float32(full)
    if spec.scheme == "narrow":
        return jnp.float32(1 - 2 ** (spec.bits - 1)), jnp.float32(2 ** (spec.bits - 1) - 1)
    half = float(2 ** (spec.bits - 1))
    return jnp.where(signed, jnp.float32(-half), 0), jnp.where(signed, jnp.float32(half - 1), jnp.float32(full))


def to_domain(spec: Spec, scale: jax.Array) -> jax.Array:
    """Maps a positive scale to what is stored."""
    if spec.scale_domain == "log":
        return jnp.log(scale)
    if spec.scale_domain == "softplus":
        return scale + jnp.log(-jnp.expm1(-scale))
    return scale


def effective_scale(spec: Spec, stored: jax.Array) -> jax.Array:
    """Maps what is stored to the scale in use: floored (gradient 1 at and above the floor), `exp` or `softplus`."""
    if spec.scale_domain == "log":
        return jnp.exp(stored)
    if spec.scale_domain == "softplus":
        return jax.nn.softplus(stored)
    return jnp.where(stored < spec.eps, jnp.asarray(spec.eps, stored.dtype), stored)  # NaN stays NaN


def effective_zero_point(spec: Spec, stored: jax.Array) -> jax.Array:
    """Rounds the stored zero point onto the grid; straight-through inside, no gradient beyond."""
    if spec.scheme in ("offset", "shifted"):
        return stored
    if spec.scheme != "asymmetric":
        return jnp.zeros_like(stored)
    return ste.clip_ste(ste.round_ste(stored), 0.0, float(2**spec.bits - 1))


def qparams(spec: Spec, low: jax.Array, high: jax.Array, group: jax.Array | None = None) -> QParams:
    """Turns a range into scale and zero point.

    Zero is always representable, but for `'offset'` and `'shifted'`: `low` is pulled down to 0 and `high` up to `eps`.

    Args:
      spec: a uniform spec.
      low: `[rows]` or a scalar.
      high: like `low`.
      group: kept with the parameters, for permuted groups.
    """
    dtype = jnp.promote_types(jnp.result_type(low, high), jnp.float32)
    low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    if spec.scheme in ("offset", "shifted"):
        step = jnp.maximum(divide(high - low, float(2**spec.bits - 1)), spec.eps)
        top = divide(high, step) if spec.scheme == "shifted" else None
        return QParams(to_domain(spec, step), divide(-low, step), jnp.asarray(False), group, top)
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, spec.eps)
    if spec.scheme == "asymmetric":
        step = divide(high - low, float(2**spec.bits - 1))
        return QParams(to_domain(spec, step), divide(-low, step), jnp.asarray(False), group)
    signed = jnp.asarray(True) if spec.scheme in ("narrow", "full") else jnp.any(low < 0)
    q_max = 2 ** (spec.bits - 1) - 0.5 if spec.scheme == "full" else limits(spec, signed)[1]
    step = divide(jnp.maximum(jnp.abs(low), high), q_max)
    return QParams(to_domain(spec, step), jnp.zeros_like(step), signed, group)


class Affine(NamedTuple):
    """`QParams` as they are used: effective, on the grid, broadcastable to the tensor."""

    scale: jax.Array
    zero_point: jax.Array
    q_min: jax.Array
    q_max: jax.Array


def affine(spec: Spec, params: QParams, shape: tuple[int, ...]) -> Affine:
    """Returns scale, integer zero point and limits, ready to broadcast against a tensor of `shape`."""
    scale = effective_scale(spec, params.scale)
    zero_point = effective_zero_point(spec, params.zero_point)
    q_min, q_max = limits(spec, params.signed)
    scale = rows.expand(scale, spec.granularity, shape, params.group)
    return Affine(scale, rows.expand(zero_point, spec.granularity, shape, params.group), q_min, q_max)


def fake_quant(
    spec: Spec,
    x: jax.Array,
    params: QParams | None = None,
    noise: jax.Array | None = None,
    progress: jax.Array | float = 1.0,
    curvature: jax.Array | None = None,
) -> jax.Array:
    """Puts `x` on its grid and back, with straight-through gradients.

    Args:
      spec: with concrete axes; its `range` decides whether scale and zero point receive gradients.
      x: any float tensor; 16-bit floats are quantized in float32 arithmetic.
      params: from `qparams`; not used by codebooks, which take their scale from `x`.
      noise: uniform in [0, 1), of the shape of `x`, for stochastic rounding; None: to nearest.
      progress: of training, in [0, 1], for codebooks that depend on it.
      curvature: not negative, of the shape of `x`: the weights of its errors, for `'loss_aware'`; None: all the same.

    Returns:
      Same shape and dtype as `x`.
    """
    x = _clipped(spec, x)
    if spec.is_codebook:
        return codebook.fake_quant(spec, x, noise, progress, curvature)
    assert params is not None, "uniform grids need QParams"
    learned = spec.range == "learned"
    if learned and spec.range_gradient == "lsq":
        params = _lsq(spec, params, x)
    grid = affine(spec, params if learned else jax.lax.stop_gradient(params), x.shape)
    if spec.scheme == "shifted":
        top = None if params.top is None else rows.expand(params.top, spec.granularity, x.shape, params.group)
        return _shifted(spec, x, grid, top)
    if noise is not None:
        x = x + ((noise - 0.5) * jax.lax.stop_gradient(grid.scale)).astype(x.dtype)
    estimator = ste.uniform_fixed
    if learned:
        estimator = ste.uniform_compact if spec.backward == "compact" else ste.uniform
    if spec.scheme == "offset":
        low = (-grid.scale * grid.zero_point).astype(x.dtype)
        return estimator(_above(x, low), *grid._replace(zero_point=jnp.zeros_like(grid.zero_point))) + low
    return estimator(x, *grid)


def _clipped(spec: Spec, x: jax.Array) -> jax.Array:
    return x if spec.clip is None else ste.clip_inside(x, *spec.clip)


def _above(x: jax.Array, low: jax.Array) -> jax.Array:
    """Returns `x - low`, or 0 where that is no more than the rounding of `low`, which is made from scale and zero point.

    Without this, an element that equals `low` would be steps below the grid if these are small: constants have the smallest.
    """
    difference = x - low
    rounding = jnp.finfo(difference.dtype).eps * jnp.abs(low)
    return ste.identity_ste(difference, jnp.where(jnp.abs(difference) <= rounding, 0, difference))


def _shifted(spec: Spec, x: jax.Array, grid: Affine, top: jax.Array | None) -> jax.Array:
    scale, low = grid.scale, -grid.zero_point
    level = jnp.clip(divide(x.astype(scale.dtype), scale), low, low + grid.q_max if top is None else top)
    level = jnp.floor(level) if spec.rounding == "floor" else jnp.trunc(level)
    return ste.identity_ste(x, (scale * level + scale * low).astype(x.dtype))


def _lsq(spec: Spec, params: QParams, x: jax.Array) -> QParams:
    """Scales the gradients of a range by `1 / sqrt(n q_max)`, with `n` elements to a range (Esser et al. 2020, section 2.2)."""
    _, q_max = limits(spec, params.signed)
    factor = jax.lax.rsqrt(q_max * (x.size / (rows.row_count(spec.granularity, x.shape) or 1)))
    scale, zero_point = (ste.scale_gradient(v, factor) for v in (params.scale, params.zero_point))
    return params._replace(scale=scale, zero_point=zero_point)


def fake_quant_rows(
    spec: Spec,
    table: jax.Array,
    ids: jax.Array,
    params: QParams | None = None,
    noise: jax.Array | None = None,
    progress: jax.Array | float = 1.0,
) -> jax.Array:
    """Returns `fake_quant(spec, table, ...)[ids]`, quantizing only the rows that are looked up where that is the same.

    Args:
      spec: with concrete axes.
      table: `[rows, dim]`.
      ids: int `[...]`.
      params: of the whole table.
      noise: see `fake_quant`, of the shape of the table.
      progress: see `fake_quant`.

    Returns:
      `[..., dim]`.
    """
    granularity = spec.granularity
    rows_apart = granularity.axis == 0 and granularity.groups is None
    by_row = rows_apart or (granularity.axis is None and not spec.is_codebook)
    if not by_row or noise is not None:
        return jnp.take(fake_quant(spec, table, params, noise, progress), ids, axis=0)
    flat = ids.reshape(-1)
    if params is not None and rows_apart:
        top = None if params.top is None else params.top[flat]
        params = params._replace(scale=params.scale[flat], zero_point=params.zero_point[flat], top=top)
    looked_up = fake_quant(spec, jnp.take(table, flat, axis=0), params, None, progress)
    return looked_up.reshape(*ids.shape, table.shape[1])


def quantize(
    spec: Spec, x: jax.Array, params: QParams | None = None, curvature: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the integers of `x` with what is needed to read them: `x_q = scale (integers - zero_point)`.

    Args:
      spec: with concrete axes.
      x: any float tensor.
      params: from `qparams`; None for codebooks.
      curvature: see `fake_quant`.

    Returns:
      int32 integers of the shape of `x`; scale; zero point. The last two broadcast against `x`.

    Raises:
      UserError: for `'shifted'` and `'tanh'`, whose values are not of this form.
    """
    x = _clipped(spec, x)
    if spec.is_codebook:
        codes, scale = codebook.codes(spec, x, curvature=curvature)
        return codes.astype(jnp.int32), scale, jnp.zeros_like(scale)
    assert params is not None, "uniform grids need QParams"
    scale, zero_point, q_min, q_max = affine(spec, params, x.shape)
    if spec.scheme == "shifted":
        raise UserError(
            "scheme 'shifted' has no integers that stand for its values; use 'offset' or 'asymmetric' to pack them"
        )
    if spec.scheme == "offset":
        _, level = ste._levels(_above(x, -scale * zero_point), scale, jnp.zeros_like(zero_point), q_min, q_max)
    else:
        _, level = ste._levels(x, scale, zero_point, q_min, q_max)
    return level.astype(jnp.int32), scale, zero_point


def dequantize(integers: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Returns `scale (integers - zero_point)` in the dtype of `scale`."""
    return scale * (integers.astype(scale.dtype) - zero_point)
