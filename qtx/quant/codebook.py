"""Grids of two and three values, whose scale comes from the tensor itself.

    ternary   t = 0.7 mean|x|, codes sign(x) [|x| > t], scale = mean of |x| over the non-zero codes (Li et al. 2016)
    binary    codes sign(x) with sign(0) = +1, scale = mean|x|                                     (Rastegari et al. 2016)

Means run over the elements that share a range. A row of zeros has scale 0 and stays zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qtx.quant import rows
from qtx.quant.spec import Spec

TERNARY_THRESHOLD = 0.7


def codes(spec: Spec, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of `x` (-1, 0, 1 as floats, same shape) and their scale (broadcastable to `x`)."""
    x = x.astype(jnp.float32)
    magnitude = jnp.abs(x)
    if spec.scheme == "binary":
        return jnp.where(x >= 0, 1.0, -1.0), rows.mean(magnitude, spec.granularity)
    keep = magnitude > TERNARY_THRESHOLD * rows.mean(magnitude, spec.granularity)
    return jnp.sign(x) * keep, rows.mean(magnitude, spec.granularity, where=keep)
