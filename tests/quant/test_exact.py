import jax
import numpy as np

from qtx.quant.exact import divide


def test_division_by_a_scalar_is_correctly_rounded_compiled_or_not():
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    for y in np.float32([0.1, 3.0, 7e-5, 1234.5]):
        true = (x.astype(np.float64) / np.float64(y)).astype(np.float32)
        np.testing.assert_array_equal(divide(x, y), true)
        np.testing.assert_array_equal(jax.jit(divide)(x, y), true)
        np.testing.assert_array_equal(jax.jit(lambda x, y=y: divide(x, float(y)))(x), true)


def test_a_quotient_is_divided_again_and_not_by_a_product():
    a, b, c = np.random.default_rng(0).uniform(0.5, 2, (3, 4096)).astype(np.float32)
    for divisor in (c, c[0], float(c[0])):
        want = (a / b) / np.float32(divisor)
        np.testing.assert_array_equal(jax.jit(lambda a, b, c=divisor: divide(a / b, c))(a, b), want)
        np.testing.assert_array_equal(jax.jit(lambda a, b, c: divide(a / b, c))(a, b, divisor), want)


def test_division_by_rows_and_of_special_values():
    x = np.float32([[1.0, np.nan, np.inf], [0.0, -np.inf, 5.0]])
    y = np.float32([[3.0], [7.0]])
    np.testing.assert_array_equal(jax.jit(divide)(x, y), x / y)
