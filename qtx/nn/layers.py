"""Linear, embedding and normalisation layers with sites.

Shapes: `B` batch, `T` tokens, `D` features. Parameters are float32 masters under the names of plain linen layers; the
arithmetic runs in `dtype`. Biases, LayerNorm's shift and the attention mask are never quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtx.errors import UserError
from qtx.nn.products import product
from qtx.nn.sites import site
from qtx.quant.policy import Policy

Initializer = Callable[..., jax.Array]


def zero_bias(inputs: int) -> Initializer:
    """Returns the initializer of the bias of a linear layer with so many inputs: zeros."""
    del inputs
    return nn.initializers.zeros


def uniform_bias(inputs: int) -> Initializer:
    """Returns the initializer of the bias of a linear layer with so many inputs: uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def sinusoids(tokens: int, width: int) -> np.ndarray:
    """Returns the position encodings of Vaswani et al. 2017 (section 3.5), float32 `[T, D]`, sine and cosine in turn."""
    angles = np.arange(tokens)[:, None] * np.exp(-np.arange(0, width, 2) * np.log(10000.0) / width)
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(tokens, width).astype(np.float32)


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 bits of any shape, each a hash of its position in the tensor and of 64 bits of a key.

        bits[i] = mix(mix(i ^ k0) + k1),   mix: two rounds of multiply and shift (Wellons' "lowbias32")

    No generator of JAX fuses into its consumer on CPU, where a word of any of them costs 16 ns, a quarter of a train step;
    this one costs half a nanosecond. It is good enough to drop elements and for nothing more. The bits are the same on all
    backends and however the tensor is sharded. A tensor of more than 2^32 elements has the same bits again.

    Args:
      key: a typed random key of any implementation.
      shape: of the result.
    """
    k0, k1 = jax.random.key_data(key).reshape(-1)[:2].astype(jnp.uint32)
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]

    def mix(x: jax.Array) -> jax.Array:
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        return x ^ (x >> 16)

    return mix(mix(index ^ k0) + k1)


def dropout(module: nn.Module, x: jax.Array, rate: float, deterministic: bool) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others to keep the mean.

    The rate is met to 2^-32. What is dropped follows from the key alone, see `hashed_bits`.

    Args:
      module: gives the random key `dropout`.
      x: any tensor.
      rate: probability of zero, in [0, 1).
      deterministic: True: `x` unchanged.
    """
    if deterministic or rate == 0:
        return x
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    kept = hashed_bits(module.make_rng("dropout"), x.shape) >= threshold
    return jnp.where(kept, x / (1 - rate), 0)


class Dense(nn.Module):
    """`activation(x W + b)`. Sites: `kernel`, `input`, `output` (after the activation).

    With `groups` G the k-th G-th of the outputs sees the k-th G-th of the inputs alone, as in a grouped convolution of
    width 1. The columns of the kernel are the outputs all the same, so per-channel grids mean the same.

    Attributes:
      features: output width.
      activation: applied before the output site.
      kernel_init: initializer of the `[in / groups, features]` kernel.
      dtype: of the operands and the output; below float32, products are summed, and the bias and the activation applied, in
        float32 (see `qtx.nn.products`; sums of `groups` are rounded to `dtype` first).
      policy: see `qtx.nn.sites`.
      groups: must divide both widths.
      bias_init: initializer of the bias, for a number of inputs.
      input_dropout: rate of a dropout of the input, behind the site `input`: a grid sees whole values.
    """

    features: int
    activation: Callable[[jax.Array], jax.Array] | None = None
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None
    groups: int = 1
    bias_init: Callable[[int], Initializer] = zero_bias
    input_dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        where: jax.Array | None = None,
        deterministic: bool = True,
        kernel: jax.Array | None = None,
    ) -> jax.Array:
        """Maps `[..., in]` to `[..., features]`.

        Args:
          x: the input.
          where: bool, broadcastable to `x`: the elements that count in calibration.
          deterministic: False: dropout of the input.
          kernel: `[in / groups, features]`, a matrix of another module (see `Embed.whole`), as it is; None: the layer's own.
        """
        groups, width = self.groups, x.shape[-1]
        if groups < 1 or width % groups or self.features % groups:
            name = "/".join(self.path) or "Dense"
            raise UserError(f"{name}: {groups} groups do not divide both widths, {width} and {self.features}")
        if kernel is None:
            kernel = self.param("kernel", self.kernel_init, (width // groups, self.features), jnp.float32)
            kernel = site(self, "kernel", kernel, kind="weight")
        bias = self.param("bias", self.bias_init(width // groups), (self.features,), jnp.float32)
        x = site(self, "input", x.astype(self.dtype), kind="input", where=where)
        x = dropout(self, x, self.input_dropout, deterministic)
        if groups == 1:
            # One row a token: the gradient of the kernel is then one plain product, on CPU in half the time.
            y = product(x.reshape(-1, width), kernel)
        else:
            blocks = x.reshape(*x.shape[:-1], groups, width // groups)
            y = jnp.einsum("...gi,igo->...go", blocks, kernel.astype(self.dtype).reshape(width // groups, groups, -1))
        y = y.reshape(*x.shape[:-1], self.features) + bias
        if self.activation is not None:
            y = self.activation(y)
        return site(self, "output", y.astype(self.dtype), where=where)


class Embed(nn.Module):
    """A lookup table. Site: `table`, whose channels are its rows; the output is on the table's grid already.

    Attributes:
      count: number of rows.
      features: width of a row.
      table_init: initializer.
      dtype: of the output.
      policy: see `qtx.nn.sites`.
    """

    count: int
    features: int
    table_init: Initializer = nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    def setup(self):
        self.table = self.param("table", self.table_init, (self.count, self.features), jnp.float32)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps int `[...]` to `[..., features]`."""
        return site(self, "table", self.table, kind="weight", channel_axis=0, lookup=ids).astype(self.dtype)

    def whole(self) -> jax.Array:
        """Returns the table on its grid, float32 `[count, features]`, for a layer that shares it.

        Rounding at random draws here and in each look-up on its own.
        """
        return site(self, "table", self.table, kind="weight", channel_axis=0)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis. Sites: `scale`, `output`.

    Statistics are in float32 with the two-pass variance: outlier channels cost the one-pass form several digits.

    Attributes:
      epsilon: added to the variance.
      dtype: of the output.
      policy: see `qtx.nn.sites`.
    """

    epsilon: float = 1e-12
    dtype: jnp.dtype = jnp.float32
    policy: Policy | None = None

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Normalises `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        scale = site(self, "scale", scale, kind="weight", channel_axis=0)
        y = self.normalised(x.astype(jnp.promote_types(x.dtype, jnp.float32))) * scale + bias
        return site(self, "output", y.astype(self.dtype), where=where)

    def normalised(self, x: jax.Array) -> jax.Array:
        """Returns `[..., D]` with mean 0 and variance 1 over the last axis."""
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.epsilon)


class Shortcut(nn.Module):
    """`x scale + bias`, channel by channel: a residual branch whose input is scaled and shifted. No sites.

    Attributes:
      dtype: of the arithmetic.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., D]` to `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return x * scale.astype(self.dtype) + bias.astype(self.dtype)


class DeviationNorm(LayerNorm):
    """Layer normalisation that divides by the unbiased standard deviation (divisor D - 1) plus epsilon. Sites as `LayerNorm`.

    It is the form of "The Annotated Transformer" (Rush 2018).

    Attributes:
      epsilon: added to the standard deviation, outside the root.
    """

    epsilon: float = 1e-6

    def normalised(self, x: jax.Array) -> jax.Array:
        """Returns `[..., D]` with mean 0 and deviation 1 over the last axis."""
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.sum(jnp.square(centred), -1, keepdims=True) / (x.shape[-1] - 1)
        # Not below the smallest number: the root has no gradient at zero, where all features are equal.
        deviation = jnp.sqrt(jnp.maximum(variance, jnp.finfo(x.dtype).tiny))
        return centred / (deviation + self.epsilon)
