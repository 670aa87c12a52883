"""What text graphs cost: the rows of `qtx.experiments.benchmark` about their products, training on them, and building them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from ml_collections import ConfigDict

from qtx.data.graph_edges import count_windows, word_word
from qtx.experiments.measuring import Bar, Comparison, Memory, random_batch, temporary_memory, train_program
from qtx.methods.bit_transformer import bit_policy
from qtx.methods.bittransgnn import graph_loss
from qtx.nn.bert import BertClassifier, BertConfig
from qtx.nn.graph import Graph, Layout, adjacency, propagate
from qtx.nn.text_graph import GraphConfig, TextGraphClassifier
from qtx.train.phase import Phase, inputs


def _falling(words: int) -> np.ndarray:
    """Shares of words whose frequencies fall as the root of their rank."""
    frequency = 1 / np.sqrt(np.arange(1, words + 1))
    return frequency / frequency.sum()


@functools.lru_cache(1)
def text_like_graph(nodes: int, pairs: int, seed: int) -> scipy.sparse.csr_array:
    """Returns a random matrix `D^-1/2 (A + I) D^-1/2` with the profile of a text graph: some words have very many neighbours.

    Args:
      nodes: half of them words, whose frequencies fall as the root of their rank; the others are documents.
      pairs: drawn in all, in the proportion of a graph of words and documents (R8); those drawn twice count once.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    words = nodes // 2
    frequency = _falling(words)
    of_words = round(0.8 * pairs)

    def drawn(count: int) -> np.ndarray:
        return rng.choice(words, count, p=frequency)

    rows = np.concatenate([drawn(of_words), rng.integers(words, nodes, pairs - of_words)])
    columns = drawn(pairs)
    apart = rows != columns
    weights = rng.uniform(0.1, 1, np.count_nonzero(apart))
    found = scipy.sparse.coo_array((weights, (rows[apart], columns[apart])), shape=(nodes, nodes)).tocsr()
    found = found.maximum(found.T) + scipy.sparse.eye_array(nodes, format="csr")
    scale = scipy.sparse.diags_array(1 / np.sqrt(found.sum(1)))
    return scipy.sparse.csr_array(scale @ found @ scale, dtype=np.float32)


def graph_product(config: ConfigDict, layout: Layout) -> Comparison:
    """`A x` and the gradient of `x`, on a graph in one layout, against the two products by SciPy.

    Raises:
      ArithmeticError: if the results differ.
    """
    c = config.graph
    matrix = text_like_graph(c.nodes, c.pairs, config.seed)
    x = np.random.default_rng(config.seed).standard_normal((2, c.nodes, c.features)).astype(np.float32)
    graph, values = adjacency(matrix, layout), jnp.asarray(x)

    def both(graph, x, g):
        y, back = jax.vjp(lambda x: propagate(graph, x), x)
        return y, back(g)[0]

    compiled = jax.jit(both).lower(graph, *values).compile()
    for ours, given in zip(compiled(graph, *values), x, strict=True):
        if not (difference := float(np.max(np.abs(np.asarray(ours) - matrix @ given)))) <= 1e-4:
            raise ArithmeticError(f"the product of a graph by {layout!r} and SciPy's differ by {difference:g}")
    memory = Memory(temporary_memory(compiled), 100 * 2**20, f"temporary, {layout}", "bar", Bar(1.0))
    is_default = type(graph) is type(adjacency(np.eye(1)))
    return Comparison(
        lambda: compiled(graph, *values),
        lambda: [matrix @ each for each in x],
        f"A x and its gradient, {layout}, {matrix.nnz:,} entries",
        "SciPy, compressed rows",
        c.rounds,
        Bar(1.15) if is_default else None,
        memory,
    )


@dataclasses.dataclass(frozen=True)
class _Setup:
    """A ternary encoder beside a graph convolution, with random weights, a graph, and a batch of its documents."""

    model: TextGraphClassifier
    params: dict[str, Any]
    batch: dict[str, jax.Array]
    graph: dict[str, Graph]
    bank: jax.Array

    @classmethod
    def make(cls, config: ConfigDict) -> _Setup:
        """Returns the setup for the sizes in `config`."""
        c = config.graph
        rng = np.random.default_rng(config.seed)
        words = c.nodes // 2
        index = words + rng.choice(c.nodes - words, config.batch, replace=False)
        batch = random_batch(config, c.classes) | {"index": jnp.asarray(index, jnp.int32)}
        encoder = BertConfig(
            **config.model, hidden_dropout=0.0, attention_dropout=0.0, num_labels=c.classes, pooler=False
        )
        model = TextGraphClassifier(encoder, policy=bit_policy(3), graph=GraphConfig(hidden_size=c.features))
        params = jax.jit(model.init)(jax.random.key(config.seed), *inputs(model, batch))["params"]
        bank = rng.standard_normal((c.nodes, encoder.hidden_size)).astype(np.float32)
        bank[:words] = 0
        graph = {"adjacency": adjacency(text_like_graph(c.nodes, c.pairs, config.seed))}
        return cls(model, params, batch, graph, jnp.asarray(bank))


def dynamic_step(config: ConfigDict) -> Comparison:
    """The dynamic step of BitTransGNN against the step of its encoder alone, of the same batch."""
    s = _Setup.make(config)
    joint = Phase("benchmark", s.model, objective=graph_loss, constants=s.graph)
    a, _ = train_program(joint, {"params": s.params}, s.batch, {"bank": {"features": s.bank}})
    alone = Phase("benchmark", BertClassifier(s.model.config, policy=s.model.policy))
    params = {name: value for name, value in s.params.items() if name != "gcn"}
    b, _ = train_program(alone, {"params": params}, s.batch)
    a_is = f"dynamic step, ternary encoder, graph of {config.graph.nodes:,} nodes"
    return Comparison(a, b, a_is, "step of the encoder alone", config.rounds, Bar(1.4))


def static_step(config: ConfigDict) -> Comparison:
    """The static step of BitTransGNN on features that are propagated once and for all against the step without; no bar."""
    s = _Setup.make(config)
    model = s.model.clone(recompute=False)
    phase = Phase("benchmark", model, objective=graph_loss, constants=s.graph, trainable=("gcn/**",))
    bank = {"features": s.bank}
    everything = {"params": s.params, "bank": bank, "graph": s.graph}
    shortcut = bank | {"propagated": model.apply(everything, method="propagated")}
    a, b = (train_program(phase, {"params": s.params}, s.batch, {"bank": each})[0] for each in (shortcut, bank))
    return Comparison(a, b, "static step, first product kept", "first product at every step", config.graph.rounds)


def loop_information(documents: Sequence[Sequence[int]], window: int) -> dict[tuple[int, int], float]:
    """Positive pointwise mutual information of words in windows as one would write it first: every pair of every window."""
    seen: Counter[int] = Counter()
    together: Counter[tuple[int, int]] = Counter()
    total = 0
    for document in documents:
        for start in range(max(len(document) - window, 0) + 1):
            inside = document[start : start + window]
            total += 1
            seen.update(set(inside))
            for i, first in enumerate(inside):
                for second in inside[i + 1 :]:
                    if first != second:
                        together[min(first, second), max(first, second)] += 1
    found = {pair: math.log(count * total / (seen[pair[0]] * seen[pair[1]])) for pair, count in together.items()}
    return {pair: value for pair, value in found.items() if value > 0}


def graph_build(config: ConfigDict) -> Comparison:
    """Counting windows and the edges between words against `loop_information`, on random documents; no bar.

    Raises:
      ArithmeticError: if the edges differ.
    """
    c = config.graph.corpus
    rng = np.random.default_rng(config.seed)
    lengths = rng.integers(1, 2 * c.words, c.documents)  # `c.words` in the mean
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.choice(c.vocabulary, offsets[-1], p=_falling(c.vocabulary))
    documents = [each.tolist() for each in np.split(tokens, offsets[1:-1])]

    def ours() -> scipy.sparse.csr_matrix:
        return word_word(count_windows(tokens, offsets, c.vocabulary, c.window))

    def theirs() -> dict[tuple[int, int], float]:
        return loop_information(documents, c.window)

    given, edges = theirs(), scipy.sparse.triu(ours(), 1).tocoo()
    found = dict(zip(zip(edges.row.tolist(), edges.col.tolist(), strict=True), edges.data.tolist(), strict=True))
    apart = max((abs(found.get(pair, 0) - given.get(pair, 0)) for pair in found.keys() | given.keys()), default=0)
    if not apart <= 1e-9:
        raise ArithmeticError(f"an edge between words and the plain loop's differ by {apart:g}")
    # What is waited for is not the dictionary: its keys would be sorted.
    return Comparison(
        lambda: ours().data,
        lambda: len(theirs()),
        f"windows and edges of {len(tokens):,} words, {len(given):,} edges",
        "loop over windows and pairs, a dictionary",
        c.rounds,
        speedup=True,
    )
