"""Adaptive rounding: to which of its neighbours on the grid each weight goes (Nagel et al. 2020, AdaRound).

Nearest rounding minimises the error of the weights; what counts is the error of the layer's output. Two ways to a better
choice:

- *relaxation*: the part above the floor is a smooth `h(alpha)` in [0, 1], trained until it is 0 or 1 (the published method);
- *descent*: for a linear layer the error is a quadratic form of the weights, whose matrix is the Gram matrix of the inputs.
  One weight at a time then has its best grid point in closed form, and no data are needed.

Kernels are `[in, out]`.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qtx.quant import grid
from qtx.quant.exact import divide
from qtx.quant.spec import Spec
from qtx.quant.ste import clip_ste

Mode = Literal["learned_hard_sigmoid", "learned_sigmoid", "sigmoid_temp_decay"]
MODES = ("learned_hard_sigmoid", "learned_sigmoid", "sigmoid_temp_decay")

LOWER, UPPER = -0.1, 1.1  # the rectified sigmoid is stretched to this interval, so that it reaches 0 and 1
BLOCK = 32  # inputs whose weights are settled before the residual of all others is computed anew


def rectified_sigmoid(alpha: jax.Array) -> jax.Array:
    """Returns `clip(sigmoid(alpha) (1.1 + 0.1) - 0.1, 0, 1)`; on both edges the gradient passes."""
    return clip_ste(jax.nn.sigmoid(alpha) * (UPPER - LOWER) + LOWER, 0.0, 1.0)


def rectified_logit(p: jax.Array) -> jax.Array:
    """Returns the `alpha` for which `rectified_sigmoid(alpha)` is `p`, in [0, 1]."""
    return -jnp.log((UPPER - p) / (p - LOWER))


def logit(p: jax.Array) -> jax.Array:
    """Returns `log(p / (1 - p))` with `p` kept off 0 and 1 by 1e-16 (which float32 cannot tell from 1: infinite there)."""
    p = jnp.clip(p, 1e-16, 1 - 1e-16)
    return jnp.log(p / (1 - p))


def relax(mode: Mode, alpha: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns `h(alpha)` in [0, 1], the part above the floor; only `sigmoid_temp_decay` has a temperature."""
    if mode == "learned_hard_sigmoid":
        return rectified_sigmoid(alpha)
    return jax.nn.sigmoid(alpha / temperature if mode == "sigmoid_temp_decay" else alpha)


def unrelax(mode: Mode, fraction: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Returns the `alpha` for which `relax(mode, alpha, temperature)` is `fraction`."""
    if mode == "learned_hard_sigmoid":
        return rectified_logit(fraction)
    return logit(fraction) * temperature if mode == "sigmoid_temp_decay" else logit(fraction)


def fraction_above_floor(spec: Spec, w: jax.Array, params: grid.QParams) -> jax.Array:
    """Returns `w / scale - floor(w / scale)`, in [0, 1): where the relaxation starts, at the weight itself."""
    ratio = divide(w, grid.affine(spec, params, w.shape).scale)
    return ratio - jnp.floor(ratio)


def codes_above_floor(spec: Spec, w: jax.Array, params: grid.QParams, above: jax.Array | float) -> jax.Array:
    """Returns the integers, zero point included, of weights at `above` (0 to 1) between their lower and upper neighbour."""
    scale, zero_point, q_min, q_max = grid.affine(spec, params, w.shape)
    return clip_ste(jnp.floor(divide(w, scale)) + above + zero_point, q_min, q_max)


def weights_above_floor(spec: Spec, w: jax.Array, params: grid.QParams, above: jax.Array) -> jax.Array:
    """Returns the weights of `codes_above_floor`; gradients reach `above` where the grid does not end."""
    scale, zero_point, _, _ = grid.affine(spec, params, w.shape)
    return scale * (codes_above_floor(spec, w, params, above) - zero_point)


class OutputError(NamedTuple):
    """The squared error of a linear layer's outputs, summed over rows and features, as a function of its weights.

    With inputs `X` of the quantized network and `X0` of the full-precision one, both `[rows, in]`, and `E = Wq - W`:

        |X Wq - X0 W|^2 = tr(E' G E) + 2 tr(E' D W) + tr(W' H W)

    Differences are taken before products, so nothing cancels.

    Attributes:
      gram: `G = X' X`, `[in, in]`.
      drift: `D = X' (X - X0)`, `[in, in]`.
      floor: `H = (X - X0)' (X - X0)`, `[in, in]`.
    """

    gram: jax.Array
    drift: jax.Array
    floor: jax.Array

    @classmethod
    def of(cls, x: jax.Array, x0: jax.Array | None = None) -> OutputError:
        """Returns the error of one batch; `x` and `x0` are `[rows, in]` (None: they are the same). Errors of batches add
        up."""
        products = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        gram = products(x.T, x)
        if x0 is None:
            return cls(gram, jnp.zeros_like(gram), jnp.zeros_like(gram))
        delta = x - x0
        return cls(gram, products(x.T, delta), products(delta.T, delta))

    def split(self, groups: int) -> list[OutputError]:
        """Returns the errors of a grouped layer's groups, each of which sees its part of the inputs alone."""
        width = self.gram.shape[0] // groups
        parts = [slice(i * width, (i + 1) * width) for i in range(groups)]
        return [OutputError(*(matrix[part, part] for matrix in self)) for part in parts]

    def __call__(self, quantized: jax.Array, w: jax.Array) -> jax.Array:
        """Returns the error of every output, `[out]`, for kernels `[in, out]`."""
        e = quantized - w
        products = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        own = jnp.sum(e * products(self.gram, e), 0)
        return own + jnp.sum(2 * e * products(self.drift, w) + w * products(self.floor, w), 0)


@partial(jax.jit, static_argnums=(0, 4, 5))
def descend(
    spec: Spec,
    w: jax.Array,
    params: grid.QParams,
    error: OutputError,
    moves: Literal["neighbours", "grid"] = "neighbours",
    sweeps: int = 30,
) -> jax.Array:
    """Minimises the output error over the grid by cyclic coordinate descent, for all outputs at once.

    With all other weights of an output fixed, the error is a parabola in weight `j`, least at `w_j - (G E + D W)_j /
    G_jj`; the nearest allowed grid point is the best one. A sweep sets every weight once; it ends when nothing moves.
    The error never rises. It starts from nearest rounding.

    Args:
      spec: a uniform spec with concrete axes.
      w: `[in, out]` float32.
      params: its quantizer parameters; they stay as they are.
      error: of the layer on its inputs.
      moves: the two neighbours of each weight (as AdaRound chooses), or any point of the grid.
      sweeps: at most so many.

    Returns:
      The weights on the grid, `[in, out]`.
    """
    count = w.shape[0]
    block = min(BLOCK, count)
    pad = -count % block
    scale, zero_point, q_min, q_max = grid.affine(spec, params, w.shape)
    products = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    pull = products(error.drift, w)
    if moves == "neighbours":
        low, high = (codes_above_floor(spec, w, params, above) for above in (0.0, 1.0))
    else:
        low, high = (jnp.broadcast_to(limit, w.shape) for limit in (q_min, q_max))
    start = grid.fake_quant(spec, w, params)
    scale, zero_point = (jnp.broadcast_to(v, w.shape) for v in (scale, zero_point))

    def rows(v: jax.Array, value: float = 0.0) -> jax.Array:
        return jnp.pad(v, ((0, pad), (0, 0)), constant_values=value)

    # Added inputs are always zero: their Gram entries are, and a weight without inputs stays where it is.
    gram = jnp.pad(error.gram, ((0, pad), (0, pad)))
    w, pull, low, high, zero_point = map(rows, (w, pull, low, high, zero_point))
    scale = rows(scale, 1.0)

    def settle(first: jax.Array, quantized: jax.Array) -> jax.Array:
        def part(v: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(v, first, block, axis)

        mine = part(gram)
        gradient = products(mine, quantized - w) + part(pull)
        square = part(mine, 1)
        s, z, least, most = map(part, (scale, zero_point, low, high))

        def one(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gradient, now = carry
            curvature = square[j, j]
            best = now[j] - gradient[j] / jnp.where(curvature > 0, curvature, 1.0)
            code = jnp.clip(jnp.round(best / s[j] + z[j]), least[j], most[j])
            new = jnp.where(curvature > 0, s[j] * (code - z[j]), now[j])
            return gradient + square[:, j, None] * (new - now[j]), now.at[j].set(new)

        _, settled = jax.lax.fori_loop(0, block, one, (gradient, part(quantized)))
        return jax.lax.dynamic_update_slice_in_dim(quantized, settled, first, 0)

    def sweep(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, quantized, _ = state
        new = jax.lax.fori_loop(0, (count + pad) // block, lambda i, q: settle(i * block, q), quantized)
        return number + 1, new, jnp.any(new != quantized)

    state = (jnp.int32(0), rows(start), jnp.bool_(True))
    _, found, _ = jax.lax.while_loop(lambda state: (state[0] < sweeps) & state[2], sweep, state)
    return found[:count]
