"""BitTransGNN: an encoder and a graph convolution over the documents and words of a text graph.

The nodes of the graph (`N`: documents and words) have a bank of features `[N, D]`: what the encoder says of each document,
and zero for words, which receive information in the first convolution and pass it on in the second. For the documents of a
batch

    f = encoder(batch), written into their rows of the bank
    p = lambda softmax(gcn(bank)[batch]) + (1 - lambda) softmax(classifier(f))

The gradient of p reaches the encoder through the classifier and, for the rows of the batch, through the graph; all other rows
are constants. Regression mixes the two outputs themselves.

Collections beside parameters, all optional:

    graph   adjacency: see `qtx.nn.graph.adjacency`; without one no document has a neighbour
    bank    features `[N, D]`; mutable: the rows of a batch are written. Where they are constants, `propagated` `[N, D]` are
            they behind the first product with the adjacency (`TextGraphClassifier.propagated`). Without a bank the batch is
            all there is

Sites are those of the encoder's family and, under `gcn/`, those of `qtx.nn.graph`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCSR

from qtx.errors import UserError
from qtx.nn.bert import BertClassifier, Block
from qtx.nn.graph import GCN
from qtx.quant.policy import Policy


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """What BitTransGNN adds to an encoder.

    Attributes:
      mix: lambda, the share of the graph's vote, in [0, 1].
      hidden_size: width between the convolutions.
      num_layers: convolutions.
      dropout: rate between them.
      bias: whether they have one; as published a quantized one has none.

    Raises:
      UserError: a value out of its range.
    """

    mix: float = 0.5
    hidden_size: int = 256
    num_layers: int = 2
    dropout: float = 0.5
    bias: bool = True

    def __post_init__(self):
        if not 0 <= self.mix <= 1:
            raise UserError(f"lambda, the share of the graph, is {self.mix}: it must lie in [0, 1]")
        if self.hidden_size < 1 or self.num_layers < 1:
            raise UserError(
                f"a graph convolution needs a positive width and at least one layer, not {self.hidden_size} and "
                f"{self.num_layers}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout {self.dropout} of the graph convolution must lie in [0, 1)")

    def convolution(self, num_labels: int, dtype: Any = jnp.float32, policy: Policy | None = None) -> GCN:
        """Returns the module."""
        return GCN(num_labels, self.num_layers, self.hidden_size, self.dropout, self.bias, dtype, policy)


class GraphOutputs(NamedTuple):
    """What BitTransGNN returns.

    Attributes:
      logits: `[B, C]`: log p, or the mixed outputs of regression.
      text: `[B, C]`, logits of the classifier.
      graph: `[B, C]`, logits of the graph convolution.
      pooled: `[B, D]`, features of the documents.
    """

    logits: jax.Array
    text: jax.Array
    graph: jax.Array
    pooled: jax.Array


class PairOutputs(NamedTuple):
    """What `StudentAndTeacher` returns: the student's logits `[B, C]`, and what the teacher does."""

    logits: jax.Array
    teacher: GraphOutputs


def mixture(graph: jax.Array, text: jax.Array, mix: float, temperature: float = 1.0) -> jax.Array:
    """Returns `log(mix softmax(graph / t) + (1 - mix) softmax(text / t))`, or for one output their weighted mean.

    Args:
      graph: `[..., C]`.
      text: `[..., C]`.
      mix: lambda in [0, 1].
      temperature: above 0; without effect on regression.
    """
    if graph.shape[-1] == 1:
        return mix * graph + (1 - mix) * text
    graph, text = (nn.log_softmax(x / temperature) for x in (graph, text))
    if mix in (0, 1):
        return graph if mix else text
    return jnp.logaddexp(math.log(mix) + graph, math.log1p(-mix) + text)


class TextHead(Block):
    """The classifier of a model without a pooler, for features that are given. Sites `classifier/...`."""

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps `[B, D]` to logits `[B, C]`."""
        logits = self.dense(self.config.num_labels, "classifier")(features)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class TextGraphClassifier(Block):
    """An encoder with its classifier and a graph convolution; parameters `encoder/...`, `classifier/...` and `gcn/...`.

    Attributes:
      config: of the encoder; `pooler=False`.
      classifier_type: class of the encoder with its head.
      graph: what the convolution is.
      recompute: whether the encoder runs; else features come from the bank, if there is one.
    """

    classifier_type: type[BertClassifier] = BertClassifier
    graph: GraphConfig = GraphConfig()
    recompute: bool = True

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids", "index")

    def setup(self):
        self.text = self.classifier_type(self.config, self.dtype, self.policy)
        self.head = TextHead(self.config, self.dtype, self.policy)
        nn.share_scope(self, self.text)
        nn.share_scope(self, self.head)
        self.gcn = self.graph.convolution(self.config.num_labels, self.dtype, self.policy)

    def __call__(self, input_ids, attention_mask, token_type_ids, index, deterministic: bool = True) -> GraphOutputs:
        """Classifies documents of the graph.

        Args:
          input_ids: int `[B, T]`.
          attention_mask: `[B, T]`, 1 for tokens and 0 for padding.
          token_type_ids: int `[B, T]`.
          index: int `[B]`, nodes of the documents; -1 in filler rows, whose outputs mean nothing.
          deterministic: False for training with dropout.
        """
        bank: Any = self.get_variable("bank", "features")
        nodes = jnp.arange(len(index)) if bank is None else index
        if self.recompute or bank is None:
            outputs = self.text(input_ids, attention_mask, token_type_ids, deterministic)
            features, text = outputs.pooled, outputs.logits
        else:
            features = bank[nodes]
            text = self.head(features)
        propagated: Any = None if self.recompute else self.get_variable("bank", "propagated")
        if bank is None:
            bank = features
        elif self.recompute:
            # A filler row has no place in the bank.
            places = jnp.where(nodes < 0, len(bank), nodes)
            bank = jax.lax.stop_gradient(bank).at[places].set(features.astype(bank.dtype), mode="drop")
            if self.is_mutable_collection("bank"):
                self.put_variable("bank", "features", jax.lax.stop_gradient(bank))
        adjacency: Any = self.get_variable("graph", "adjacency")
        x = bank if propagated is None else propagated
        votes = self.gcn(adjacency, x, deterministic, is_propagated=propagated is not None)[nodes]
        votes = votes.astype(jnp.promote_types(votes.dtype, jnp.float32))
        return GraphOutputs(mixture(votes, text, self.graph.mix), text, votes, features)

    def attached(self, pooled: jax.Array, rows: BCSR, entering: Sequence[jax.Array]) -> GraphOutputs:
        """Classifies new documents, which see the graph and are not seen by it.

        Args:
          pooled: features `[M, D]` of the documents.
          rows: `[M, N + M]` of the normalised adjacency: edges into the graph, and loops; see `qtx.data.text_graph.attach`.
          entering: what enters each convolution, of the nodes of the graph `[N, ...]`.
        """
        text = self.head(pooled)
        votes = self.gcn.attached(rows, pooled, entering).astype(text.dtype)
        return GraphOutputs(mixture(votes, text, self.graph.mix), text, votes, pooled)

    def entering(self) -> tuple[jax.Array, ...]:
        """Returns what enters each convolution, of the nodes of the graph: what `attached` needs of them."""
        return self.gcn.entering(self.get_variable("graph", "adjacency"), self.get_variable("bank", "features"))

    def propagated(self) -> jax.Array:
        """Returns the features of the bank behind the first product with the adjacency, `[N, D]`."""
        return self.gcn.propagated(self.get_variable("graph", "adjacency"), self.get_variable("bank", "features"))


class StudentAndTeacher(Block):
    """A text classifier `student/...` and a `TextGraphClassifier` `teacher/...` that are trained together.

    Its collections `graph` and `bank` are the teacher's, below `teacher`.

    Attributes:
      config: of both encoders; `pooler=False`.
      classifier_type: class of both encoders with their heads.
      graph: what the teacher's convolution is.
    """

    classifier_type: type[BertClassifier] = BertClassifier
    graph: GraphConfig = GraphConfig()

    inputs: ClassVar[tuple[str, ...]] = TextGraphClassifier.inputs

    def setup(self):
        fields = self.config, self.dtype, self.policy
        self.student = self.classifier_type(*fields)
        self.teacher = TextGraphClassifier(*fields, self.classifier_type, self.graph)

    def __call__(self, input_ids, attention_mask, token_type_ids, index, deterministic: bool = True) -> PairOutputs:
        """Classifies documents of the graph; see `TextGraphClassifier`."""
        batch = input_ids, attention_mask, token_type_ids
        teacher = self.teacher(*batch, index, deterministic)
        return PairOutputs(self.student(*batch, deterministic).logits, teacher)
