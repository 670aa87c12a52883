"""ALBERT (Lan et al. 2020) with every tensor a site.

BERT's sites (`qtx.nn.bert`), and `encoder/embeddings/projection/{kernel,output}` from the width of the tables to that of the
layers. The layers of a group share their parameters: the weight sites of a group are those of its first layer, while every
layer has activation sites, and so ranges, of its own.

Dropout after the second linear layer of the feed-forward block is that of the authors' code; `transformers` has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from qtx.nn import bert
from qtx.nn.sites import running_as


@dataclasses.dataclass(frozen=True)
class AlbertConfig(bert.BertConfig):
    """Sizes and rates of an ALBERT model; the defaults are those of `transformers` (ALBERT-xxlarge).

    Attributes:
      embedding_size: width of the embedding tables.
      num_groups: groups of consecutive layers that share their parameters.
    """

    vocab_size: int = 30000
    hidden_size: int = 4096
    num_heads: int = 64
    intermediate_size: int = 16384
    hidden_act: str = "gelu_new"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = 0.1
    embedding_size: int = 128
    num_groups: int = 1

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size

    @property
    def owners(self) -> tuple[int, ...]:
        """For every layer the number of the one whose parameters it uses, the first of its group."""
        groups = [int(i / (self.num_layers / self.num_groups)) for i in range(self.num_layers)]
        return tuple(groups.index(group) for group in groups)


class Embeddings(bert.Embeddings):
    """BERT's embeddings, narrow, and their projection to the width of the layers."""

    @nn.compact
    def __call__(self, input_ids, token_type_ids, where, deterministic: bool) -> jax.Array:
        """Maps `[B, T]` ids to `[B, T, D]`."""
        x = super().__call__(input_ids, token_type_ids, where, deterministic)
        return self.dense(self.config.hidden_size, "projection")(x, where)


class Encoder(bert.Encoder):
    """Embeddings and all layers, some of which are the same one."""

    embeddings_type = Embeddings

    def layers(self) -> Sequence[Callable[..., jax.Array]]:
        """Returns the layers in the order in which they run."""
        owners = self.config.owners  # type: ignore[attr-defined]
        own = {i: self.part(self.layer_type, f"layer_{i}") for i in dict.fromkeys(owners)}
        return [running_as(own[owner], f"layer_{i}") for i, owner in enumerate(owners)]


class AlbertClassifier(bert.BertClassifier):
    """ALBERT with a pooler and a linear head for sequence classification or regression (one label)."""

    encoder_type = Encoder
