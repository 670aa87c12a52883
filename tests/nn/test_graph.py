"""Graph convolution: every layout against dense float64 arithmetic, gradients, memory, and the GCN with its shortcut."""

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from qtx.errors import UserError
from qtx.nn import graph as graphs
from qtx.nn import list_sites, policy
from qtx.nn.graph import GCN, adjacency, propagate
from qtx.quant import Spec, per_token, symmetric

NODES, WIDTH = 40, 6
FAST = ("csr", "buckets")


def matrix(nodes=NODES, density=0.1, seed=0):
    """A symmetric matrix with a hub (node 0) and a node without edges (the last)."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.1, 1, (nodes, nodes)) * (rng.random((nodes, nodes)) < density)
    a[0] = rng.uniform(0.1, 1, nodes)
    a = np.maximum(a, a.T)
    a[-1] = a[:, -1] = 0
    return a.astype(np.float32)


def features(width=WIDTH, seed=1, nodes=NODES):
    return np.random.default_rng(seed).standard_normal((nodes, width)).astype(np.float32)


A, X, G = matrix(), features(), features(seed=2)


@pytest.mark.parametrize("layout", [*FAST, "edges"])
def test_every_layout_is_the_dense_product_with_its_gradient(layout):
    graph = adjacency(scipy.sparse.coo_matrix(A), layout)

    @jax.jit
    def both(graph, x, g):
        y, back = jax.vjp(lambda x: propagate(graph, x), x)
        return y, back(g)[0]

    y, dx = both(graph, X, G)
    np.testing.assert_allclose(y, A.astype(float) @ X, atol=1e-5)
    np.testing.assert_allclose(dx, A.T.astype(float) @ G, atol=1e-5)


@pytest.mark.parametrize("layout", FAST)
def test_it_works_in_a_scanned_rematerialised_donated_step(layout):
    graph = adjacency(A, layout)

    def loss(w, graph):
        return jnp.sum(jnp.square(jax.checkpoint(lambda w: propagate(graph, X * w))(w)))

    def steps(w, graph):
        return jax.lax.scan(lambda w, _: (w - 1e-3 * jax.grad(loss)(w, graph), None), w, None, length=3)[0]

    got = jax.jit(steps, donate_argnums=0)(jnp.ones(WIDTH), graph)
    want, square = np.ones(WIDTH), np.sum(np.square(A.astype(float) @ X), 0)
    for _ in range(3):
        want = want - 1e-3 * 2 * want * square
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("layout", FAST)
def test_the_rows_of_all_edges_are_never_held_at_once(layout):
    nodes, width = 300, 64
    graph = adjacency(matrix(nodes, 0.3), layout)
    edges = int(np.count_nonzero(matrix(nodes, 0.3)))
    x = jax.ShapeDtypeStruct((nodes, width), jnp.float32)
    compiled = jax.jit(jax.grad(lambda x, graph: jnp.sum(propagate(graph, x)))).lower(x, graph).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < edges * width * 4 / 10


def test_half_precision_is_summed_in_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    y = propagate(adjacency(A, "csr"), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.asarray(A @ np.asarray(x, np.float32), jnp.bfloat16))


def test_a_jraph_graph_need_not_be_symmetric():
    senders, receivers = np.asarray([0, 1, 1]), np.asarray([1, 2, 0])
    directed = jraph.GraphsTuple(None, np.float32([2, 3, 5]), receivers, senders, None, np.int32([3]), np.int32([3]))
    dense = np.zeros((3, 3))
    dense[receivers, senders] = [2, 3, 5]
    x = X[:3]
    y, back = jax.vjp(lambda x: propagate(directed, x), x)
    np.testing.assert_allclose(y, dense @ x, atol=1e-5)
    np.testing.assert_allclose(back(G[:3])[0], dense.T @ G[:3], atol=1e-5)
    with pytest.raises(UserError, match="not symmetric: opposite weights differ by up to 3"):
        adjacency(directed)


def test_a_jraph_graph_can_be_prepared():
    fast = adjacency(adjacency(A, "edges"), "csr")
    np.testing.assert_array_equal(fast.todense(), A)


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 9), st.sampled_from([1, 7, 64, 2**14]))
def test_buckets_hold_the_matrix(nodes, density, seed, entries):
    a = matrix(nodes, density, seed)
    found = graphs._buckets(scipy.sparse.csr_array(a), entries)
    rows = []
    for columns, weights in zip(found.columns, found.weights, strict=True):
        _, at_once, width = columns.shape
        assert at_once * width <= max(entries, width) and width <= nodes
        for own, filled in zip(columns.reshape(-1, width), weights.reshape(-1, width), strict=True):
            row = np.zeros(nodes, np.float32)
            np.add.at(row, own, filled)
            rows.append(row)
    np.testing.assert_array_equal(np.stack(rows)[found.position], a)


# GCN

GRID = policy(symmetric(4, range="dynamic"), inputs={"**": Spec(8, "narrow", per_token(), range="dynamic")})


def built(**fields):
    model = GCN(3, hidden_size=5, **fields)
    return model, model.init(jax.random.key(0), adjacency(A, "edges"), X)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gcn_is_the_published_formula(layers):
    model, variables = built(num_layers=layers)
    params = {name: {"bias": p["bias"] + 0.1, "kernel": p["kernel"]} for name, p in variables["params"].items()}
    assert sorted(params) == [f"layer_{i}" for i in range(layers)]
    x = X.astype(float)
    for i in range(layers):
        kernel = np.asarray(params[f"layer_{i}"]["kernel"], float)
        assert np.abs(kernel).max() <= len(kernel) ** -0.5
        x = A @ (x @ kernel) + np.asarray(params[f"layer_{i}"]["bias"])
        x = np.maximum(x, 0) if i + 1 < layers else x
    np.testing.assert_allclose(model.apply({"params": params}, adjacency(A), X), x, atol=1e-5)


@pytest.mark.parametrize("rules", [None, GRID], ids=["float", "quantized"])
def test_features_are_propagated_once_and_for_all(rules):
    model, variables = built(policy=rules, use_bias=rules is None)
    graph = adjacency(A)
    once = model.apply(variables, graph, X, method="propagated")
    got = model.apply(variables, graph, once, is_propagated=True)
    want = model.apply(variables, graph, X)
    np.testing.assert_allclose(got, want, atol=1e-4 if rules is None else 2e-2)
    plain = model.clone(policy=None).apply(variables, graph, X)
    assert np.allclose(want, plain) == (rules is None)


def test_every_tensor_of_a_gcn_is_a_site_and_biases_are_optional():
    model, variables = built(use_bias=False)
    assert set(variables["params"]["layer_0"]) == {"kernel"}
    found = list_sites(model, variables, adjacency(A, "csr"), X)
    assert set(found) == {f"layer_{i}/{role}" for i in range(2) for role in ("kernel", "input", "output")}


def test_dropout_is_between_the_layers():
    model, variables = built(dropout=0.5)
    graph = adjacency(A, "csr")
    plain, again = (model.apply(variables, graph, X) for _ in range(2))
    drop = model.apply(variables, graph, X, False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(plain, again)
    assert not np.allclose(plain, drop)
    single = GCN(3, num_layers=1)
    variables = single.init(jax.random.key(0), graph, X)
    np.testing.assert_array_equal(single.apply(variables, graph, X, False), single.apply(variables, graph, X))
