"""Outlier suppression: move what makes activations wide out of them, then quantize after training.

    found = suppress(model, params, batches, OutlierSuppression("os", bits=6))
    logits = found.model.apply({"params": found.params, "ranges": found.ranges}, *args).logits

Two methods, for encoders whose norms stand behind the residual sums:

os    Wei et al. 2022, "Outlier suppression". The gain of a LayerNorm amplifies the outliers of a few channels, so it migrates
      into what reads the norm (gamma migration); then ranges leave out the tokens with the largest values, as many as is
      best for the logits (token-wise clipping), and scales and zero points learn (LSQ+).
os+   Wei et al. 2023, "Outlier suppression+". Every channel of a norm's output is shifted to the middle of its range and,
      where it is wider than a threshold, scaled down to it; the threshold is searched for each norm.

Both are one transformation, `migrate`. With a scale `s` and a shift `z` for each channel of a norm's output `x`:

    x' = (x - z) / s        gain / s, (bias - z) / s
    what reads x'           rows of the kernel times s, bias + z W
    the residual sum        takes x' s + z: the parameters of `BertConfig.shortcuts`

In exact arithmetic the function is the same. `os` has `s` = the gain and `z` = 0.

`'os+_as_published'` is what a published study ran under the name of OS+: nothing migrates, and every weight passes through a
grid of activations first, one for the whole tensor, and then through its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.calibrate import Args, calibrate, fake_quant_weight, put, weight_ranges, with_frozen_weights
from qtx.nn.albert import AlbertConfig
from qtx.nn.aliases import policy as make_policy
from qtx.nn.bert import BertConfig
from qtx.nn.distilbert import DistilBertConfig
from qtx.nn.layers import Dense
from qtx.nn.roberta import RobertaConfig
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.nn.squeezebert import SqueezeBertConfig
from qtx.quant import estimators, grid, rows
from qtx.quant.policy import Policy, Rule
from qtx.quant.spec import Estimator, MinMax, Search, Spec, asymmetric, per_channel
from qtx.train.logging import progress
from qtx.train.report import Table

Method = Literal["os", "os+", "os+_as_published"]
SUPPORTED = (BertConfig, RobertaConfig, DistilBertConfig, SqueezeBertConfig, AlbertConfig)
"""Configurations of the families whose norms can migrate. In ALBERT those within the layers do: the norm at the end of a layer
feeds several."""

CLIPPED = {8: 0.1, 6: 0.3, 4: 0.9}
"""By bits, the largest share of tokens that token-wise clipping tries to leave out."""
SEARCHED = Search("mse", "brent", margin=0.0)
SAMPLE = 2**16  # elements of an activation that a search looks at: one range in all needs no more
LEAST_GAIN = 1e-4  # of the largest: below it, a gain stays where it is, as dividing a bias by it would make an outlier


@dataclasses.dataclass(frozen=True)
class OutlierSuppression:
    """What is done, and how.

    Attributes:
      method: see above.
      bits: of weights and activations: 8, 6 or 4; estimators go with them, see `suppression_policy`.
      learning_rate: of scales and zero points (`os` below 8 bits), by Adam with a cosine decay to zero.
      epochs: passes over the calibration batches in which they learn; 0: they do not.

    Raises:
      UserError: on an unknown method, other bits, or negative values.
    """

    method: Method = "os"
    bits: int = 8
    learning_rate: float = 1e-5
    epochs: int = 3

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise UserError(f"unknown outlier suppression {self.method!r}{near_misses(self.method, get_args(Method))}")
        if self.bits not in CLIPPED:
            raise UserError(
                f"outlier suppression has settings for 8, 6 and 4 bits, not {self.bits}; choose one of them"
            )
        if self.learning_rate < 0 or self.epochs < 0:
            raise UserError(
                f"outlier suppression: learning_rate {self.learning_rate} and epochs {self.epochs} cannot be negative"
            )

    @property
    def migrates(self) -> bool:
        """Whether the model changes, which not every family can."""
        return self.method != "os+_as_published"

    @property
    def learns(self) -> bool:
        """Whether ranges are clipped by tokens, and learn."""
        return self.method == "os" and self.bits < 8


class Suppressed(NamedTuple):
    """A quantized model.

    Attributes:
      model: with the policy, and with a configuration that has `shortcuts` where norms migrated.
      params: float masters.
      ranges: of weights and activations.
      table: how far the logits on the calibration data are from those of the float model, after each step. Learned ranges are
        those of the model only if they have the least error.
    """

    model: nn.Module
    params: dict[str, Any]
    ranges: dict[str, Any]
    table: Table


# --- The policy ---


def suppression_policy(options: OutlierSuppression, num_layers: int, token_quantile: float = 1.0) -> Policy:
    """Returns which sites are on which grids.

    Weights of tables and linear layers have a range for each row or output; activations one each: outputs of the norms but the
    last layer's, of query, key and value, probabilities, context, the FFN's hidden layer, and what the head's layers read. The
    residual sums, scores and logits stay in full precision.

    | bits | weights | activations of os | activations of os+ |
    |---|---|---|---|
    | 8 | min-max | mean of the batches' min-max | mean of the batches' min-max |
    | 6 | min-max | ... of tokens that are left, then learned | mean of the batches' ranges of least squared error |
    | 4 | least squared error | as with 6 | as with 6 |

    Args:
      options: method and bits.
      num_layers: of the model.
      token_quantile: of pruned tokens, see `qtx.quant.spec.MinMax`.
    """
    bits = options.bits
    weights = Spec(bits, "full", per_channel(), SEARCHED if bits == 4 else MinMax())
    every: Estimator = MinMax("mean")
    if options.method != "os" and bits < 8:
        every = dataclasses.replace(SEARCHED, over="mean", sample=SAMPLE)
    activations = asymmetric(bits, estimator=every)
    if options.learns:
        activations = dataclasses.replace(activations, range="learned", range_gradient="lsq")
    pruned = activations
    if token_quantile < 1:
        pruned = dataclasses.replace(activations, estimator=MinMax("mean", token_quantile=token_quantile))
    found = make_policy(
        weights={"**/kernel": weights, "**/table": weights},
        activations=dict.fromkeys("qkvcxzi", pruned) | {"p": activations, f"z{num_layers - 1}": None},
    )

    def first_of(label: str, *patterns: str) -> tuple[Rule, ...]:
        return tuple(Rule(pattern, pruned, label) for pattern in patterns)

    ends = first_of("embeddings", "encoder/embeddings/norm/output", "encoder/embeddings/projection/output")
    head = first_of("head", "pooler/dense/input", "classifier/input", "classifier/hidden/input", "classifier/out/input")
    return dataclasses.replace(found, activations=found.activations + ends, inputs=head)


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
        gain = jnp.asarray(_at(params, norm)["scale"])
        found[norm] = jnp.where(jnp.abs(gain) > LEAST_GAIN * jnp.max(jnp.abs(gain)), gain, 1.0)
    return found


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


# --- OS+: where to shift, and how to scale ---


def channel_scale(low: jax.Array, high: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Returns the scales `[D]` that bring channels with these extremes into `[-threshold, threshold]`; never below 1."""
    return jnp.maximum(1.0, jnp.maximum(high / threshold, -low / threshold))


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
        found = reader.output(reader.folded(params, scale, shift), (x - shift) / scale, mask, quantized)
        return jnp.sum(jnp.square(found - wanted), where=mask[..., None])

    return channel_scale(*ends, tried[jnp.argmin(jax.lax.map(error, tried))])


def _reader(model: nn.Module, link: Link, params: Any) -> tuple[Reader, Any]:
    """Returns what reads a norm, and its parameters."""
    if link.readers == ("up",):
        up = _at(params, f"{link.block}/up")
        inputs, features = up["kernel"].shape
        width = _at(params, link.norm)["scale"].shape[0]
        return Reader(Dense(features, dtype=model.dtype, groups=width // inputs)), up  # type: ignore[attr-defined]
    attention = type(model).encoder_type.layer_type.attention_type  # type: ignore[attr-defined]
    return Reader(attention(model.config, model.dtype, None), link.readers), _at(params, link.block)  # type: ignore[attr-defined]


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    model: nn.Module, names: tuple[str, ...], params: Any, args: Args
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns the values of activation sites, and the mask `[B, T]` of the first one, in full precision."""
    _, found = model.apply({"params": params}, *args, mutable=["captures", "masks"])
    return {name: _at(found["captures"], name) for name in names}, _at(found["masks"], names[0])[..., 0]


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


# --- OS: token-wise clipping, and learned steps ---


def quantiles(bits: int, tokens: int) -> list[float]:
    """Returns the token quantiles that are tried, from 1 downwards.

    Args:
      bits: of the activations; 8, 6 or 4.
      tokens: of a batch, padding included: the more there are, the smaller the steps.
    """
    step = min(0.01, float(f"{128 * 32 * 0.01 / tokens:.2g}"))
    return [1 - step * i for i in range(int(CLIPPED[bits] / step))]


@partial(jax.jit, static_argnums=(0, 1))
def _extremes(
    model: nn.Module, names: tuple[str, ...], params: Any, args: Args
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns least and greatest element of every token at some sites, in full precision."""
    _, found = model.apply({"params": params}, *args, mutable=["captures", "masks"])
    values, masks = (traverse_util.flatten_dict(found.get(part, {}), sep="/") for part in ("captures", "masks"))
    return {name: estimators.token_extremes(values[name], masks.get(name)) for name in names}


@partial(jax.jit, static_argnums=0)
def _pruned_ranges(specs: tuple[tuple[str, Spec, bool], ...], extremes: Any, quantile: jax.Array) -> dict[str, Any]:
    ranges: dict[str, Any] = {}
    for name, spec, clipped in specs:
        low, high = jax.vmap(partial(estimators.pruned_range, quantile=quantile if clipped else 1.0))(*extremes[name])
        put(ranges, name, grid.qparams(spec, jnp.mean(low), jnp.mean(high))._asdict())
    return ranges


def _batch_loss(model: nn.Module, variables: Any, args: Args, wanted: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model.apply(variables, *args).logits - wanted))  # type: ignore[union-attr]


@partial(jax.jit, static_argnums=0)
def logits_error(model: nn.Module, variables: Any, batches: Args, wanted: jax.Array) -> jax.Array:
    """Returns the mean squared error of the logits, summed over batches.

    Args:
      model: a module.
      variables: what it is applied to.
      batches: its arguments, stacked: `[N, B, ...]`.
      wanted: `[N, B, C]`.
    """
    return jnp.sum(jax.lax.map(lambda each: _batch_loss(model, variables, *each), (batches, wanted)))


def clip_tokens(
    model: nn.Module,
    params: Any,
    frozen: Any,
    sites: Mapping[str, SiteInfo],
    batches: Args,
    wanted: jax.Array,
    bits: int,
) -> tuple[float, dict[str, Any], list[float]]:
    """Finds the token quantile of least error of the logits (Wei et al. 2022, the coarse stage).

    Extremes of tokens are those of the full-precision model; probabilities are not clipped.

    Args:
      model: its policy covers the activations.
      params: float parameters.
      frozen: parameters with weights on their grids.
      sites: from `list_sites`.
      batches: arguments, stacked: `[N, B, ...]`.
      wanted: logits of the float model, `[N, B, C]`.
      bits: of the activations.

    Returns:
      The quantile, the ranges of activations and inputs, and the error for every quantile that was tried.
    """
    policy: Policy = model.policy  # type: ignore[attr-defined]
    specs = tuple(
        (name, spec, info.features)
        for name, info in sites.items()
        if info.kind != "weight" and (spec := policy.spec(info.kind, name)) is not None
    )
    names = tuple(name for name, *_ in specs)
    plain = model.clone(policy=None)
    each = [_extremes(plain, names, params, args) for args in zip(*batches, strict=True)]
    extremes = jax.tree.map(lambda *values: jnp.stack(values), *each)
    tried = quantiles(bits, batches[0][0].size)
    errors: list[float] = []
    with progress(len(tried), "token-wise clipping") as bar:
        for quantile in tried:
            ranges = _pruned_ranges(specs, extremes, jnp.float32(quantile))
            errors.append(float(logits_error(model, {"params": frozen, "ranges": ranges}, batches, wanted)))
            bar.update(len(errors), error=errors[-1])
    best = tried[int(np.argmin(errors))]
    return best, _pruned_ranges(specs, extremes, jnp.float32(best)), errors


def learn_ranges(
    model: nn.Module,
    frozen: Any,
    ranges: Mapping[str, Any],
    batches: Args,
    wanted: jax.Array,
    options: OutlierSuppression,
) -> dict[str, Any]:
    """Trains scales and zero points towards the logits of the float model (the fine stage of token-wise clipping).

    Args:
      model: its policy has learned ranges.
      frozen: parameters with weights on their grids.
      ranges: of activations and inputs.
      batches: arguments, stacked: `[N, B, ...]`.
      wanted: `[N, B, C]`.
      options: learning rate and epochs.
    """
    flat = traverse_util.flatten_dict(dict(ranges))
    learned = {path: value for path, value in flat.items() if path[-1] in ("scale", "zero_point")}
    rest = {path: value for path, value in flat.items() if path not in learned}
    optimizer = optax.adam(optax.cosine_decay_schedule(options.learning_rate, max(options.epochs * len(wanted), 1)))

    @jax.jit
    def epoch(carry: Any, frozen: Any, batches: Args, wanted: jax.Array) -> tuple[Any, jax.Array]:
        def loss(learned: Any, args: Args, wanted: jax.Array) -> jax.Array:
            whole = traverse_util.unflatten_dict({**rest, **learned})
            return _batch_loss(model, {"params": frozen, "ranges": whole}, args, wanted)

        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            learned, state = carry
            value, gradient = jax.value_and_grad(loss)(learned, *batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(learned, updates), state), value

        carry, losses = jax.lax.scan(step, carry, (batches, wanted))
        return carry, jnp.sum(losses)

    carry = learned, optimizer.init(learned)
    with progress(options.epochs, "learning ranges") as bar:
        for number in range(options.epochs):
            carry, error = epoch(carry, frozen, batches, wanted)
            bar.update(number + 1, error=float(error))
    return traverse_util.unflatten_dict({**rest, **carry[0]})


# --- The whole ---


def on_activation_grids(params: Any, sites: Mapping[str, SiteInfo], policy: Policy, spec: Spec) -> dict[str, Any]:
    """Returns parameters whose quantized weights passed a grid of activations, one for each tensor (as published)."""
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    dynamic = dataclasses.replace(spec, range="dynamic")
    for name, info in sites.items():
        if info.kind == "weight" and policy.spec("weight", name) is not None:
            flat[name] = fake_quant_weight(dynamic, flat[name], {}, name)
    return traverse_util.unflatten_dict(flat, sep="/")


def suppress(
    model: nn.Module, params: Mapping[str, Any], batches: Sequence[Args], options: OutlierSuppression
) -> Suppressed:
    """Migrates and quantizes a trained encoder.

    Args:
      model: an encoder with a head; its policy does not matter.
      params: its parameters.
      batches: argument tuples of one shape; published with 256 examples, 16 (os) or 32 (os+) a batch.
      options: what is done.

    Raises:
      UserError: for a family whose norms cannot migrate, without a batch, or with batches of several shapes.
    """
    if not batches or len({tuple(np.shape(value) for value in args) for args in batches}) > 1:
        raise UserError("outlier suppression needs calibration batches, at least one, and all of one shape")
    model, config = model.clone(policy=None), model.config  # type: ignore[attr-defined]
    policy = suppression_policy(options, config.num_layers)
    sites = list_sites(model, {"params": params}, *batches[0])
    check_policy(policy, sites)
    stacked = tuple(jnp.stack([jnp.asarray(args[i]) for args in batches]) for i in range(len(batches[0])))
    wanted = _logits(model, params, stacked)

    new: Any = params
    if options.method == "os":
        new, config = migrate(params, config, gains(params, config))
    elif options.method == "os+":
        shifts, scales = shifts_and_scales(model, params, batches, options.bits)
        new, config = migrate(params, config, scales, shifts)
    else:
        like = policy.spec("activation", "encoder/layer_0/attention/context")
        assert like is not None
        new = on_activation_grids(params, sites, policy, like)
    model = model.clone(config=config, policy=policy)
    errors: dict[str, float] = {}

    def measure(stage: str, runnable: nn.Module, frozen: Any, ranges: Any) -> None:
        errors[stage] = float(logits_error(runnable, {"params": frozen, "ranges": ranges}, stacked, wanted))

    if not options.learns:
        ranges = calibrate(model, new, batches)
        runnable, frozen = with_frozen_weights(model, sites, new, ranges)
        measure("calibrated", runnable, frozen, ranges)
    else:
        weights = weight_ranges(policy, sites, new)
        runnable, frozen = with_frozen_weights(model, sites, new, weights)
        best, found, tried = clip_tokens(runnable, new, frozen, sites, stacked, wanted, options.bits)
        errors |= {"min-max": tried[0], f"token quantile {best:.3g}": min(tried)}
        if options.epochs:
            learned = learn_ranges(runnable, frozen, found, stacked, wanted, options)
            measure("learned", runnable, frozen, learned)
            if errors["learned"] < min(tried):  # few noisy steps can lead away
                found = learned
        ranges = _merged(weights, found)
        model = model.clone(policy=suppression_policy(options, config.num_layers, best))
    table = Table(
        ["ranges", "error"], list(errors.items()), {"error": ".4g"}, "Squared error of the calibration logits"
    )
    return Suppressed(model, new, ranges, table)


@partial(jax.jit, static_argnums=0)
def _logits(model: nn.Module, params: Any, batches: Args) -> jax.Array:
    return jax.lax.map(lambda args: model.apply({"params": params}, *args).logits, batches)  # type: ignore[union-attr]


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    flat = {**traverse_util.flatten_dict(dict(first)), **traverse_util.flatten_dict(dict(second))}
    return traverse_util.unflatten_dict(flat)
