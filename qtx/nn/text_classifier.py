"""A small pre-norm transformer for texts, trained from scratch, with every tensor a site.

The two-layer classifier of a course project that quantized and binarized it on AG_NEWS (Transformer-Quantization, 2022).
Sites and parameters have BERT's names (`qtx.nn.bert`), so one policy serves both:

    encoder/embeddings/{word,position}/table                                   weights
    encoder/embeddings/sum_position, sum_sinusoid (e); with embedding='twice' sum_twice (e)
    encoder/layer_i/attention/norm/{scale,output} (x), {query,key,value}/{kernel,input,output}
    encoder/layer_i/attention/scores (s), probs (p), context (c), out/{kernel,input,output} (g), residual (u)
    encoder/layer_i/ffn/norm/{scale,output} (z), up/{kernel,input,output}, down/{kernel,input,output} (h), residual (y)
    classifier/hidden/{kernel,input,output}, classifier/out/{kernel,input,output} (C)

The norms stand before their sub-layer, and there is none behind the stack. Query, key and value each have an `input` site of
their own; that of `ffn/down` sees the output of the ReLU before dropout.

What the project meant is the default. What its code did has a name in the configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtx.errors import UserError, near_misses
from qtx.nn import bert
from qtx.nn.layers import DeviationNorm, Embed, sinusoids, uniform_bias
from qtx.nn.sites import site

PUBLISHED_MASKED = -1e-9  # what the published code writes over the scores of padding

XAVIER = nn.initializers.xavier_uniform()
_CHOICES = {"mask": ("exact", "published"), "embedding": ("once", "twice"), "pooling": ("cls", "mean")}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
    "classifier_size",
)
_WITHOUT = ("type_vocab_size", "initializer_range", "pooler")


@dataclasses.dataclass(frozen=True)
class TextClassifierConfig(bert.BertConfig):
    """Sizes and rates of a text classifier; the defaults are the published ones.

    Attributes:
      layer_norm_eps: added to the standard deviation, not to the variance.
      hidden_act: between the layers of the FFN.
      classifier_size: width of the classifier's hidden layer.
      classifier_relu: False: no ReLU between the layers of the classifier, as in the published fully quantized model.
      mask: what becomes of the scores of padding. `'exact'`: padding has no weight. `'published'`: they are replaced by
        -1e-9 (where -1e9 was meant), so padding takes part in attention and results depend on it.
      embedding: how the embeddings `e` and the sinusoids `P` enter. `'once'`: `dropout(e + P)`. `'twice'`:
        `e + dropout(e + P)`, as published.
      first_token_only: leave out what does not reach the first token: in the last layer only its query is asked. The
        logits are the same; the last hidden state is `[B, 1, D]`. With `pooling='mean'` all tokens are needed anyway.

    Raises:
      UserError: if a field has a value that does not exist, heads do not divide the width, or the width is odd.
    """

    hidden_size: int = 512
    num_layers: int = 2
    num_heads: int = 8
    intermediate_size: int = 1024
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-6
    hidden_act: str = "relu"
    num_labels: int = 4
    classifier_dropout: float | None = 0.0
    classifier_size: int = 1024
    classifier_relu: bool = True
    mask: Literal["exact", "published"] = "exact"
    embedding: Literal["once", "twice"] = "once"
    first_token_only: bool = True

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive number, not {value!r}")
        if self.hidden_act not in bert.ACTIVATIONS:
            raise UserError(f"unknown hidden_act {self.hidden_act!r}{near_misses(self.hidden_act, bert.ACTIVATIONS)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(map(repr, choices))}")
        for field in dataclasses.fields(self):
            if field.name in _WITHOUT and getattr(self, field.name) != field.default:
                raise UserError(f"a text classifier has no {field.name}; leave it out")
        if self.hidden_size % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide the width {self.hidden_size}")
        if self.hidden_size % 2:
            raise UserError(f"hidden_size {self.hidden_size} is odd: sinusoids come in pairs")


class PreNormBlock(bert.Block):
    """A part of a pre-norm model that is trained from nothing: how its linear layers start, as published."""

    norm_first: ClassVar[bool] = True

    def initializers(self) -> dict[str, Any]:
        return {"kernel_init": XAVIER, "bias_init": uniform_bias}


class _Block(PreNormBlock):
    """A part of the model: its norms divide by deviation plus epsilon, and it may see padding as published."""

    config: TextClassifierConfig

    def norm(self) -> nn.Module:
        return DeviationNorm(self.config.layer_norm_eps, self.dtype, self.policy, name="norm")

    def masked(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
        if self.config.mask == "exact":
            return super().masked(scores, mask)
        return jnp.where(mask, scores, PUBLISHED_MASKED)


class Embeddings(_Block):
    """Word and learned position embeddings, times the root of the width, and sinusoids."""

    @nn.compact
    def __call__(self, input_ids, token_type_ids, where, deterministic: bool) -> jax.Array:
        """Maps `[B, T]` ids to `[B, T, D]`; token types are ignored."""
        del token_type_ids
        c, tokens = self.config, input_ids.shape[1]

        def table(count: int, name: str) -> Embed:
            return Embed(count, c.embedding_width, XAVIER, self.dtype, self.policy, name=name)

        positions = table(c.position_rows, "position")(jnp.arange(tokens)[None])
        e = (table(c.vocab_size, "word")(input_ids) + positions) * c.hidden_size**0.5
        e = site(self, "sum_position", e, where=where)
        x = site(self, "sum_sinusoid", e + sinusoids(tokens, c.hidden_size).astype(self.dtype), where=where)
        x = self.dropout(x, deterministic)
        return site(self, "sum_twice", e + x, where=where) if c.embedding == "twice" else x


class Attention(_Block):
    """Multi-head self-attention behind its norm, with its residual.

    Attributes:
      first_only: only the first token asks and has a result.
    """

    first_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, Q, D]`, Q being T or 1; `mask` is bool `[B, T]`, `where` is `[B, T, 1]`."""
        width, count = x.shape[-1], 1 if self.first_only else x.shape[1]
        y, asking = self.norm()(x, where), where[:, :count]
        query = self.dense(width, "query")(y[:, :count], asking)
        key, value = (self.dense(width, name)(y, where) for name in ("key", "value"))
        context = bert.attend(self, query, key, value, mask, asking, deterministic)
        y = self.dropout(self.dense(width, "out")(context, asking), deterministic)
        return site(self, "residual", x[:, :count] + y, where=asking)


class PreNormFeedForward(PreNormBlock):
    """The two-layer perceptron behind its norm, with its residual."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, Q, D]` to `[B, Q, D]`; `where` is `[B, Q, 1]`."""
        c = self.config
        y = self.dense(c.intermediate_size, "up", bert.ACTIVATIONS[c.hidden_act])(self.norm()(x, where), where)
        down = self.dense(x.shape[-1], "down", input_dropout=c.hidden_dropout)
        y = self.dropout(down(y, where, deterministic), deterministic)
        return site(self, "residual", x + y, where=where)


class FeedForward(_Block, PreNormFeedForward):
    """The feed-forward part of a layer."""


class Layer(_Block):
    """One encoder layer; `first_only` as in `Attention`."""

    first_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, Q, D]`, Q being T or 1."""
        x = self.part(Attention, "attention", first_only=self.first_only)(x, mask, where, deterministic)
        return self.part(FeedForward, "ffn")(x, where[:, : x.shape[1]], deterministic)


class Encoder(bert.Encoder):
    """Embeddings and all layers."""

    config: TextClassifierConfig

    embeddings_type = Embeddings

    def layers(self) -> Sequence[Callable[..., jax.Array]]:
        """Returns the layers in the order in which they run."""
        c = self.config
        last = c.num_layers - 1 if c.first_token_only and c.pooling == "cls" else None
        return [self.part(Layer, f"layer_{i}", first_only=i == last) for i in range(c.num_layers)]


class Head(_Block):
    """The two-layer classifier."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """Maps `[B, T, D]` and a bool mask `[B, T]` to logits `[B, C]` and the vectors `[B, D]` that they are made of."""
        c, where = self.config, jnp.any(mask, 1)[:, None]
        pooled = self.pool(x, mask)
        rate = c.hidden_dropout if c.classifier_dropout is None else c.classifier_dropout
        hidden = self.dense(c.classifier_size, "hidden", nn.relu if c.classifier_relu else None, input_dropout=rate)
        return self.dense(c.num_labels, "out")(hidden(pooled, where, deterministic), where), pooled


class TextClassifier(bert.BertClassifier):
    """The text classifier; called as `qtx.nn.bert.BertClassifier` is, without effect of the token types."""

    config: TextClassifierConfig

    norm_first: ClassVar[bool] = True
    encoder_type = Encoder

    def head(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """Maps the encoder's output `[B, T, D]` and a bool mask `[B, T]` to logits `[B, C]` and what they are made of."""
        return self.part(Head, "classifier")(x, mask, deterministic)
