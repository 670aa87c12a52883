"""The bounded minimiser against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from qtx import quant

FUNCTIONS = {
    "parabola": (lambda x, m: (x - 0.37) ** 2 + 1, 0.0, 1.0),
    "kink": (lambda x, m: m.abs(x - 0.8) + 0.1 * x, -2.0, 3.0),
    "many minima": (lambda x, m: m.sin(5 * x) + 0.3 * x, -2.0, 4.0),
    "minimum on the edge": (lambda x, m: x, 1.0, 2.0),
    "flat": (lambda x, m: 0 * x, -1.0, 1.0),
    "steps": (lambda x, m: m.round(x * 3) ** 2 + 0.0, -4.0, 5.0),
    "quartic far out": (lambda x, m: (x - 5e3) ** 4, 0.0, 1e4),
}


@pytest.mark.parametrize("tolerance", [1e-5, 1e-2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_like_scipy(name, tolerance):
    function, low, high = FUNCTIONS[name]
    want = optimize.minimize_scalar(
        lambda x: function(x, np), bounds=(low, high), method="bounded", options={"xatol": tolerance}
    )
    with jax.enable_x64(True):
        got = quant.minimize_bounded(lambda x: function(x, jnp), jnp.float64(low), jnp.float64(high), tolerance)
    assert int(got.evaluations) == want.nfev
    np.testing.assert_allclose(got.x, want.x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.fun, want.fun, rtol=1e-9, atol=1e-9)
    assert got.points is None


def test_points_in_order():
    seen = []

    def function(x):
        seen.append(float(x))
        return (x - 0.3) ** 2 + np.sin(9 * x)

    optimize.minimize_scalar(function, bounds=(0, 2), method="bounded")
    with jax.enable_x64(True):
        got = quant.minimize_bounded(
            lambda x: (x - 0.3) ** 2 + jnp.sin(9 * x),
            jnp.float64(0),
            jnp.float64(2),
            max_evaluations=60,
            keep_points=True,
        )
    assert got.points.shape == (60,)
    np.testing.assert_allclose(got.points[: len(seen)], seen, atol=1e-9)
    assert np.all(np.isnan(got.points[len(seen) :]))


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_stops_at_the_limit(limit):
    got = quant.minimize_bounded(lambda x: jnp.sin(5 * x), jnp.float32(-2), jnp.float32(4), max_evaluations=limit)
    assert int(got.evaluations) == limit


def test_maps_over_rows_and_runs_in_float32():
    centres = jnp.array([0.1, 0.5, 0.9], jnp.float32)
    got = jax.jit(jax.vmap(lambda c: quant.minimize_bounded(lambda x: (x - c) ** 2, jnp.float32(0), jnp.float32(1))))(
        centres
    )
    assert got.x.dtype == jnp.float32
    np.testing.assert_allclose(got.x, centres, atol=1e-4)
    assert np.all(np.asarray(got.evaluations) < 50)


def test_never_leaves_the_interval():
    with jax.enable_x64(True):
        got = quant.minimize_bounded(lambda x: -x, jnp.float64(0.01), jnp.float64(1), keep_points=True)
    points = np.asarray(got.points)[: int(got.evaluations)]
    assert np.all((points >= 0.01) & (points <= 1)) and points.max() > 0.9999
