"""The tables of a sweep: medians over seeds, with everything that is behind them and everything that is missing."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qtx.experiments.plan import Trial
from qtx.experiments.study import Attempt
from qtx.files import write_text
from qtx.train.report import Table

_SHOWN = 12  # missing cells that are printed; the file has all


@dataclasses.dataclass(frozen=True)
class Cell:
    """The scores of a row at a point of the grid.

    Attributes:
      labels: of the point, by axis.
      row: name of the row, with the method if its entry compares several.
      scores: by seed.
      planned: how many seeds there shall be.
      published: what a paper reports.
      mebibytes: of the weights; None if the entry does not say.
      point: on the grid, as in the paths of its runs.
      without_embeddings: MiB of the weights but for the tables of embeddings; None if the entry does not say, or did not when
        the trials were run.
      full_precision: whether it is the model in full precision that others at its point are held against.
    """

    labels: Mapping[str, str]
    row: str
    scores: Mapping[int, float]
    planned: int
    published: float | None = None
    mebibytes: float | None = None
    point: str = ""
    without_embeddings: float | None = None
    full_precision: bool = False

    @property
    def median(self) -> float | None:
        """The median over seeds; None without any."""
        return statistics.median(self.scores.values()) if self.scores else None

    def __str__(self) -> str:
        if not self.scores:
            return ""
        count = f"n={len(self.scores)}" + (f" of {self.planned}" if len(self.scores) < self.planned else "")
        low, high = min(self.scores.values()), max(self.scores.values())
        spread = f"{low:.4f} to {high:.4f}, " if len(self.scores) > 1 else ""
        return f"{self.median:.4f} ({spread}{count})"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a sweep has found so far.

    Attributes:
      table: rows against the values of one axis; medians, smallest and largest score, number of seeds.
      cells: one line for each cell of it, with every seed's score and published numbers.
      found: the cells themselves.
      orderings: one line for each claim of `sweep.orderings` at each point, and whether it holds; None without any.
      search: one line for each sample, best first; None without a search.
      missing: for each cell that is not complete: which and why, and the flags of the command that fills it.
      command: that fills all of them, without such flags.
    """

    table: Table
    cells: Table
    found: tuple[Cell, ...]
    orderings: Table | None
    search: Table | None
    missing: tuple[tuple[str, str], ...]
    command: str

    def print(self) -> None:
        """Prints the tables, the cells, and the first of those that are missing."""
        if self.table.rows:
            self.table.print()
        for table in (self.orderings, self.search):
            if table is not None:
                table.print()
        if self.cells.rows:
            self.cells.print()
        if self.missing:
            print(f"missing, and run by: {self.command}")
        for what, flags in self.missing[:_SHOWN]:
            print(f"  {what}  {flags}".rstrip())
        if len(self.missing) > _SHOWN:
            print(f"... and {len(self.missing) - _SHOWN} more in table.md")

    def save(self, workdir: Path) -> None:
        """Writes `table.md` (with what is missing), `table.csv`, `cells.md`, `cells.csv`, and `search.*` after a search."""
        self.table.save(workdir, "table")
        self.cells.save(workdir, "cells")
        text = f"{self.table.title}\n\n{self.table.markdown()}" if self.table.rows else ""
        if self.orderings is not None:
            text += f"\n{self.orderings.title}\n\n{self.orderings.markdown()}"
        if self.search is not None:
            self.search.save(workdir, "search")
            text += f"\n{self.search.title}\n\n{self.search.markdown()}"
        if self.missing:
            commands = [(what, f"{self.command} {flags}".rstrip()) for what, flags in self.missing]
            text += "\nMissing:\n\n" + "".join(f"- {what}: `{command}`\n" for what, command in commands)
        write_text(workdir / "table.md", text)


def make_report(section: ConfigDict, trials: Sequence[Trial], attempts: Mapping[str, Attempt], command: str) -> Report:
    """Returns the report of a sweep.

    Args:
      section: `sweep` of the configuration.
      trials: all of them.
      attempts: of each, by name.
      command: that runs the sweep; `--only` is put behind it.
    """
    fixed = [trial for trial in trials if not trial.search]
    searched = [trial for trial in trials if trial.search]
    cells = _cells(fixed, attempts, section)
    search = _search(searched, attempts, section) if searched else None
    missing = tuple(_missing(trials, attempts))
    orderings = _orderings(cells, section) if section.orderings else None
    return Report(_table(cells, section), _list(cells, section), tuple(cells), orderings, search, missing, command)


def _orderings(cells: Sequence[Cell], section: ConfigDict) -> Table:
    """Looks at every claim `(row, relation, row)` about medians."""
    medians = {(cell.point, cell.row): cell.median for cell in cells}
    rows = []
    for point in dict.fromkeys(cell.point for cell in cells):
        for first, relation, second in section.orderings:
            a, b = medians.get((point, first)), medians.get((point, second))
            holds = ""
            if a is not None and b is not None:
                found = {">": a > b, "~": abs(a - b) <= section.near, ">=": a >= b - section.near}
                holds = "yes" if found[relation] else "no"
            rows.append([point, f"{first} {relation} {second}", a, b, holds])
    formats = {"first": ".4f", "second": ".4f"}
    title = f"orderings of the medians (~: within {section.near} of each other; >=: not more than that below)"
    return Table(["point", "claim", "first", "second", "holds"], rows, formats, title)


def _methods(trials: Iterable[Trial], attempts: Mapping[str, Attempt]) -> list[str]:
    found = [method for t in trials for outcome in attempts[t.name].results.values() for method in outcome]
    return list(dict.fromkeys(found)) or [""]


def _cells(trials: Sequence[Trial], attempts: Mapping[str, Attempt], section: ConfigDict) -> list[Cell]:
    by_group: dict[str, list[Trial]] = {}
    by_row: dict[str, list[Trial]] = {}
    for trial in trials:
        by_group.setdefault(trial.group, []).append(trial)
        by_row.setdefault(trial.row.name, []).append(trial)
    methods = {row: _methods(members, attempts) for row, members in by_row.items()}
    references = _references([members[0] for members in by_group.values()], section)
    cells = []
    for members in by_group.values():
        first = members[0]
        results = {seed: out for trial in members for seed, out in attempts[trial.name].results.items()}
        published = next((first.row.published[x] for x in first.labels.values() if x in first.row.published), None)
        for method in methods[first.row.name]:
            found = {seed: out[method] for seed, out in sorted(results.items()) if method in out}
            scores = {seed: values[section.metric] for seed, values in found.items() if section.metric in values}
            name = ": ".join(filter(None, (first.row.name, method)))
            whole, rest = (_mebibytes(found, bytes_) for bytes_ in ("weight_bytes", "weight_bytes_without_embeddings"))
            reference = first.group in references
            labels, planned = first.labels, len(members)
            cells.append(Cell(labels, name, scores, planned, published, whole, first.point, rest, reference))
    return cells


def _mebibytes(found: Mapping[int, Mapping[str, float]], name: str) -> float | None:
    """Returns the median over the seeds that have such a size; None without any."""
    sizes = [values[name] / 2**20 for values in found.values() if name in values]
    return statistics.median(sizes) if sizes else None


def _references(trials: Sequence[Trial], section: ConfigDict) -> set[str]:
    """Returns, for each point, the group of the trials that the others there are held against, if it is clear which one is.

    Of those that quantize nothing it is one that claims of the sweep are about, if they are about any. One that others of
    them go on from is only the beginning of a model in full precision; and one that is the start of quantized rows alone
    counts only if there is no other, such as a first epoch beside the whole training.

    Args:
      trials: one of each group.
      section: `sweep` of the configuration.
    """
    claimed = {name for first, _, second in section.orderings for name in (first, second)}
    starts = {trial.start for trial in trials}
    by_point: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.in_full_precision:
            by_point.setdefault(trial.point, []).append(trial)
    chosen = set()
    for found in by_point.values():
        found = [trial for trial in found if trial.row.name in claimed] or found
        begun = {trial.start for trial in found}
        found = [trial for trial in found if trial.group not in begun] or found
        found = [trial for trial in found if trial.group not in starts] or found
        if len(found) == 1:
            chosen.add(found[0].group)
    return chosen


def _lines(cells: Sequence[Cell], section: ConfigDict) -> dict[tuple, dict[str, Cell]]:
    """Returns the cells by line of the table (the labels of all axes but one, and the row) and column."""
    lines: dict[tuple, dict[str, Cell]] = {}
    for cell in cells:
        rest = tuple(label for axis, label in cell.labels.items() if axis != section.columns)
        lines.setdefault((*rest, cell.row), {})[cell.labels.get(section.columns, section.metric)] = cell
    return lines


def _mean(line: Mapping[str, Cell], columns: Sequence[str]) -> float | None:
    medians = [line[column].median for column in columns if column in line]
    if len(medians) < len(columns) or None in medians:
        return None
    return statistics.fmean(median for median in medians if median is not None)


def _table(cells: Sequence[Cell], section: ConfigDict) -> Table:
    lines = _lines(cells, section)
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    axes = [axis for axis in (cells[0].labels if cells else ()) if axis != section.columns]
    means = [section.mean] if section.columns and len(columns) > 1 else []
    published = _published_means(section) if means else {}
    rows = []
    for key, line in lines.items():
        values = [str(line[column]) if column in line else "" for column in columns]
        rows.append([*key, *values, *([_mean(line, columns)] if means else [])])
        if published:
            rows[-1].append(published.get(key[-1]))
    means += [_published(section, section.mean)] if published else []
    return Table(
        [*axes, "row", *columns, *means],
        rows,
        formats={name: ".4f" for name in means},
        title=f"{section.metric}: median over seeds (lowest to highest, number of seeds)",
    )


def _published(section: ConfigDict, mean: str = "") -> str:
    """Returns the head of a column of published scores."""
    known = section.get("comparable", True)  # configurations from before there was the field
    return " ".join(filter(None, ("published", mean, "" if known else "(not comparable)")))


def _published_means(section: ConfigDict) -> dict[str, float]:
    found = {row["name"]: row.get("published", {}).get(section.mean) for row in section.rows}
    return {name: mean for name, mean in found.items() if mean is not None}


def _list(cells: Sequence[Cell], section: ConfigDict) -> Table:
    axes = list(cells[0].labels) if cells else []
    rows: list[list[Any]] = []

    def add(
        labels: Sequence[str], row: str, median: float | None, scores: Mapping[int, float], published, whole, rest
    ) -> None:
        spread = [min(scores.values()), max(scores.values())] if scores else [None, None]
        seeds = ", ".join(f"{seed}: {score:.4f}" for seed, score in scores.items())
        comparable = section.get("comparable", True)
        difference = median - published if comparable and None not in (median, published) else None
        rows.append([*labels, row, median, *spread, len(scores), seeds, published, difference, whole, rest])

    for cell in cells:
        labels = [cell.labels[axis] for axis in axes]
        add(labels, cell.row, cell.median, cell.scores, cell.published, cell.mebibytes, cell.without_embeddings)
    if section.columns:
        lines = _lines(cells, section)
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        published = _published_means(section)
        for line in lines.values() if len(columns) > 1 else ():
            some = next(iter(line.values()))
            labels = [section.mean if axis == section.columns else some.labels[axis] for axis in axes]
            add(labels, some.row, _mean(line, columns), {}, published.get(some.row), None, None)
    scores, sizes = ["median", "min", "max"], ["MiB of weights", "without embeddings"]
    known = [_published(section), "difference", *sizes]
    columns = [*axes, "row", *scores, "n", "seeds", *known]
    formats = dict.fromkeys([*scores, *known], ".4f") | dict(zip(sizes, (".2f", ".3f"), strict=True))
    # What no row knows has no column.
    empty = [i for i, name in enumerate(columns) if name in known and all(row[i] is None for row in rows)]
    kept = [i for i in range(len(columns)) if i not in empty]
    names = [columns[i] for i in kept]
    shown = {name: text for name, text in formats.items() if name in names}
    return Table(names, [[row[i] for i in kept] for row in rows], shown, title=f"{section.metric}, cell by cell")


def _search(trials: Sequence[Trial], attempts: Mapping[str, Attempt], section: ConfigDict) -> Table:
    axes, fields = list(trials[0].labels), [bounds[0] for bounds in section.ranges]
    by_search: dict[str, list[Trial]] = {}
    for trial in trials:
        by_search.setdefault(trial.search, []).append(trial)
    rows = []
    for members in by_search.values():
        found = []
        for trial in members:
            attempt = attempts[trial.name]
            scores = {seed: next(iter(out.values()))[section.metric] for seed, out in attempt.results.items()}
            cell = Cell(trial.labels, trial.row.name, scores, len(trial.seeds))
            drawn = [attempt.drawn.get(field) for field in fields]
            if attempt.state != "new" and attempt.state != "waiting":
                found.append((cell.median, [*trial.labels.values(), trial.row.name, trial.group, *drawn, str(cell)]))
        scored = [(median, number) for number, (median, _) in enumerate(found) if median is not None]
        rows += [found[number][1] for _, number in sorted(scored, reverse=section.maximize)]
        rows += [line for median, line in found if median is None]
    return Table(
        [*axes, "row", "sample", *fields, section.metric],
        rows,
        title=f"{section.sampler} search, best first; {section.metric}: median over seeds (lowest to highest, number of seeds)",
    )


def _missing(trials: Sequence[Trial], attempts: Mapping[str, Attempt]) -> Iterable[tuple[str, str]]:
    """Says for each cell, or search, what is not there, why, and with which flags it is run alone."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.search or trial.group, []).append(trial)
    for members in groups.values():
        left = [trial for trial in members if attempts[trial.name].state != "done"]
        if not left:
            continue
        reasons: dict[str, list[str]] = {}
        for trial in left:
            reasons.setdefault(_reason(trial, attempts), []).append(trial.name.rpartition("/")[-1])
        where = ", ".join(filter(None, (*members[0].labels.values(), members[0].row.name)))
        why = "; ".join(f"{', '.join(names)} {reason}" for reason, names in reasons.items())
        flags = []
        if pattern := members[0].name.rpartition("/")[0]:
            flags.append(f"--only={shlex.quote(f'{pattern}/*')}")
        if any(attempts[trial.name].state == "failed" for trial in left):
            flags.append("--retry_failed")
        yield f"{where or 'all'}: {why}", " ".join(flags)


def _reason(trial: Trial, attempts: Mapping[str, Attempt]) -> str:
    attempt = attempts[trial.name]
    if attempt.state == "failed":
        return f"failed ({attempt.error})"
    if attempt.state == "running":
        return f"running on {attempt.worker[0]}"
    broken = [name for name in trial.needs() if attempts[name].state == "failed"]
    return f"not run, because {broken[0]} failed" if broken else "not run"
