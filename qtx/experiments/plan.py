"""What a sweep consists of: from the section `sweep` of a configuration to a list of trials, before anything runs.

A sweep has four parts, each of which may be missing:

- **axes** (`grid`): a field and its values, `("task", ("rte", "mrpc"))`, or labels with the fields that each of them sets,
  `("task", {"rte": {"task": "rte", ...}, ...})`. The points of the grid are all combinations; the last axis turns fastest.
- **rows**: what is done at every point: an entry, changes of fields, and the row whose trained model it starts from. A
  row that others start from is run once for each point and seed, and they all share its model.
- **seeds**.
- **ranges** of fields, for a random or TPE search instead of fixed values: every row that no other starts from is
  run at `samples` points, each with all seeds.

Every run has a directory of its own: `POINT/ROW/seed_1000`, or `POINT/ROW/sample_3/seed_1000`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qtx.analysis.memory import Item, totals, weight_memory
from qtx.errors import UserError, near_misses
from qtx.experiments.compare import baseline, compare
from qtx.experiments.config import changed, field_of
from qtx.experiments.experiment import family_and_sizes
from qtx.experiments.from_config import policy_from
from qtx.experiments.run import evaluate, quantize, train_and_evaluate
from qtx.experiments.setup import sites_of
from qtx.models.checkpoints import abstract_params

Outcome = dict[str, dict[str, float]]
"""Metrics by method; an entry that has one result calls it `''`."""


def _train(config: ConfigDict, workdir: Path) -> Outcome:
    result = train_and_evaluate(config, workdir)
    experiment = result["experiment"]
    last = config.phases[config.recipe[-1]]
    policy = policy_from(config.quant, experiment.pretrained.config.num_layers) if last.quantized else None
    weights = weight_memory(policy, experiment.sites(), result["params"])
    return {"": result["metrics"][config.recipe[-1]] | _sizes(totals(weights)["stored"], weights)}


def _quantize(config: ConfigDict, workdir: Path) -> Outcome:
    family, sizes = family_and_sizes(config.model)
    policy = policy_from(config.quant, sizes.num_layers)
    weights = weight_memory(policy, sites_of(config, family, sizes), abstract_params(family, sizes))
    result = quantize(config, workdir, compare=False)
    return {"": result["quantized"] | _sizes(result["weight_bytes"], weights)}


def _sizes(whole: float, weights: Iterable[Item]) -> dict[str, float]:
    """Returns bytes of all weights, and of what is left without the tables of embeddings (and, where it is tied to one of
    them, without the last layer): studies that leave tables in full precision count only the rest."""
    tables = totals(item for item in weights if _is_table(item.name))["stored"]
    return {"weight_bytes": whole, "weight_bytes_without_embeddings": whole - tables}


def _is_table(name: str) -> bool:
    *path, last = name.split("/")
    return last == "table" and "embeddings" in path


def _evaluate(config: ConfigDict, workdir: Path) -> Outcome:
    return {"": evaluate(config, workdir)}


def _compare(config: ConfigDict, workdir: Path) -> Outcome:
    return {row.method: {"score": row.score} for row in compare(config, workdir)}


def _baseline(config: ConfigDict, workdir: Path) -> Outcome:
    return {"": baseline(config, workdir)}


ENTRIES: dict[str, Callable[[ConfigDict, Path], Outcome]] = {
    "train": _train,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "compare": _compare,
    "baseline": _baseline,
}
SAMPLERS = ("grid", "random", "tpe")
RELATIONS = (">", "~", ">=")
ANY = "any"
"""Label of an axis for a row that ignores it."""
SEED = "seed"
"""What a row ignores that is run with the first seed alone."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What is done at every point of the grid, with every seed.

    Attributes:
      name: of the row in the table.
      entry: key of `ENTRIES`.
      start: name of the row whose model (`model/` in its run directory, same point and seed) is `model.name` here.
      start_at: by label, the row that it starts from there instead.
      uses: further fields with the rows whose runs they name; behind a slash what of the run: `{"bittransgnn.teacher":
        "dynamic/quantized"}`; without one its `model`. Without a row (`"/graphs"`) it is a place in the sweep's own directory,
        which all runs share, unless the field has a value.
      ignores: axes that make no difference to it: it is run once for all their values, and rows at each of them share it.
        `'seed'`: it is run with the first seed, for all of them.
      changes: values by dotted field.
      at: labels of the points that it is run at; empty: at all.
      changes_at: further changes, by label.
      published: what a paper reports, by label, and under the name of the mean column.
    """

    name: str
    entry: str
    start: str = ""
    start_at: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: tuple[str, ...] = ()
    changes_at: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the rows whose models it needs."""
        used = (given.partition("/")[0] for given in self.uses.values())
        return tuple(filter(None, (self.start, *self.start_at.values(), *used)))

    def at_point(self, labels: Iterable[str]) -> Row:
        """Returns the row as it is at a point: with one row that it starts from."""
        start = next((self.start_at[label] for label in labels if label in self.start_at), self.start)
        return dataclasses.replace(self, start=start, start_at={})


@dataclasses.dataclass(frozen=True)
class Choice:
    """One label of an axis, the name it has in paths, and the fields that it sets."""

    label: str
    path: str
    changes: Mapping[str, Any]


Point = tuple[tuple[str, Choice], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One piece of work: a row at a point, with one seed; or a sample of a search, with all seeds.

    Attributes:
      name: unique; what `only` patterns match.
      group: directory of its runs, relative to that of the sweep.
      labels: of its point, by axis.
      point: its point, as the paths of its runs have it; empty without axes.
      row: what it does.
      seeds: one run each.
      config: of its runs, but for the seed, the model that it starts from, and what a sampler draws.
      sources: groups of the rows whose models it needs, by name.
      shared: the seed of those that all seeds share, by name.
      ranges: fields to be drawn; empty if nothing is.
      search: which samples belong together; empty if nothing is drawn.
    """

    name: str
    group: str
    labels: Mapping[str, str]
    point: str
    row: Row
    seeds: tuple[int, ...]
    config: ConfigDict
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ranges: tuple = ()
    search: str = ""
    shared: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def start(self) -> str:
        """Group of the row whose model it starts from, or empty."""
        return self.sources.get(self.row.start, "")

    @property
    def start_trial(self) -> str:
        """Name of the trial whose model its first run starts from, or empty."""
        return str(self._run(self.row.start, self.seeds[0])) if self.row.start else ""

    @property
    def in_full_precision(self) -> bool:
        """Whether it trains a model and quantizes nothing in any phase."""
        phases = self.config.phases
        quantized = any(phases[name].quantized for name in self.config.recipe if name in phases)
        return self.row.entry == "train" and not quantized

    def needs(self) -> tuple[str, ...]:
        """Names of the trials that have to be done before."""
        return tuple(str(self._run(row, seed)) for row in self.sources for seed in self.seeds)

    def _run(self, row: str, seed: int) -> Path:
        return Path(self.sources[row]) / f"seed_{self.shared.get(row, seed)}"

    def run_config(self, workdir: Path, seed: int, drawn: Mapping[str, Any]) -> ConfigDict:
        """Returns the configuration of one run."""

        found: dict[str, Any] = {}
        if self.row.start:
            model = str(workdir.resolve() / self._run(self.row.start, seed) / "model")
            found = {"model.name": model, "model.start": None}  # what it started from itself
        for field, given in self.row.uses.items():
            row, _, part = given.partition("/")
            if not row and field_of(self.config, field):
                continue  # a place of one's own
            found[field] = str(workdir.resolve() / (self._run(row, seed) if row else "") / (part or "model"))
        return changed(self.config, {"seed": seed, **found, **drawn}, self.name)


def plan(config: ConfigDict) -> list[Trial]:
    """Returns all trials of a sweep in the order in which they are to be run: by point, by seed, by row.

    Raises:
      UserError: on a section that says nothing or something impossible, and on fields that do not exist.
    """
    section = config.sweep
    base = copy.deepcopy(config)
    with base.unlocked():
        del base["sweep"]
    axes, rows = _axes(section), _rows(section)
    if not section.seeds:
        raise UserError("sweep.seeds is empty: give at least one seed")
    if section.sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {section.sampler!r}{near_misses(section.sampler, SAMPLERS)}")
    searching = section.sampler != "grid"
    if searching != bool(section.ranges):
        raise UserError(
            f"sampler {section.sampler!r} {'needs' if searching else 'draws nothing from'} sweep.ranges: give ranges with "
            "sampler 'random' or 'tpe', and none with 'grid'"
        )
    if not axes and len(rows) < 2 and len(section.seeds) < 2 and not searching:
        raise UserError("nothing to sweep over: give sweep.grid, sweep.rows, several sweep.seeds, or sweep.ranges")
    if section.columns and section.columns not in [name for name, _ in axes]:
        raise UserError(f"sweep.columns {section.columns!r} is no axis{near_misses(section.columns, dict(axes))}")
    for bounds in section.ranges:
        _check_range(base, bounds)

    for claim in section.orderings:
        if len(claim) != 3 or claim[1] not in RELATIONS:
            raise UserError(
                f"sweep.orderings: {claim!r} is not (row, relation, row) with one of {', '.join(RELATIONS)}"
            )
        for name in (claim[0], claim[2]):
            if name not in {row.name for row in rows}:
                raise UserError(
                    f"sweep.orderings: there is no row {name!r}{near_misses(name, [row.name for row in rows])}"
                )
    sources = {name for row in rows for name in row.sources}
    known_labels = {choice.label for _, choices in axes for choice in choices}
    for row in rows:
        for label in {*row.at, *row.changes_at, *row.start_at}:
            if label not in known_labels:
                raise UserError(f"row {row.name!r} names the label {label!r}{near_misses(label, known_labels)}")
    for row in rows:
        for name in row.ignores:
            known_axes = (SEED, *dict(axes))
            if name not in known_axes:
                raise UserError(f"row {row.name!r} ignores {name!r}, which is no axis{near_misses(name, known_axes)}")
    shared = {row.name: section.seeds[0] for row in rows if SEED in row.ignores}
    trials: list[Trial] = []
    known: set[str] = set()
    for choices in itertools.product(*(choices for _, choices in axes)):
        whole: Point = tuple((name, choice) for (name, _), choice in zip(axes, choices, strict=True))
        present = [row.at_point(choice.label for _, choice in whole) for row in rows if _is_at(row, whole)]
        points = {row.name: tuple(each for each in whole if each[0] not in row.ignores) for row in present}
        made = {row.name: _at_point(base, row, points[row.name], row.name in sources) for row in present}
        for row in present:
            for source in row.sources:
                if source not in made:
                    raise UserError(f"row {row.name!r} starts from {source!r}, which is not run at {_path(whole)!r}")
        fixed = [row for row in present if not searching or row.name in sources]
        searched = [row for row in present if row not in fixed]
        for seed in section.seeds:
            for row in fixed:
                point = points[row.name]
                group = _group(point, row.name)
                needed = {source: _group(points[source], source) for source in row.sources}
                seeds = (shared.get(row.name, seed),)
                name = "/".join(filter(None, (group, f"seed_{seeds[0]}")))
                if row.ignores and name in known:
                    continue
                known.add(name)
                labels = _labels(whole) | {axis: ANY for axis in row.ignores if axis != SEED}
                trials.append(
                    Trial(name, group, labels, _path(point), row, seeds, made[row.name], needed, shared=shared)
                )
        for row in searched:
            if set(row.ignores) - {SEED}:
                raise UserError(
                    f"row {row.name!r} ignores an axis, but is searched; leave sweep.ranges or `ignores` out"
                )
            point = whole
            search = _group(point, row.name)
            needed = {source: _group(points[source], source) for source in row.sources}
            for sample in range(section.samples):
                name = "/".join(filter(None, (search, f"sample_{sample}")))
                trials.append(
                    Trial(
                        name,
                        name,
                        _labels(point),
                        _path(point),
                        row,
                        (shared[row.name],) if row.name in shared else tuple(section.seeds),
                        made[row.name],
                        needed,
                        tuple(section.ranges),
                        search or "samples",
                        shared,
                    )
                )
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two trials would share the directory {double!r}: give seeds, rows and labels names of their own"
        )
    return trials


def selected(trials: Sequence[Trial], patterns: Sequence[str]) -> list[Trial]:
    """Returns the trials that match one of some patterns (`rte/*/seed_1000`), and those they start from; all without any.

    Raises:
      UserError: on a pattern that matches nothing.
    """
    if not patterns:
        return list(trials)
    names = {trial.name: trial for trial in trials}
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"no trial is called {pattern!r}{near_misses(pattern, names)}")
        wanted |= found
    while missing := {need for name in wanted for need in names[name].needs()} - wanted:
        wanted |= missing
    return [trial for trial in trials if trial.name in wanted]


def parse_axis(text: str) -> tuple[str, tuple]:
    """Reads an axis of the command line: `'data.seed=0,1'` is `('data.seed', (0, 1))`; raises a `UserError`."""
    field, sign, values = text.partition("=")
    if not sign or not field or not values:
        raise UserError(f"--grid: {text!r} is not of the form FIELD=VALUE,VALUE")
    return field.strip(), tuple(_value(value) for value in values.split(","))


def parse_range(text: str) -> tuple:
    """Reads a range of the command line: `'f=1e-5:1e-3:log'` is `('f', 1e-5, 1e-3, 'log')`; raises a `UserError`."""
    field, sign, bounds = text.partition("=")
    if not sign or not field or not 2 <= len(bounds.split(":")) <= 3:
        raise UserError(f"--range: {text!r} is not of the form FIELD=LOW:HIGH or FIELD=LOW:HIGH:log")
    return field.strip(), *(_value(bound) for bound in bounds.split(":"))


def parse_seeds(values: Iterable[str]) -> tuple[int, ...]:
    """Reads seeds of the command line; raises a `UserError`."""
    try:
        return tuple(int(value) for value in values)
    except ValueError:
        raise UserError(f"--seeds: {','.join(values)!r} is not of the form 1000,1001") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return text.strip()


def _axes(section: ConfigDict) -> list[tuple[str, list[Choice]]]:
    axes = []
    for axis in section.grid:
        if len(axis) != 2 or not isinstance(axis[0], str):
            raise UserError(f"sweep.grid: {axis!r} is not a pair such as ('task', ('rte', 'mrpc'))")
        name, values = axis
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UserError(f"sweep.grid: the values of {name!r} must be a tuple or a mapping, not {values!r}")
        if isinstance(values, Mapping):
            choices = [Choice(str(label), slug(str(label)), changes) for label, changes in values.items()]
        else:
            last = name.rpartition(".")[-1]
            choices = [Choice(str(v), slug(v if isinstance(v, str) else f"{last}={v}"), {name: v}) for v in values]
        if not choices:
            raise UserError(f"sweep.grid: {name!r} has no values; give at least one, or leave the axis out")
        axes.append((name, choices))
    return axes


def _rows(section: ConfigDict) -> list[Row]:
    fields = [field.name for field in dataclasses.fields(Row)]
    rows: list[Row] = []
    for given in section.rows or ({"name": ""},):
        for field in given:
            if field not in fields:
                raise UserError(f"row {given.get('name')!r}: a row has no {field!r}{near_misses(field, fields)}")
        if section.rows and not given.get("name"):
            raise UserError(f"every row of a sweep needs a name: {dict(given)!r} has none")
        rows.append(Row(**{"entry": section.entry, **given}))
        if rows[-1].entry not in ENTRIES:
            raise UserError(
                f"row {rows[-1].name!r}: unknown entry {rows[-1].entry!r}{near_misses(rows[-1].entry, ENTRIES)}"
            )
    names = [row.name for row in rows]
    for number, row in enumerate(rows):
        if row.name in names[:number]:
            raise UserError(f"two rows are called {row.name!r}: every row needs a name of its own")
        for source in row.sources:
            if source not in names[:number]:
                earlier = [other.name for other in rows[:number] if other.entry == "train"]
                raise UserError(
                    f"row {row.name!r} starts from {source!r}, no row before it{near_misses(source, earlier)}"
                )
            if rows[names.index(source)].entry not in ("train", "compare"):
                raise UserError(
                    f"row {row.name!r} starts from {source!r}, which trains no model; give a row that trains"
                )
    return rows


def _check_range(base: ConfigDict, bounds: Sequence[Any]) -> None:
    what = f"sweep.ranges: {tuple(bounds)!r}"
    if not 2 <= len(bounds) <= 4 or not isinstance(bounds[0], str):
        raise UserError(f"{what} is not (field, low, high), (field, low, high, 'log') or (field, choices)")
    if len(bounds) == 2:
        if isinstance(bounds[1], str) or not isinstance(bounds[1], Sequence) or not bounds[1]:
            raise UserError(f"{what}: the choices must be a tuple with at least one value")
        values: Sequence[Any] = bounds[1]
    else:
        values = bounds[1:3]
        if not all(isinstance(value, int | float) for value in values) or values[0] >= values[1]:
            raise UserError(f"{what}: low and high must be numbers, low below high")
        if len(bounds) == 4 and (bounds[3] != "log" or values[0] <= 0):
            raise UserError(f"{what}: a fourth value is 'log', for positive bounds")
    if bounds[0] == "seed":
        raise UserError(f"{what}: the seeds of a sweep are sweep.seeds (--seeds)")
    for value in values:
        changed(base, {bounds[0]: value}, "sweep.ranges")


def _is_at(row: Row, point: Point) -> bool:
    return not row.at or any(choice.label in row.at for _, choice in point)


def _at_point(base: ConfigDict, row: Row, point: Point, is_source: bool) -> ConfigDict:
    config = base
    every = [row.changes, *row.changes_at.values(), *(choice.changes for _, choice in point)]
    if any("seed" in changes for changes in every):
        raise UserError(
            "the seeds of a sweep are sweep.seeds (--seeds): leave the field 'seed' out of its grid and its rows"
        )
    taken = {"model.name": row.start} if row.start else {}
    for field, source in (taken | dict(row.uses)).items():
        if any(field in changes for changes in every[: 1 + len(row.changes_at)]):
            raise UserError(f"row {row.name!r} starts from {source!r}: leave {field!r} out of its changes")
    for name, choice in point:
        config = changed(config, choice.changes, f"sweep.grid {name!r}, {choice.label!r}")
    if row.start:
        config = changed(config, {"model.fresh_head": False}, f"row {row.name!r}")
    config = changed(config, row.changes, f"row {row.name!r}")
    for _, choice in point:
        config = changed(config, row.changes_at.get(choice.label, {}), f"row {row.name!r} at {choice.label!r}")
    return changed(config, {"save_models": True}, row.name) if is_source else config


def slug(text: str) -> str:
    """Returns text as a part of a path: what is not a letter, digit or one of `.=+-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"


def _path(point: Point) -> str:
    return "/".join(choice.path for _, choice in point)


def _group(point: Point, row: str) -> str:
    return "/".join(filter(None, (_path(point), row and slug(row))))


def _labels(point: Point) -> dict[str, str]:
    return {name: choice.label for name, choice in point}
