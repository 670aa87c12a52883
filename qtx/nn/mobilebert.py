"""MobileBERT (Sun et al. 2020) with every tensor a site: thin layers between bottlenecks, several FFNs in each.

Shapes as in `qtx.nn.bert`; `E` is the width of the word table, `N` the width within a layer. The roles that BERT has too
have its names, so its short names work; the letters of the FFN mean the last one of a layer, `i` and `FFN` all of them.
In parentheses: the short name, and the published name (Bondarenko et al. 2021), both usable in a policy:

    encoder/embeddings/{word,token_type,position}/table                 weights; the word table is [V, E]
    encoder/embeddings/transformation/{kernel,output}                   from [next, present, previous] word, 3 E -> D
    encoder/embeddings/sum_position (e, sum_input_pos_embd), sum_token_type (e, sum_token_type_embd)
    encoder/embeddings/norm/{scale,output}
    encoder/layer_i/bottleneck_in/{dense/{kernel,output},norm/{scale,output}}         D -> N, the residual in the layer
    encoder/layer_i/bottleneck_attention/{dense/{kernel,output},norm/{scale,output}}  D -> N, for query and key
    encoder/layer_i/attention/{query,key,value}/{kernel,output}
    encoder/layer_i/attention/scores (s, attn_scores), probs (p, attn_probs), context (c, attn_output)
    encoder/layer_i/attention/out/{kernel,output} (g), residual (u, res_self_output), norm/{scale,output} (x)
    encoder/layer_i/ffn_j/up/{kernel,output} (i), down/{kernel,output}, residual (res_ffn_output), norm/{scale,output}
    encoder/layer_i/ffn/up/{kernel,output} (i), down/{kernel,output} (h), residual (y, res_output), norm/{scale,output} (z)
    encoder/layer_i/bottleneck_out/{dense/{kernel,output},residual,norm/{scale,output}}  N -> D, residual: the layer's input
                                                                        (residual is res_output_bottleneck)
    pooler/dense/{kernel,output} (P)                                    with `classifier_activation` alone
    classifier/{kernel,output} (C)

With `F` FFNs in each of `L` layers, bottlenecks and the default flags: (16 + 4 F) L + 5 activations and (11 + 3 F) L + 6
weights, one more of each with the pooler's layer. The last token sees the embedding of the padding after it, as published.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtx.errors import UserError, near_misses
from qtx.nn import bert
from qtx.nn.bert import attend
from qtx.nn.layers import Embed, LayerNorm
from qtx.nn.sites import site
from qtx.quant.policy import Policy

NORMALIZATIONS = ("no_norm", "layer_norm")

# Two of the norms have this constant whatever the configuration says, as published.
_OTHER_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class MobileBertConfig(bert.BertConfig):
    """Sizes and rates; the defaults are MobileBERT uncased.

    Attributes:
      embedding_size: width of the word table.
      trigram_input: a token's input is the words next to it, too.
      use_bottleneck: the layers are `intra_bottleneck_size` wide within, else `hidden_size`.
      intra_bottleneck_size: see above.
      use_bottleneck_attention: query, key and value come from the residual's bottleneck.
      key_query_shared_bottleneck: query and key come from one of their own (the value from the layer's input).
      num_feedforward_networks: in each layer.
      normalization_type: `'no_norm'` (scale and shift alone) or `'layer_norm'`.
      classifier_activation: whether the pooler has a dense layer and a tanh.

    Raises:
      UserError: on an unknown normalization, or sizes and flags that do not go together.
    """

    hidden_size: int = 512
    num_layers: int = 24
    num_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout: float = 0.0
    embedding_size: int = 128
    trigram_input: bool = True
    use_bottleneck: bool = True
    intra_bottleneck_size: int = 128
    use_bottleneck_attention: bool = False
    key_query_shared_bottleneck: bool = True
    num_feedforward_networks: int = 4
    normalization_type: Literal["no_norm", "layer_norm"] = "no_norm"
    classifier_activation: bool = True

    def __post_init__(self):
        kind, width = self.normalization_type, self.true_hidden_size
        if kind not in NORMALIZATIONS:
            raise UserError(f"unknown normalization_type {kind!r}{near_misses(str(kind), NORMALIZATIONS)}")
        if self.num_feedforward_networks < 1:
            raise UserError(f"num_feedforward_networks is {self.num_feedforward_networks}; a layer needs at least one")
        if width % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide the width {width} within the layers")
        from_outside = not (self.use_bottleneck_attention or self.key_query_shared_bottleneck)
        if from_outside and width != self.hidden_size:
            raise UserError(
                f"queries {width} wide cannot come from layers {self.hidden_size} wide; "
                "set key_query_shared_bottleneck or use_bottleneck_attention"
            )

    @property
    def true_hidden_size(self) -> int:
        """Width within the layers."""
        return self.intra_bottleneck_size if self.use_bottleneck else self.hidden_size


class NoNorm(nn.Module):
    """`x scale + bias`, in place of a normalisation. Sites: `scale`, `output`.

    The shift is never quantized. (The published code puts scale and shift on one grid, which is the shift's.)

    Attributes:
      dtype: of the output.
      policy: see `qtx.nn.sites`.
    """

    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Maps `[..., D]` to `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        scale = site(self, "scale", scale, kind="weight", channel_axis=0)
        return site(self, "output", (x * scale + bias).astype(self.dtype), where=where)


class _Block(bert.Block):
    """Fields and layers that all parts share."""

    config: MobileBertConfig

    def norm(self, epsilon: float | None = None) -> nn.Module:
        if self.config.normalization_type == "no_norm":
            return NoNorm(self.dtype, self.policy, name="norm")
        epsilon = self.config.layer_norm_eps if epsilon is None else epsilon
        return LayerNorm(epsilon, self.dtype, self.policy, name="norm")


class Embeddings(_Block):
    """Words of three neighbours, widened; positions and token types are added; then the norm."""

    @nn.compact
    def __call__(self, input_ids, token_type_ids, where, deterministic: bool) -> jax.Array:
        """Maps `[B, T]` ids to `[B, T, D]`."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def table(count: int, features: int, name: str) -> Embed:
            return Embed(count, features, init, self.dtype, self.policy, name=name)

        x = table(c.vocab_size, c.embedding_size, "word")(input_ids)
        if c.trigram_input:
            edge = jnp.zeros_like(x[:, :1])
            after, before = jnp.concatenate([x[:, 1:], edge], 1), jnp.concatenate([edge, x[:, :-1]], 1)
            x = jnp.concatenate([after, x, before], -1)
        wider = self.dense(c.hidden_size, "transformation")
        if c.trigram_input or c.embedding_size != c.hidden_size:
            x = wider(x, where)
        elif self.is_initializing():
            wider(x)  # published checkpoints hold it, though nothing uses it
        x = x + table(c.max_positions, c.hidden_size, "position")(jnp.arange(input_ids.shape[1])[None])
        x = site(self, "sum_position", x, where=where)
        x = x + table(c.type_vocab_size, c.hidden_size, "token_type")(token_type_ids)
        x = site(self, "sum_token_type", x, where=where)
        return self.dropout(self.norm(_OTHER_EPS)(x, where), deterministic)


class Bottleneck(_Block):
    """From the width between the layers to the one within."""

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, N]`."""
        return self.norm()(self.dense(self.config.intra_bottleneck_size, "dense")(x, where), where)


class OutputBottleneck(_Block):
    """Back to the width between the layers, with the residual of the whole layer."""

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, N]` and the layer's input `[B, T, D]` to `[B, T, D]`."""
        x = self.dropout(self.dense(self.config.hidden_size, "dense")(x, where), deterministic)
        return self.norm()(site(self, "residual", x + residual, where=where), where)


class Attention(_Block):
    """Multi-head self-attention whose inputs may differ, with its residual and norm."""

    @nn.compact
    def __call__(self, query, key, value, residual, mask, where, deterministic: bool) -> jax.Array:
        """Maps queries' and keys' inputs and the residual `[B, T, N]`, and values' `[B, T, D or N]`, to `[B, T, N]`."""
        c = self.config
        query, key, value = (
            self.dense(c.true_hidden_size, name)(x, where)
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        context = attend(self, query, key, value, mask, where, deterministic)
        y = self.dense(c.true_hidden_size, "out")(context, where)
        y = self.dropout(y, deterministic or c.use_bottleneck)  # with bottlenecks, their output alone has dropout
        return self.norm()(site(self, "residual", y + residual, where=where), where)


class StackedFeedForward(_Block, bert.FeedForward):
    """One of the FFNs before the last; without dropout."""

    def dropout(self, x: jax.Array, deterministic: bool, rate: float | None = None) -> jax.Array:
        return x


class FeedForward(_Block, bert.FeedForward):
    """The last FFN of a layer."""

    def norm(self, epsilon: float | None = _OTHER_EPS) -> nn.Module:
        return super().norm(epsilon)

    def dropout(self, x: jax.Array, deterministic: bool, rate: float | None = None) -> jax.Array:
        return super().dropout(x, deterministic or self.config.use_bottleneck, rate)


class Layer(_Block):
    """One encoder layer."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        c = self.config
        query = key = value = residual = x
        if c.use_bottleneck:
            residual = self.part(Bottleneck, "bottleneck_in")(x, where)
            shared = self.part(Bottleneck, "bottleneck_attention") if c.key_query_shared_bottleneck else None
            if c.use_bottleneck_attention:
                query = key = value = residual
                if shared and self.is_initializing():
                    shared(x, where)  # published checkpoints hold it, though nothing uses it
            elif shared:
                query = key = shared(x, where)
        y = self.part(Attention, "attention")(query, key, value, residual, mask, where, deterministic)
        for j in range(c.num_feedforward_networks - 1):
            y = self.part(StackedFeedForward, f"ffn_{j}")(y, where, deterministic)
        y = self.part(FeedForward, "ffn")(y, where, deterministic)
        return self.part(OutputBottleneck, "bottleneck_out")(y, x, where, deterministic) if c.use_bottleneck else y


class Encoder(bert.Encoder):
    """Embeddings and all layers."""

    embeddings_type = Embeddings
    layer_type = Layer


class Pooler(_Block, bert.Pooler):
    """One vector per sequence; dense and tanh only if the configuration says so."""

    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        """Maps `[B, T, D]` and a bool mask `[B, T]` to `[B, D]`."""
        return super().__call__(x, mask, deterministic) if self.config.classifier_activation else self.pool(x, mask)


class MobileBertClassifier(bert.BertClassifier):
    """MobileBERT with a pooler and a linear head."""

    config: MobileBertConfig

    encoder_type = Encoder
    pooler_type = Pooler
