"""Grids whose scale comes from the tensor itself, at every call.

    ternary     t = 0.7 mean|x|, codes sign(x) [|x| > t], scale = mean of |x| over the non-zero codes   (Li et al. 2016)
    binary      codes sign(x) with sign(0) = +1, scale = mean|x|                                  (Rastegari et al. 2016)
    twn         h = mean of |x| above mean|x|, codes [clip(x, -h, h) / s], scale s = 2 h / (2^b - 1)
    loss_aware  n = 2^(b-1) - 1, codes k from sign(x) on: a = sum |k| d |x| / sum |k| d and k = [n clip(x/a, -1, 1)] in turn,
                scale = a / n; d is the curvature of the loss, or 1                (Hou and Kwok 2018, section 3.2)
    magnitude   s = 2^b - 1, l = s |x| / max|x|, codes sign(x) (floor(l) + m) with m in {0, 1}, scale = max|x| / s;
                m is 1 with probability l - floor(l) if rounding is stochastic             (Alistarh et al. 2017, QSGD);
                with scale='norm' the Euclidean norm stands for max|x|, as in the paper
    absmean     scale m = max(mean|x|, eps), codes [x / m] within -1..1, -2..1 or -2..2 for 3, 4 or 5 states; of 2 states
                sign(x - mean x), with sign(0) = 0                              (Ma et al. 2024; BitTransGNN, section 2.1)

Means run over the elements that share a range. A row of zeros has scale 0 and stays zero; a row with a NaN is NaN.
The codes of `twn` go from -2^(b-1) to 2^(b-1), more than b bits hold: 2 h / s is odd and half of it is rounded up (Kim et al.
2022, "Understanding and improving knowledge distillation for QAT of large transformer encoders", for 4 to 7 bits).

IR-Net (Qin et al. 2020) is a binary grid of `(x - mean) / std` of every row, whose scale is a power of two, with the
gradient of `k tanh(t .)` instead of that of the sign: `t` grows from 0.1 to 10 in training, `k = max(1 / t, 1)` (section 3.3).

By the names of what was published (AG_NEWS study, Compressed Transformers): `sign`, signs without a scale, sign(0) = 0, whose
gradient passes where |x| <= 1; `magnitude_int8`, codes modulo 256 in [-128, 127]; `tanh`, the whole tensor standardised,
`k tanh(t .)` as the value, and a gradient that knows nothing of the standardisation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qtx.errors import UserError
from qtx.quant import rows, ste
from qtx.quant.exact import divide
from qtx.quant.spec import Granularity, Spec

TERNARY_THRESHOLD = 0.7
_DECADES = {"binary": 2.0, "ternary": 2.0, "tanh": math.log(100.0)}  # of growth; as published, the wrong logarithm


def error_decay(progress: jax.Array | float, scheme: str = "binary") -> tuple[jax.Array, jax.Array]:
    """Returns `t` and `k` of the error decay estimator (Qin et al. 2020, eq. 12).

    Args:
      progress: of training, in [0, 1].
      scheme: `'binary'`: `t = 0.1 * 10^(2 progress)`; `'tanh'`, as published: `0.1 * 10^(ln(100) progress)`.
    """
    t = 0.1 * 10.0 ** (jnp.asarray(progress, float) * _DECADES[scheme])
    return t, jnp.maximum(1 / t, 1)


def standardized(x: jax.Array, granularity: Granularity) -> jax.Array:
    """Returns `(x - mean) / std` of every row, with the unbiased standard deviation; a constant row is zero."""
    whole = rows.to_rows(x, granularity)
    count = whole.size // whole.shape[0]
    centred = x - rows.mean(x, granularity)
    variance = rows.mean(jnp.square(centred), granularity) * (count / max(count - 1, 1))
    constant = variance <= 0
    return jnp.where(constant, 0, divide(centred, jnp.sqrt(jnp.where(constant, 1, variance))))


def codes(
    spec: Spec, x: jax.Array, noise: jax.Array | None = None, curvature: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of `x` (whole numbers as floats, same shape) and their scale (broadcastable to `x`).

    Args:
      spec: a codebook with concrete axes.
      x: any float tensor.
      noise: uniform in [0, 1), of the shape of `x`, for stochastic rounding; None: to nearest.
      curvature: not negative, of the shape of `x`, for `'loss_aware'`; None: the same everywhere.

    Raises:
      UserError: for `'tanh'`, which has no codes.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if spec.scheme == "tanh":
        raise UserError(
            "scheme 'tanh' has no codes: its weights are real numbers; train with qtx.ir_net() to pack them"
        )
    if spec.scheme in ("magnitude", "magnitude_int8"):
        return _magnitude_codes(spec, x, noise)
    if spec.scheme == "sign":
        return jnp.sign(x), jnp.ones((), x.dtype)
    if spec.scheme == "loss_aware":
        return _loss_aware(spec, jax.lax.stop_gradient(x), curvature)
    if spec.scheme == "twn":
        return _twn(spec, x)
    if spec.scheme == "absmean":
        return _absmean(spec, x)
    return _signs(spec, standardized(x, spec.granularity) if spec.standardize else x)


def _signs(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    magnitude = jnp.abs(x)
    if spec.scheme == "binary":
        found, scale = jnp.where(x >= 0, 1.0, -1.0), rows.mean(magnitude, spec.granularity)
    else:
        keep = magnitude > TERNARY_THRESHOLD * rows.mean(magnitude, spec.granularity)
        found, scale = jnp.sign(x) * keep, rows.mean(magnitude, spec.granularity, where=keep)
    if spec.scale == "one":
        scale = jnp.ones_like(scale)
    elif spec.scale == "shift":
        scale = jnp.where(scale > 0, jnp.exp2(jnp.round(jnp.log2(jnp.where(scale > 0, scale, 1)))), 0)
    return found, scale


def _nonzero(x: jax.Array) -> jax.Array:
    """Returns divisors, 1 in the place of 0."""
    return jnp.where(x == 0, 1, x)


def _twn(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    magnitude = jnp.abs(x)
    mean = rows.mean(magnitude, spec.granularity)
    end = rows.mean(magnitude, spec.granularity, where=magnitude > mean)
    end = jnp.where(end == 0, mean, end)  # all magnitudes are the same
    scale = divide(2 * end, float(2**spec.bits - 1))
    return jnp.round(divide(jnp.clip(x, -end, end), _nonzero(scale))), scale


def _absmean(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = jnp.maximum(rows.mean(jnp.abs(x), spec.granularity), spec.eps)
    if spec.states == 2:
        # A mean lies between the extremes, whatever is rounded: that of constants is all of them.
        low, high = -rows.largest(-x, spec.granularity), rows.largest(x, spec.granularity)
        return jnp.sign(x - jnp.clip(rows.mean(x, spec.granularity), low, high)), scale
    assert spec.states is not None
    least = -(spec.states // 2)
    return jnp.clip(jnp.round(divide(x, _nonzero(scale))), least, least + spec.states - 1), scale


def _loss_aware(spec: Spec, x: jax.Array, curvature: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    levels, magnitude = float(2 ** (spec.bits - 1) - 1), jnp.abs(x)

    def best_scale(found: jax.Array) -> jax.Array:
        weight = jnp.abs(found) if curvature is None else jnp.abs(found) * curvature.astype(x.dtype)
        total = rows.mean(weight, spec.granularity)
        return divide(rows.mean(weight * magnitude, spec.granularity), _nonzero(total))

    def nearest(scale: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(divide(x, _nonzero(scale)), -1, 1) * levels)

    found = jax.lax.fori_loop(1, spec.iterations, lambda _, found: nearest(best_scale(found)), jnp.sign(x))
    scale = best_scale(found)
    return nearest(scale), divide(scale, levels)


def _magnitude_codes(spec: Spec, x: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    levels = float(2**spec.bits - 1)
    largest = (rows.norm if spec.scale == "norm" else rows.largest)(jnp.abs(x), spec.granularity)
    level = divide(jnp.abs(x), jnp.where(largest > 0, largest, 1)) * levels
    if noise is None:
        whole = jnp.round(level)
    else:
        whole = jnp.floor(level)
        whole = whole + (noise < jnp.clip(level - whole, 0, 1))
    found = jnp.sign(x) * whole
    if spec.scheme == "magnitude_int8":
        found = jnp.mod(found + 128, 256) - 128
    return found, divide(largest, levels)


def fake_quant(
    spec: Spec,
    x: jax.Array,
    noise: jax.Array | None = None,
    progress: jax.Array | float = 1.0,
    curvature: jax.Array | None = None,
) -> jax.Array:
    """Puts `x` on its grid and back; `spec.gradient` says what passes backwards, the scale is a constant.

    Args:
      spec: a codebook with concrete axes.
      x: any float tensor.
      noise: see `codes`.
      progress: of training, in [0, 1], for schemes and gradients that depend on it.
      curvature: see `codes`.

    Returns:
      Same shape and dtype as `x`.
    """
    if spec.scheme == "tanh":
        t, k = error_decay(progress, "tanh")
        soft = jnp.tanh(t * standardized(x, spec.granularity))
        return ste.scaled_ste(x, (k * soft).astype(x.dtype), k * t * (1 - soft * soft))
    found, scale = codes(spec, x, noise, curvature)
    value = (found * scale).astype(x.dtype)
    base = standardized(x, spec.granularity) if spec.standardize else x
    if spec.gradient == "decay":
        t, k = error_decay(progress)
        return ste.scaled_ste(base, value, scale * k * t * (1 - jnp.square(jnp.tanh(t * base))))
    if spec.gradient == "clipped" or spec.scheme == "sign":
        return ste.scaled_ste(base, value, (jnp.abs(base) <= 1).astype(base.dtype))
    return ste.identity_ste(base, value)
