"""Division that is division.

XLA turns `x / s` with a scalar `s` into `x * (1 / s)`, which is off by one unit in the last place for most `x`. Usually
that is harmless; here the last bit decides which way a value half-way between two integers rounds, and compiled,
uncompiled and integer code would disagree about it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """Returns `x / y` correctly rounded, compiled or not.

    The select makes the divisor depend on `x`, which is all that keeps the compiler from inverting it once.
    """
    return x / jnp.where(x != x, jnp.ones((), x.dtype), y)
