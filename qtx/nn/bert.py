"""BERT (Devlin et al. 2019) with every tensor a site.

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `L` layers, `V` vocabulary, `C` classes. Site names, with the
letters of Bondarenko et al. 2021 (13 L + 5 activations, 8 L + 6 weights):

    encoder/embeddings/{word,token_type,position}/table                      weights
    encoder/embeddings/sum_token_type, sum_position (e), norm/{scale,output}
    encoder/layer_i/attention/{query,key,value}/{kernel,output}
    encoder/layer_i/attention/scores (s)       before 1/sqrt(D/H) and before the mask
    encoder/layer_i/attention/probs (p), context (c), out/{kernel,output} (g), residual (u), norm/{scale,output} (x)
    encoder/layer_i/ffn/up/{kernel,output}     after GELU
    encoder/layer_i/ffn/down/{kernel,output} (h), residual (y), norm/{scale,output} (z)
    pooler/dense/{kernel,output} (P)           after tanh
    classifier/{kernel,output} (C)

Linear layers have an `input` site as well, for methods that quantize what enters a product.

Other families of post-LN encoders (`qtx.nn.roberta` and so on) are these parts with one or two of them replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtx.nn.layers import Dense, Embed, LayerNorm, dropout
from qtx.nn.sites import site
from qtx.quant.policy import Policy
from qtx.quant.ste import clip_ste

MASKED = -10000.0  # added to the scores of padding; finite, as in the published models

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and rates of a BERT model; the defaults are BERT-base uncased.

    Attributes:
      max_positions: the longest sequence, in tokens.
      type_vocab_size: token types; 0: there are none, 1: all tokens have the same.
      classifier_dropout: rate in the head; None: `hidden_dropout`.
      pooling: what the head sees: `'cls'` (first token, dense, tanh) or `'mean'` (mean of the tokens, dense, tanh).
      logit_range: the logits are clamped to this range (regression of published quantized models: 0 to 5), or None.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    num_labels: int = 2
    pooling: Literal["cls", "mean"] = "cls"
    logit_range: tuple[float, float] | None = None
    classifier_dropout: float | None = None

    @property
    def embedding_width(self) -> int:
        """Width of the embedding tables."""
        return self.hidden_size

    @property
    def position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_positions


class Outputs(NamedTuple):
    """What a classifier returns; what is not used is never computed under `jit`.

    Attributes:
      logits: `[B, C]` float32.
      pooled: `[B, D]`.
      hidden_states: `L + 1` times `[B, T, D]`: the embeddings and every layer.
    """

    logits: jax.Array
    pooled: jax.Array
    hidden_states: tuple[jax.Array, ...]


class _Block(nn.Module):
    """Fields that all parts of the model share."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    def dense(self, features: int, name: str, activation=None) -> Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return Dense(features, activation, init, self.dtype, self.policy, name=name)

    def norm(self, name: str = "norm") -> LayerNorm:
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.policy, name=name)

    def dropout(self, x: jax.Array, deterministic: bool, rate: float | None = None) -> jax.Array:
        return dropout(self, x, self.config.hidden_dropout if rate is None else rate, deterministic)


class Embeddings(_Block):
    """Word, token-type (if there are any) and position embeddings, summed and normalised."""

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Returns rows of the position table for `[B, T]` ids, `[B, T]` or `[1, T]`."""
        return jnp.arange(input_ids.shape[1])[None]

    @nn.compact
    def __call__(self, input_ids, token_type_ids, where, deterministic: bool) -> jax.Array:
        """Maps `[B, T]` ids to `[B, T, E]`, `E` being the width of the tables."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def table(count: int, name: str) -> Embed:
            return Embed(count, c.embedding_width, init, self.dtype, self.policy, name=name)

        x = table(c.vocab_size, "word")(input_ids)
        if c.type_vocab_size:
            types = token_type_ids if c.type_vocab_size > 1 else jnp.zeros_like(token_type_ids)
            x = site(self, "sum_token_type", x + table(c.type_vocab_size, "token_type")(types), where=where)
        x = x + table(c.position_rows, "position")(self.positions(input_ids))
        x = site(self, "sum_position", x, where=where)
        return self.dropout(self.norm()(x, where), deterministic)


class Attention(_Block):
    """Multi-head self-attention with its residual and LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`; `mask` is bool `[B, T]`, `where` is `[B, T, 1]`."""
        c = self.config
        heads, width = c.num_heads, c.hidden_size // c.num_heads

        def project(name: str) -> jax.Array:
            return self.dense(c.hidden_size, name)(x, where).reshape(*x.shape[:2], heads, width)

        query, key, value = project("query"), project("key"), project("value")
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = site(self, "scores", scores, where=pairs, features=False)
        bias = jnp.where(mask, 0.0, MASKED)[:, None, None, :]
        probs = nn.softmax(scores.astype(jnp.float32) / width**0.5 + bias).astype(self.dtype)
        probs = site(self, "probs", probs, where=pairs, features=False)
        probs = self.dropout(probs, deterministic, c.attention_dropout)
        context = jnp.einsum("bhqk,bkhd->bqhd", probs, value).reshape(x.shape)
        context = site(self, "context", context, where=where)
        y = self.dropout(self.dense(c.hidden_size, "out")(context, where), deterministic)
        return self.norm()(site(self, "residual", y + x, where=where), where)


class FeedForward(_Block):
    """The two-layer perceptron with its residual and LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        c = self.config
        y = self.dense(c.intermediate_size, "up", ACTIVATIONS[c.hidden_act])(x, where)
        y = self.dropout(self.dense(c.hidden_size, "down")(y, where), deterministic)
        return self.norm()(site(self, "residual", y + x, where=where), where)


class Layer(_Block):
    """One encoder layer."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        x = Attention(self.config, self.dtype, self.policy, name="attention")(x, mask, where, deterministic)
        return FeedForward(self.config, self.dtype, self.policy, name="ffn")(x, where, deterministic)


class Encoder(_Block):
    """Embeddings and all layers; layers are unrolled so that each can have its own bits."""

    embeddings_type = Embeddings

    def layers(self) -> Sequence[Callable[..., jax.Array]]:
        """Returns the layers in the order in which they run."""
        names = [f"layer_{i}" for i in range(self.config.num_layers)]
        return [Layer(self.config, self.dtype, self.policy, name=name) for name in names]

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """Maps `[B, T]` ids to the embeddings and every layer's output, each `[B, T, D]`."""
        mask = attention_mask > 0
        where = mask[:, :, None]
        x = self.embeddings_type(self.config, self.dtype, self.policy, name="embeddings")(
            input_ids, token_type_ids, where, deterministic
        )
        states = [x]
        for layer in self.layers():
            states.append(layer(states[-1], mask, where, deterministic))
        return tuple(states)


class Pooler(_Block):
    """One vector per sequence."""

    activation = "tanh"
    input_dropout = False  # whether the dense layer's input has the head's dropout, too

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps `[B, T, D]` and a bool mask `[B, T]` to `[B, D]`."""
        if self.config.pooling == "mean":
            weight = mask[:, :, None].astype(x.dtype)
            x = jnp.sum(x * weight, 1) / jnp.maximum(jnp.sum(weight, 1), 1)
        else:
            x = x[:, 0]
        if self.input_dropout:
            x = self.dropout(x, deterministic, self.config.classifier_dropout)
        dense = self.dense(self.config.hidden_size, "dense", ACTIVATIONS[self.activation])
        return dense(x, jnp.any(mask, 1)[:, None])


class BertClassifier(_Block):
    """BERT with a pooler and a linear head for sequence classification or regression (one label)."""

    encoder_type = Encoder
    pooler_type = Pooler

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, deterministic: bool = True) -> Outputs:
        """Classifies sequences.

        Args:
          input_ids: int `[B, T]`.
          attention_mask: `[B, T]`, 1 for tokens and 0 for padding; a row of zeros is a filler row.
          token_type_ids: int `[B, T]`; without effect where a family has no token types.
          deterministic: False for training with dropout (needs the rng `dropout`).
        """
        parts = (self.config, self.dtype, self.policy)
        states = self.encoder_type(*parts, name="encoder")(input_ids, attention_mask, token_type_ids, deterministic)
        mask = attention_mask > 0
        pooled = self.pooler_type(*parts, name="pooler")(states[-1], mask, deterministic)
        x = self.dropout(pooled, deterministic, self.config.classifier_dropout)
        logits = self.dense(self.config.num_labels, "classifier")(x, jnp.any(mask, 1)[:, None]).astype(jnp.float32)
        if self.config.logit_range is not None:
            logits = clip_ste(logits, *self.config.logit_range)
        return Outputs(logits, pooled, states)
