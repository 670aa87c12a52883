"""Post-training quantization: find the range of every quantized tensor from a few batches.

    model = BertClassifier(config, policy=policy(symmetric(8), asymmetric(8)))
    ranges = calibrate(model, params, [inputs(model, batch) for batch in batches])
    logits = model.apply({"params": params, "ranges": ranges}, *inputs(model, batch)).logits

The forward pass of calibration is already quantized: later layers see what earlier ones hand on (Bondarenko et al. 2021,
section 5). Weight ranges do not depend on data and are found first, one compiled search per shape. Nothing is trained.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.errors import UserError
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.quant import estimators, grid, rows
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec

Args = tuple[Any, ...]

_estimate = jax.jit(estimators.estimate, static_argnums=0)
_fake_quant = jax.jit(grid.fake_quant, static_argnums=0)


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Sets an entry of a nested dict by its name, such as `a/b/c`."""
    *path, leaf = name.split("/")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[leaf] = value


def weight_ranges(policy: Policy, sites: Mapping[str, SiteInfo], params: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates the ranges of all weights with a static or learned range.

    Args:
      policy: decides which weights, and how.
      sites: from `list_sites`.
      params: nested parameters.

    Returns:
      A nested `ranges` collection with the weights alone.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    ranges: dict[str, Any] = {}
    for name, info in sites.items():
        spec = policy.spec("weight", name) if info.kind == "weight" else None
        if spec is None or spec.range == "dynamic":
            continue
        if spec.granularity.permute:
            raise UserError(f"weight {name!r}: permuted groups are for activations; use per_group(K) or per_channel()")
        put(ranges, name, _estimate(spec.at(info.channel_axis, len(info.shape)), flat[name]).stored())
    return ranges


def permutation_groups(
    model: nn.Module,
    params: Mapping[str, Any],
    batches: Sequence[Args],
    sites: Mapping[str, SiteInfo],
    share: str | None = None,
    published: bool = False,
) -> dict[str, Any]:
    """Assigns channels to groups for every activation with permuted groups (range-based permutation).

    The ranges come from the full-precision model over all batches.

    Args:
      model: with a policy.
      params: nested parameters.
      batches: what the model is called with.
      sites: from `list_sites`.
      share: role, such as `'ffn/down/output'`, whose permutation all permuted sites of its layer use.
      published: as in the released code: the other activations are quantized meanwhile, and the last batch alone counts.

    Returns:
      A nested `groups` collection of `[d]` int32 arrays; empty if no site asks for a permutation.
    """
    policy: Policy = model.policy  # type: ignore[attr-defined]
    specs = {name: policy.spec(info.kind, name) for name, info in sites.items()}
    wanted = {name: spec for name, spec in specs.items() if spec is not None and spec.granularity.permute}
    if not wanted:
        return {}
    if published:

        def others(spec: Spec) -> Spec | None:
            return None if spec.granularity.permute else _dynamic(spec)

        quiet = Policy(activations=policy.map_specs(others).activations, precedence=policy.precedence)
    else:
        quiet = None
    recorder = model.clone(policy=quiet)

    @jax.jit
    def record(params: Any, args: Args) -> dict[str, tuple[jax.Array, jax.Array]]:
        _, found = recorder.apply({"params": params}, *args, mutable=["captures", "masks"])
        captured = traverse_util.flatten_dict(found["captures"], sep="/")
        masks = traverse_util.flatten_dict(found.get("masks", {}), sep="/")
        extremes = {}
        for name, spec in wanted.items():
            axis = spec.granularity.axis
            assert isinstance(axis, int)
            where = masks.get(name) if spec.estimator.padding == "ignore" else None
            extremes[name] = rows.extremes(captured[name], axis, where)
        return extremes

    lows: dict[str, Any] = {}
    highs: dict[str, Any] = {}
    for args in batches[-1:] if published else batches:
        for name, (low, high) in record(params, args).items():
            lows[name] = jnp.minimum(lows.get(name, low), low)
            highs[name] = jnp.maximum(highs.get(name, high), high)

    groups: dict[str, Any] = {}
    for name, spec in wanted.items():
        source = name
        if share is not None:
            layer = re.match(r"(.*/)?layer_\d+/", name)
            source = f"{layer[0]}{share}" if layer else name
            if source not in wanted:
                raise UserError(f"{name!r} is to share the permutation of {source!r}, which has no permuted groups")
        k = spec.granularity.groups
        assert k is not None
        put(groups, name, rows.groups_by_range(highs[source] - lows[source], k))
    return groups


def _dynamic(spec: Spec) -> Spec:
    return dataclasses.replace(spec, range="dynamic")


def calibrate(
    model: nn.Module,
    params: Mapping[str, Any],
    batches: Sequence[Args],
    share_permutation: str | None = None,
    permutation: Literal["full_precision", "published"] = "full_precision",
    weights: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Finds the range of every quantized site.

    Padding is left out of the ranges unless an estimator's `padding` is `'include'`.

    Args:
      model: a module with a policy.
      params: its parameters.
      batches: argument tuples for the model; statistics follow their order.
      share_permutation: see `permutation_groups`.
      permutation: `'published'` reproduces the released permutation pass.
      weights: a `ranges` collection with the ranges of the weights, if they are known (see `qtx.methods.adaround`).

    Returns:
      The `ranges` collection: for every site `scale`, `zero_point`, `signed` and, for permuted groups, `group`.

    Raises:
      UserError: if the policy does not fit the model, there is no batch, or a range is not finite (the site is named).
    """
    policy: Policy | None = getattr(model, "policy", None)
    if policy is None:
        raise UserError("calibrate needs a model with a policy; clone it with model.clone(policy=...)")
    if len(batches) == 0:
        raise UserError("calibration got no batches; give it at least one")
    sites = list_sites(model, {"params": params}, *batches[0])
    check_policy(policy, sites)
    ranges = weight_ranges(policy, sites, params) if weights is None else dict(weights)
    _check_finite(ranges, "the weights hold NaN or infinity: check the checkpoint")
    observed = [
        spec
        for name, info in sites.items()
        if info.kind != "weight" and (spec := policy.spec(info.kind, name)) and spec.range != "dynamic"
    ]
    if not observed:
        return ranges
    groups = permutation_groups(model, params, batches, sites, share_permutation, published=permutation == "published")
    return activation_ranges(model, {"params": params, "groups": groups, "ranges": ranges}, batches)


def activation_ranges(model: nn.Module, variables: Mapping[str, Any], batches: Sequence[Args]) -> dict[str, Any]:
    """Completes the ranges of the weights by those of activations and inputs: the pass over the data of `calibrate`.

    Calls with the same model and the same shapes share one compiled program, whatever the values of `switches`.

    Args:
      model: a module with a policy that fits it.
      variables: `params`, `ranges` of the weights, `groups` where the policy permutes, and whatever else sites read.
      batches: argument tuples for the model; statistics follow their order.

    Returns:
      The whole `ranges` collection.
    """
    fixed = {name: value for name, value in variables.items() if name != "ranges"}
    collections: dict[str, Any] = {"ranges": variables["ranges"]}
    for args in batches:
        collections = _observe(model, fixed, collections, args)
        _check_finite(collections.get("ranges", {}), "the calibration data or the activations hold NaN or infinity")
    return collections.get("ranges", {})


# Parameters are arguments: as constants of the compiled function they double the time of compilation.
@partial(jax.jit, static_argnums=0)
def _observe(model: nn.Module, fixed: dict[str, Any], collections: dict[str, Any], args: Args) -> dict[str, Any]:
    _, updated = model.apply(fixed | collections, *args, mutable=["ranges", "observers"])
    return dict(updated)


def _check_finite(ranges: Mapping[str, Any], reason: str) -> None:
    flat = traverse_util.flatten_dict(ranges, sep="/")
    for name, value in jax.device_get(flat).items():
        if value is not None and not np.all(np.isfinite(value)):
            raise UserError(f"site {name.rpartition('/')[0]!r} has no finite range: {reason}")


def quantized_weights(
    policy: Policy, sites: Mapping[str, SiteInfo], params: Any, ranges: Any, key: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the parameters with every quantized weight on its grid (fake quantization, once and for all).

    Args:
      policy: as in calibration.
      sites: from `list_sites`.
      params: nested parameters.
      ranges: from `calibrate`.
      key: of the draws of stochastic rounding, one for each weight; None: all weights are rounded to nearest.
    """
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for number, (name, info) in enumerate(sites.items()):
        spec = policy.spec("weight", name) if info.kind == "weight" else None
        if spec is not None:
            drawn = None
            if key is not None and spec.rounding == "stochastic":
                drawn = jax.random.uniform(jax.random.fold_in(key, number), info.shape)
            flat[name] = fake_quant_weight(spec.at(info.channel_axis, len(info.shape)), flat[name], ranges, name, drawn)
    return traverse_util.unflatten_dict(flat, sep="/")


def with_frozen_weights(
    model: nn.Module, sites: Mapping[str, SiteInfo], params: Any, ranges: Any, key: jax.Array | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the model without rules for weights, or without a policy if nothing is left, and parameters on their grids.

    It computes the same, and quantizes no weight in every call: for evaluation, and for decoding above all.

    Args:
      model: with the policy it was calibrated or trained with.
      sites: from `list_sites`.
      params: nested parameters.
      ranges: from `calibrate` or training.
      key: see `quantized_weights`.
    """
    policy: Policy = model.policy  # type: ignore[attr-defined]
    rest = dataclasses.replace(policy, weights=())
    left = rest if rest.activations or rest.inputs else None
    return model.clone(policy=left), quantized_weights(policy, sites, params, ranges, key)


def stored_qparams(ranges: Mapping[str, Any], name: str) -> grid.QParams | None:
    """Returns the quantizer parameters of a site, or None if it has none."""
    node: Any = ranges
    for part in name.split("/"):
        if part not in node:
            return None
        node = node[part]
    return grid.QParams(**node)


def fake_quant_weight(
    spec: Spec, weight: jax.Array, ranges: Mapping[str, Any], name: str, noise: jax.Array | None = None
) -> jax.Array:
    """Puts one weight on its grid, with its stored range or one of its own (dynamic); `noise` as in `grid.fake_quant`."""
    params = stored_qparams(ranges, name)
    if params is None and not spec.is_codebook:
        if spec.range != "dynamic":
            raise UserError(f"weight {name!r} has no range; calibrate with the same policy first")
        params = _estimate(spec, weight)
    return _fake_quant(spec, weight, params, noise)
