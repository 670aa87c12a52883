"""Products of narrow operands with wide sums, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.nn.layers import Dense
from qtx.nn.products import _sums, _sums_on_cpu, product

RNG = np.random.default_rng(3)
X, KERNEL, GRADIENT = (RNG.standard_normal(shape).astype(np.float32) for shape in ((300, 17), (17, 9), (300, 9)))
NARROW = [jnp.bfloat16, jnp.float16]


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """Returns float64 values on the grid of a type."""
    return np.asarray(jnp.asarray(x).astype(dtype), np.float64)


def derivatives(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
    value, backward = jax.vjp(product, x, kernel)
    return (value, *backward(jnp.asarray(GRADIENT, value.dtype)))


@pytest.mark.parametrize("dtype", NARROW)
def test_operands_are_rounded_and_sums_are_not(dtype):
    value, of_x, of_kernel = jax.jit(derivatives)(jnp.asarray(X, dtype), KERNEL)
    x, kernel, gradient = (rounded(a, dtype) for a in (X, KERNEL, GRADIENT))
    assert (value.dtype, of_x.dtype, of_kernel.dtype) == (jnp.float32, dtype, jnp.float32)
    # A float32 sum of N products is off by N units of 6e-8 of the sum of their magnitudes at most.
    for found, a, b in ((value, x, kernel), (of_kernel, x.T, gradient)):
        assert np.all(np.abs(found - a @ b) <= 6e-8 * a.shape[1] * (np.abs(a) @ np.abs(b)))
    np.testing.assert_allclose(np.asarray(of_x, np.float64), gradient @ kernel.T, rtol=jnp.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_plain_products(platform):
    lowered = jax.jit(derivatives).trace(jnp.asarray(X, jnp.bfloat16), KERNEL).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    results = re.findall(r"dot_general .*-> tensor<\w+x(\w+)>", text)
    assert sorted(results) == ["bf16", "bf16", "f32"]  # of the product, of the gradient of x, of that of the kernel
    assert "optimization_barrier" not in text


def test_gradient_of_the_kernel_is_finer_than_its_operands():
    of_kernel = np.asarray(derivatives(jnp.asarray(X, jnp.bfloat16), KERNEL)[2])
    assert np.mean(of_kernel != rounded(of_kernel, jnp.bfloat16)) > 0.9


def test_float32_is_the_plain_product_in_every_derivative():
    np.testing.assert_array_equal(product(X, KERNEL), jnp.asarray(X) @ KERNEL)
    for found, want in zip(derivatives(X, KERNEL)[1:], (GRADIENT @ KERNEL.T, X.T @ GRADIENT), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    hessian = jax.hessian(lambda k: 0.5 * jnp.sum(product(X, k) ** 2))(KERNEL)[:, 0, :, 0]
    np.testing.assert_allclose(hessian, X.T @ X, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axes", [(1, 0), (1, 1), (0, 0)])
def test_the_form_for_cpus_changes_nothing(axes):
    x = jnp.asarray(X if axes[0] else X.T, jnp.bfloat16)
    y = jnp.asarray(KERNEL.T if axes == (1, 1) else KERNEL, jnp.bfloat16)
    found = jax.jit(_sums_on_cpu, static_argnums=2)(x, y, axes)
    np.testing.assert_allclose(found, _sums(x, y, axes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(96, 64, 32), (920, 16, 300), (1, 16, 8), (64, 1, 8), (64, 16, 1), (1, 1, 1), (0, 4, 3)]
)
@pytest.mark.parametrize("turned", ["", "x", "kernel", "result", "x kernel result"])
def test_transposes_around_a_product(shape, turned):
    """XLA takes transposes into a product, and has no program for some of the products that this gives."""
    rows, inputs, outputs = shape
    x = jnp.asarray(RNG.standard_normal((inputs, rows) if "x" in turned else (rows, inputs)), jnp.bfloat16)
    kernel = jnp.asarray(
        RNG.standard_normal((outputs, inputs) if "kernel" in turned else (inputs, outputs)), jnp.float32
    )

    @jax.jit
    def run(x, kernel):
        def result(x, kernel):
            found = product(x.T if "x" in turned else x, kernel.T if "kernel" in turned else kernel)
            return found.T if "result" in turned else found

        value, backward = jax.vjp(result, x, kernel)
        return value, *backward(jnp.cos(value))

    wide = np.asarray(x, np.float64), rounded(kernel, jnp.bfloat16)
    a, b = (value.T if name in turned else value for name, value in zip(("x", "kernel"), wide, strict=True))
    value, of_x, of_kernel = (np.asarray(found, np.float64) for found in run(x, kernel))
    value = value.T if "result" in turned else value
    of_x = of_x.T if "x" in turned else of_x
    of_kernel = of_kernel.T if "kernel" in turned else of_kernel
    np.testing.assert_allclose(value, a @ b, rtol=1e-4, atol=1e-4)
    gradient = rounded(np.cos(value), jnp.bfloat16)
    np.testing.assert_allclose(of_x, gradient @ b.T, rtol=2.0**-7, atol=0.05)
    np.testing.assert_allclose(of_kernel, a.T @ gradient, rtol=2.0**-7, atol=0.05)


def test_many_products_at_once():
    def of_kernel(x, gradient):
        return jax.vjp(lambda k: product(x, k), jnp.asarray(KERNEL))[1](gradient)[0]

    x, gradient = jnp.asarray(X, jnp.bfloat16).reshape(4, 75, 17), jnp.asarray(GRADIENT).reshape(4, 75, 9)
    want = jnp.stack([of_kernel(*pair) for pair in zip(x, gradient, strict=True)])
    np.testing.assert_allclose(jax.vmap(of_kernel)(x, gradient), want, rtol=1e-5, atol=1e-5)


def test_bias_and_activation_of_a_narrow_layer_are_float32():
    layer = Dense(9, jnp.tanh, dtype=jnp.bfloat16)
    params = {"kernel": KERNEL, "bias": RNG.standard_normal(9).astype(np.float32)}
    want = np.tanh(rounded(X, jnp.bfloat16) @ rounded(KERNEL, jnp.bfloat16) + params["bias"])
    found = np.asarray(layer.apply({"params": params}, X), np.float64)
    # One rounding in all: half a unit in the last of eight bits.
    np.testing.assert_allclose(found, want, rtol=2.0**-8, atol=1e-6)
