"""What is quantized in a model, how, and what is not and why: one table.

print(describe(model, {"params": params}, *inputs))
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from qtx.nn.sites import SiteInfo, list_sites
from qtx.quant.policy import Kind, Policy

FULL = "full precision"
_BIAS = f"added in {FULL} after the product (bias)"

_LAYER = re.compile(r"layer_(\d+)")
_PLURALS = {"weight": "weights", "activation": "activations", "input": "inputs", "parameter": "other parameters"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, or one parameter that is no site.

    Attributes:
      name: of the site or parameter.
      kind: weight, activation, input, or `'parameter'` for what is no site.
      shape: of the tensor, for the arguments that the model was described with.
      treatment: its grid, or `FULL`.
      reason: the rule that decided, or why there is none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    treatment: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Description:
    """Rows in the order in which data meets them; printed as a table in which identical layers share a line."""

    rows: tuple[Row, ...]

    @property
    def summary(self) -> str:
        """How many tensors of each kind are quantized, such as `161 of 161 activations, 102 of 102 weights`."""
        counts = []
        for kind in ("activation", "weight", "input"):
            treatments = [row.treatment for row in self.rows if row.kind == kind]
            if treatments:
                quantized = sum(treatment != FULL for treatment in treatments)
                counts.append(f"{quantized} of {len(treatments)} {_PLURALS[kind]}")
        others = sum(row.kind == "parameter" for row in self.rows)
        return f"quantized: {', '.join(counts) or 'nothing'}; {others} {_PLURALS['parameter']} in {FULL}"

    def __str__(self) -> str:
        lines = [("name", "kind", "shape", "treatment", "reason")]
        lines += [(r.name, r.kind, "x".join(map(str, r.shape)), r.treatment, r.reason) for r in _collapsed(self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([*(line.rstrip() for line in table), "", self.summary])


def describe(model: nn.Module, variables: Mapping[str, Any], *args: Any) -> Description:
    """Says for every site and every parameter what becomes of it; nothing is computed.

    Args:
      model: a module with or without a policy.
      variables: its parameters; `jax.ShapeDtypeStruct`s do.
      *args: what the model is called with, arrays or `jax.ShapeDtypeStruct`s; activations have the shapes of these.
    """
    policy: Policy | None = getattr(model, "policy", None)
    sites = list_sites(model, variables, *args)
    rest = {
        name: value.shape
        for name, value in traverse_util.flatten_dict(variables["params"], sep="/").items()
        if name not in sites
    }
    rows = []
    for name in _data_flow(model, variables, *args):
        rows.append(_site_row(policy, name, sites[name]))
        bias = f"{name.rpartition('/')[0]}/bias"
        if sites[name].kind == "weight" and bias in rest:
            reason = _BIAS if name.endswith("/kernel") else f"added in {FULL} after the normalisation (shift)"
            rows.append(Row(bias, "parameter", rest.pop(bias), FULL, reason))
    for name, shape in rest.items():
        module, _, parameter = name.rpartition("/")
        tied = parameter == "bias" and f"{module}/input" in sites  # of a product whose matrix is another module's table
        rows.append(Row(name, "parameter", shape, FULL, _BIAS if tied else "no site of the model"))
    return Description(tuple(rows))


def _site_row(policy: Policy | None, name: str, info: SiteInfo) -> Row:
    def row(treatment: str, reason: str) -> Row:
        return Row(name, info.kind, info.shape, treatment, reason)

    if policy is None:
        return row(FULL, "the model has no policy")
    rule = policy.rule(info.kind, name)
    if rule is None:
        return row(FULL, _no_rule(policy, info.kind))
    written = repr(rule.pattern)
    if rule.label and rule.label != rule.pattern:
        written = f"{rule.label!r} ({rule.pattern})"
    if rule.spec is None:
        return row(FULL, f"rule {written} keeps it in {FULL}")
    return row(str(rule.spec), f"rule {written}")


def _no_rule(policy: Policy, kind: Kind) -> str:
    return "no rule matches" if policy.rules(kind) else f"no rules for {_PLURALS[kind]}"


def _data_flow(model: nn.Module, variables: Mapping[str, Any], *args: Any) -> list[str]:
    """Returns the site names in the order in which the forward pass meets them."""
    order: list[str] = []

    plain = model.clone(policy=None) if getattr(model, "policy", None) is not None else model  # type: ignore[call-arg]

    # A dict that leaves a trace comes back sorted by key; inside, it still has the order of insertion.
    def trace(params: Any, args: Any) -> None:
        _, found = plain.apply({"params": params}, *args, mutable=["sites"])
        order.extend(traverse_util.flatten_dict(found["sites"], sep="/"))

    jax.eval_shape(trace, variables["params"], args)
    return order


def _collapsed(rows: tuple[Row, ...]) -> list[Row]:
    """Merges rows that differ in the number of their layer alone, and the inputs if there is no rule for them."""
    merged: dict[str, dict[Row, list[int]]] = defaultdict(lambda: defaultdict(list))
    idle_inputs = 0
    for row in rows:
        if row.kind == "input" and row.reason == f"no rules for {_PLURALS['input']}":
            idle_inputs += 1
            continue
        layer = _LAYER.search(row.name)
        if layer is None:
            merged[row.name][row] = []
            continue
        # The layer's own number is no difference in a rule written for that layer, such as y3.
        reason = re.sub(rf"(layer_|'[A-Za-z]+){layer[1]}(?!\d)", r"\1{}", row.reason)
        name = row.name.replace(layer[0], "layer_{}", 1)
        merged[name][dataclasses.replace(row, name=name, reason=reason)].append(int(layer[1]))
    result = []
    for row, layers in (item for variants in merged.values() for item in variants.items()):
        numbers = _number_set(layers)
        name, reason = (text.replace("{}", numbers) for text in (row.name, row.reason))
        result.append(dataclasses.replace(row, name=name, reason=reason))
    if idle_inputs:
        result.append(Row(f"{idle_inputs} inputs of products", "input", (), FULL, "no rules for inputs"))
    return result


def _number_set(numbers: list[int]) -> str:
    """Writes ascending numbers as `3` or `{0..2,5}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
