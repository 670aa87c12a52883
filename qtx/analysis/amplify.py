"""Outliers made to order: the same function, with activations that one range per tensor cannot hold.

    harder = amplify(params, config, sites=("x",), factor=50.0)

A hard case for quantizers out of any trained post-LayerNorm encoder: weights change so that chosen activations carry a few
huge values, and what reads them undoes it. In exact arithmetic the outputs are the same; in float32 they differ by the
rounding of values `factor` times as large.

What can be amplified. A layer computes, with `n(.)` for normalising a token's features, `f` for GELU, `*` for products of
elements:

    x = g1 * n(u) + b1      h = f(x W1 + a1) W2 + a2      y = x + h      z = g2 * n(y) + b2      u' = z + out(context(z))

x, h    exact by a shift. For any vector `c`, `x + c` (b1 + c) and `h - c` (a2 - c) have the same sum, and `a1 - c W1` gives the
        FFN what it saw before. x and h carry `c` and `-c` in the chosen channels; y is what it was.
z, g    likewise: z + c (b2 + c), the output projection of the next layer g - c; query, key and value (or the pooler) get
        their bias minus `c W`. The sum u is what it was; the encoder's own hidden states are shifted by `c`.
y       only as a whole. For a scalar a > 0 and a scalar b, `n(a y + b 1) = n(y)`, and every y' with `n(y') = n(y)` is of that
        form. Were instead `n(y') = M n(y)`, then z' = g * M n(y) + b would have to enter the next sum as z does, up to that
        form again, and diagonal g that differ leave permutations and signs for M. So a shift of all channels (a2 + b 1) is
        exact, and a shift or scale of single channels of y, or of u, is not. No grouping of channels undoes a common
        shift, because every range holds zero; more bits do.
c       exact by a scale: value channel j times s, row j of the output projection divided by s.
        The outliers follow the token here.

A scale of single channels of x fails in the residual sum: y would need `h - (s - 1) x`, and the FFN is not linear. (With two
more hidden units for each channel it is: `f(t) - f(-t) = t` for GELU, SiLU and ReLU. That would be a model of other sizes.)
Hidden units `f(.)` of GELU themselves cannot be scaled, those of ReLU could.

Shifts live in biases, which are never quantized, and leave every kernel as it was. Weight rounding is still felt more: the
bias undoes `c W`, and the quantized kernel adds `c Q(W)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.nn.bert import BertConfig

Flat = dict[str, np.ndarray]


def amplify(
    params: Mapping[str, Any],
    config: BertConfig,
    sites: Sequence[str] = ("x",),
    factor: float = 30.0,
    channels: int = 1,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns parameters of the same function with larger activations.

    Args:
      params: nested parameters of a post-LayerNorm encoder under the names of `qtx.nn.bert`.
      config: its sizes.
      sites: what to amplify: `'x'` (and h), `'z'` (and g of the next layer), `'y'` (all channels), `'c'`.
      factor: size of a shift in units of the root mean square of the LayerNorm output; the scale, for `'c'`. 0 and 1
        change nothing, respectively.
      channels: how many channels of each site, those with the largest weights.
      layers: which layers; None: all.

    Returns:
      Nested parameters of the same shapes and dtypes.

    Raises:
      UserError: on an unknown site or layer, a factor that is not positive, too many channels, or other parameters.
    """
    for name in sites:
        if name not in _TRANSFORMATIONS:
            raise UserError(
                f"site {name!r} cannot be amplified without changing the function{near_misses(name, _TRANSFORMATIONS)}"
            )
    if not factor > 0:
        raise UserError(f"factor {factor} is not positive")
    if not 1 <= channels <= config.hidden_size:
        raise UserError(f"{channels} channels: give from 1 to the model's width {config.hidden_size}")
    chosen = range(config.num_layers) if layers is None else layers
    for i in chosen:
        if not 0 <= i < config.num_layers:
            raise UserError(f"layer {i} does not exist; the model has layers 0 to {config.num_layers - 1}")
    given = traverse_util.flatten_dict(params, sep="/")
    # A pre-norm encoder has norms of the same names, and none of its embeddings.
    if not {"encoder/embeddings/norm/bias", "encoder/layer_0/ffn/norm/bias"} <= given.keys():
        raise UserError(
            "these are not the parameters of a post-LayerNorm encoder; amplify knows the names of qtx.nn.bert"
        )
    flat = {name: np.array(value, np.float64) for name, value in given.items()}
    for name in sites:
        for i in chosen:
            _TRANSFORMATIONS[name](flat, i, config.num_layers, factor, channels)
    return traverse_util.unflatten_dict(
        {name: jnp.asarray(value, given[name].dtype) for name, value in flat.items()}, sep="/"
    )


def _rms(flat: Flat, norm: str) -> float:
    """Of a LayerNorm's output: its input has mean 0 and variance 1 over the features."""
    return float(np.sqrt(np.mean(flat[f"{norm}/scale"] ** 2 + flat[f"{norm}/bias"] ** 2)))


def _largest(kernel: np.ndarray, count: int) -> np.ndarray:
    """The output channels of a kernel with the largest weights."""
    return np.argsort(-np.linalg.norm(kernel, axis=0), kind="stable")[:count]


def _shift(flat: Flat, norm: str, kernel: str, factor: float, channels: int) -> np.ndarray:
    shift = np.zeros_like(flat[f"{norm}/bias"])
    shift[_largest(flat[kernel], channels)] = factor * _rms(flat, norm)
    return shift


def _compensate(flat: Flat, module: str, shift: np.ndarray) -> None:
    """Gives a linear layer whose input is shifted its old output."""
    flat[f"{module}/bias"] = flat[f"{module}/bias"] - shift @ flat[f"{module}/kernel"]


def _amplify_x(flat: Flat, i: int, num_layers: int, factor: float, channels: int) -> None:
    layer = f"encoder/layer_{i}"
    shift = _shift(flat, f"{layer}/attention/norm", f"{layer}/ffn/down/kernel", factor, channels)
    flat[f"{layer}/attention/norm/bias"] += shift
    _compensate(flat, f"{layer}/ffn/up", shift)
    flat[f"{layer}/ffn/down/bias"] -= shift


def _amplify_z(flat: Flat, i: int, num_layers: int, factor: float, channels: int) -> None:
    layer, above = f"encoder/layer_{i}", f"encoder/layer_{i + 1}/attention"
    shift = _shift(flat, f"{layer}/ffn/norm", f"{layer}/ffn/down/kernel", factor, channels)
    flat[f"{layer}/ffn/norm/bias"] += shift
    if i + 1 == num_layers:
        return _compensate(flat, "pooler/dense", shift)
    for name in ("query", "key", "value"):
        _compensate(flat, f"{above}/{name}", shift)
    flat[f"{above}/out/bias"] -= shift
    return None


def _amplify_y(flat: Flat, i: int, num_layers: int, factor: float, channels: int) -> None:
    layer = f"encoder/layer_{i}"
    flat[f"{layer}/ffn/down/bias"] += factor * _rms(flat, f"{layer}/attention/norm")


def _amplify_c(flat: Flat, i: int, num_layers: int, factor: float, channels: int) -> None:
    attention = f"encoder/layer_{i}/attention"
    scale = np.ones_like(flat[f"{attention}/value/bias"])
    scale[_largest(flat[f"{attention}/value/kernel"], channels)] = factor
    flat[f"{attention}/value/kernel"] *= scale
    flat[f"{attention}/value/bias"] *= scale
    flat[f"{attention}/out/kernel"] /= scale[:, None]


_TRANSFORMATIONS: dict[str, Callable[[Flat, int, int, float, int], None]] = {
    "x": _amplify_x,
    "z": _amplify_z,
    "y": _amplify_y,
    "c": _amplify_c,
}
