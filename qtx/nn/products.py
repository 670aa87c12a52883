"""Matrix products whose operands may be narrower than their sums."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x kernel`, of operands in the type of `x` and with sums of float32 at least.

    Where `x` is narrower than float32, both operands are rounded to its type, and their products are summed and returned in
    float32; accelerators round the result to the type of `x` on the way, so that half as much goes through their memory. In
    the gradients that of the result is rounded like an operand, and that of the kernel is float32, as a float32 parameter wants
    it. This is mixed precision as in Micikevicius et al. 2018 (section 3.3, https://arxiv.org/abs/1710.03740). It has a
    gradient and no forward-mode derivative; in float32 it is a plain product, which has both.

    Args:
      x: `[N, in]`.
      kernel: `[in, out]`, rounded to the type of `x`.

    Returns:
      `[N, out]`, float32 or, if that is wider, the type of `x`.
    """
    if jnp.promote_types(x.dtype, jnp.float32) == x.dtype:
        return jnp.matmul(x, kernel.astype(x.dtype))
    return _narrow(x, kernel)


def _sums(x: jax.Array, y: jax.Array, axes: tuple[int, int], result: jnp.dtype = jnp.float32) -> jax.Array:
    """Returns the product of two matrices over one axis of each, summed in float32."""
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=result)


def _sums_on_cpu(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns what `_sums` does, in a form that XLA's library for CPUs has: over the last axis of `x`.

    What it falls back to takes 2.5 times as long. XLA decides early whether the library will have a product, so nothing may
    happen to it after that: a transposed result would be taken into the product, which then fails as it runs. Hence the
    barriers. Nor does the library take a transpose by layout alone: hence the third axis.
    """
    if axes[0] == 0:
        turned = jax.lax.optimization_barrier(x.T.reshape(x.shape[1], x.shape[0], 1))
        x, axes = turned.reshape(x.shape[1], x.shape[0]), (1, axes[1])
    x, y = jax.lax.optimization_barrier((x, y))
    return jax.lax.optimization_barrier(_sums(x, y, axes))


def _rounded(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns what `_sums` does, rounded to the type of `x`; by the product itself, as XLA drops a cast and its reverse."""
    return _sums(x, y, axes, x.dtype).astype(jnp.float32)


def _by_platform(x: jax.Array, y: jax.Array, axes: tuple[int, int], elsewhere: Callable[..., jax.Array]) -> jax.Array:
    on_cpu = functools.partial(_sums_on_cpu, axes=axes)
    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=functools.partial(elsewhere, axes=axes))


@jax.custom_vjp
def _narrow(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _by_platform(x, kernel.astype(x.dtype), (1, 0), _rounded)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    of_x = _by_platform(gradient, kernel.astype(x.dtype), (1, 1), _rounded)
    of_kernel = _by_platform(x, gradient, (0, 0), _sums)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_narrow.defvjp(_forward, _backward)
