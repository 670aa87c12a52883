"""Directions normalized by filter, and losses on grids in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from qtx.analysis import landscape
from tests.nn import tiny

KEY = jax.random.key(0)
PARAMS = tiny.params()


def norms(x, axis):
    return np.linalg.norm(np.asarray(x), axis=axis)


@pytest.mark.parametrize(("choice", "of_kernel", "of_table"), [("inputs", 1, 0), ("outputs", 0, 1)])
def test_directions_have_the_norms_of_the_weights(choice, of_kernel, of_table):
    first, second = landscape.directions(KEY, PARAMS, still=landscape.POSITIONS, norms=choice)
    kernel = ("encoder", "layer_1", "ffn", "up", "kernel")
    table = ("encoder", "embeddings", "word", "table")
    for path, axis in ((kernel, of_kernel), (table, of_table)):
        w, d, other = PARAMS, first, second
        for name in path:
            w, d, other = w[name], d[name], other[name]
        np.testing.assert_allclose(norms(d, axis), norms(w, axis), rtol=1e-5)
        assert np.std(norms(d, 1 - axis) / norms(w, 1 - axis)) > 1e-3
        assert abs(np.vdot(d, other)) < 0.5 * np.vdot(d, d)
    assert not np.any(first["encoder"]["embeddings"]["position"]["table"])
    assert not np.any(first["encoder"]["layer_0"]["ffn"]["up"]["bias"])
    moving = landscape.directions(KEY, PARAMS, 1)[0]
    assert np.any(moving["encoder"]["embeddings"]["position"]["table"])


def test_a_slice_of_zeros_stays_where_it_is():
    w = {"kernel": jnp.asarray([[0.0, 0.0], [3.0, 4.0]])}
    found = landscape.normalized({"kernel": jnp.asarray([[1.0, 1.0], [0.0, 2.0]])}, w)["kernel"]
    np.testing.assert_allclose(found, [[0, 0], [0, 5]], rtol=1e-6)


def test_a_grid_is_one_program():
    traces = []
    params = {"kernel": jnp.zeros((2, 2))}
    across = [{"kernel": jnp.asarray([[1.0, 0.0], [0.0, 0.0]])}, {"kernel": jnp.asarray([[0.0, 2.0], [0.0, 0.0]])}]
    batches = jnp.asarray([1.0, 3.0])

    def loss(params, batch):
        traces.append(1)
        w = params["kernel"]
        return batch * (w[0, 0] ** 2 + 10 * w[0, 1])

    x, y = np.linspace(-1, 1, 5), np.array([-0.5, 0.0, 2.0])
    for _ in range(2):
        found = landscape.evaluate(loss, params, batches, across, (x, y), together=4)
        np.testing.assert_allclose(found.losses, 2 * (x[None] ** 2 + 20 * y[:, None]), atol=1e-5)
    assert len(traces) == 1
    rows = found.table().rows
    assert len(rows) == 15 and rows[1] == [-0.5, -0.5, float(found.losses[0, 1])]
    assert found.table().columns == ["x", "y", "loss"]
    curve = landscape.evaluate(loss, params, batches, across[:1], (x,))
    np.testing.assert_allclose(curve.losses, 2 * x**2, atol=1e-6)
    assert curve.table().columns == ["x", "loss"] and len(curve.table().rows) == 5


def test_plots(tmp_path):
    axis = np.linspace(-0.5, 0.5, 5)
    bowl = axis[:, None] ** 2 + axis**2
    bowl[0, 0] = np.inf
    found = {"full": landscape.Landscape((axis, axis), bowl), "ternary": landscape.Landscape((axis, axis), 3 * bowl)}
    table = landscape.summary_table(found, {"full": 0.0, "ternary": 1.0})
    assert table.rows[1] == ["ternary", 1.0, 0.0, pytest.approx(3 * bowl[np.isfinite(bowl)].mean()), 1.5, 1]
    landscape.plot_contours(found, tmp_path / "contours.png")
    curves = {name: landscape.Landscape((axis,), each.losses[2]) for name, each in found.items()}
    landscape.plot_curves(curves, tmp_path / "curves.png")
    for name in ("contours", "curves"):
        assert image.imread(tmp_path / f"{name}.png").std() > 0
