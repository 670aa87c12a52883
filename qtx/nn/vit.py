"""Vision transformers (ViT, Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021) with every tensor a site.

Shapes: `B` batch, `S` height and width of an image in pixels, `K` channels, `T` tokens (patches, and one or two before
them), `D` width, `H` heads, `L` layers, `C` classes. Sites have BERT's names (`qtx.nn.bert`) where they mean the same:

    encoder/embeddings/patch/{kernel,input,output}                         the linear layer over cut patches
    encoder/embeddings/{cls,distillation,position}/table                    weights; `distillation` in DeiT alone
    encoder/embeddings/sum_position (e)
    encoder/layer_i/attention/norm/{scale,output} (x), {query,key,value}/{kernel,input,output}
    encoder/layer_i/attention/scores (s), probs (p), context (c), out/{kernel,input,output} (g), residual (u)
    encoder/layer_i/ffn/norm/{scale,output} (z), up/{kernel,input,output}, down/{kernel,input,output} (h), residual (y)
    encoder/norm/{scale,output}
    classifier/{kernel,input,output}, distillation_classifier/{kernel,input,output} (C)

The norms stand before their sub-layer. All tokens of all images count: there is no mask.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtx.errors import UserError, near_misses
from qtx.nn import bert
from qtx.nn.layers import Embed
from qtx.nn.sites import site

_COUNTS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "num_labels",
)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes and rates of a ViT; the defaults are ViT-B/16.

    Attributes:
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch, in pixels; divides `image_size`.
      num_channels: 3 for colours, 1 for grey.
      image_mean: of pixels between 0 and 1, one for each channel, or one for all; see `normalised`.
      image_std: likewise, above 0.
      pooling: what the head sees of the last norm: `'cls'` (the first token) or `'mean'` (the mean of the tokens).
      classifier_dropout: rate of what the head sees.

    Raises:
      UserError: if a field has a value that does not exist, or sizes do not divide.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    initializer_range: float = 0.02
    num_labels: int = 2
    pooling: Literal["cls", "mean"] = "cls"
    image_mean: tuple[float, ...] = (0.5,)
    image_std: tuple[float, ...] = (0.5,)

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a positive number, not {value!r}")
        if self.hidden_act not in bert.ACTIVATIONS:
            raise UserError(f"unknown hidden_act {self.hidden_act!r}{near_misses(self.hidden_act, bert.ACTIVATIONS)}")
        if self.pooling not in ("cls", "mean"):
            raise UserError(f"unknown pooling {self.pooling!r}; choose from 'cls', 'mean'")
        if self.image_size % self.patch_size:
            raise UserError(f"patches of {self.patch_size} pixels do not divide images of {self.image_size}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide the width {self.hidden_size}")
        for name in ("image_mean", "image_std"):
            values = tuple(float(value) for value in getattr(self, name))
            values = values * self.num_channels if len(values) == 1 else values
            if len(values) != self.num_channels:
                raise UserError(f"{name} has {len(values)} values for {self.num_channels} channels; give one for each")
            if name == "image_std" and min(values) <= 0:
                raise UserError(f"image_std {values} must be above 0")
            object.__setattr__(self, name, values)

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return 1

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2 + self.extra_tokens


@dataclasses.dataclass(frozen=True)
class DeitConfig(VitConfig):
    """Sizes and rates of a DeiT, which has a second token that learned from a teacher.

    Attributes:
      distillation_head: that token has a head of its own, and the logits are the mean of both heads.

    Raises:
      UserError: as for `VitConfig`, or a mean of tokens with two heads.
    """

    distillation_head: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.distillation_head and self.pooling == "mean":
            raise UserError("with distillation_head each head sees its own token: pooling is 'cls', not 'mean'")

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return 2


def normalised(pixels: jax.Array, config: VitConfig) -> jax.Array:
    """Returns images as a model sees them, float32 `[B, S, S, K]`.

    Args:
      pixels: `[B, S, S, K]`, integers from 0 to 255; floating-point values are normalised already and stay as they are.
      config: `image_mean` and `image_std` are of values from 0 to 1.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels
    # One product and one sum, with constants of double precision.
    mean, std = np.array(config.image_mean), np.array(config.image_std)
    return pixels.astype(jnp.float32) * np.float32(1 / (255 * std)) - np.float32(mean / std)


def patches(pixels: jax.Array, size: int) -> jax.Array:
    """Cuts images `[B, S, S, K]` into patches of `size` pixels, row by row: `[B, (S / size)^2, size * size * K]`."""
    batch, side, _, channels = pixels.shape
    count = side // size
    cut = pixels.reshape(batch, count, size, count, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, count * count, size * size * channels)


class Block(bert.Block):
    """A part of the model."""

    config: VitConfig  # type: ignore[assignment]

    norm_first: ClassVar[bool] = True


class Embeddings(Block):
    """Tokens of the patches, behind one or two learned ones, plus their positions."""

    @nn.compact
    def __call__(self, pixels: jax.Array, deterministic: bool) -> jax.Array:
        """Maps normalised images `[B, S, S, K]` to `[B, T, D]`."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)

        def table(count: int, name: str) -> jax.Array:
            embed = Embed(count, c.hidden_size, init, self.dtype, self.policy, name=name)
            return embed(jnp.arange(count)[None])

        x = self.dense(c.hidden_size, "patch")(patches(pixels, c.patch_size))
        learned = [table(1, name) for name in ("cls", "distillation")[: c.extra_tokens]]
        x = jnp.concatenate([*(jnp.broadcast_to(t, (len(x), 1, c.hidden_size)) for t in learned), x], 1)
        x = site(self, "sum_position", x + table(c.tokens, "position"))
        return self.dropout(x, deterministic)


class Attention(Block):
    """Multi-head self-attention behind its norm, with its residual."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        y = self.norm()(x)
        query, key, value = (self.dense(x.shape[-1], name)(y) for name in ("query", "key", "value"))
        context = bert.attend(self, query, key, value, None, None, deterministic)
        y = self.dropout(self.dense(x.shape[-1], "out")(context), deterministic)
        return site(self, "residual", x + y)


class FeedForward(Block):
    """The two-layer perceptron behind its norm, with its residual."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        c = self.config
        y = self.dense(c.intermediate_size, "up", bert.ACTIVATIONS[c.hidden_act])(self.norm()(x))
        y = self.dropout(self.dense(x.shape[-1], "down")(y), deterministic)
        return site(self, "residual", x + y)


class Layer(Block):
    """One encoder layer."""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        x = self.part(Attention, "attention")(x, deterministic)
        return self.part(FeedForward, "ffn")(x, deterministic)


class Encoder(Block):
    """Embeddings, all layers and the norm behind them."""

    @nn.compact
    def __call__(self, pixels: jax.Array, deterministic: bool) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Maps normalised images `[B, S, S, K]` to embeddings and every layer's output, and the last behind the norm."""
        states = [self.part(Embeddings, "embeddings")(pixels, deterministic)]
        for i in range(self.config.num_layers):
            states.append(self.part(Layer, f"layer_{i}")(states[-1], deterministic))
        return tuple(states), self.norm()(states[-1])


class VitClassifier(Block):
    """A vision transformer with a linear head.

    `inputs` names what the model is called with, as arrays of a batch.
    """

    inputs: ClassVar[tuple[str, ...]] = ("pixels",)

    @staticmethod
    def example_inputs(config: VitConfig) -> tuple[jax.Array, ...]:
        """Returns what a model of these sizes is called with, to trace it: one black image."""
        return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels), jnp.uint8),)

    @nn.compact
    def __call__(self, pixels: jax.Array, deterministic: bool = True) -> bert.Outputs:
        """Classifies images.

        Args:
          pixels: `[B, S, S, K]`, see `normalised`.
          deterministic: False for training with dropout (needs the rng `dropout`).

        Returns:
          The pooled vector is what the head sees: the first token or the mean of all, behind the encoder's norm.

        Raises:
          UserError: on images of another shape than the model's.
        """
        c = self.config
        wanted = (c.image_size, c.image_size, c.num_channels)
        if pixels.shape[1:] != wanted:
            raise UserError(f"images of the shape {pixels.shape[1:]} do not fit a model for {wanted}; resize them")
        states, x = self.part(Encoder, "encoder")(normalised(pixels, c), deterministic)
        pooled = x[:, 0] if c.pooling == "cls" else jnp.mean(x, 1)
        logits = self._head("classifier", pooled, deterministic)
        if isinstance(c, DeitConfig) and c.distillation_head:
            logits = (logits + self._head("distillation_classifier", x[:, 1], deterministic)) / 2
        return bert.Outputs(logits, pooled, states)

    def _head(self, name: str, x: jax.Array, deterministic: bool) -> jax.Array:
        x = self.dropout(x, deterministic, self.config.classifier_dropout)
        logits = self.dense(self.config.num_labels, name)(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
