"""Division that is division.

XLA turns `x / s` with a scalar `s` into `x * (1 / s)`, and `(a / b) / s` into `a / (b * s)`: off by one unit in the last place
for most `x`. Usually that is harmless; here the last bit decides which way a value half-way between two integers rounds, and
compiled, uncompiled and integer code would disagree about it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """Returns `x / y` correctly rounded, compiled or not.

    The selects change nothing, and the compiler does not know: a divisor that depends on `x` is not inverted once, and a
    dividend that might be something else is not taken for the quotient that it is.
    """
    missing = x != x
    return jnp.where(missing, jnp.full((), jnp.nan, x.dtype), x) / jnp.where(missing, jnp.ones((), x.dtype), y)
