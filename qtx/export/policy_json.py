"""Policies as JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtx.errors import UserError, near_misses
from qtx.quant.policy import Policy, Rule
from qtx.quant.spec import Granularity, MinMax, Search, Spec


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """Returns a policy as plain dicts, lists and scalars; `policy_from_json` gives back an equal policy."""

    def spec_to_json(spec: Spec) -> dict[str, Any]:
        estimator = {"kind": type(spec.estimator).__name__, **dataclasses.asdict(spec.estimator)}
        return {**dataclasses.asdict(spec), "estimator": estimator}

    def rules(given: tuple[Rule, ...]) -> list[dict[str, Any]]:
        return [
            {
                "pattern": rule.pattern,
                "label": rule.label,
                "spec": None if rule.spec is None else spec_to_json(rule.spec),
            }
            for rule in given
        ]

    return {
        "weights": rules(policy.weights),
        "activations": rules(policy.activations),
        "inputs": rules(policy.inputs),
        "precedence": policy.precedence,
    }


def policy_from_json(data: Mapping[str, Any]) -> Policy:
    """Reads what `policy_to_json` returned, also after a trip through `json`.

    Raises:
      UserError: on unknown or missing fields, or values that no spec takes.
    """

    def spec(given: Mapping[str, Any]) -> Spec:
        how = dict(given.get("estimator", {}))
        kind = how.pop("kind", None)
        if kind not in ("MinMax", "Search"):
            raise UserError(f"policy: unknown range estimator {kind!r}; choose from: MinMax, Search")
        granularity = granularity_from_json(given.get("granularity", {}))
        estimator = _build(MinMax if kind == "MinMax" else Search, how)
        return _build(Spec, {**given, "granularity": granularity, "estimator": estimator})

    def rule(given: Mapping[str, Any]) -> Rule:
        return _build(Rule, {**given, "spec": None if given.get("spec") is None else spec(given["spec"])})

    kinds = ("weights", "activations", "inputs")
    return _build(Policy, {**data, **{kind: tuple(rule(each) for each in data.get(kind, ())) for kind in kinds}})


def granularity_from_json(data: Mapping[str, Any]) -> Granularity:
    """Reads the fields of a granularity, also after a trip through `json`; raises a `UserError` on unknown ones."""
    axis = data.get("axis")
    return _build(Granularity, {**data, "axis": tuple(axis) if isinstance(axis, list | tuple) else axis})


def _build(cls: type, fields: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise UserError(f"policy: {cls.__name__} has no field {name!r}{near_misses(name, known)}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"policy: {cls.__name__}: {error}") from None
