"""BitTransformer: encoders whose linear layers, embeddings and attention have a few states (1 to 2.32 bits).

    policy = bit_policy(states=3)                         # ternary weights, 8-bit activations
    policy = bit_policy(states=2, gcn_states=2)           # with the GCN of a joint model

BitTransGNN ("Graph neural networks improve quantized transformers by incorporating global structural relationships"): the
layers of BitNet b1.58 (Ma et al. 2024), without its norms, in a pretrained BERT or RoBERTa. All gradients are straight through:
no gradient reaches a scale, none is cut where a value is clipped.

Weights and activations have 2, 3, 4 or 5 states (`qtx.quant.absmean`), which the authors call 1, 1.58, 2 and 2.32 bits;
activations may have 8 bits in units of the largest of their token, or 32. LayerNorm, GELU, softmax, scores and probabilities
are in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.agnews_study import without_quantized_biases
from qtx.quant.policy import Policy, Rule
from qtx.quant.spec import MinMax, Spec, absmean, per_channel, per_tensor, per_token

WIDTHS = {1.0: 2, 1.58: 3, 2.0: 4, 2.32: 5}
"""Published widths of activations with their numbers of states."""

EPS = 1e-5  # least mean, and least maximum, of magnitudes

_ENCODER = ("encoder", "pooler", "classifier")  # modules whose linear layers are those of the encoder
_HEADS = tuple(f"encoder/**/{name}_heads" for name in ("query", "key", "value"))


def weight_spec(states: int, scale: Literal["row", "tensor"] = "row") -> Spec:
    """Returns the grid of weights (section 2.1).

    Args:
      states: 2 to 5.
      scale: for every output (every row of a table), or for the whole tensor: the older code, whose scale of two states has
        no floor.

    Raises:
      UserError: on another number of states or another scale.
    """
    _check("weight_scale", scale, ("row", "tensor"))
    if scale == "row":
        return absmean(states, per_channel(), eps=EPS)
    return absmean(states, per_tensor(), eps=0.0 if states == 2 else EPS)


def activation_spec(bits: float, low_bit_scale: Literal["token", "tensor"] = "token") -> Spec | None:
    """Returns the grid of activations (section 2.2); None for 32 bits.

    Args:
      bits: 1, 1.58, 2, 2.32, 8 or 32.
      low_bit_scale: for every token, or for the whole tensor (the older code) below 8 bits; 8 bits always have one a token.

    Raises:
      UserError: on another width or another scale.
    """
    _check("low_bit_act_scale", low_bit_scale, ("token", "tensor"))
    if bits in WIDTHS:
        return absmean(WIDTHS[bits], per_token() if low_bit_scale == "token" else per_tensor(), eps=EPS)
    if bits == 8:
        # Padding has ranges of its own, which reach no other token. The least scale is that of the least maximum.
        return Spec(8, "narrow", per_token(), MinMax(padding="include"), range="dynamic", eps=EPS / 127)
    if bits == 32:
        return None
    raise UserError(f"activations of {bits:g} bits: choose from {', '.join(f'{each:g}' for each in WIDTHS)}, 8 and 32")


def bit_policy(
    states: int,
    activation_bits: float = 8.0,
    *,
    embeddings: bool = True,
    attention: bool = True,
    weight_scale: Literal["row", "tensor"] = "row",
    low_bit_act_scale: Literal["token", "tensor"] = "token",
    attention_act_32: Literal["off", "eight_bit"] = "off",
    gcn_states: int = 0,
    gcn_activation_bits: float = 8.0,
) -> Policy:
    """Returns the policy of a quantized encoder with its pooler and classifier (section 2.4), and of a GCN beside it.

    The older code is `attention=False, weight_scale='tensor', low_bit_act_scale='tensor'`, and `without_linear_bias`.

    Args:
      states: of the weights of linear layers and of the tables: 2 to 5; 0: weights, and what enters them, in full precision.
      activation_bits: of what enters linear layers; see `activation_spec`.
      embeddings: the tables of words, positions and token types.
      attention: query, key and value, one scale for each head and token.
      weight_scale: see `weight_spec`.
      low_bit_act_scale: see `activation_spec`.
      attention_act_32: with `attention` and 32 bits: queries, keys and values in full precision, or `'eight_bit'` as published.
      gcn_states: of the weights of the module `gcn`; 0: in full precision. As run, the authors' joint models had `states` and
        `activation_bits` here, whatever was asked for; meant were 8 bits, and no biases.
      gcn_activation_bits: of what enters them.

    Raises:
      UserError: on a number of states, a width or a choice that does not exist.
    """
    _check("attention_act_32", attention_act_32, ("off", "eight_bit"))
    weights: list[Rule] = []
    inputs: list[Rule] = []

    def linear(modules: tuple[str, ...], count: int, bits: float, label: str) -> None:
        kernels, entering = weight_spec(count, weight_scale), activation_spec(bits, low_bit_act_scale)
        weights.extend(Rule(f"{module}/**/kernel", kernels, label) for module in modules)
        if entering is not None:
            inputs.extend(Rule(f"{module}/**/input", entering, label) for module in modules)

    if states:
        linear(_ENCODER, states, activation_bits, "linear layers")
        if embeddings:
            weights.append(Rule("encoder/embeddings/**/table", weight_spec(states, weight_scale), "embeddings"))
    if attention:
        bits = 8 if activation_bits == 32 and attention_act_32 == "eight_bit" else activation_bits
        if (heads := activation_spec(bits, low_bit_act_scale)) is not None:
            inputs.extend(Rule(pattern, heads, "attention") for pattern in _HEADS)
    if gcn_states:
        linear(("gcn",), gcn_states, gcn_activation_bits, "gcn")
    return Policy(weights=tuple(weights), inputs=tuple(inputs))


def without_linear_bias(params: Mapping[str, Any], policy: Policy) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns parameters without the biases of quantized layers, and what is to be trained of them, for `Phase.trainable`.

    The older code has such biases and never adds them: they are zeros that stay zeros.

    Args:
      params: nested parameters.
      policy: says which layers are quantized.
    """
    flat = traverse_util.flatten_dict(params, sep="/")

    def dropped(name: str) -> bool:
        module, _, leaf = name.rpartition("/")
        kernel = f"{module}/kernel"
        return leaf == "bias" and kernel in flat and policy.spec("weight", kernel) is not None

    return without_quantized_biases(params, policy), tuple(name for name in flat if not dropped(name))


def _check(what: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{what} {value!r} does not exist{near_misses(str(value), options)}")
