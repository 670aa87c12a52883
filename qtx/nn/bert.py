"""BERT (Devlin et al. 2019) with every tensor a site.

Shapes: `B` batch, `T` tokens, `D` width, `H` heads, `L` layers, `V` vocabulary, `C` classes. Site names, with the
letters of Bondarenko et al. 2021 (13 L + 5 activations, 8 L + 6 weights):

    encoder/embeddings/{word,token_type,position}/table                      weights
    encoder/embeddings/sum_token_type, sum_position (e), norm/{scale,output}
    encoder/layer_i/attention/{query,key,value}/{kernel,output}
    encoder/layer_i/attention/scores (s)       before 1/sqrt(D/H) and before the mask
    encoder/layer_i/attention/probs (p), context (c), out/{kernel,output} (g), residual (u), norm/{scale,output} (x)
    encoder/layer_i/attention/probs_dropped    an input: probabilities behind their dropout, as they enter the product
    encoder/layer_i/attention/{query,key,value}_heads  inputs: [B, T, H, D/H], so that per token means per head and token
    encoder/layer_i/ffn/up/{kernel,output}     after GELU
    encoder/layer_i/ffn/down/{kernel,output} (h), residual (y), norm/{scale,output} (z)
    pooler/dense/{kernel,output} (P)           after tanh; not with `pooler=False`
    classifier/{kernel,output} (C)

With `BertConfig.shortcuts` the residual branches have parameters `attention/shortcut/{scale,bias}` and `ffn/shortcut/...`,
which are never quantized; the plain model has none.

Linear layers have an `input` site as well, for methods that quantize what enters a product, or cut its gradient.

Other families of post-LN encoders (`qtx.nn.roberta` and so on) are these parts with one or two of them replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtx.nn.layers import Dense, Embed, LayerNorm, Shortcut, dropout
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
      pooling: what the head sees: `'cls'` (first token) or `'mean'` (mean of the tokens).
      pooler: whether a dense layer with tanh, and dropout, stand before the classifier; without them it sees what was pooled
        as it is.
      shortcuts: residual branches have a scale and a shift for each channel, which undo what was taken out of the norm before
        them (`qtx.methods.norm_migration`). Hidden states are scaled and shifted, too, the last one excepted.
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
    pooler: bool = True
    logit_range: tuple[float, float] | None = None
    classifier_dropout: float | None = None
    shortcuts: bool = False

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
      logits: `[B, C]`, at least float32.
      pooled: `[B, D]`.
      hidden_states: `L + 1` times `[B, T, D]`: the embeddings and every layer (`[B, 1, D]` for the last one where nothing
        but the first token is needed of it).
    """

    logits: jax.Array
    pooled: jax.Array
    hidden_states: tuple[jax.Array, ...]


Part = TypeVar("Part", bound="Block")


class Block(nn.Module):
    """Fields and layers that all parts of a model share. Other families of encoders derive theirs from it.

    `norm_first` says whether the norm of a sub-layer stands before it: the site `attention/norm/output` is what enters
    attention then, not what comes of it.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    norm_first: ClassVar[bool] = False

    def initializers(self) -> dict[str, Any]:
        """Returns the fields of `Dense` that say how linear layers start."""
        return {"kernel_init": nn.initializers.normal(self.config.initializer_range)}

    def dense(self, features: int, name: str, activation=None, groups: int = 1, **fields: Any) -> Dense:
        fields = self.initializers() | fields
        return Dense(features, activation, dtype=self.dtype, policy=self.policy, groups=groups, name=name, **fields)

    def norm(self) -> nn.Module:
        return LayerNorm(self.config.layer_norm_eps, self.dtype, self.policy, name="norm")

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Returns what a residual sum takes of the input `[B, T, D]` of its block."""
        return Shortcut(self.dtype, name="shortcut")(x) if self.config.shortcuts else x

    def part(self, kind: type[Part], name: str, **fields: Any) -> Part:
        return kind(self.config, self.dtype, self.policy, name=name, **fields)

    def score_divisor(self, width: int) -> float:
        """Returns what scores are divided by before the softmax, for heads of this width."""
        return width**0.5

    def masked(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns divided scores `[B, H, Q, T]`, of which the softmax leaves out what is false in the mask.

        Args:
          scores: `[B, H, Q, T]`.
          mask: bool `[B, 1, 1, T]` or `[B, 1, Q, T]`.
        """
        return scores + jnp.where(mask, 0.0, MASKED)

    def pool(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` and a bool mask `[B, T]` to the first token or the mean of the tokens, `[B, D]`."""
        if self.config.pooling == "cls":
            return x[:, 0]
        weight = mask[:, :, None].astype(x.dtype)
        return jnp.sum(x * weight, 1) / jnp.maximum(jnp.sum(weight, 1), 1)

    def dropout(self, x: jax.Array, deterministic: bool, rate: float | None = None) -> jax.Array:
        return dropout(self, x, self.config.hidden_dropout if rate is None else rate, deterministic)


class Embeddings(Block):
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


def attend(
    block: Block, query, key, value, mask: jax.Array | None, where: jax.Array | None, deterministic: bool
) -> jax.Array:
    """Multi-head attention, with its sites in the module `block`: `{query,key,value}_heads`, `scores`, `probs`,
    `probs_dropped` and `context`.

    Args:
      block: the module.
      query: `[B, Q, D]`.
      key: `[B, T, D]`.
      value: `[B, T, D]`.
      mask: bool `[B, T]`, or `[B, Q, T]` where it depends on the query: the keys that are seen; None: all of them.
      where: bool `[B, Q, 1]`: the queries that count in calibration; None, as the mask then is: all of them.
      deterministic: False: dropout of the probabilities.

    Returns:
      The context, heads merged, `[B, Q, D]`.
    """
    c = block.config
    shape, width = query.shape, query.shape[-1] // c.num_heads
    seen = None if mask is None else (mask if mask.ndim == 2 else jnp.any(mask, 1))[..., None]
    query, key, value = (
        site(
            block,
            f"{name}_heads",
            x.reshape(*x.shape[:2], c.num_heads, width),
            kind="input",
            where=None if counted is None else counted[..., None],
        )
        for name, x, counted in (("query", query, where), ("key", key, seen), ("value", value, seen))
    )
    pairs = None
    if mask is not None and where is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        pairs = mask & where[:, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    scores = site(block, "scores", scores, where=pairs, features=False)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = scores / block.score_divisor(width)
    probs = nn.softmax(scores if mask is None else block.masked(scores, mask)).astype(block.dtype)
    probs = site(block, "probs", probs, where=pairs, features=False)
    probs = block.dropout(probs, deterministic, c.attention_dropout)
    probs = site(block, "probs_dropped", probs, kind="input", where=pairs, features=False)
    context = jnp.einsum("bhqk,bkhd->bqhd", probs, value).reshape(shape)
    return site(block, "context", context, where=where)


class Attention(Block):
    """Multi-head self-attention with its residual and LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`; `mask` is bool `[B, T]`, `where` is `[B, T, 1]`."""
        query, key, value = (self.dense(x.shape[-1], name)(x, where) for name in ("query", "key", "value"))
        context = attend(self, query, key, value, mask, where, deterministic)
        y = self.dropout(self.dense(x.shape[-1], "out")(context, where), deterministic)
        return self.norm()(site(self, "residual", y + self.shortcut(x), where=where), where)


class FeedForward(Block):
    """The two-layer perceptron with its residual and LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        c = self.config
        y = self.dense(c.intermediate_size, "up", ACTIVATIONS[c.hidden_act])(x, where)
        y = self.dropout(self.dense(x.shape[-1], "down")(y, where), deterministic)
        return self.norm()(site(self, "residual", y + self.shortcut(x), where=where), where)


class Layer(Block):
    """One encoder layer."""

    attention_type: ClassVar[type[Block]] = Attention
    feed_forward_type: ClassVar[type[Block]] = FeedForward

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        x = self.part(self.attention_type, "attention")(x, mask, where, deterministic)
        return self.part(self.feed_forward_type, "ffn")(x, where, deterministic)


class Encoder(Block):
    """Embeddings and all layers; layers are unrolled so that each can have its own bits."""

    embeddings_type: ClassVar[type[Block]] = Embeddings
    layer_type: ClassVar[type[Block]] = Layer

    def layers(self) -> Sequence[Callable[..., jax.Array]]:
        """Returns the layers in the order in which they run."""
        return [self.part(self.layer_type, f"layer_{i}") for i in range(self.config.num_layers)]

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, deterministic: bool = True) -> tuple[jax.Array, ...]:
        """Maps `[B, T]` ids to the embeddings and every layer's output, each `[B, T, D]`."""
        mask = attention_mask > 0
        where = mask[:, :, None]
        x = self.part(self.embeddings_type, "embeddings")(input_ids, token_type_ids, where, deterministic)
        states = [x]
        for layer in self.layers():
            states.append(layer(states[-1], mask, where, deterministic))
        return tuple(states)


class Pooler(Block):
    """One vector per sequence."""

    activation = "tanh"
    input_dropout = False  # whether the dense layer's input has the head's dropout, too

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps `[B, T, D]` and a bool mask `[B, T]` to `[B, D]`."""
        x = self.pool(x, mask)
        if self.input_dropout:
            x = self.dropout(x, deterministic, self.config.classifier_dropout)
        dense = self.dense(self.config.hidden_size, "dense", ACTIVATIONS[self.activation])
        return dense(x, jnp.any(mask, 1)[:, None])


class BertClassifier(Block):
    """BERT with a pooler and a linear head for sequence classification or regression (one label).

    `inputs` names what the model is called with, as arrays of a batch.
    """

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    encoder_type: ClassVar[type[Block]] = Encoder
    pooler_type: ClassVar[type[Block]] = Pooler

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, deterministic: bool = True) -> Outputs:
        """Classifies sequences.

        Args:
          input_ids: int `[B, T]`.
          attention_mask: `[B, T]`, 1 for tokens and 0 for padding; a row of zeros is a filler row.
          token_type_ids: int `[B, T]`; without effect where a family has no token types.
          deterministic: False for training with dropout (needs the rng `dropout`).
        """
        states = self.part(self.encoder_type, "encoder")(input_ids, attention_mask, token_type_ids, deterministic)
        logits, pooled = self.head(states[-1], attention_mask > 0, deterministic)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.config.logit_range is not None:
            logits = clip_ste(logits, *self.config.logit_range)
        return Outputs(logits, pooled, states)

    def head(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array]:
        """Maps the encoder's output `[B, T, D]` and a bool mask `[B, T]` to logits `[B, C]` and what they are made of."""
        if self.config.pooler:
            pooled = self.part(self.pooler_type, "pooler")(x, mask, deterministic)
            x = self.dropout(pooled, deterministic, self.config.classifier_dropout)
        else:
            pooled = x = self.pool(x, mask)
        return self.dense(self.config.num_labels, "classifier")(x, jnp.any(mask, 1)[:, None]), pooled
