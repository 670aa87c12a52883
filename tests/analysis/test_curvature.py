"""Eigenvalues, traces and densities of losses whose Hessian is known, and what stands for it with quantized weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from matplotlib import image

from qtx import quant
from qtx.analysis import curvature
from qtx.quant import estimators, grid

KEY = jax.random.key(0)
SPECTRUM = np.array([-9.0, 6.0, 4.0, 1.0, 0.5, 0.0, 0.0, 0.0], np.float32)
BASIS = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)
MATRIX = BASIS * SPECTRUM @ BASIS.T
PARAMS = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2)}}
FACTORS = jnp.asarray([0.5, 1.5])  # two batches whose mean is the matrix


def quadratic(matrix, params, factor):
    flat = ravel_pytree(params)[0]
    return factor * flat @ matrix @ flat / 2


LOSS = Partial(quadratic, jnp.asarray(MATRIX))


def test_products_are_those_of_the_mean_over_batches():
    vectors = jnp.asarray(np.random.default_rng(1).standard_normal((3, 8)), jnp.float32)
    np.testing.assert_allclose(curvature.products(LOSS, PARAMS, FACTORS, vectors), vectors @ MATRIX, atol=1e-5)
    np.testing.assert_allclose(curvature.product(LOSS, PARAMS, FACTORS, vectors[1]), vectors[1] @ MATRIX, atol=1e-5)


def test_top_eigenvalues_by_magnitude():
    found = curvature.top_eigenvalues(LOSS, PARAMS, FACTORS, KEY, 3, iterations=200, tolerance=1e-6)
    np.testing.assert_allclose(found.values, [-9, 6, 4], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(found.vectors * BASIS[:, :3].T, 1)), 1, atol=1e-2)


def power_iteration(matrix, start, iterations, tolerance):
    """As published, one eigenvalue, in float64."""
    value, v, quotients = None, start, []
    for _ in range(iterations):
        v = v / (np.linalg.norm(v) + 1e-6)
        turned = matrix @ v
        quotient = turned @ v
        quotients.append(quotient)
        v = turned / (np.linalg.norm(turned) + 1e-6)
        if value is not None and abs(value - quotient) / (abs(value) + 1e-6) < tolerance:
            break
        value = quotient
    return value, quotients


@pytest.mark.parametrize(("iterations", "tolerance"), [(100, 1e-2), (4, 1e-2), (6, 0.0)])
def test_the_older_value_is_returned_when_the_quotient_settles(iterations, tolerance):
    start = np.random.default_rng(2).standard_normal(8).astype(np.float32)
    value, quotients = power_iteration(MATRIX.astype(np.float64), start, iterations, tolerance)
    settled = len(quotients) < iterations
    assert settled == (iterations == 100)
    found = curvature.top_eigenvalues(
        LOSS, PARAMS, FACTORS, KEY, 1, iterations=iterations, tolerance=tolerance, start=jnp.asarray(start[None])
    )
    assert int(found.iterations[0]) == len(quotients)
    np.testing.assert_allclose(found.quotients[0, : len(quotients)], quotients, rtol=1e-4)
    assert np.isnan(found.quotients[0, len(quotients) :]).all()
    np.testing.assert_allclose(found.values[0], value, rtol=1e-4)
    assert found.values[0] == found.quotients[0, len(quotients) - (2 if settled else 1)]


def test_eigenvalues_of_every_batch():
    found = curvature.top_eigenvalues_by_batch(LOSS, PARAMS, FACTORS, KEY, 2, tolerance=1e-5)
    np.testing.assert_allclose(found, FACTORS[:, None] * jnp.asarray([-9.0, 6.0]), rtol=1e-2)


def test_trace():
    diagonal = Partial(quadratic, jnp.diag(jnp.asarray(SPECTRUM)))
    found = curvature.trace(diagonal, PARAMS, FACTORS, KEY)
    assert len(found.samples) == 2  # every sample of a diagonal matrix is its trace: the second one changes nothing
    np.testing.assert_allclose(found.value, SPECTRUM.sum(), rtol=1e-5)
    found = curvature.trace(LOSS, PARAMS, FACTORS, KEY, 400, tolerance=0.0)
    assert len(found.samples) == 400 and len(set(found.samples.sum(1).tolist())) > 50
    np.testing.assert_allclose(found.value, np.mean(found.samples.sum(1)), rtol=1e-4)
    assert abs(found.value - SPECTRUM.sum()) < 4 * found.standard_error
    assert 0 < found.standard_error < 2


def test_density_has_the_moments_of_the_spectrum():
    found = curvature.density(LOSS, PARAMS, FACTORS, KEY, steps=8, runs=64)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-5)
    distinct = np.unique(SPECTRUM)
    near = np.abs(np.asarray(found.values)[..., None] - distinct).min(-1)
    assert near[np.asarray(found.weights) > 1e-3].max() < 1e-2  # the three zeros end the first space early
    mass = np.sum(found.weights, where=np.abs(found.values) < 0.1) / 64
    assert abs(mass - 3 / 8) < 0.1
    x = np.linspace(-12, 9, 2001)
    density = found.on(x, 0.1)
    assert abs(density.sum() * (x[1] - x[0]) - 1) < 1e-3
    assert density[np.abs(x + 9).argmin()] > 10 * density[np.abs(x + 7).argmin()]


def test_one_program_for_other_parameters_batches_and_arrays_of_the_loss():
    traces = []

    def counted(matrix, params, factor):
        traces.append(1)
        return quadratic(matrix, params, factor)

    def run(scale):
        loss = Partial(counted, scale * jnp.asarray(MATRIX))
        params = jax.tree.map(lambda x: scale * x, PARAMS)
        return curvature.top_eigenvalues(loss, params, scale * FACTORS, KEY, 2).values

    first = run(1.0)
    once = len(traces)
    np.testing.assert_allclose(run(2.0), 4 * first, rtol=1e-3)
    assert once == len(traces) == 1


# --- Quantized weights ---

X = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
W = np.array([[0.9, -0.1, 0.4], [-2.7, 0.2, 0.3], [0.05, 2.6, -0.6], [0.7, -0.8, 0.1]], np.float32)
SPECS = {
    "ternary": quant.ternary(clip=(-2.5, 2.5)),
    "uniform": quant.Spec(3, "narrow", range="dynamic", clip=(-2.5, 2.5)),
}


def layer_loss(spec, params, x):
    w = params["w"]
    if spec is not None:
        w = grid.fake_quant(spec, w, None if spec.is_codebook else estimators.estimate(spec, w))
    return jnp.sum(jnp.tanh(x @ w) ** 2)


@pytest.mark.parametrize("name", SPECS)
def test_the_operator_of_a_quantized_layer_is_the_hessian_at_its_grid_where_gradients_pass(name):
    spec, batches = SPECS[name], jnp.asarray(X)[None]
    inside = (np.abs(W) < 2.5).ravel()
    assert 0 < (~inside).sum() < inside.size
    found = curvature.products(lambda p, x: layer_loss(spec, p, x), {"w": jnp.asarray(W)}, batches, jnp.eye(W.size))
    on_grid = grid.fake_quant(
        spec, jnp.asarray(W), None if spec.is_codebook else estimators.estimate(spec, jnp.asarray(W))
    )
    hessian = jax.hessian(lambda w: layer_loss(None, {"w": w.reshape(W.shape)}, X))(on_grid.ravel())
    expected = np.outer(inside, inside) * hessian
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("backward", ["exact", "compact"])
def test_a_learned_range_is_one_more_parameter(backward):
    spec, x, scale = quant.Spec(4, range="learned", backward=backward), jnp.asarray(X)[None], 0.3

    def loss(params, x):
        params_of_grid = grid.QParams(params["scale"], jnp.zeros(()), jnp.asarray(True))
        return layer_loss(None, {"w": grid.fake_quant(spec, params["w"], params_of_grid)}, x)

    params = {"scale": jnp.float32(scale), "w": jnp.asarray(W)}
    found = curvature.products(loss, params, x, jnp.eye(W.size + 1))
    levels = np.round(W / scale)
    inside = ((levels >= -8) & (levels <= 7)).ravel()
    assert 0 < (~inside).sum() < inside.size
    on_grid = jnp.asarray(scale * np.clip(levels, -8, 7)).ravel()
    hessian = jax.hessian(lambda w: layer_loss(None, {"w": w.reshape(W.shape)}, X))(on_grid)
    np.testing.assert_allclose(found[1:, 1:], np.outer(inside, inside) * hessian, atol=1e-3)
    assert found[0, 0] != 0


def test_reports(tmp_path):
    found = {"ternary": np.array([[-3.0, 2.0], [5.0, 1.0]]), "ours": np.array([[1.0, 0.5], [-1.0, np.nan]])}
    table = curvature.eigenvalues_table(found)
    assert len(table.rows) == 8 and table.rows[2] == ["ternary", 1, 0, 5.0]
    curvature.plot_eigenvalues(found, tmp_path / "eigenvalues.png")
    assert image.imread(tmp_path / "eigenvalues.png").std() > 0
