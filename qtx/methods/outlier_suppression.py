"""Outlier suppression: move what makes activations wide out of them, then quantize after training.

    found = suppress(model, params, batches, OutlierSuppression("os", bits=6))
    logits = found.model.apply({"params": found.params, "ranges": found.ranges}, *args).logits

Two methods, for encoders whose norms stand behind the residual sums:

os    Wei et al. 2022, "Outlier suppression". The gain of a LayerNorm amplifies the outliers of a few channels, so it migrates
      into what reads the norm (gamma migration); then ranges leave out the tokens with the largest values, as many as is
      best for the logits (token-wise clipping), and scales and zero points learn (LSQ+).
os+   Wei et al. 2023, "Outlier suppression+". Every channel of a norm's output is shifted to the middle of its range and,
      where it is wider than a threshold, scaled down to it; the threshold is searched for each norm.

Both are one transformation, `qtx.methods.norm_migration.migrate`, behind which the function is the same.

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
from qtx.methods.norm_migration import gains, migrate, shifts_and_scales
from qtx.nn.aliases import policy as make_policy
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.quant import estimators, grid
from qtx.quant.policy import Policy, Rule
from qtx.quant.spec import Estimator, MinMax, Search, Spec, asymmetric, per_channel
from qtx.train.logging import progress
from qtx.train.report import Table

Method = Literal["os", "os+", "os+_as_published"]
CLIPPED = {8: 0.1, 6: 0.3, 4: 0.9}
"""By bits, the largest share of tokens that token-wise clipping tries to leave out."""
SEARCHED = Search("mse", "brent", margin=0.0)
SAMPLE = 2**16  # elements of an activation that a search looks at: one range in all needs no more


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
        put(ranges, name, grid.qparams(spec, jnp.mean(low), jnp.mean(high)).stored())
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
