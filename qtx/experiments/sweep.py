"""Runs a sweep: grids, rows and seeds of any configuration, or a search over ranges, on any number of machines.

    sweep(config, "runs/sweep")                                # what is left of it, then the tables
    sweep(config, "runs/sweep", storage="postgresql://...")    # the same on every machine that shares the work

What there is to do is in `qtx.experiments.plan`, who does it in `qtx.experiments.study`, the tables in
`qtx.experiments.sweep_report`, the plots in `qtx.experiments.sweep_plots`. A trial that fails is recorded with its line
and the others go on. A call that is interrupted, or whose process dies, is repeated: what is done stays done, and the
trial that was running goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import math
import shlex
import shutil
import statistics
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from qtx.errors import UserError
from qtx.experiments.config import field_of, sweeping
from qtx.experiments.heap import return_freed_memory
from qtx.experiments.plan import ENTRIES, Outcome, Trial, plan, selected
from qtx.experiments.run import check_run
from qtx.experiments.study import Attempt, Claim, Ledger, TakenOver, without_password
from qtx.experiments.sweep_plots import plot_sweep
from qtx.experiments.sweep_report import Report, make_report
from qtx.files import write_text
from qtx.train.logging import progress
from qtx.train.report import save_config

STORAGE_FILE = "sweep.db"
_POLL = 2.0  # seconds between looks at what other workers do


def sweep(
    config: ConfigDict,
    workdir: str | Path,
    storage: str = "",
    trials: int = 0,
    minutes: float = 0.0,
    only: Sequence[str] = (),
    report_only: bool = False,
    retry_failed: bool = False,
    command: str = "python launch/sweep.py",
    given: Sequence[str] = (),
) -> Report:
    """Runs the trials of a sweep that are not done, and reports all of them.

    Args:
      config: of any kind, with a section `sweep` (`qtx.experiments.config.sweeping`).
      workdir: run directories and tables. Workers on several machines need a directory that they share, if rows start
        from other rows; else each can have its own.
      storage: URL of an optuna storage that workers share; by default a SQLite file in `workdir`, for workers of one
        machine.
      trials: run at most so many in this call; 0: all.
      minutes: start none after so many; 0: no limit.
      only: patterns over names of trials, such as `rte/*/seed_1000`; what they start from is run too.
      report_only: run nothing.
      retry_failed: run failed trials again, too.
      command: how a user repeats this call, for the report.
      given: fields that the user has set; a line says which rows set them otherwise.

    Returns:
      The report, which is written to `table.md`, `table.csv`, `cells.md`, `cells.csv` after every trial. In the end it is
      printed, and there are plots beside it, see `qtx.experiments.sweep_plots`.

    Raises:
      UserError: on anything that does not fit, before the first trial; and in the end, if trials have failed.
    """
    if jax.process_count() > 1:
        raise UserError(
            "a sweep gives each host trials of its own: start it on every host without --multihost, with one --storage"
        )
    workdir, console = Path(workdir), Console(stderr=True)
    if "sweep" not in config:
        raise UserError(
            "the configuration has no section `sweep`; add config.sweep = qtx.experiments.config.sweeping(...)"
        )
    section = config.sweep
    everything = plan(config)
    chosen = selected(everything, only)
    workdir.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(workdir / STORAGE_FILE).resolve()}"
    ledger = Ledger(url, section.name, workdir, section.heartbeat, section.sampler, section.maximize)
    ledger.check(everything)

    def report() -> Report:
        found = make_report(section, everything, ledger.attempts(everything), command)
        found.save(workdir)
        return found

    def finish(found: Report) -> None:
        found.print()
        for line in plot_sweep(everything, ledger.attempts(everything), found.found, section.metric, workdir):
            console.print(line, highlight=False)

    if report_only:
        found = report()
        finish(found)
        return found
    for line in not_reached(config, chosen, given):
        console.print(line, highlight=False)
    check_models(chosen)
    save_config(config, workdir)
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    again, before, ran, told = (("failed",) if retry_failed else ()), None, 0, ""
    while not (trials and ran >= trials) and time.monotonic() < deadline:
        ledger.enter(chosen, again)
        again = ()
        attempts = ledger.attempts(chosen)
        waiting = [trial for trial in chosen if attempts[trial.name].state == "waiting"]
        for trial in (trial for trial in waiting if _is_ready(trial, attempts, workdir)):
            with ledger.claim(trial) as claim:
                if claim is None:
                    continue
                if before is not None and before != (trial.labels, trial.row.name):
                    jax.clear_caches()  # its programs are others; they would pile up
                before = trial.labels, trial.row.name
                finished = sum(attempt.state in ("done", "failed") for attempt in attempts.values())
                with progress(len(chosen), f"trial {trial.name}", start=finished):
                    pass  # one line: the bars of the run itself follow
                _run(trial, claim, workdir, section, console)
            return_freed_memory()
            ran += 1
            report()
            break
        else:
            needed = {name for trial in waiting for name in trial.needs() if attempts[name].state == "running"}
            claimed_elsewhere = any(_is_ready(trial, attempts, workdir) for trial in waiting)
            if not needed and not claimed_elsewhere:
                break
            if needed and told != (told := ", ".join(sorted(needed))):
                console.print(f"waiting for {told}, which run elsewhere", highlight=False)
            time.sleep(_POLL)
    found = report()
    finish(found)
    failed = [name for name, attempt in ledger.attempts(chosen).items() if attempt.state == "failed"]
    if failed:
        line = ledger.attempts(chosen)[failed[0]].error
        raise UserError(
            f"{len(failed)} of {len(chosen)} trials failed, {failed[0]} with: {line}; the tables are complete but for them "
            "(--retry_failed runs them again)"
        )
    return found


def check_models(trials: Sequence[Trial]) -> None:
    """Finds, before hours of training, what would fail in the end: a recipe, a policy or a model that cannot be.

    Raises:
      UserError: that says which trial.
    """
    sources = {trial.group: trial for trial in trials}
    for group, trial in sources.items():
        root = trial
        while root.start:
            root = sources[root.start]
        try:
            check_run(trial.config, trial.row.entry, root.config.model)
        except UserError as error:
            raise UserError(f"{group}: {error}" if group else str(error)) from None


def not_reached(config: ConfigDict, trials: Sequence[Trial], given: Sequence[str]) -> list[str]:
    """Returns a line for each field that was given and that rows, or points of the grid, set to something else.

    Args:
      config: of the sweep.
      trials: of it.
      given: dotted names of fields.
    """
    lines = []
    for name in given:
        if name.startswith("sweep."):  # which trials do not have
            continue
        value = field_of(config, name)
        others = dict.fromkeys(trial.row.name for trial in trials if field_of(trial.config, name) != value)
        if others:
            lines.append(f"--config.{name} does not reach {', '.join(others)}: the sweep sets it there")
    return lines


def _is_ready(trial: Trial, attempts: dict[str, Attempt], workdir: Path) -> bool:
    return all(attempts[name].state == "done" and (workdir / name / "model").is_dir() for name in trial.needs())


def _run(trial: Trial, claim: Claim, workdir: Path, section: ConfigDict, console: Console) -> None:
    """Runs a trial with all its seeds and records what came out."""
    directory = workdir / trial.group
    start = time.perf_counter()
    try:
        drawn = claim.draw(trial.ranges)
        for seed in trial.seeds:
            if seed in claim.results:
                continue
            directory = workdir / trial.group / f"seed_{seed}"
            outcome = ENTRIES[trial.row.entry](trial.run_config(workdir, seed, drawn), directory)
            check_outcome(outcome, section.metric)
            claim.add(seed, outcome)
            if not section.keep_checkpoints:
                for name in ("checkpoints", "best"):
                    shutil.rmtree(directory / name, ignore_errors=True)
        score = statistics.median(next(iter(claim.results[seed].values()))[section.metric] for seed in trial.seeds)
        claim.complete(score)
        text = f"{section.metric} {score:.4f}"
    except TakenOver:
        text = "another worker has taken it over: this one gave no sign of life for too long"
    except Exception as error:  # whatever it is, the other trials go on
        text = one_line(error)
        write_text(directory / "error.txt", traceback.format_exc())
        claim.fail(text)
        text = f"failed: {text}"
    tables = f"; tables so far: {workdir / 'table.md'}"
    console.print(f"{trial.name}: {text} ({time.perf_counter() - start:.0f} s){tables}", highlight=False)


def check_outcome(outcome: Outcome, metric: str) -> None:
    """Raises a `UserError` if a metric is missing or no number."""
    for method, values in outcome.items():
        if metric not in values:
            raise UserError(
                f"there is no metric {metric!r} to sweep for, only {', '.join(values)}; change sweep.metric"
            )
        if not math.isfinite(values[metric]):
            raise UserError(f"its {metric} is {values[metric]}{method and f' for {method}'}")


def one_line(error: BaseException) -> str:
    """Returns what an error says in one line: a `UserError` its text, any other its type and first line."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}".rstrip(": ")


def with_fields(config: ConfigDict, **fields: Any) -> ConfigDict:
    """Returns a configuration with a section `sweep`, its own or a new one, in which some fields are set."""
    found = copy.deepcopy(config)  # keeps the types of fields that have no value yet
    known = found.sweep.to_dict() if "sweep" in found else {"seeds": (found.seed,)}
    if "grid" in fields:
        known |= {"columns": ""}  # of an axis that is gone
    with found.unlocked():
        found.sweep = sweeping(**known | fields)
    return found


def command_of(argv: Sequence[str]) -> str:
    """Returns the command line of a launcher without the flags that are meant for one call alone."""
    once = ("trials", "minutes", "only", "report_only", "retry_failed")
    kept, skip = [], False
    for argument in argv:
        name, sign, _ = argument.lstrip("-").partition("=")
        if skip or (argument.startswith("-") and name in once):
            skip = not skip and not sign and name in once[:3]  # --trials 5
            continue
        kept.append(argument)
    return f"python {shlex.join(map(without_password, kept))}"
