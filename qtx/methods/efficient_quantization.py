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
from qtx.nn.aliases import ALIASES, expand, policy
from qtx.quant.policy import Kind, Policy, Rule, matches
from qtx.quant.spec import ESTIMATORS, Granularity, Search, Spec, estimator, per_embedding, per_group

Value = int | str | None


def with_value(spec: Spec, value: Value) -> Spec | None:
    """Applies one value of a published quantization dictionary to a spec.

    Args:
      spec: what the site has so far.
      value: number of bits, `'fp32'`, `'per_embd'`, `'ng6'` (six groups), `'ngp6'` (six permuted groups), the name of a range
        estimator (`'cross_entropy'`, which is for logits) or None (leave).

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
    if value in ESTIMATORS:
        return dataclasses.replace(spec, estimator=estimator(str(value), padding=spec.estimator.padding))
    groups = re.fullmatch(r"ng(p?)(\d+)", str(value))
    if groups:
        return dataclasses.replace(spec, granularity=per_group(int(groups[2]), permute=bool(groups[1])))
    raise UserError(
        f"unknown quantization value {value!r}; give bits, 'fp32', 'per_embd', 'ng6', 'ngp6' or one of {', '.join(ESTIMATORS)}"
    )


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

    One rule holds for everything; further ones are written only for what differs, so the policy fits every family.

    Args:
      weights: spec of all weights, or None.
      activations: spec of all activations, or None.
      quant_dict: short name to value (`with_value`); `{'y': 16, 'h': 16, 'x': 16}` is the paper's mixed precision.
      num_layers: of the model.
      setup: logits like all activations, in full precision, or with a range by bounded search.
      everywhere: granularity of the encoder's activations but scores, probabilities and those within the FFN (the options
        per-embedding, which is for the pooler too, and per-groups).
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

    places = {key: _places(key, num_layers) for key in quant_dict if _kind(key) == "activation"}

    rules: dict[str, Rule] = {}  # by pattern

    def put(name: str, spec: Spec | None) -> None:
        rules.update({pattern: Rule(pattern, spec, name) for pattern in expand("activation", name)})

    if activations is not None:
        put("**", activations)
        if everywhere is not None:
            most = "**" if everywhere == per_embedding() else "encoder/**"
            put(most, dataclasses.replace(activations, granularity=everywhere))
            for name in (place for key in "spiC" for place in _places(key, num_layers)):
                put(name, activations)
        if setup == "MSE_logits":
            put("C", dataclasses.replace(activations, estimator=_bounded(activations)))
        for key in sorted(places, key=lambda key: _rank(key, order)):
            for name in places[key]:
                for pattern in expand("activation", name):
                    above = max((r for r in rules.values() if matches(r.pattern, pattern)), key=lambda r: r.specificity)
                    rules.setdefault(pattern, Rule(pattern, above.spec, name))
                    for rule in [rule for rule in rules.values() if matches(pattern, rule.pattern)]:
                        changed = with_value(rule.spec or activations, quant_dict[key])
                        rules[rule.pattern] = dataclasses.replace(rule, spec=changed)
        if setup == "FP_logits":
            put("C", None)

    weight_rules: dict[str, Spec | None] = {"**": weights}
    if weights is not None:
        for key in ("Et", "wP", "wC"):
            if key in quant_dict:
                base = dataclasses.replace(weights, estimator=_bounded(weights)) if key == "Et" else weights
                weight_rules[key] = with_value(base, quant_dict[key])
    found = policy(weights=weight_rules if weights is not None else None)
    return dataclasses.replace(found, activations=tuple(rules.values()))


def _places(key: str, num_layers: int) -> list[str]:
    """Writes a key for all layers as one key a layer: `y` as `y0`, `y1` ..."""
    if key[-1].isdigit() or "{i}" not in ALIASES["activation"][key][0]:
        number = re.sub("[A-Za-z_]+", "", key)
        if number and int(number) >= num_layers:
            raise UserError(f"{key!r} names layer {number}, but the model has layers 0 to {num_layers - 1}")
        return [key]
    return [f"{key}{i}" for i in range(num_layers)]


def _bounded(spec: Spec) -> Search:
    return Search("mse", "brent", extent="tensor", padding=spec.estimator.padding)


def _kind(key: str) -> Kind:
    if key in ("Et", "wP", "wC"):
        return "weight"
    if expand("activation", key) == (key,):
        raise UserError(f"{key!r} is a pattern; quantization dictionaries have short names alone, such as 'y' or 'y11'")
    return "activation"


def _rank(key: str, order: str) -> int:
    """When a key is applied; later ones override. Published: y3, y, L3, L; otherwise the most specific comes last."""
    is_layer, is_indexed = key[0] == "L", key[-1].isdigit()
    if order == "published":
        return 2 * is_layer + (not is_indexed)
    return 2 * (not is_layer) + is_indexed
