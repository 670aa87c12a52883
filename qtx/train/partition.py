"""What training changes and what it leaves: for train steps of one's own, as `equinox` does it.

    trained, fixed = qtx.partition(model, variables, x)
    gradient = jax.grad(lambda trained: loss(model.apply(qtx.combine(trained, fixed), x)))(trained)

Both parts have the structure of the variables, so optimizers and transformations of JAX take them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.nn.sites import SiteInfo, list_sites
from qtx.quant.policy import Policy


def partition(model: nn.Module, variables: Mapping[str, Any], *args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the variables of a model into those that training changes and the others.

    Trained are parameters, and scales and zero points of sites whose range is learned (`qtx.training_policy`).

    Args:
      model: any module with sites and a policy.
      variables: `params` and `ranges`.
      *args: what the model is called with; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Two trees of the structure of `variables`, with None where the other one has the array. To JAX and optax a None is
      no leaf, so an optimizer takes the first one as it is.
    """
    sites = list_sites(model, variables, *args)
    policy: Policy | None = getattr(model, "policy", None)
    flat = traverse_util.flatten_dict(variables, sep="/")
    chosen = {name: is_trained(policy, sites, name, value) for name, value in flat.items()}
    halves = [{name: v if chosen[name] == half else None for name, v in flat.items()} for half in (True, False)]
    trained, fixed = (traverse_util.unflatten_dict(half, sep="/") for half in halves)
    return trained, fixed


def combine(trained: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)


def is_trained(policy: Policy | None, sites: Mapping[str, SiteInfo], name: str, value: Any) -> bool:
    """Whether training changes an array, `params/...` or `ranges/...`: parameters, learned scales and learned zero points."""
    collection, _, path = name.partition("/")
    if value is None or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return False
    if collection == "params":
        return True
    site, _, field = path.rpartition("/")
    spec = policy.spec(sites[site].kind, site) if policy is not None and site in sites else None
    if spec is None or spec.range != "learned":
        return False
    return field == "scale" or (field == "zero_point" and spec.has_zero_point)
