"""Policies of "Understanding and Overcoming the Challenges of Efficient Transformer Quantization".

Bondarenko, Nagel, Blankevoort (EMNLP 2021): 8-bit post-training quantization of BERT fails because a few embedding
dimensions carry outliers; the remedies are 16 bits for a few activations (mixed precision) and ranges per embedding group
(PEG). Both are policies over the sites of `qtx.nn.bert`, written with the paper's short names (`qtx.nn.aliases`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

from qtx.errors import UserError
from qtx.nn.aliases import expand, policy
from qtx.quant.policy import Kind, Policy
from qtx.quant.spec import Granularity, Search, Spec, per_embedding, per_group

Value = int | str | None

_IN_LAYER = "qkvspcguxihyz"
_WITH_FEATURE_AXIS = "qkvcguxhyz"  # what the global per-embedding options apply to


def with_value(spec: Spec, value: Value) -> Spec | None:
    """Applies one value of a published quantization dictionary to a spec.

    Args:
      spec: what the site has so far.
      value: number of bits, `'fp32'`, `'per_embd'`, `'ng6'` (six groups), `'ngp6'` (six permuted groups) or None (leave).

    Raises:
      UserError: on any other value.
    """
    if value is None:
        return spec
    if value == "fp32":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return dataclasses.replace(spec, bits=value)
    if value == "per_embd":
        return dataclasses.replace(spec, granularity=per_embedding())
    groups = re.fullmatch(r"ng(p?)(\d+)", str(value))
    if groups:
        return dataclasses.replace(spec, granularity=per_group(int(groups[2]), permute=bool(groups[1])))
    raise UserError(f"unknown quantization value {value!r}; give bits, 'fp32', 'per_embd', 'ng6' or 'ngp6'")


def policy_of(
    weights: Spec | None,
    activations: Spec | None,
    quant_dict: Mapping[str, Value] | None = None,
    num_layers: int = 12,
    setup: Literal["all", "FP_logits", "MSE_logits"] = "all",
    everywhere: Granularity | None = None,
    order: Literal["specific", "published"] = "specific",
) -> Policy:
    """Builds the policy of one published configuration (reference, sections 6.2 to 6.4).

    Args:
      weights: spec of all weights, or None.
      activations: spec of all activations, or None.
      quant_dict: short name to value (`with_value`); `{'y': 16, 'h': 16, 'x': 16}` is the paper's mixed precision.
      num_layers: of the model.
      setup: logits like all activations, in full precision, or with a range by bounded search.
      everywhere: granularity of every activation that has a feature axis (the options per-embedding and per-groups).
      order: which of several keys for one site wins: the most specific one, or as published (`L` over everything,
        a global key over an indexed one).

    Raises:
      UserError: on unknown keys, values or setups.
    """
    quant_dict = dict(quant_dict or {})
    if setup not in ("all", "FP_logits", "MSE_logits"):
        raise UserError(f"unknown setup {setup!r}; choose from 'all', 'FP_logits', 'MSE_logits'")
    if order not in ("specific", "published"):
        raise UserError(f"unknown order {order!r}; choose from 'specific', 'published'")
    for key, value in quant_dict.items():
        with_value((weights if _kind(key) == "weight" else activations) or Spec(), value)

    names = ["e"] + [f"{letter}{i}" for i in range(num_layers) for letter in _IN_LAYER] + ["P", "C"]
    specs: dict[str, Spec | None] = {name: activations for name in names}
    specs["norm"] = activations
    if activations is not None:
        if everywhere is not None:
            for name in specs:
                if name in ("e", "norm") or (name[0] in _WITH_FEATURE_AXIS and name not in ("P", "C")):
                    specs[name] = dataclasses.replace(activations, granularity=everywhere)
            if everywhere == per_embedding():
                specs["P"] = dataclasses.replace(activations, granularity=everywhere)
        if setup == "MSE_logits":
            specs["C"] = dataclasses.replace(activations, estimator=_bounded(activations))

    for key in sorted(quant_dict, key=lambda key: _rank(key, order)):
        value = quant_dict[key]
        if _kind(key) == "weight":
            continue
        letter, number = re.fullmatch(r"([A-Za-z]+)(\d*)", key).groups()  # type: ignore[union-attr]
        if number and int(number) >= num_layers:
            raise UserError(f"{key!r} names layer {number}, but the model has layers 0 to {num_layers - 1}")
        for name in specs:
            found = re.fullmatch(r"([A-Za-z]+?)(\d*)", name)
            assert found is not None
            in_layer = found[2] != ""
            if (found[1] == letter or (letter == "L" and in_layer)) and number in ("", found[2]):
                specs[name] = None if activations is None else with_value(specs[name] or activations, value)
    if setup == "FP_logits":
        specs["C"] = None

    rules: dict[str, Spec | None] = {}
    for name, spec in specs.items():
        # What follows the sums: the norm and, in some families, a projection.
        patterns = ("encoder/embeddings/*/output",) if name == "norm" else expand("activation", name)
        rules |= {pattern: spec for pattern in patterns}
    weight_rules: dict[str, Spec | None] = {"**": weights}
    if weights is not None:
        for key in ("Et", "wP", "wC"):
            if key in quant_dict:
                base = dataclasses.replace(weights, estimator=_bounded(weights)) if key == "Et" else weights
                weight_rules[key] = with_value(base, quant_dict[key])
    return policy(
        weights=weight_rules if weights is not None else None, activations=rules if activations is not None else None
    )


def _bounded(spec: Spec) -> Search:
    return Search("mse", "brent", extent="tensor", padding=spec.estimator.padding)


def _kind(key: str) -> Kind:
    if key in ("Et", "wP", "wC"):
        return "weight"
    expand("activation", key)
    return "activation"


def _rank(key: str, order: str) -> int:
    """When a key is applied; later ones override. Published: y3, y, L3, L; otherwise the most specific comes last."""
    is_layer, is_indexed = key[0] == "L", key[-1].isdigit()
    if order == "published":
        return 2 * is_layer + (not is_indexed)
    return 2 * (not is_layer) + is_indexed
