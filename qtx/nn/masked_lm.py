"""Masked language models (Devlin et al. 2019, section 3.1): an encoder and the head it was pre-trained with.

Shapes: `B` batch, `T` tokens, `P` positions, `D` width, `V` vocabulary. Sites beside the encoder's (`qtx.nn.bert`):

    transform/dense/{kernel,input,output}      after the activation
    transform/norm/{scale,output}
    decoder/{input,output}                     its kernel is `encoder/embeddings/word/table`, one site for both uses
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtx.nn import roberta
from qtx.nn.bert import ACTIVATIONS, Block, Encoder
from qtx.nn.layers import Embed


class Predictions(NamedTuple):
    """What a masked language model returns.

    Attributes:
      logits: of the word at each position, `[B, T, V]` or `[B, P, V]`, at least float32.
      hidden_states: `L + 1` times `[B, T, D]`: the embeddings and every layer.
    """

    logits: jax.Array
    hidden_states: tuple[jax.Array, ...]


class Transform(Block):
    """The layer between encoder and decoder."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """Maps `[B, P, D]` to `[B, P, D]`; `where` is `[B, P, 1]`."""
        c = self.config
        return self.norm()(self.dense(c.hidden_size, "dense", ACTIVATIONS[c.hidden_act])(x, where), where)


class BertMaskedLM(Block):
    """BERT that says which words stand at positions. The decoder's matrix is the table of word embeddings."""

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    encoder_type: ClassVar[type[Encoder]] = Encoder

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> Predictions:
        """Predicts words.

        Args:
          input_ids: int `[B, T]`.
          attention_mask: `[B, T]`, 1 for tokens and 0 for padding.
          token_type_ids: int `[B, T]`; without effect where a family has no token types.
          positions: int `[B, P]`, where to predict; None: everywhere. The head is computed there alone, and with a
            vocabulary of usual size it costs more than a layer.
          deterministic: False for training with dropout (needs the rng `dropout`).
        """
        encoder = self.part(self.encoder_type, "encoder")
        states = encoder(input_ids, attention_mask, token_type_ids, deterministic)
        x, where = states[-1], (attention_mask > 0)[:, :, None]
        if positions is not None:
            x, where = (jnp.take_along_axis(each, positions[:, :, None], 1) for each in (x, where))
        x = self.part(Transform, "transform")(x, where)
        logits = self.dense(self.config.vocab_size, "decoder")(x, where, kernel=self.word_table(encoder).T)
        return Predictions(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), states)

    def word_table(self, encoder: Encoder) -> jax.Array:
        """Returns the word embeddings of an encoder that was called, on their grid, float32 `[V, D]`."""
        c, scope = self.config, encoder.scope
        assert scope is not None
        for name in ("embeddings", "word"):
            scope = scope.push(name, reuse=True)
        fields: dict[str, Any] = dict(dtype=self.dtype, policy=self.policy, parent=scope)
        return Embed(c.vocab_size, c.embedding_width, **fields).whole()


class RobertaMaskedLM(BertMaskedLM):
    """RoBERTa that says which words stand at positions."""

    encoder_type = roberta.Encoder
