"""Graph convolution over a whole graph (Kipf and Welling 2017), with quantized kernels and features.

    graph = adjacency(matrix)               # normalised and symmetric, from SciPy or a jraph.GraphsTuple
    model = GCN(num_labels=8)
    logits = model.apply(variables, graph, features)          # of every node

Shapes: `N` nodes, `E` edges (both directions), `D` features, `C` classes. `propagate(graph, x)` is `A x`; the kind of the
graph says how it is computed. The results are the same but for the order of sums.

    jax.experimental.sparse.BCSR   compressed rows: one pass of compiled code, no temporary memory. On CPU
    Buckets                        rows of similar degree, padded to the same length, some of them at a time. Elsewhere
    jraph.GraphsTuple              gathers the rows of all edges and adds them up: E x D numbers. For small graphs

The first two want a symmetric matrix, `adjacency` checks it: the gradient of `A x` is `A g` then, by the same code. All
are pytrees and can be arguments of compiled functions. On several devices a graph is on all of them: what is spread over
devices by nodes or features is brought together first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import scipy.sparse
from jax.experimental.sparse import BCSR

from qtx.errors import UserError, near_misses
from qtx.nn.layers import dropout, uniform_bias
from qtx.nn.sites import site
from qtx.quant.policy import Policy

Layout = Literal["csr", "buckets", "edges"]

_GROWTH = 1.25  # of widths from bucket to bucket: at most a fifth of the entries is padding
# Entries of a bucket that are multiplied at a time: their rows of features stay in a core's cache, or keep a device busy.
_ENTRIES = {"cpu": 2**8, "other": 2**14}
_ASYMMETRY = 1e-6  # of the largest weight: what rounding leaves


class Buckets(NamedTuple):
    """Rows of a sparse matrix by their number of entries.

    Attributes:
      columns: of every bucket, int32 `[steps, rows, width]`; padding is column 0 with weight 0.
      weights: of every bucket, float32 `[steps, rows, width]`.
      position: int32 `[N]`, of each node among the rows of all buckets.
    """

    columns: tuple[jax.Array | np.ndarray, ...]
    weights: tuple[jax.Array | np.ndarray, ...]
    position: jax.Array | np.ndarray


Graph: TypeAlias = BCSR | Buckets | jraph.GraphsTuple


def adjacency(source: Any, layout: Layout | None = None) -> Graph:
    """Prepares a graph for `propagate`.

    Args:
      source: a symmetric `[N, N]` SciPy sparse matrix, or one `jraph.GraphsTuple` whose `edges` are the weights `[E]`; on the
        host. Normalised already: `D^-1/2 (A + I) D^-1/2` is symmetric, `D^-1 A` is not.
      layout: `'csr'` (`BCSR`), `'buckets'` or `'edges'` (`jraph.GraphsTuple`); None: the fastest where we are.

    Raises:
      UserError: on an unknown layout, a matrix that is not square, symmetric or finite, or edges without weights.
    """
    cpu = jax.default_backend() == "cpu"
    layout = layout or ("csr" if cpu else "buckets")
    if layout not in get_args(Layout):
        raise UserError(f"unknown graph layout {layout!r}{near_misses(layout, get_args(Layout))}")
    matrix = _matrix(source)
    if layout == "csr":
        # One type for both kinds of index, or JAX leaves the compiled code out.
        indices, starts = jnp.asarray(matrix.indices, jnp.int32), jnp.asarray(matrix.indptr, jnp.int32)
        return BCSR((jnp.asarray(matrix.data), indices, starts), shape=matrix.shape)
    if layout == "buckets":
        return jax.tree.map(jnp.asarray, _buckets(matrix, _ENTRIES["cpu" if cpu else "other"]))
    nodes, entries = matrix.shape[0], matrix.tocoo()
    return jraph.GraphsTuple(
        nodes=None,
        edges=jnp.asarray(entries.data),
        senders=jnp.asarray(entries.col, jnp.int32),
        receivers=jnp.asarray(entries.row, jnp.int32),
        globals=None,
        n_node=jnp.asarray([nodes], jnp.int32),
        n_edge=jnp.asarray([entries.nnz], jnp.int32),
    )


def _matrix(source: Any) -> scipy.sparse.csr_array:
    if isinstance(source, jraph.GraphsTuple):
        edges, nodes = _edge_weights(source), int(np.sum(source.n_node))
        where = np.asarray(source.receivers), np.asarray(source.senders)
        source = scipy.sparse.coo_array((np.asarray(edges), where), shape=(nodes, nodes))
    matrix = scipy.sparse.csr_array(source, dtype=np.float32)
    if matrix.shape[0] != matrix.shape[1]:
        raise UserError(f"the graph's matrix is {matrix.shape}: it needs a row and a column for every node")
    matrix.sum_duplicates()
    largest = abs(matrix.data).max(initial=0)
    if not np.isfinite(largest):
        raise UserError("the graph has weights that are no finite numbers; nodes without edges have no inverse degree")
    if (gap := abs(matrix - matrix.T).max() if matrix.nnz else 0) > _ASYMMETRY * largest:
        raise UserError(
            f"the graph is not symmetric: opposite weights differ by up to {gap:.3g}; normalise it by D^-1/2 A D^-1/2, "
            "or give the jraph.GraphsTuple itself to the model"
        )
    return matrix


def _edge_weights(graph: jraph.GraphsTuple) -> Any:
    edges = graph.edges
    if not hasattr(edges, "shape") or edges.shape != graph.senders.shape:
        shape = getattr(edges, "shape", type(edges).__name__)
        raise UserError(f"the graph's edges are {shape}: give each of the {len(graph.senders)} edges one weight, [E]")
    return edges


def _buckets(matrix: scipy.sparse.csr_array, entries: int) -> Buckets:
    degrees = np.diff(matrix.indptr)
    level = np.ceil(np.log(np.maximum(degrees, 1)) / np.log(_GROWTH)).astype(int)
    columns, weights, position, done = [], [], np.zeros(len(degrees), np.int32), 0
    for each in np.unique(level):
        rows = np.flatnonzero(level == each)
        width = max(int(degrees[rows].max()), 1)
        at_once = min(max(entries // width, 1), len(rows))
        steps = -(-len(rows) // at_once)
        shape = steps * at_once, width
        own, filled = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        inside = np.arange(width) < degrees[rows, None]
        taken = (matrix.indptr[rows, None] + np.arange(width))[inside]
        own[: len(rows)][inside], filled[: len(rows)][inside] = matrix.indices[taken], matrix.data[taken]
        columns.append(own.reshape(steps, at_once, width))
        weights.append(filled.reshape(steps, at_once, width))
        position[rows] = done + np.arange(len(rows))
        done += len(own)
    return Buckets(tuple(columns), tuple(weights), position)


def propagate(graph: Graph | None, x: jax.Array) -> jax.Array:
    """Returns `A x`: the sum over the neighbours of every node, by the weights of the edges.

    Linear in `x`. Of `BCSR` and `Buckets` the weights are constants; of a `GraphsTuple` they are not.

    Args:
      graph: from `adjacency`; or a `jraph.GraphsTuple` with weights `[E]` as its edges, which need not be symmetric. None: no
        node has a neighbour but itself.
      x: `[N, D]`; sums are in float32 at least.

    Returns:
      Same shape and dtype as `x`.

    Raises:
      UserError: if the edges of a `GraphsTuple` are not one weight each.
    """
    if graph is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if isinstance(graph, jraph.GraphsTuple):
        weights = jnp.asarray(_edge_weights(graph), wide.dtype)
        y = jraph.segment_sum(weights[:, None] * wide[graph.senders], graph.receivers, num_segments=len(x))
    else:
        y = _symmetric(graph, wide)
    return y.astype(x.dtype)


@jax.custom_vjp
def _symmetric(graph: BCSR | Buckets, x: jax.Array) -> jax.Array:
    if isinstance(graph, BCSR):
        return BCSR((graph.data.astype(x.dtype), graph.indices, graph.indptr), shape=graph.shape) @ x

    def some_rows(bucket: tuple[jax.Array, jax.Array]) -> jax.Array:
        columns, weights = bucket
        return jnp.einsum("rw,rwd->rd", weights.astype(x.dtype), x[columns])

    parts = [jax.lax.map(some_rows, bucket) for bucket in zip(graph.columns, graph.weights, strict=True)]
    return jnp.concatenate([part.reshape(-1, x.shape[1]) for part in parts])[graph.position]


# None: the graph is a constant.
_symmetric.defvjp(lambda graph, x: (_symmetric(graph, x), graph), lambda graph, g: (None, _symmetric(graph, g)))


class GraphConvolution(nn.Module):
    """`activation(A (x W) + b)`. Sites: `kernel`, `input`, `output` (after the activation).

    Attributes:
      features: output width.
      relu: whether the activation is ReLU; else there is none.
      use_bias: whether there is a bias.
      dtype: of the arithmetic.
      policy: see `qtx.nn.sites`.
    """

    features: int
    relu: bool = False
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    def entering(self, x: jax.Array) -> jax.Array:
        """Returns the features `[N, D]` as they enter the product with the kernel, on their grid."""
        return site(self, "input", x.astype(self.dtype), kind="input")

    @nn.compact
    def __call__(self, graph: Graph | None, x: jax.Array, is_propagated: bool = False) -> jax.Array:
        """Maps `[N, D]` to `[N, features]`.

        Args:
          graph: see `propagate`.
          x: of every node.
          is_propagated: `x` is `A Q(x)` already, see `GCN.propagated`.
        """
        kernel = self.param("kernel", uniform_bias(x.shape[-1]), (x.shape[-1], self.features), jnp.float32)
        kernel = site(self, "kernel", kernel, kind="weight").astype(self.dtype)
        y = x.astype(self.dtype) @ kernel if is_propagated else propagate(graph, self.entering(x) @ kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        return site(self, "output", nn.relu(y) if self.relu else y)


class GCN(nn.Module):
    """Graph convolutions `layer_0`, `layer_1` ... with ReLU and dropout between them (BitTransGNN, section 5.2).

    As published, quantized convolutions have no bias: `use_bias=False`.

    Attributes:
      num_labels: `C`, the output width.
      num_layers: at least one.
      hidden_size: width between layers.
      dropout: rate, between layers.
      use_bias: of every layer.
      dtype: of the arithmetic.
      policy: see `qtx.nn.sites`.
    """

    num_labels: int
    num_layers: int = 2
    hidden_size: int = 256
    dropout: float = 0.5
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    def setup(self):
        if self.num_layers < 1:
            raise UserError(f"a GCN needs at least one layer, not {self.num_layers}")
        widths = [self.hidden_size] * (self.num_layers - 1) + [self.num_labels]
        self.layers = [
            GraphConvolution(width, i + 1 < self.num_layers, self.use_bias, self.dtype, self.policy, name=f"layer_{i}")
            for i, width in enumerate(widths)
        ]

    def __call__(
        self, graph: Graph | None, x: jax.Array, deterministic: bool = True, is_propagated: bool = False
    ) -> jax.Array:
        """Maps features `[N, D]` to logits `[N, C]`.

        Args:
          graph: see `propagate`.
          x: of every node.
          deterministic: False for training with dropout (needs the rng `dropout`).
          is_propagated: `x` is what `propagated` returned: the first layer is a matrix product.
        """
        for i, layer in enumerate(self.layers):
            x = layer(graph, x, is_propagated and i == 0)
            if i + 1 < self.num_layers:
                x = dropout(self, x, self.dropout, deterministic)
        return x

    def entering(self, graph: Graph | None, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns what enters each layer, without dropout: the features `[N, D]`, then `[N, hidden_size]`."""
        found = [x]
        for layer in self.layers[:-1]:
            found.append(layer(graph, found[-1]))
        return tuple(found)

    def attached(self, rows: Graph, x: jax.Array, entering: Sequence[jax.Array]) -> jax.Array:
        """Returns the logits `[M, C]` of new nodes, which see the nodes of a graph and are not seen by them.

        Args:
          rows: the edges of the new nodes, `[M, N + M]`: a `BCSR`, or a `jraph.GraphsTuple` of N + M nodes.
          x: features of the new nodes, `[M, D]`.
          entering: of the nodes of the graph, from the method `entering`.
        """
        for layer, known in zip(self.layers, entering, strict=True):
            x = layer(rows, jnp.concatenate([known, x]))[-len(x) :]
        return x

    def propagated(self, graph: Graph, x: jax.Array) -> jax.Array:
        """Returns `A Q(x)`, `[N, D]`: features that do not change are rounded and propagated once and for all.

            features = model.apply(variables, graph, x, method="propagated")
            logits = model.apply(variables, graph, features, is_propagated=True)

        The sums are the same, in another order: `(A Q(x)) W` for `A (Q(x) W)`. `Q` is the grid of the site `layer_0/input`,
        which calls with `is_propagated` do not see.

        Args:
          graph: see `propagate`.
          x: of every node.
        """
        return propagate(graph, self.layers[0].entering(x))
