"""Matrix products whose operands may be narrower than their sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x kernel`, of operands in the type of `x` and with sums of float32 at least.

    Where `x` is narrower than float32, both operands are rounded to its type, and their products are summed and returned in
    float32. So it is in the gradients: that of the result is rounded like an operand, and that of the kernel is float32, as a
    float32 parameter wants it. This is mixed precision as in Micikevicius et al. 2018 (section 3.3,
    https://arxiv.org/abs/1710.03740). It has a gradient and no forward-mode derivative; in float32 it is a plain product, which
    has both.

    Args:
      x: `[N, in]`.
      kernel: `[in, out]`, rounded to the type of `x`.

    Returns:
      `[N, out]`, float32 or, if that is wider, the type of `x`.
    """
    if jnp.promote_types(x.dtype, jnp.float32) == x.dtype:
        return jnp.matmul(x, kernel.astype(x.dtype))
    return _narrow(x, kernel)


def _sums(x: jax.Array, y: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _narrow(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _sums(x, kernel.astype(x.dtype), (1, 0))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    of_x = _sums(gradient, kernel.astype(x.dtype), (1, 1)).astype(x.dtype)
    of_kernel = jax.lax.platform_dependent(x, gradient, cpu=_turned_first, default=lambda x, g: _sums(x, g, (0, 0)))
    return of_x, of_kernel.astype(kernel.dtype)


_narrow.defvjp(_forward, _backward)


def _turned_first(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns `x^T gradient`, `[in, out]`, where `x` is turned before and not within the product.

    XLA's library for CPUs has no product over the first axes of both, and what it falls back to takes 2.5 times as long. Nor
    does it take an operand that is a transpose by its layout alone: hence the third axis, and the barrier, which keeps XLA
    from taking all of this away again.
    """
    turned = jax.lax.optimization_barrier(x.T.reshape(x.shape[1], x.shape[0], 1))
    return _sums(turned.reshape(x.shape[1], x.shape[0]), gradient, (1, 0))
