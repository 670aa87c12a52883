"""RoBERTa (Liu et al. 2019), and DistilRoBERTa, with every tensor a site.

BERT's sites (`qtx.nn.bert`). It differs from BERT in its positions, which count tokens and skip padding, and in its head,
which has dropout before the pooler too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qtx.nn import bert


@dataclasses.dataclass(frozen=True)
class RobertaConfig(bert.BertConfig):
    """Sizes and rates of a RoBERTa model; the defaults are those of `transformers`.

    The position table has `pad_token_id + 1` rows more than `max_positions`: padding has the row `pad_token_id`, the first
    token the next one.
    """

    vocab_size: int = 50265
    max_positions: int = 510
    pad_token_id: int = 1

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_positions + self.pad_token_id + 1


class Embeddings(bert.Embeddings):
    """Word, token-type and position embeddings, summed and normalised."""

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Returns rows of the position table `[B, T]`; an id is padding if it is `pad_token_id`, as published."""
        padding = self.config.pad_token_id
        tokens = (input_ids != padding).astype(jnp.int32)
        return jnp.cumsum(tokens, axis=1) * tokens + padding


class Encoder(bert.Encoder):
    """Embeddings and all layers."""

    embeddings_type = Embeddings


class Pooler(bert.Pooler):
    """One vector per sequence: the first part of what is published as the classification head."""

    input_dropout = True


class RobertaClassifier(bert.BertClassifier):
    """RoBERTa with its head for sequence classification or regression (one label)."""

    encoder_type = Encoder
    pooler_type = Pooler
