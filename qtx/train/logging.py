"""What a run says while it runs: scalars for files, and a progress bar for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.text
import tensorboardX

from qtx.files import write_text

_FILE = "metrics.jsonl"


class MetricsLog:
    """Scalars of a run, as `workdir/metrics.jsonl` and as TensorBoard events under `workdir/tensorboard`.

    A context manager. Lines are whole once `write` returns, and a line that a killed run tore is repaired when the log
    is opened again. Of several hosts the first one writes and the others do nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Opens the log for appending, and makes the directory if it is not there."""
        self.path = Path(workdir) / _FILE
        self._writes = jax.process_index() == 0
        self._file: IO[str] | None = None
        self._events: tensorboardX.SummaryWriter | None = None
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair(self.path)
            self._open()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Appends one line: `{"step": step, "<prefix><name>": value, …}`.

        Args:
          step: the train step the values belong to.
          values: Python floats or what converts to them (a `jax.Array` waits for its device). A value that is not
            finite is null in the file, since JSON has no word for it.
          prefix: put before each name, such as `eval/`, which groups them in TensorBoard.

        Raises:
          ValueError: a value would be called `step`, or the log is closed.
        """
        record = {prefix + name: float(value) for name, value in values.items()}
        if "step" in record:
            raise ValueError("a value cannot be called 'step': that is the line's own step")
        if not self._writes:
            return
        if self._file is None or self._events is None:
            raise ValueError(f"{self.path} is closed")
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._events.add_scalar(name, value, int(step))

    def rewind(self, step: int) -> None:
        """Drops everything after `step`, as if the run had stopped there: for resuming from an earlier checkpoint.

        The file is replaced atomically, and TensorBoard is told to disregard the later events; without any, nothing happens.
        """
        if not self._writes:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            return
        self.close()
        write_text(self.path, "".join(kept))
        self._open(purge_step=step + 1)

    def close(self) -> None:
        """Writes out what is buffered and closes both files. Closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _open(self, purge_step: int | None = None) -> None:
        self._file = open(self.path, "a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(self.path.parent / "tensorboard"),
            purge_step=purge_step,
            flush_secs=30,
            filename_suffix=f".{time.time_ns()}",  # two openings within a second must not share a file
        )


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl` in order, each with its `step`; values that are null become NaN.

    A torn last line, which a running or killed run may leave, is left out. A run without the file has no lines.
    """
    path = Path(workdir) / _FILE
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: math.nan if value is None else value for name, value in record.items()} for record in records]


def running_means(values: Sequence[float], weights: Sequence[float]) -> np.ndarray:
    """Returns the mean of an epoch's batches so far, after each one, in float64.

    The smooth curve that training logs often show. It jumps where an epoch begins, and lags behind the model within it.

    Args:
      values: a mean over each batch of the epoch, such as its loss, in order.
      weights: examples in each batch.
    """
    weight = np.asarray(weights, np.float64)
    return np.cumsum(np.asarray(values, np.float64) * weight) / np.cumsum(weight)


def _repair(path: Path) -> None:
    """Makes a file end in a whole line, by ending the last one if it is whole and by dropping it otherwise."""
    if not path.exists():
        return
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    whole, tail = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    try:
        json.loads(tail)
        whole += tail + b"\n"
    except ValueError:
        pass
    write_text(path, whole.decode("utf-8"))


class Progress:
    """How far a loop is; made by `progress`."""

    def __init__(self, bar: rich.progress.Progress, task: rich.progress.TaskID, plain: IO[str] | None, interval: float):
        self._bar, self._id, self._plain, self._interval = bar, task, plain, interval
        self._printed_at, self._printed_step = -math.inf, -1.0

    def update(self, step: int, **values: float) -> None:
        """Shows that `step` steps are done.

        Args:
          step: steps done since the beginning of the run, not of this process.
          **values: Python floats to show, such as `loss`; names not given keep their last value. Nothing here waits
            for a device, so fetch values from it as rarely as they are worth.
        """
        self._bar.update(self._id, completed=step, values={**self._task.fields["values"], **values})
        if self._plain is not None and self._bar.get_time() - self._printed_at >= self._interval:
            self._print()

    def _finish(self) -> None:
        if self._plain is not None and self._printed_step != self._task.completed:
            self._print()

    @property
    def _task(self) -> rich.progress.Task:
        return self._bar.tasks[self._id]

    def _print(self) -> None:
        task = self._task
        left = "" if task.finished or task.time_remaining is None else f"{_clock(task.time_remaining)} left"
        done = f"{task.description}: {task.completed:.0f}/{task.total:.0f} ({task.percentage:.0f}%)"
        parts = [part for part in (done, _rate(task), _values(task), left) if part]
        print("  ".join(parts), file=self._plain, flush=True)
        self._printed_at, self._printed_step = self._bar.get_time(), task.completed


class _TextOf(rich.progress.ProgressColumn):
    """A column that shows a function of the task, called when the bar is drawn rather than at every update."""

    def __init__(self, text: Callable[[rich.progress.Task], str]):
        super().__init__()
        self._text = text

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(self._text(task))


@contextmanager
def progress(
    total: int,
    description: str,
    start: int = 0,
    examples_per_step: int | None = None,
    *,
    console: rich.console.Console | None = None,
    interval: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Shows a loop's progress on standard error: a bar, step/total, rate, values and the time left.

    Where standard error is not a terminal it prints plain lines instead: one at once, one at most every `interval`
    seconds, and one at the end. Of several hosts the first one speaks.

    Args:
      total: steps of the whole run.
      description: what is going on, such as `train: rte`.
      start: the step a resumed run begins at; it counts as done, and not for the rate.
      examples_per_step: global batch size, to show examples instead of steps per second.
      console: another place than standard error, for tests.
      interval: seconds between plain lines.
      clock: seconds, for tests.

    Yields:
      A `Progress`, whose `update(step, loss=…)` is to be called after each step.
    """
    stderr = sys.stderr
    console = console or rich.console.Console(file=stderr, force_terminal=stderr.isatty())
    speaks = jax.process_index() == 0
    live = speaks and console.is_terminal and not console.is_dumb_terminal
    bar = rich.progress.Progress(
        _TextOf(lambda task: task.description),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        _TextOf(_rate),
        _TextOf(_values),
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=not live,
        get_time=clock,
    )
    with bar:
        task = bar.add_task(description, total=total, completed=start, values={}, examples=examples_per_step)
        shown = Progress(bar, task, console.file if speaks and not live else None, interval)
        try:
            yield shown
        finally:
            shown._finish()


def _rate(task: rich.progress.Task) -> str:
    speed = (task.finished_speed or task.speed or 0.0) * (task.fields["examples"] or 1)
    unit = "examples/s" if task.fields["examples"] else "steps/s"
    return f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.3g} {unit}" if speed else ""


def _values(task: rich.progress.Task) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in task.fields["values"].items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
