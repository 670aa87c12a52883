"""Adaptive rounding: the relaxation, the error as a quadratic form, and descent on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.quant import rounding

SPECS = {
    "symmetric": quant.symmetric(3),
    "per channel": quant.symmetric(4, quant.per_channel(-1)),
    "asymmetric": quant.asymmetric(3),
    "per input": quant.asymmetric(2, quant.per_channel(0)),
    "groups of inputs": quant.symmetric(2, quant.per_group(3, axis=0)),
}


def layer(seed, rows=200, inputs=39, outputs=5):
    """Correlated inputs, drifted ones, and a kernel whose first output has an outlier."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs))
    x0 = (rng.standard_normal((rows, inputs)) @ mix).astype(np.float32)
    x = (x0 + 0.1 * rng.standard_normal(x0.shape)).astype(np.float32)
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    w[3, 0] = 6
    return jnp.asarray(x), jnp.asarray(x0), jnp.asarray(w)


def direct(x, x0, quantized, w):
    """The error of every output, in float64."""
    x, x0, quantized, w = (np.asarray(v, np.float64) for v in (x, x0, quantized, w))
    return np.sum((x @ quantized - x0 @ w) ** 2, 0)


@pytest.mark.parametrize("mode", rounding.MODES)
def test_relaxation_starts_at_the_weight(mode):
    fraction = jnp.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(rounding.relax(mode, rounding.unrelax(mode, fraction, 20.0), 20.0), fraction, rtol=1e-5)


def test_rectified_sigmoid_reaches_zero_and_one_and_stops_there():
    ends = rounding.rectified_sigmoid(jnp.array([-20.0, 20.0]))
    np.testing.assert_array_equal(ends, [0, 1])
    slope = jax.grad(lambda a: rounding.rectified_sigmoid(a))
    assert slope(jnp.float32(-20.0)) == 0 and slope(jnp.float32(0.0)) == pytest.approx(0.3)


@pytest.mark.parametrize("name", SPECS)
def test_weights_between_their_neighbours(name):
    spec, w = SPECS[name], layer(0)[2]
    params = quant.estimate(spec, w)
    fraction = rounding.fraction_above_floor(spec, w, params)
    assert np.all((fraction >= 0) & (fraction < 1))
    below, above = (rounding.codes_above_floor(spec, w, params, v) for v in (0.0, 1.0))
    nearest = quant.quantize(spec, w, params)[0]
    assert np.all((nearest == below) | (nearest == above)) and np.all((above - below == 1) | (above == below))
    inside = np.asarray(above > below)  # where the grid ends, both neighbours are its end
    np.testing.assert_allclose(rounding.weights_above_floor(spec, w, params, fraction)[inside], w[inside], atol=1e-5)
    assert inside.mean() > 0.7


def test_output_error_is_the_error_of_the_outputs():
    x, x0, w = layer(1)
    quantized = quant.fake_quant(SPECS["symmetric"], w, quant.estimate(SPECS["symmetric"], w))
    error = rounding.OutputError.of(x, x0)
    np.testing.assert_allclose(error(quantized, w), direct(x, x0, quantized, w), rtol=1e-4)
    halves = [rounding.OutputError.of(x[part], x0[part]) for part in (slice(0, 90), slice(90, None))]
    np.testing.assert_allclose(jax.tree.map(jnp.add, *halves)(quantized, w), error(quantized, w), rtol=1e-4)


@pytest.mark.parametrize("moves", ["neighbours", "grid"])
@pytest.mark.parametrize("name", SPECS)
def test_descent_ends_where_no_single_move_helps(name, moves):
    """Every output's error is at most that of nearest rounding, and no weight has a better place."""
    spec, (x, x0, w) = SPECS[name], layer(2)
    params = quant.estimate(spec, w)
    found = rounding.descend(spec, w, params, rounding.OutputError.of(x, x0), moves, 100)
    nearest = quant.fake_quant(spec, w, params)
    best = direct(x, x0, found, w)
    assert np.all(best <= direct(x, x0, nearest, w) * (1 + 1e-5))
    assert best.sum() < 0.9 * direct(x, x0, nearest, w).sum()
    np.testing.assert_array_equal(quant.fake_quant(spec, found, params), found)  # it lies on the grid
    codes, scale, zero = (np.asarray(v) for v in quant.quantize(spec, found, params))
    low, high = (np.asarray(rounding.codes_above_floor(spec, w, params, v)) for v in (0.0, 1.0))
    if moves == "neighbours":
        assert np.all((codes == low) | (codes == high))
    for j in range(w.shape[0]):
        for step in (-1, 1):
            moved = codes.astype(np.float64).copy()
            moved[j] += step
            if moves == "neighbours":
                moved[j] = np.clip(moved[j], low[j], high[j])
            else:
                signed = spec.scheme == "symmetric"
                moved[j] = np.clip(moved[j], -(2 ** (spec.bits - 1)) if signed else 0, 2 ** (spec.bits - signed) - 1)
            assert np.all(direct(x, x0, scale * (moved - zero), w) >= best * (1 - 1e-4))


def test_inputs_that_are_always_zero_leave_their_weights_nearest():
    spec, (x, x0, w) = SPECS["symmetric"], layer(3)
    x, x0 = x.at[:, 7].set(0), x0.at[:, 7].set(0)
    params = quant.estimate(spec, w)
    found = rounding.descend(spec, w, params, rounding.OutputError.of(x, x0))
    np.testing.assert_array_equal(found[7], quant.fake_quant(spec, w, params)[7])
    assert np.all(np.isfinite(found))


def test_independent_inputs_are_rounded_to_nearest():
    """With orthogonal inputs the output error is the error of the weights."""
    spec, w = SPECS["symmetric"], layer(4)[2]
    params = quant.estimate(spec, w)
    x = jnp.eye(w.shape[0]) * jnp.linspace(1, 2, w.shape[0])
    found = rounding.descend(spec, w, params, rounding.OutputError.of(x, x))
    np.testing.assert_array_equal(found, quant.fake_quant(spec, w, params))
