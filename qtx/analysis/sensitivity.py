"""Which quantizers cost the accuracy: leave one set out of a quantized model, or quantize one set alone.

    groups = make_groups(("name",), policy, sites)
    scores = measure(model, params, batches, groups, evaluate)
    print(summary(scores, groups))

"Leave out" is the table of Bondarenko et al. 2021 (section 4, table 2): everything is quantized but one set of sites, and
the set that wins back most is the culprit. "Only" is its converse. A set is any group of sites: by short name, layer,
site or pattern; activations and weights alike, whatever the policy quantizes.

Every variant runs in one compiled program for each shape of a batch: the quantizers are there in all of them, and the
collection `switches` (see `qtx.nn.sites`) says which are on. Where the ranges come from is `calibration`:

    full_precision  once, from the full-precision model: rows differ in nothing but the grids that are on (default)
    quantized       once, with all quantizers on
    variant         for each variant anew, with its own quantizers on: this reproduces the paper's table
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.files import write_text
from qtx.methods.calibrate import activation_ranges, permutation_groups, weight_ranges
from qtx.nn.aliases import ALIASES, expand, short_name
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.quant.policy import Kind, Policy, matches
from qtx.train.logging import progress
from qtx.train.plots import ACCENT, AMBER, INK, new_figure, save_figure
from qtx.train.report import Table

FULL, ALL = "full precision", "everything"
TABLES = {"leave_out": "all but {}", "only": "only {}"}
CALIBRATIONS = ("full_precision", "quantized", "variant")
PARTITIONS = ("name", "layer", "site")

Groups = Mapping[str, Sequence[str]]
Evaluate = Callable[[nn.Module, Mapping[str, Any]], Mapping[str, float]]


def quantized_sites(policy: Policy, sites: Mapping[str, SiteInfo]) -> dict[str, Kind]:
    """Returns the sites that a policy quantizes, with their kind."""
    return {name: info.kind for name, info in sites.items() if policy.spec(info.kind, name) is not None}


def make_groups(by: Sequence[str], policy: Policy, sites: Mapping[str, SiteInfo]) -> dict[str, tuple[str, ...]]:
    """Sorts the quantized sites of a model into groups.

    Args:
      by: any of `'name'` (short names: all layers' `y` are a group), `'layer'`, `'site'` (each for itself), and groups of
        one's own: a short name, a pattern, or several joined by `+`, such as `'y10+y11'` or `'**/ffn/**'`.
      policy: of the quantized model.
      sites: from `list_sites`.

    Returns:
      Site names by group. What has no short name goes by its own name with `*` for the number of the layer.

    Raises:
      UserError: on an empty list, or a group that holds no quantized site.
    """
    quantized = quantized_sites(policy, sites)
    if not quantized:
        raise UserError("the policy quantizes no site of this model: there is nothing to leave out")
    if not by:
        raise UserError(f"no groups of sites to compare; choose from {', '.join(PARTITIONS)}, short names and patterns")
    groups: dict[str, list[str]] = {}
    for entry in by:
        if entry in PARTITIONS:
            for name, kind in quantized.items():
                groups.setdefault(_part(entry, kind, name), []).append(name)
        else:
            groups[entry] = _chosen(entry, quantized)
    return {group: tuple(dict.fromkeys(names)) for group, names in groups.items()}


def _part(partition: str, kind: Kind, name: str) -> str:
    if partition == "site":
        return name
    if partition == "layer":
        layer = re.match(r"(?:encoder/)?(.*?layer_\d+)/", name)
        return layer[1] if layer else name.removeprefix("encoder/").split("/")[0]
    short = short_name(kind, name)
    return re.sub(r"layer_\d+", "layer_*", name) if short is None else short.rstrip("0123456789")


def _chosen(entry: str, quantized: Mapping[str, Kind]) -> list[str]:
    found: list[str] = []
    for part in entry.split("+"):
        is_pattern = "/" in part or "*" in part
        kind: Kind = "weight" if part.rstrip("0123456789") in ALIASES["weight"] else "activation"
        patterns = expand(kind, part)
        names = [
            name
            for name, its_kind in quantized.items()
            if (is_pattern or its_kind == kind) and any(matches(pattern, name) for pattern in patterns)
        ]
        if not names:
            raise UserError(
                f"the group {entry!r} matches no quantized site{near_misses(patterns[0], quantized)} "
                "(see quant.overrides for what is quantized)"
            )
        found += names
    return found


def variants(
    groups: Groups, quantized: Sequence[str], tables: Sequence[str] = tuple(TABLES)
) -> tuple[list[str], np.ndarray]:
    """Returns the names of the variants, and which quantizers are on: bool `[variants, sites]`.

    The first two are `FULL` and `ALL`; then one for each table and group.
    """
    names, rows = [FULL, ALL], [np.zeros(len(quantized), bool), np.ones(len(quantized), bool)]
    for table in TABLES:
        for group, members in groups.items():
            if table in tables:
                inside = np.isin(quantized, members)
                names.append(TABLES[table].format(group))
                rows.append(inside if table == "only" else ~inside)
    return names, np.array(rows)


def check(tables: Sequence[str], calibration: str) -> None:
    """Raises a `UserError` on an unknown table or calibration, or if there is no table."""
    for table in tables:
        if table not in TABLES:
            raise UserError(f"unknown table {table!r}{near_misses(table, TABLES)}")
    if not tables:
        raise UserError(f"no table to make; choose from {', '.join(TABLES)}")
    if calibration not in CALIBRATIONS:
        raise UserError(f"unknown calibration {calibration!r}{near_misses(calibration, CALIBRATIONS)}")


def measure(
    model: nn.Module,
    params: Mapping[str, Any],
    batches: Sequence[tuple[Any, ...]],
    groups: Groups,
    evaluate: Evaluate,
    *,
    tables: Sequence[str] = tuple(TABLES),
    calibration: str = "full_precision",
    path: str | os.PathLike[str] | None = None,
    share_permutation: str | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates every variant of a quantized model.

    Args:
      model: a module with a policy.
      params: its trained parameters.
      batches: argument tuples for calibration.
      groups: from `make_groups`.
      evaluate: `(model, variables) -> metrics`: `score`, of which more is better, perhaps `error` of the logits, and others. It
        must hand all of `variables` to the model.
      tables: `'leave_out'`, `'only'` or both.
      calibration: where the ranges come from, see above.
      path: JSON-lines file, a line for each variant: what stands there is read and not measured again.
      share_permutation: as in `qtx.methods.calibrate.calibrate`.

    Returns:
      The metrics by variant.

    Raises:
      UserError: on an unknown table or calibration, no batch, or a policy that does not fit.
    """
    check(tables, calibration)
    if len(batches) == 0:
        raise UserError("calibration got no batches; give it at least one")
    policy: Policy = model.policy  # type: ignore[attr-defined]
    sites = list_sites(model, {"params": params}, *batches[0])
    check_policy(policy, sites)
    quantized = list(quantized_sites(policy, sites))
    names, matrix = variants(groups, quantized, tables)
    done = _read(path)
    if all(name in done for name in names):
        return {name: done[name] for name in names}

    variables = {
        "params": params,
        "ranges": weight_ranges(policy, sites, params),
        "groups": permutation_groups(model, params, batches, sites, share_permutation),
    }

    def ranges(row: np.ndarray) -> dict[str, Any]:
        return activation_ranges(model, variables | {"switches": switches(quantized, row)}, batches)

    if calibration != "variant":
        shared = ranges(matrix[names.index(ALL if calibration == "quantized" else FULL)])
    with progress(len(names), "sensitivity", start=sum(name in done for name in names)) as bar:
        for name, row in zip(names, matrix, strict=True):
            if name in done:
                continue
            own = ranges(row) if calibration == "variant" else shared
            given = {"params": params, "ranges": own, "switches": switches(quantized, row)}
            done[name] = dict(evaluate(model, given))
            if path is not None:
                lines = (json.dumps({"variant": variant} | values) + "\n" for variant, values in done.items())
                write_text(path, "".join(lines))
            bar.update(sum(name in done for name in names), score=done[name]["score"])
    return {name: done[name] for name in names}


def switches(quantized: Sequence[str], row: np.ndarray) -> dict[str, Any]:
    """Returns the nested collection `switches` of one variant: a bool for every site."""
    return traverse_util.unflatten_dict(dict(zip(quantized, map(np.bool_, row), strict=True)), sep="/")


def _read(path: str | os.PathLike[str] | None) -> dict[str, dict[str, float]]:
    if path is None or not Path(path).exists():
        return {}
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {record.pop("variant"): record for record in records}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the quantizers of one group cost; None for a table that was not made, or an error that was not measured.

    Attributes:
      group: its name.
      sites: how many it has.
      wins_back: score without them minus score with everything quantized.
      loses: score in full precision minus score with them alone.
      error_without: error of the logits with all quantizers but these.
      error_alone: error of the logits with these alone.
    """

    group: str
    sites: int
    wins_back: float | None
    loses: float | None
    error_without: float | None
    error_alone: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What all groups cost.

    Attributes:
      full: score in full precision.
      quantized: score with every quantizer on.
      error: of the logits with every quantizer on; None if it was not measured.
      costs: the worst group first: by what leaving it out wins back, then by what it loses alone, then by error.
    """

    full: float
    quantized: float
    error: float | None
    costs: tuple[Cost, ...]

    @property
    def culprit(self) -> str:
        """One or two sentences that name the group whose quantizers cost most."""
        worst, total = self.costs[0], self.full - self.quantized
        facts = [f"Full precision {self.full:.4f}, everything quantized {self.quantized:.4f}."]
        if worst.wins_back is not None and worst.wins_back > 0:
            part = f" ({worst.wins_back / total:.0%} of what is lost)" if total >= worst.wins_back else ""
            facts.append(
                f"The culprit is {worst.group} ({worst.sites} sites): without it {worst.wins_back:.4f}{part} is won back."
            )
        elif worst.wins_back is None and worst.loses is not None and worst.loses > 0:
            facts.append(f"The culprit is {worst.group} ({worst.sites} sites): alone it loses {worst.loses:.4f}.")
        else:
            facts.append("No group changes the score for the worse.")
        if self.error is not None:
            # A score moves by whole examples; the logits show what is below that.
            by_error = min(self.costs, key=_remaining_error)
            if by_error.error_without is not None:
                change = f"from {self.error:.4f} to {by_error.error_without:.4f} without it"
            else:
                change = f"to {by_error.error_alone:.4f} by it alone, to {self.error:.4f} by everything"
            facts.append(f"By the error of the logits it is {by_error.group}: {change}.")
        return " ".join(facts)

    def table(self) -> Table:
        """Returns the groups, the worst first."""
        columns = ["group", "sites", "all but it", "wins back", "only it", "loses", "error without", "error alone"]
        rows: list[list[Any]] = [
            [FULL, None, self.full, None, None, None, None, None],
            [ALL, None, self.quantized, None, None, None, self.error, None],
        ]
        for cost in self.costs:
            without = None if cost.wins_back is None else self.quantized + cost.wins_back
            only = None if cost.loses is None else self.full - cost.loses
            rows.append(
                [
                    cost.group,
                    cost.sites,
                    without,
                    cost.wins_back,
                    only,
                    cost.loses,
                    cost.error_without,
                    cost.error_alone,
                ]
            )
        return Table(columns, rows, dict.fromkeys(columns[2:], ".4f"))


def _remaining_error(cost: Cost) -> float:
    """Small for a group that explains much of the error."""
    return cost.error_without if cost.error_without is not None else -(cost.error_alone or 0.0)


def summary(scores: Mapping[str, Mapping[str, float]], groups: Groups) -> Summary:
    """Compares what `measure` returned: `score`, and `error` of the logits if `evaluate` gives one."""
    full, quantized = scores[FULL]["score"], scores[ALL]["score"]

    def cost(group: str, members: Sequence[str]) -> Cost:
        without, alone = (scores.get(TABLES[table].format(group), {}) for table in ("leave_out", "only"))
        return Cost(
            group,
            len(members),
            without["score"] - quantized if without else None,
            full - alone["score"] if alone else None,
            without.get("error"),
            alone.get("error"),
        )

    def badness(cost: Cost) -> tuple[float, float, float]:
        return cost.wins_back or 0.0, cost.loses or 0.0, -_remaining_error(cost)

    costs = sorted((cost(group, members) for group, members in groups.items()), key=badness, reverse=True)
    return Summary(full, quantized, scores[ALL].get("error"), tuple(costs))


def plot(found: Summary, path: str | os.PathLike[str], count: int = 30) -> None:
    """Draws what the worst groups win back and lose, as horizontal bars.

    Args:
      found: from `summary`.
      path: of the PNG.
      count: how many groups at most.
    """
    costs = found.costs[:count][::-1]
    figure, ((axes,),) = new_figure(8, 1.6 + 0.3 * len(costs))
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    wins, losses = ([getattr(cost, field) for cost in costs] for field in ("wins_back", "loses"))
    for title, values, color, offset in (
        ("won back when it is left out", wins, ACCENT, 0.2),
        ("lost when it is quantized alone", losses, AMBER, -0.2),
    ):
        bars = [(i + offset, value) for i, value in enumerate(values) if value is not None]
        if bars:
            axes.barh(*zip(*bars, strict=True), height=0.36, color=color, label=title)
    axes.set_yticks(range(len(costs)), [cost.group for cost in costs], fontsize=8)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(f"score (full precision {found.full:.4f}, everything quantized {found.quantized:.4f})", color=INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    save_figure(figure, path)
