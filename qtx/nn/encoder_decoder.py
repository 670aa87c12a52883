"""The encoder-decoder transformer (Vaswani et al. 2017, pre-norm) with every tensor a site, and its step-by-step decoding.

The model that the course project "Compressed Transformers" (2020) quantized and binarized on IWSLT. Shapes: `B` sentences,
`S` and `T` source and target tokens, `D` width, `H` heads, `V` target vocabulary, `K` hypotheses of a sentence. Site names:

    encoder/embeddings/word/table, decoder/embeddings/word/table                       weights
    encoder/embeddings/sum_sinusoid, decoder/embeddings/sum_sinusoid                   times sqrt(D), with positions
    encoder/layer_i/attention/norm/{scale,output}, {query,key,value,out}/{kernel,input,output}
    encoder/layer_i/attention/scores                                                   before the divisor and the mask
    encoder/layer_i/attention/probs, context, residual
    encoder/layer_i/ffn/norm/{scale,output}, {up,down}/{kernel,input,output}, residual
    encoder/norm/{scale,output}
    decoder/layer_i/{self_attention,cross_attention}/...                               as encoder/layer_i/attention
    decoder/layer_i/ffn/..., decoder/norm/{scale,output}
    generator/{kernel,input,output}                                                    the logits

With `tied` the generator has no kernel: its matrix is a table, which begins with deviation 1/sqrt(D), so that words are as
large as positions in the sum (untied ones begin as published, a quarter of that at the sizes of `configs/translation.py`).

Padding masks follow from the ids. `start`, `empty_cache` and `step` decode one token at a time, with the sites and ranges
of the whole model: the logits of a step are those of a forward pass over all tokens so far, but for activation ranges that
are found anew at every call over several tokens (`range='dynamic'`, unless per token).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtx.errors import UserError, near_misses
from qtx.nn import bert
from qtx.nn.layers import Embed, sinusoids
from qtx.nn.sites import site
from qtx.nn.text_classifier import XAVIER, PreNormBlock, PreNormFeedForward

Tree = dict[str, Any]

_CHOICES = {"tied": ("none", "target", "all"), "scores": ("sqrt", "25d")}
_COUNTS = (
    "source_vocab_size",
    "target_vocab_size",
    "hidden_size",
    "num_layers",
    "decoder_layers",
    "num_heads",
    "intermediate_size",
    "max_positions",
)


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and rates of an encoder-decoder; the defaults are the published ones ("base").

    Attributes:
      source_vocab_size: rows of the source table; the default is that of the joint vocabulary of Vaswani et al. 2017.
      target_vocab_size: rows of the target table and width of the logits.
      num_layers: of the encoder.
      decoder_layers: of the decoder.
      max_positions: the longest source or target that the model is meant for, in tokens; sinusoids have no table that ends.
      hidden_act: between the layers of the FFN.
      hidden_dropout: of embeddings, sub-layer outputs and hidden units of the FFN.
      attention_dropout: of the attention probabilities.
      pad_token_id: in both vocabularies, as `unk_token_id`.
      bos_token_id: what a target begins with.
      eos_token_id: what a target ends with.
      tied: which of source table, target table and generator matrix are one: `'none'`, `'target'` (target table and
        generator) or `'all'` (of a joint vocabulary).
      scores: divisor of the attention scores: `'sqrt'`, the root of a head's width; `'25d'`, 25 times that width, which the
        published binarized models need. A checkpoint can be loaded with another one.

    Raises:
      UserError: if a field has a value that does not exist, heads do not divide the width, the width is odd, or vocabularies of
        different sizes are to be tied.
    """

    source_vocab_size: int = 37000
    target_vocab_size: int = 37000
    hidden_size: int = 512
    num_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    intermediate_size: int = 2048
    max_positions: int = 5000
    layer_norm_eps: float = 1e-5
    hidden_act: str = "relu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    unk_token_id: int = 0
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 3
    tied: Literal["none", "target", "all"] = "none"
    scores: Literal["sqrt", "25d"] = "sqrt"

    changeable: ClassVar[tuple[str, ...]] = ("scores",)  # no parameter depends on them

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive number, not {value!r}")
        if self.hidden_act not in bert.ACTIVATIONS:
            raise UserError(f"unknown hidden_act {self.hidden_act!r}{near_misses(self.hidden_act, bert.ACTIVATIONS)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from {', '.join(map(repr, choices))}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide the width {self.hidden_size}")
        if self.hidden_size % 2:
            raise UserError(f"hidden_size {self.hidden_size} is odd: sinusoids come in pairs")
        if self.tied == "all" and self.source_vocab_size != self.target_vocab_size:
            raise UserError(
                f"tied='all' needs one joint vocabulary, not {self.source_vocab_size} source and {self.target_vocab_size} "
                "target words; use tied='target'"
            )


class Outputs(NamedTuple):
    """What a translation model returns; what is not used is never computed under `jit`.

    Attributes:
      logits: `[B, T, V]` float32: of the token after each target token.
      encoder_states: `num_layers + 1` times `[B, S, D]`: the embeddings and every layer.
      encoded: `[B, S, D]`: the last of them behind the encoder's norm, which is what the decoder sees.
      decoder_states: `decoder_layers + 1` times `[B, T, D]`: likewise.
      decoded: `[B, T, D]`: the last of them behind the decoder's norm.
    """

    logits: jax.Array
    encoder_states: tuple[jax.Array, ...]
    encoded: jax.Array
    decoder_states: tuple[jax.Array, ...]
    decoded: jax.Array


class Block(PreNormBlock):
    """A part of the model."""

    config: EncoderDecoderConfig  # type: ignore[assignment]

    def score_divisor(self, width: int) -> float:
        return 25.0 * width if self.config.scores == "25d" else super().score_divisor(width)

    def masked(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
        # Binarized layers have scores beyond any fixed penalty. A row in which nothing is seen has equal probabilities.
        return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


class Embeddings(Block):
    """Word embeddings times the root of the width, with sinusoids.

    Attributes:
      count: rows of the table.
      shared: the table of other embeddings, in place of one of its own.
    """

    count: int = 0
    shared: Embed | None = None

    def setup(self):
        if self.shared is None:
            c = self.config
            init = XAVIER if c.tied == "none" else nn.initializers.normal(c.hidden_size**-0.5)
            self.word = Embed(self.count, c.hidden_size, init, self.dtype, self.policy, name="word")
        else:
            self.word = self.shared

    def __call__(self, ids: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Maps int `[B, T]` to `[B, T, D]`."""
        positions = sinusoids(ids.shape[1], self.config.hidden_size)
        return self.dropout(self.at(ids, positions, where), deterministic)

    def at(self, ids: jax.Array, positions: jax.Array | np.ndarray, where: jax.Array) -> jax.Array:
        """Maps int `[B, T]` to `[B, T, D]`, given encodings `[T, D]` of their positions."""
        x = self.word(ids) * self.config.hidden_size**0.5
        return site(self, "sum_sinusoid", x + positions.astype(self.dtype), where=where)


class FeedForward(Block, PreNormFeedForward):
    """The feed-forward part of a layer."""


class Attention(Block):
    """Multi-head attention behind its norm, with its residual: of tokens to one another, or to what `project` made."""

    def setup(self):
        width = self.config.hidden_size
        self.before = self.norm()
        self.query, self.key = self.dense(width, "query"), self.dense(width, "key")
        self.value, self.out = self.dense(width, "value"), self.dense(width, "out")

    def project(self, x: jax.Array, where: jax.Array) -> Tree:
        """Maps normalised `[B, T, D]` to the keys and values of these tokens, each `[B, T, D]`."""
        return {"key": self.key(x, where), "value": self.value(x, where)}

    def __call__(self, x, mask, where, deterministic: bool, seen: Tree | None = None) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`.

        Args:
          x: `[B, T, D]`.
          mask: bool `[B, S]` or `[B, T, S]`: which keys are seen.
          where: bool `[B, T, 1]`: the tokens that count in calibration.
          deterministic: False: dropout.
          seen: keys and values `[B, S, D]`; None: those of `x` itself.
        """
        y = self.before(x, where)
        query = self.query(y, where)
        seen = self.project(y, where) if seen is None else seen
        context = bert.attend(self, query, seen["key"], seen["value"], mask, where, deterministic)
        return self.finish(x, context, where, deterministic)

    def step(self, x, mask, where, cache: Tree, position) -> tuple[jax.Array, Tree]:
        """Maps one token of every hypothesis, `[B, K, D]`, to `[B, K, D]`, with the keys and values of earlier ones.

        Args:
          x: `[B, K, D]`.
          mask: bool `[B, K, limit]`: which of the tokens so far are seen, this one included.
          where: bool `[B, K, 1]`.
          cache: keys and values `[B, K, limit, D]`.
          position: int32: where the new ones go.
        """
        y = self.before(x, where)
        query = self.query(y, where)
        new = self.project(y, where)
        cache = {name: _put(cache[name], new[name], position) for name in cache}
        # Every hypothesis has keys of its own: they attend as so many sentences with one query each.
        one, many = (lambda a: a.reshape(-1, 1, a.shape[-1])), (lambda a: a.reshape(-1, *a.shape[2:]))
        key, value = many(cache["key"]), many(cache["value"])
        context = bert.attend(self, one(query), key, value, one(mask), one(where), True)
        return self.finish(x, context.reshape(x.shape), where, True), cache

    def finish(self, x: jax.Array, context: jax.Array, where: jax.Array, deterministic: bool) -> jax.Array:
        """Returns the residual sum `[B, T, D]`."""
        y = self.dropout(self.out(context, where), deterministic)
        return site(self, "residual", x + y, where=where)


def _put(cached: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """Writes `[B, K, ...]` at a position of the third axis of `[B, K, limit, ...]`."""
    return jax.lax.dynamic_update_slice_in_dim(cached, new[:, :, None], position, axis=2)


class EncoderLayer(Block, bert.Layer):
    """One encoder layer."""

    attention_type = Attention
    feed_forward_type = FeedForward


class DecoderLayer(Block):
    """One decoder layer: attention to the target so far, to the encoded source, and the FFN."""

    def setup(self):
        self.self_attention = self.part(Attention, "self_attention")
        self.cross_attention = self.part(Attention, "cross_attention")
        self.ffn = self.part(FeedForward, "ffn")

    def project(self, encoded: jax.Array, where: jax.Array) -> Tree:
        """Returns keys and values `[B, S, D]` of the encoded source."""
        return self.cross_attention.project(encoded, where)

    def __call__(self, x, mask, where, encoded, source_mask, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`; `mask` is `[B, T, T]`, `encoded` `[B, S, D]`, `source_mask` `[B, S]`."""
        x = self.self_attention(x, mask, where, deterministic)
        seen = self.project(encoded, source_mask[:, :, None])
        x = self.cross_attention(x, source_mask, where, deterministic, seen)
        return self.ffn(x, where, deterministic)

    def step(self, x, mask, where, source_mask, seen: Tree, cache: Tree, position) -> tuple[jax.Array, Tree]:
        """Maps `[B, K, D]` to `[B, K, D]`; see `Attention.step`."""
        x, cache = self.self_attention.step(x, mask, where, cache, position)
        x = self.cross_attention(x, source_mask, where, True, seen)
        return self.ffn(x, where, True), cache


class Encoder(Block):
    """Embeddings, all layers and a norm; layers are unrolled so that each can have its own bits."""

    def setup(self):
        c = self.config
        self.embeddings = self.part(Embeddings, "embeddings", count=c.source_vocab_size)
        self.layers = [self.part(EncoderLayer, f"layer_{i}") for i in range(c.num_layers)]
        self.after = self.norm()

    def __call__(self, ids: jax.Array, mask: jax.Array, deterministic: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Maps int `[B, S]` and their mask to embeddings and layers, and the last of them normalised, each `[B, S, D]`."""
        where = mask[:, :, None]
        states = [self.embeddings(ids, where, deterministic)]
        for layer in self.layers:
            states.append(layer(states[-1], mask, where, deterministic))
        return tuple(states), self.after(states[-1], where)


class Decoder(Block):
    """Embeddings, all layers and a norm.

    Attributes:
      shared: the source table, where there is but one.
    """

    shared: Embed | None = None

    def setup(self):
        c = self.config
        self.embeddings = self.part(Embeddings, "embeddings", count=c.target_vocab_size, shared=self.shared)
        self.layers = [self.part(DecoderLayer, f"layer_{i}") for i in range(c.decoder_layers)]
        self.after = self.norm()

    def project(self, encoded: jax.Array, where: jax.Array) -> tuple[Tree, ...]:
        """Returns what each layer sees of the encoded source `[B, S, D]`."""
        return tuple(layer.project(encoded, where) for layer in self.layers)

    def __call__(self, ids, encoded, source_mask, deterministic: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Maps int `[B, T]` and the encoded source to embeddings and layers, and the last one normalised, `[B, T, D]`."""
        tokens = ids != self.config.pad_token_id
        where = tokens[:, :, None]
        mask = tokens[:, None, :] & jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))
        states = [self.embeddings(ids, where, deterministic)]
        for layer in self.layers:
            states.append(layer(states[-1], mask, where, encoded, source_mask, deterministic))
        return tuple(states), self.after(states[-1], where)

    def step(self, ids, seen, source_mask, cache: Tree, position) -> tuple[jax.Array, Tree]:
        """Maps int `[B, K]` to `[B, K, D]`, and the cache to what the next step is given."""
        where = (ids != self.config.pad_token_id)[:, :, None]
        mask = _put(cache["mask"], where[:, :, 0], position)
        positions = sinusoids(mask.shape[2], self.config.hidden_size)
        x = self.embeddings.at(ids, jax.lax.dynamic_slice_in_dim(positions, position, 1), where)
        layers = []
        for layer, its, cached in zip(self.layers, seen, cache["layers"], strict=True):
            x, cached = layer.step(x, mask, where, source_mask, its, cached, position)
            layers.append(cached)
        return self.after(x, where), {"mask": mask, "layers": tuple(layers)}


class EncoderDecoder(Block):
    """Translates: the logits of each target token, given the source and the target tokens before it."""

    inputs: ClassVar[tuple[str, ...]] = ("source_ids", "target_ids")

    def setup(self):
        c = self.config
        self.encoder = self.part(Encoder, "encoder")
        shared = self.encoder.embeddings.word if c.tied == "all" else None
        self.decoder = self.part(Decoder, "decoder", shared=shared)
        self.generator = self.dense(c.target_vocab_size, "generator")

    def __call__(self, source_ids, target_ids, deterministic: bool = True) -> Outputs:
        """Runs over whole sentences.

        Args:
          source_ids: int `[B, S]`, padded; a row of padding is a filler row.
          target_ids: int `[B, T]`: the decoder's input, beginning with bos, padded.
          deterministic: False for training with dropout (needs the rng `dropout`).
        """
        mask = source_ids != self.config.pad_token_id
        encoder_states, encoded = self.encoder(source_ids, mask, deterministic)
        decoder_states, decoded = self.decoder(target_ids, encoded, mask, deterministic)
        where = (target_ids != self.config.pad_token_id)[:, :, None]
        return Outputs(self.logits(decoded, where), encoder_states, encoded, decoder_states, decoded)

    def logits(self, decoded: jax.Array, where: jax.Array) -> jax.Array:
        """Maps `[B, T, D]` to float32 `[B, T, V]`."""
        kernel = None if self.config.tied == "none" else self.decoder.embeddings.word.whole().T
        return self.generator(decoded, where, kernel=kernel).astype(jnp.float32)

    def start(self, source_ids: jax.Array) -> Tree:
        """Encodes the source, once for all steps: `memory = model.apply(variables, source_ids, method='start')`.

        Args:
          source_ids: int `[B, S]`, padded.

        Returns:
          What does not change during decoding: `mask` `[B, S]` and, for each decoder layer, keys and values `[B, S, D]` of its
          attention to the source.
        """
        mask = source_ids != self.config.pad_token_id
        _, encoded = self.encoder(source_ids, mask, True)
        return {"mask": mask, "layers": self.decoder.project(encoded, mask[:, :, None])}

    @nn.nowrap
    def empty_cache(self, batch: int, beams: int, limit: int) -> Tree:
        """Returns the cache of no tokens: `model.empty_cache(batch, beams, limit)`, for a bound module or not.

        Args:
          batch: B, sentences.
          beams: K, hypotheses of each.
          limit: most tokens of a hypothesis, bos included.

        Returns:
          `mask` bool `[B, K, limit]`: the tokens that are seen; for each decoder layer keys and values `[B, K, limit, D]`.

        Raises:
          UserError: if the limit is beyond the model's positions.
        """
        c = self.config
        if not 1 <= limit <= c.max_positions:
            raise UserError(f"a limit of {limit} tokens is outside 1 to the model's {c.max_positions} positions")
        empty = jnp.zeros((batch, beams, limit, c.hidden_size), self.dtype)
        layers = tuple({"key": empty, "value": empty} for _ in range(c.decoder_layers))
        return {"mask": jnp.zeros((batch, beams, limit), bool), "layers": layers}

    def step(self, memory: Tree, cache: Tree, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Tree]:
        """Adds one token to every hypothesis: `model.apply(variables, memory, cache, tokens, position, method='step')`.

        The K hypotheses of a sentence are K queries to its source: nothing of `memory` is copied. The shapes do not depend on
        the position, so one compiled program serves all steps.

        Args:
          memory: from `start`.
          cache: from `empty_cache` or the step before, its hypotheses rearranged at will.
          tokens: int `[B, K]`: the latest token of each hypothesis; at position 0 bos.
          position: int32 scalar: how many tokens came before.

        Returns:
          Float32 logits `[B, K, V]` of the next token, and the new cache.
        """
        x, cache = self.decoder.step(tokens, memory["layers"], memory["mask"], cache, position)
        where = (tokens != self.config.pad_token_id)[:, :, None]
        return self.logits(x, where), cache
