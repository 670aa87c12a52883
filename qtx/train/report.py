"""What a run directory needs to explain itself: its config and its tables (plots: `qtx.train.plots`)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import numbers
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import rich.console
import rich.table
import rich.text

from qtx.errors import UserError
from qtx.files import write_text

_CONFIG = "config.json"
LOSS = "training_loss"  # a column of `training_curves`
_OF_CURVES = ["phase", "step", "epoch", LOSS]


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> Path:
    """Writes the resolved config to `workdir/config.json`, sorted and indented, atomically, and returns the path.

    References are resolved, NumPy values become numbers and lists, and what JSON has no word for becomes its `str`: a
    run is never refused because of its record. Tuples come back as lists.
    """
    path = Path(workdir) / _CONFIG
    write_text(path, _config_text(config))
    return path


def _config_text(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, indent=2, default=_jsonable) + "\n"


def check_config(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    defaults: ml_collections.ConfigDict | None = None,
) -> None:
    """Raises a `UserError` that names a difference if a run directory holds the config of another run.

    Args:
      config: of this run.
      workdir: a directory with a `config.json`.
      defaults: what fields are worth that the stored config does not have, because it is older than they are.
    """
    found = first_difference(load_config(workdir).to_dict(), config_record(config), defaults)
    if found is not None:
        name, old, new = found
        raise UserError(f"{Path(workdir)} holds a run with {name}={old!r}, not {new!r}; use another workdir")


def config_record(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a config as `save_config` writes it: nested dicts of what JSON can say."""
    return json.loads(_config_text(config))


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: ml_collections.ConfigDict | None = None
) -> tuple[str, Any, Any] | None:
    """Returns (dotted name, old value, new value) of the first field that differs between two records, or None.

    Fields that the old record lacks have their value in `defaults`: what was done before there was a field.
    """
    old, new = _flat(old), _flat(new)
    if defaults is not None:
        old = {name: value for name, value in _flat(config_record(defaults)).items() if name in new} | old
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def load_config(workdir: str | os.PathLike[str]) -> ml_collections.ConfigDict:
    """Reads what `save_config` wrote.

    Raises:
      UserError: there is no config in the directory, or it is not a JSON object.
    """
    path = Path(workdir) / _CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {_CONFIG} in {Path(workdir)}: name the directory of a run") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or train again in another workdir") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}, not an object of fields: name the directory of a run")
    return ml_collections.ConfigDict(fields)


@dataclasses.dataclass(frozen=True)
class Table:
    """Results as a table, to look at (`print`), to paste (`markdown`) and to compute with (`csv`).

    Attributes:
      columns: headers.
      rows: one value for each column: a string, a number, or None for an empty cell.
      formats: by column, how its numbers are shown (`".3f"`, `",d"`, `".1%"`); strings are shown as they are, and
        numbers without a format with up to six digits. `csv` keeps full precision.
      title: shown by `print`.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    title: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {list(row)} has {len(row)} values for {len(self.columns)} columns")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"formats for columns that do not exist: {sorted(unknown)}")

    def markdown(self) -> str:
        """Returns a GitHub table with aligned columns, numbers to the right, ending in a newline."""
        grid = [[str(c) for c in self.columns], *([*map(self._show, self.columns, row)] for row in self.rows)]
        grid = [[cell.replace("|", "\\|") for cell in row] for row in grid]
        widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
        numeric = self._numeric()
        rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]
        padded = [
            [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
            for row in grid
        ]
        return "".join("| " + " | ".join(row) + " |\n" for row in [padded[0], rule, *padded[1:]])

    def csv(self) -> str:
        """Returns comma-separated values with a header, unrounded, None as an empty field."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def print(self, console: rich.console.Console | None = None) -> None:
        """Prints the table to standard output, or to `console`."""
        table = rich.table.Table(title=self.title or None)
        for column, right in zip(self.columns, self._numeric(), strict=True):
            table.add_column(rich.text.Text(str(column)), justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*(rich.text.Text(self._show(*pair)) for pair in zip(self.columns, row, strict=True)))
        # Logs have no width of their own; 80 columns would break every cell.
        console = console or rich.console.Console(width=None if sys.stdout.isatty() else 160)
        console.print(table)

    def save(self, directory: str | os.PathLike[str], name: str) -> None:
        """Writes `directory/name.md` and `directory/name.csv`, each atomically."""
        write_text(Path(directory) / f"{name}.md", self.markdown())
        write_text(Path(directory) / f"{name}.csv", self.csv())

    def _show(self, column: str, value: Any) -> str:
        if value is None:
            return ""
        if not _is_number(value):
            return str(value)
        return format(value, self.formats.get(column, "d" if isinstance(value, numbers.Integral) else ".6g"))

    def _numeric(self) -> list[bool]:
        filled = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(values) and all(map(_is_number, values)) for values in filled]


def training_curves(lines: Iterable[Mapping[str, Any]], phases: Sequence[str], batches_per_epoch: int) -> Table:
    """Returns training loss, training accuracy and evaluations of a run, one row for each step at which something was measured.

    Args:
      lines: of `metrics.jsonl`, see `qtx.train.logging.read_metrics`.
      phases: names of the phases, in order.
      batches_per_epoch: steps in an epoch.

    Returns:
      Columns `phase`, `step` and `epoch` (both since the beginning of the run, as is `best_epoch` of a report),
      `training_loss`, every metric of an evaluation, and `training_accuracy` where classes are trained (with dropout, the mean
      of the steps since the line before).
    """
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        for phase in phases:
            prefix = f"{phase}/eval/"
            values = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
            values.pop("epoch", None)  # within the phase; here it is that of the run
            if f"{phase}/loss" in line:
                values[LOSS] = line[f"{phase}/loss"]
            if f"{phase}/accuracy" in line:
                values["training_accuracy"] = line[f"{phase}/accuracy"]
            if values:
                found.setdefault((phase, line["step"]), {}).update(values)
    names = [LOSS, *dict.fromkeys(name for values in found.values() for name in values if name != LOSS)]
    rows = [[phase, step, step / batches_per_epoch, *map(values.get, names)] for (phase, step), values in found.items()]
    return Table([*_OF_CURVES[:-1], *names], rows)


def load_curves(path: str | os.PathLike[str]) -> Table:
    """Reads what `training_curves(...).csv()` wrote.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            columns, *lines = csv.reader(file)
        if columns[: len(_OF_CURVES)] != _OF_CURVES:
            raise ValueError(f"its columns are {', '.join(columns) or 'none'}")
        rows = [[phase, int(step), *(float(x) if x else None for x in values)] for phase, step, *values in lines]
        return Table(columns, rows)
    except FileNotFoundError:
        raise UserError(f"there is no {path}: the run is not done, or lies elsewhere") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} holds no curves ({error}): train again in another workdir") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
