"""Moving what makes activations wide from the outputs of norms into what reads them; the function stays the same.

With a scale `s` and a shift `z` for each channel of a norm's output `x`:

    x' = (x - z) / s        gain / s, (bias - z) / s
    what reads x'           rows of the kernel times s, bias + z W
    the residual sum        takes x' s + z: the parameters of `BertConfig.shortcuts`

Gamma migration (Wei et al. 2022, "Outlier suppression") has `s` = the gain and `z` = 0. Outlier suppression+ (Wei et al. 2023)
shifts every channel to the middle of its range and, where it is wider than a threshold, scales it down to it; the threshold is
searched for each norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.calibrate import Args
from qtx.nn.albert import AlbertConfig
from qtx.nn.aliases import policy as make_policy
from qtx.nn.bert import BertConfig
from qtx.nn.distilbert import DistilBertConfig
from qtx.nn.layers import Dense
from qtx.nn.roberta import RobertaConfig
from qtx.nn.squeezebert import SqueezeBertConfig
from qtx.quant import rows
from qtx.quant.exact import divide
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec, asymmetric, per_channel
from qtx.train.logging import progress

SUPPORTED = (BertConfig, RobertaConfig, DistilBertConfig, SqueezeBertConfig, AlbertConfig)
"""Configurations of the families whose norms can migrate. In ALBERT those within the layers do: the norm at the end of a layer
feeds several."""

LEAST_GAIN = 1e-4  # of the largest: below it, a gain stays where it is, as dividing a bias by it would make an outlier


# --- Migration ---


class Link(NamedTuple):
    """A norm and what reads it.

    Attributes:
      norm: its path.
      block: path of the block, an attention or an FFN, that reads it.
      readers: names of the linear layers in that block that do.
      outputs: sites of the norm's output; several where layers share it.
    """

    norm: str
    block: str
    readers: tuple[str, ...]
    outputs: tuple[str, ...]


def links(config: Any) -> list[Link]:
    """Returns the norms that can migrate; raises a `UserError` for other families."""
    if type(config) not in SUPPORTED:
        names = ", ".join(kind.__name__.removesuffix("Config") for kind in SUPPORTED)
        raise UserError(
            f"norms of a {type(config).__name__.removesuffix('Config')} model cannot migrate; "
            f"outlier suppression is for {names} (or use 'os+_as_published', which moves nothing)"
        )
    found = []
    owners = config.owners if isinstance(config, AlbertConfig) else tuple(range(config.num_layers))
    for i in dict.fromkeys(owners):
        layer, before = f"encoder/layer_{i}", f"encoder/layer_{i - 1}/ffn/norm" if i else "encoder/embeddings/norm"
        if not isinstance(config, AlbertConfig):
            found.append(Link(before, f"{layer}/attention", ("query", "key", "value"), (f"{before}/output",)))
        runs = [f"encoder/layer_{j}/attention/norm/output" for j, owner in enumerate(owners) if owner == i]
        found.append(Link(f"{layer}/attention/norm", f"{layer}/ffn", ("up",), tuple(runs)))
    return found


def folded(params: Mapping[str, Any], scale: jax.Array, shift: jax.Array) -> dict[str, Any]:
    """Returns `kernel` and `bias` of a linear layer that reads `(x - shift) / scale` instead of `x`.

    Args:
      params: kernel `[in / groups, out]` and bias.
      scale: `[in]`, not zero.
      shift: `[in]`.
    """
    kernel, bias = params["kernel"], params["bias"]

    def spread(v: jax.Array) -> jax.Array:  # to the shape of the kernel, whose columns may see parts of the input
        blocks = v.reshape(-1, kernel.shape[0]).T
        return jnp.repeat(blocks, kernel.shape[1] // blocks.shape[1], axis=1)

    return {"kernel": kernel * spread(scale), "bias": bias + jnp.sum(spread(shift) * kernel, 0)}


def migrate(
    params: Mapping[str, Any],
    config: BertConfig,
    scales: Mapping[str, jax.Array],
    shifts: Mapping[str, jax.Array] | None = None,
) -> tuple[dict[str, Any], BertConfig]:
    """Scales and shifts the outputs of norms, and undoes it in what reads them: the function stays the same.

    A model that migrated before can do so again.

    Args:
      params: nested parameters of an encoder with a head.
      config: its sizes.
      scales: by path of a norm, `[D]`, not zero; the norm's output is divided by it.
      shifts: likewise, what is subtracted before.

    Returns:
      Parameters and configuration, with `shortcuts`.

    Raises:
      UserError: for a family that is not in `SUPPORTED`, or a norm that does not feed one block alone.
    """
    chain = {link.norm: link for link in links(config)}
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for name in [name for name in flat if name.endswith(("/attention/norm/scale", "/ffn/norm/scale"))]:
        block = name.removesuffix("/norm/scale")
        flat.setdefault(f"{block}/shortcut/scale", jnp.ones_like(flat[name]))
        flat.setdefault(f"{block}/shortcut/bias", jnp.zeros_like(flat[name]))
    for norm, scale in scales.items():
        if norm not in chain:
            raise UserError(f"{norm!r} cannot migrate{near_misses(norm, chain)}")
        link = chain[norm]
        scale = jnp.asarray(scale, flat[f"{norm}/scale"].dtype)
        shift = jnp.zeros_like(scale) if shifts is None else jnp.asarray(shifts[norm], scale.dtype)
        flat[f"{norm}/scale"] = flat[f"{norm}/scale"] / scale
        flat[f"{norm}/bias"] = (flat[f"{norm}/bias"] - shift) / scale
        for path in (f"{link.block}/{reader}" for reader in link.readers):
            new = folded({leaf: flat[f"{path}/{leaf}"] for leaf in ("kernel", "bias")}, scale, shift)
            flat |= {f"{path}/{leaf}": value for leaf, value in new.items()}
        branch = f"{link.block}/shortcut"
        flat[f"{branch}/bias"] = flat[f"{branch}/bias"] + flat[f"{branch}/scale"] * shift
        flat[f"{branch}/scale"] = flat[f"{branch}/scale"] * scale
    return traverse_util.unflatten_dict(flat, sep="/"), dataclasses.replace(config, shortcuts=True)


def gains(params: Mapping[str, Any], config: BertConfig) -> dict[str, jax.Array]:
    """Returns the gains of the norms that can migrate, by path: the scales of gamma migration (Wei et al. 2022).

    Gains that are zero, or next to it, count as 1: there is nothing to take out.
    """
    found = {}
    for norm in (link.norm for link in links(config)):
        gain = jnp.asarray(at(params, norm)["scale"])
        found[norm] = jnp.where(jnp.abs(gain) > LEAST_GAIN * jnp.max(jnp.abs(gain)), gain, 1.0)
    return found


def at(tree: Any, path: str) -> Any:
    """Returns what lies at a path of a nested mapping."""
    for part in path.split("/"):
        tree = tree[part]
    return tree


# --- OS+: where to shift, and how to scale ---


def channel_scale(low: jax.Array, high: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Returns the scales `[D]` that bring channels with these extremes into `[-threshold, threshold]`; never below 1."""
    return jnp.maximum(1.0, jnp.maximum(divide(high, threshold), divide(-low, threshold)))


def thresholds(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns the thresholds that are tried: from the largest magnitude down to 1, 100 steps or more, of at most 1/2.

    Args:
      low: `[D]`, least values of the shifted channels.
      high: greatest ones.
    """
    widest = float(max(np.max(high), -np.min(low)))
    if widest <= 1:
        return np.ones(1, np.float32)
    step = (widest - 1) / max(100, int(np.max(high) / 0.5))
    tried = [widest]
    while tried[-1] - step >= 1:
        tried.append(tried[-1] - step)
    return np.array(tried, np.float32)


@dataclasses.dataclass(frozen=True)
class Reader:
    """What the error of a scale is measured on: a linear layer, or an attention up to its context.

    Attributes:
      module: unbound; `Dense`, or the attention of a family.
      layers: names of the linear layers that read the input; empty: the module is one.
    """

    module: nn.Module
    layers: tuple[str, ...] = ()

    def output(self, params: Any, x: jax.Array, mask: jax.Array, policy: Policy | None = None) -> jax.Array:
        """Returns the output for `[B, T, D]` and a bool mask `[B, T]`."""
        module = self.module.clone(policy=policy)
        if not self.layers:
            return module.apply({"params": params}, x, mask[..., None])  # type: ignore[return-value]
        _, found = module.apply({"params": params}, x, mask, mask[..., None], True, mutable=["captures"])
        return found["captures"]["context"]

    def folded(self, params: Any, scale: jax.Array, shift: jax.Array) -> Any:
        """Returns the parameters for an input that is shifted and scaled."""
        if not self.layers:
            return folded(params, scale, shift)
        return {**params, **{name: folded(params[name], scale, shift) for name in self.layers}}


@partial(jax.jit, static_argnums=(0, 1))
def search_scale(
    reader: Reader,
    bits: int,
    params: Any,
    x: jax.Array,
    mask: jax.Array,
    shift: jax.Array,
    ends: tuple[jax.Array, jax.Array],
    tried: jax.Array,
) -> jax.Array:
    """Returns the channel scales whose threshold gives the least error of the output (Wei et al. 2023).

    Input and weights are quantized meanwhile, with min-max ranges.

    Args:
      reader: what reads the norm.
      bits: of input and weights.
      params: of the reader.
      x: `[B, T, D]`, the norm's output.
      mask: bool `[B, T]`: the tokens that count.
      shift: `[D]`, subtracted from `x`.
      ends: least and greatest value of the shifted channels, `[D]` each.
      tried: `[N]` from `thresholds`; the first of equally good ones wins.
    """
    quantized = make_policy(
        weights={"**/kernel": Spec(bits, "full", per_channel(), range="dynamic")},
        inputs={"**/input": asymmetric(bits, range="dynamic")},
    )
    wanted = reader.output(params, x, mask)

    def error(threshold: jax.Array) -> jax.Array:
        scale = channel_scale(*ends, threshold)
        found = reader.output(reader.folded(params, scale, shift), divide(x - shift, scale), mask, quantized)
        return jnp.sum(jnp.square(found - wanted), where=mask[..., None])

    return channel_scale(*ends, tried[jnp.argmin(jax.lax.map(error, tried))])


def _reader(model: nn.Module, link: Link, params: Any) -> tuple[Reader, Any]:
    """Returns what reads a norm, and its parameters."""
    if link.readers == ("up",):
        up = at(params, f"{link.block}/up")
        inputs, features = up["kernel"].shape
        width = at(params, link.norm)["scale"].shape[0]
        return Reader(Dense(features, dtype=model.dtype, groups=width // inputs)), up  # type: ignore[attr-defined]
    attention = type(model).encoder_type.layer_type.attention_type  # type: ignore[attr-defined]
    return Reader(attention(model.config, model.dtype, None), link.readers), at(params, link.block)  # type: ignore[attr-defined]


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    model: nn.Module, names: tuple[str, ...], params: Any, args: Args
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns the values of activation sites, and the mask `[B, T]` of the first one, in full precision."""
    _, found = model.apply({"params": params}, *args, mutable=["captures", "masks"])
    return {name: at(found["captures"], name) for name in names}, at(found["masks"], names[0])[..., 0]


def shifts_and_scales(
    model: nn.Module, params: Mapping[str, Any], batches: Sequence[Args], bits: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the shifts and scales of OS+ for every norm that can migrate, by path.

    Extremes of the channels are those of all batches; the error is measured on the first batch.

    Args:
      model: without a policy.
      params: nested parameters.
      batches: argument tuples of one shape.
      bits: of input and weights in the search.
    """
    chain = links(model.config)  # type: ignore[attr-defined]
    names = tuple(name for link in chain for name in link.outputs)
    lows: dict[str, jax.Array] = {}
    highs: dict[str, jax.Array] = {}
    first: dict[str, jax.Array] = {}
    for args in batches:
        values, mask = _outputs(model, names, params, args)
        if not first:
            first, first_mask = values, mask
        for link in chain:
            for name in link.outputs:
                low, high = rows.extremes(values[name], -1, mask[..., None])
                lows[link.norm] = jnp.minimum(lows.get(link.norm, low), low)
                highs[link.norm] = jnp.maximum(highs.get(link.norm, high), high)
    shifts = {norm: (lows[norm] + highs[norm]) / 2 for norm in lows}
    tried = {norm: thresholds(*(np.asarray(v[norm] - shifts[norm]) for v in (lows, highs))) for norm in shifts}
    longest = max(len(each) for each in tried.values())
    scales = {}
    with progress(len(chain), "outlier suppression+") as bar:
        for step, link in enumerate(chain):
            norm = link.norm
            reader, its_params = _reader(model, link, params)
            x = jnp.concatenate([first[name] for name in link.outputs])
            mask = jnp.concatenate([first_mask] * len(link.outputs))
            ends = lows[norm] - shifts[norm], highs[norm] - shifts[norm]
            # All norms share a compiled program: the first threshold again, which is the first to win.
            padded = np.concatenate([tried[norm], np.full(longest - len(tried[norm]), tried[norm][0])])
            scales[norm] = search_scale(reader, bits, its_params, x, mask, shifts[norm], ends, padded)
            bar.update(step + 1)
    return shifts, scales
