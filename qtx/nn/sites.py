"""Sites: every tensor that can be quantized, captured or replaced, marked by one function.

    kernel = site(self, "kernel", kernel, kind="weight")
    y = site(self, "output", y, where=mask)

A site's name is its module's path and its role, `encoder/layer_3/ffn/down/output`. What happens there is decided by the
module's `policy` and by the variable collections that are passed to `apply`, in this order:

    sites        mutable: the site is listed (shapes only; see `list_sites`)
    captures     mutable: its full-precision value is stored under its name
    masks        mutable: so is the mask of the elements that count (not padding), where it has one
    teacher      holds the name: the value is replaced; `{'value', 'gate'}` replaces where the gate is true
    detach       holds the name: the gradient is cut where the flag, which broadcasts to the value, is true
    observers    mutable: the range is estimated from the value (calibration)
    ranges       scale and zero point in use; trained when the spec says `range='learned'`
    switches     holds the name: the grid is used where the flag is true; one program serves every choice of sites
    noise        holds the name: draws for stochastic rounding; without it they come from the random stream `rounding`,
                 and without that, as in evaluation, rounding is to nearest
    schedule     holds `progress` at its root: how far training has come, for grids that depend on it; else 1

Without a policy and collections a site is its argument: parameters and values are those of the plain model.

A module that runs several times with the same parameters (layers that share them) has its weight sites once, under its
own path; `running_as` gives every run a name of its own for the other sites.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.errors import UserError
from qtx.quant import estimators, grid
from qtx.quant.policy import KINDS, Kind, Policy
from qtx.quant.spec import Spec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """What is known of a site without running it.

    Attributes:
      kind: weight, activation or input.
      shape: of the tensor, for the arguments it was listed with.
      channel_axis: what per-channel means here.
      features: whether the last axis is a fixed feature axis (it is not for attention scores).
    """

    kind: Kind
    shape: tuple[int, ...]
    channel_axis: int
    features: bool


class HasPolicy(Protocol):
    """What `site` needs of a module."""

    policy: Policy | None


# Of every shared module that is running now: its path, and the name that its sites have meanwhile.
_RUNS: contextvars.ContextVar[tuple[tuple[tuple[str, ...], str], ...]] = contextvars.ContextVar("runs", default=())


def running_as(module: nn.Module, name: str) -> Callable[..., Any]:
    """Returns a call of a shared module whose activation and input sites lie under another name than the module's.

        layer = Layer(name="layer_0")
        for i in range(12):
            x = running_as(layer, f"layer_{i}")(x)

    Here `layer_0/residual` to `layer_11/residual` are sites with their own ranges, while the weight site
    `layer_0/kernel` exists once, as its parameter does.

    Args:
      module: a bound module.
      name: stands in place of the module's own name.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _RUNS.set((*_RUNS.get(), (module.path, name)))
        try:
            return module(*args, **kwargs)
        finally:
            _RUNS.reset(token)

    return run


def _scope(module: Any, kind: Kind) -> Any:
    """Returns the Flax scope that holds the variables of a module's sites: its own, or that of the present run."""
    path = module.path
    if kind != "weight":
        for owner, name in _RUNS.get():
            if module.path[: len(owner)] == owner:
                path = (*path[: len(owner) - 1], name, *path[len(owner) :])
    scope, same = module.scope, 0
    while same < len(path) and path[same] == module.path[same]:
        same += 1
    for _ in path[same:]:
        scope = scope.parent
    for part in path[same:]:
        scope = scope.push(part, reuse=True)
    return scope


def site(
    module: Any,
    role: str,
    x: jax.Array,
    *,
    kind: Kind = "activation",
    where: jax.Array | None = None,
    channel_axis: int = -1,
    features: bool = True,
    lookup: jax.Array | None = None,
) -> jax.Array:
    """Marks a tensor as a site and returns the value to go on with.

    Args:
      module: a bound linen module with an attribute `policy` (a `Policy` or None).
      role: name of the tensor within the module; for weights, the parameter's name.
      x: the tensor.
      kind: which rules of the policy apply.
      where: bool, broadcastable to `x`: elements that count in calibration (not padding).
      channel_axis: the axis that `per_channel()` means.
      features: False if the last axis has no fixed meaning, so that per-embedding grids make no sense.
      lookup: int `[...]`; for tables: the rows `x[lookup]` are returned, and only they are quantized where possible.

    Raises:
      UserError: if the policy wants a static range that was never calibrated.
    """
    if module.is_initializing():
        return x if lookup is None else jnp.take(x, lookup, axis=0)
    scope = _scope(module, kind)
    if scope.is_mutable_collection("sites"):
        scope.put_variable("sites", role, SiteInfo(kind, x.shape, channel_axis, features))
    if scope.is_mutable_collection("captures"):
        scope.put_variable("captures", role, x)
    if where is not None and scope.is_mutable_collection("masks"):
        scope.put_variable("masks", role, where)
    if scope.has_variable("teacher", role):
        given = scope.get_variable("teacher", role)
        value, gate = (given["value"], given["gate"]) if isinstance(given, Mapping) else (given, True)
        x = jnp.where(gate, jax.lax.stop_gradient(value).astype(x.dtype), x)
    if scope.has_variable("detach", role):
        x = jnp.where(scope.get_variable("detach", role), jax.lax.stop_gradient(x), x)
    spec = None if module.policy is None else module.policy.spec(kind, "/".join((*scope.path, role)))
    if spec is None:
        return x if lookup is None else jnp.take(x, lookup, axis=0)
    spec = spec.at(channel_axis, x.ndim)
    params = _params(scope, role, x, spec, kind, where)
    noise, progress = _noise(module, scope, role, x, spec), _progress(scope, spec)
    if lookup is None:
        y = grid.fake_quant(spec, x, params, noise, progress)
    else:
        y = grid.fake_quant_rows(spec, x, lookup, params, noise, progress)
    if scope.has_variable("switches", role):
        plain = x if lookup is None else jnp.take(x, lookup, axis=0)
        y = jnp.where(scope.get_variable("switches", role), y, plain)
    return y


def _params(
    scope: Any, role: str, x: jax.Array, spec: Spec, kind: Kind, where: jax.Array | None
) -> grid.QParams | None:
    if spec.is_codebook:
        return None
    if spec.range == "dynamic":
        return estimators.estimate(spec, x, where)
    stored = scope.get_variable("ranges", role)
    # Weights do not change while activations are calibrated: their range is estimated once.
    if scope.is_mutable_collection("observers") and (kind != "weight" or stored is None):
        group = scope.get_variable("groups", role)
        state = estimators.observe(spec, scope.get_variable("observers", role), x, where, group)
        stored = grid.qparams(spec, *estimators.estimated_range(spec, state), group).stored()
        scope.put_variable("observers", role, state)
        scope.put_variable("ranges", role, stored)
    if stored is None:
        name = "/".join((*scope.path, role))
        raise UserError(f"site {name!r} has no range yet; calibrate the model first, or give it range='dynamic'")
    return grid.QParams(**stored)


def _noise(module: Any, scope: Any, role: str, x: jax.Array, spec: Spec) -> jax.Array | None:
    if spec.rounding != "stochastic":
        return None
    if scope.has_variable("noise", role):
        return scope.get_variable("noise", role)
    return jax.random.uniform(module.make_rng("rounding"), x.shape) if module.has_rng("rounding") else None


def _progress(scope: Any, spec: Spec) -> jax.Array | float:
    found = scope.root.get_variable("schedule", "progress") if spec.needs_progress else None
    return 1.0 if found is None else found


def list_sites(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, SiteInfo]:
    """Returns every site of a model by name, in the order of their names; nothing is computed.

    Args:
      model: any linen module whose tensors are marked by `site`; its policy does not matter.
      variables: its parameters; `jax.ShapeDtypeStruct`s do.
      *args: what the model is called with; arrays or `jax.ShapeDtypeStruct`s.
      **kwargs: likewise, static.
    """
    plain = model.clone(policy=None) if getattr(model, "policy", None) is not None else model
    params = {"params": variables["params"]}
    _, found = jax.eval_shape(lambda v, a: plain.apply(v, *a, **kwargs, mutable=["sites"]), params, args)
    flat = traverse_util.flatten_dict(found["sites"], sep="/")
    return {name: flat[name] for name in sorted(flat)}


def example_inputs(module: Any, config: Any, tokens: int = 8) -> tuple[jax.Array, ...]:
    """Returns what a model is called with, to trace it.

    Args:
      module: a model or its class; it says itself in `example_inputs(config)`, or it reads ids and masks of texts.
      config: its sizes.
      tokens: of a text.

    Returns:
      For a model of texts int32 `[1, tokens]` for each of its `inputs`.
    """
    if hasattr(module, "example_inputs"):
        return module.example_inputs(config)
    return (jnp.zeros((1, tokens), jnp.int32),) * len(module.inputs)


def names_by_kind(sites: Mapping[str, SiteInfo]) -> dict[Kind, list[str]]:
    """Returns the names of sites, from `list_sites`, by their kind."""
    return {kind: [name for name, info in sites.items() if info.kind == kind] for kind in KINDS}


def check_policy(policy: Policy, sites: Mapping[str, SiteInfo]) -> None:
    """Raises a `UserError` if a policy does not fit a model.

    That is: a rule that matches no site, a group count that does not divide the width, a per-embedding grid where the
    last axis is not a feature axis, or a static range per token or position.

    Args:
      policy: the policy.
      sites: from `list_sites`.
    """
    policy.check(names_by_kind(sites))
    for name, info in sites.items():
        spec = policy.spec(info.kind, name)
        if spec is None:
            continue
        _check_granularity(name, info, spec)


def _check_granularity(name: str, info: SiteInfo, spec: Spec) -> None:
    ndim, granularity = len(info.shape), spec.granularity
    axis = spec.at(info.channel_axis, ndim).granularity.axis
    if axis is None:
        return
    axes = axis if isinstance(axis, tuple) else (axis,)
    assert all(isinstance(a, int) for a in axes)
    kept = {int(a) % ndim for a in axes if -ndim <= int(a) < ndim}
    if len(kept) < len(axes):
        raise UserError(f"site {name!r} has {ndim} axes: {granularity} does not apply there")
    if info.kind != "weight":
        if ndim - 1 in kept and not info.features:
            raise UserError(f"site {name!r} has no feature axis: {granularity} does not apply there; use per_tensor()")
        if kept - {ndim - 1} and spec.range != "dynamic":
            raise UserError(f"site {name!r}: ranges {granularity} depend on the batch; use range='dynamic'")
        if granularity.permute and spec.range == "dynamic":
            raise UserError(f"site {name!r}: permuted groups are found in calibration; use range='static' or 'learned'")
    if granularity.groups is not None and info.shape[min(kept)] % granularity.groups:
        width = info.shape[min(kept)]
        raise UserError(f"site {name!r}: {granularity.groups} groups do not divide its width {width}")
