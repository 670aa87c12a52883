"""Who runs which trial of a sweep, and what came out: a ledger in an optuna storage that any number of workers share.

A trial is entered once under its name (`WAITING`) and claimed by one worker (`RUNNING`, an atomic change in the data base). It
ends as `COMPLETE` with its results, or as `FAIL` with the line that says why. A trial that fails without such a line was
interrupted: its worker stopped or died. It is entered again, with what it had drawn and finished, as `after` that
attempt. Of the attempts that no other comes after, the first one counts; so two workers that enter the same trial at
the same moment do no harm.

A worker shows that it lives by its heartbeat in the storage and by a lock on a file: whoever looks from the same machine
sees at once that a lock is free, from another machine one waits for the heartbeat to grow old.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy.event
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from qtx.errors import UserError
from qtx.experiments.config import defaults_of
from qtx.experiments.plan import Outcome, Trial
from qtx.train.report import config_record, first_difference

optuna.logging.set_verbosity(optuna.logging.WARNING)

TakenOver = optuna.exceptions.UpdateFinishedTrialError
GRACE = 5  # heartbeats that may fail to come
_STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "done",
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the ledger says about a trial.

    Attributes:
      state: 'new' (not entered), 'waiting', 'running', 'done', 'failed' or 'interrupted'.
      number: of the attempt in its study; -1 for none.
      id: in the storage.
      results: by seed.
      error: the line of a failed trial.
      worker: of a running one: its host and its lock.
      drawn: values of the fields of a search.
      config: what it was entered with.
    """

    state: str = "new"
    number: int = -1
    id: int = -1
    results: Mapping[int, Outcome] = dataclasses.field(default_factory=dict)
    error: str = ""
    worker: tuple[str, str] = ("", "")
    drawn: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Claim:
    """A trial that this worker runs; made by `Ledger.claim`.

    Its methods raise `TakenOver` if another worker took this one for dead and ended the attempt.
    """

    def __init__(self, ledger: Ledger, trial: Trial, attempt: Attempt):
        self._ledger, self._study, self.attempt = ledger, ledger.study(trial), attempt
        self.results = dict(attempt.results)

    def draw(self, ranges: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Draws a value for each range (see `plan.Trial`); the same ones when an attempt is taken up again."""
        if not ranges:
            return {}
        self._study.sampler = self._ledger.sampler(self.attempt.number)
        trial = optuna.trial.Trial(self._study, self.attempt.id)
        drawn: dict[str, Any] = {}
        for field, *bounds in ranges:
            if len(bounds) == 1:
                drawn[field] = trial.suggest_categorical(field, bounds[0])
            elif all(isinstance(bound, int) for bound in bounds[:2]):
                drawn[field] = trial.suggest_int(field, *bounds[:2], log=len(bounds) == 3)
            else:
                drawn[field] = trial.suggest_float(field, *bounds[:2], log=len(bounds) == 3)
        return drawn

    def add(self, seed: int, outcome: Outcome) -> None:
        """Records the result of one run."""
        self.results[seed] = outcome
        self._attribute("results", {str(seed): outcome for seed, outcome in self.results.items()})

    def complete(self, value: float) -> None:
        """Ends the trial; `value` is what a search goes by."""
        self._ledger.storage.set_trial_state_values(self.attempt.id, TrialState.COMPLETE, [value])

    def fail(self, line: str) -> None:
        """Ends the trial with the line that says why."""
        self._attribute("error", line)
        self._ledger.storage.set_trial_state_values(self.attempt.id, TrialState.FAIL)

    def give_back(self) -> None:
        """Ends the attempt, for the trial to be taken up again."""
        with contextlib.suppress(TakenOver):  # or over already
            self._ledger.storage.set_trial_state_values(self.attempt.id, TrialState.FAIL)

    def _attribute(self, name: str, value: Any) -> None:
        self._ledger.storage.set_trial_user_attr(self.attempt.id, name, value)


class Ledger:
    """The trials of a sweep in their storage.

    Args:
      url: of the storage (SQLAlchemy: `sqlite:///FILE`, `postgresql://...`, `mysql://...`).
      name: of the studies: `NAME`, and `NAME/SEARCH` for each search.
      workdir: where lock files lie, below `.locks`.
      heartbeat: seconds between signs of life.
      sampler: 'grid', 'random' or 'tpe'.
      maximize: direction of a search.

    Raises:
      UserError: if the storage cannot be opened.
    """

    def __init__(
        self, url: str, name: str, workdir: Path, heartbeat: int, sampler: str = "grid", maximize: bool = True
    ):
        self.storage = open_storage(url, heartbeat)
        self._name, self._locks, self._heartbeat = name, workdir.resolve() / ".locks", heartbeat
        self._sampler = sampler
        self._direction: Literal["maximize", "minimize"] = "maximize" if maximize else "minimize"
        self._studies: dict[str, optuna.Study] = {}
        self._host = socket.gethostname()

    def study(self, trial: Trial) -> optuna.Study:
        """Returns the study that a trial belongs to."""
        name = "/".join(filter(None, (self._name, trial.search)))
        if name not in self._studies:
            self._studies[name] = optuna.create_study(
                study_name=name, storage=self.storage, load_if_exists=True, direction=self._direction
            )
        return self._studies[name]

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Returns the sampler of a search, seeded by the number of the attempt: workers draw different points."""
        if self._sampler == "random":
            return optuna.samplers.RandomSampler(seed=number)
        return optuna.samplers.TPESampler(seed=number, constant_liar=True)

    def attempts(self, trials: Sequence[Trial]) -> dict[str, Attempt]:
        """Returns the attempt that counts of each trial, by name."""
        found: dict[str, list[FrozenTrial]] = {}
        for study in {id(study): study for study in map(self.study, trials)}.values():
            for entry in study.get_trials(deepcopy=False):
                if "trial" in entry.user_attrs:
                    found.setdefault(entry.user_attrs["trial"], []).append(entry)
        return {trial.name: _counting(found.get(trial.name, ())) for trial in trials}

    def check(self, trials: Sequence[Trial]) -> None:
        """Raises a `UserError` if a trial was entered with another configuration."""
        for name, attempt in self.attempts(trials).items():
            trial = next(trial for trial in trials if trial.name == name)
            if attempt.state == "new":
                continue
            if (found := first_difference(attempt.config, _record(trial), defaults_of(trial.config))) is not None:
                field, old, new = found
                raise UserError(
                    f"{name} of this sweep has {field}={old!r}, not {new!r}; "
                    "give the row another name, or use another workdir and sweep.name"
                )

    def enter(self, trials: Sequence[Trial], again: Sequence[str] = ()) -> None:
        """Enters the trials that are new, and those that were interrupted, once more.

        Args:
          trials: to be entered.
          again: states that are entered once more besides, such as 'failed'.
        """
        self._release(trials)
        for name, attempt in self.attempts(trials).items():
            if attempt.state not in ("new", "interrupted", *again):
                continue
            trial = next(trial for trial in trials if trial.name == name)
            known: dict[str, Any] = {"trial": name, "config": _record(trial)}
            if attempt.state != "new":
                results = {str(seed): outcome for seed, outcome in attempt.results.items()}
                known |= {"after": attempt.number, "results": results}
            self.study(trial).enqueue_trial(dict(attempt.drawn), user_attrs=known)

    @contextlib.contextmanager
    def claim(self, trial: Trial) -> Iterator[Claim | None]:
        """Gives the trial to this worker for the length of a block, or None if another one has it.

        A block that ends without an end of the trial, by an interrupt for example, gives it back.
        """
        with self._lock(trial) as lock:
            attempt = self.attempts([trial])[trial.name] if lock else Attempt()
            if attempt.state != "waiting" or not self._take(attempt):
                yield None
                return
            self.storage.set_trial_user_attr(attempt.id, "worker", [self._host, str(lock)])
            claim = Claim(self, trial, attempt)
            stop = threading.Event()
            thread = threading.Thread(target=self._beat, args=(attempt.id, stop), daemon=True)
            thread.start()
            try:
                yield claim
            finally:
                stop.set()
                thread.join()
                claim.give_back()

    def _take(self, attempt: Attempt) -> bool:
        self.storage.record_heartbeat(attempt.id)  # before the state: a running trial without one would never grow old
        try:
            return self.storage.set_trial_state_values(attempt.id, TrialState.RUNNING)
        except TakenOver:
            return False

    def _beat(self, trial_id: int, stop: threading.Event) -> None:
        while not stop.wait(self._heartbeat):
            with contextlib.suppress(optuna.exceptions.StorageInternalError):  # a data base may be away for a while
                self.storage.record_heartbeat(trial_id)

    def _release(self, trials: Sequence[Trial]) -> None:
        """Ends running attempts whose worker is dead."""
        for study in {id(study): study for study in map(self.study, trials)}.values():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(study)
        for attempt in self.attempts(trials).values():
            host, lock = attempt.worker
            if attempt.state == "running" and host == self._host and _is_free(Path(lock)):
                with contextlib.suppress(TakenOver):
                    self.storage.set_trial_state_values(attempt.id, TrialState.FAIL)

    @contextlib.contextmanager
    def _lock(self, trial: Trial) -> Iterator[Path | None]:
        path = self._locks / trial.name.replace("/", "%")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            yield path


def open_storage(url: str, heartbeat: int) -> optuna.storages.RDBStorage:
    """Opens an optuna storage; raises a `UserError` if that fails."""
    lite = url.startswith("sqlite")
    for left in (2, 1, 0):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs={"connect_args": {"timeout": 60}} if lite else {"pool_pre_ping": True},
                    heartbeat_interval=heartbeat,
                    grace_period=GRACE * heartbeat,
                )
            break
        except Exception as error:  # of SQLAlchemy, of a driver that is missing, of optuna
            if isinstance(error, sqlalchemy.exc.DBAPIError) and left:  # two workers may be making the tables at once
                time.sleep(0.2)
                continue
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise UserError(
                f"the storage {without_password(url)!r} cannot be opened ({reason}); give a URL such as sqlite:///FILE or postgresql://USER@HOST/BASE"
            ) from None
    if lite:
        # SQLite knows no row locks. Every transaction takes the write lock at its beginning, so that reading a state and
        # changing it is one act, as it is elsewhere.
        storage.engine.dispose()
        sqlalchemy.event.listen(storage.engine, "connect", lambda connection, _: _by_hand(connection))
        sqlalchemy.event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    return storage


def without_password(text: str) -> str:
    """Returns text in which the password of a URL is hidden."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def _by_hand(connection: Any) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own


def _counting(entries: Sequence[FrozenTrial]) -> Attempt:
    over = {entry.user_attrs.get("after") for entry in entries}
    left = [entry for entry in entries if entry.number not in over]
    if not left:
        return Attempt()
    entry = min(left, key=lambda entry: entry.number)
    known = entry.user_attrs
    state = _STATES.get(entry.state) or ("failed" if "error" in known else "interrupted")
    return Attempt(
        state,
        entry.number,
        entry._trial_id,
        {int(seed): outcome for seed, outcome in known.get("results", {}).items()},
        known.get("error", ""),
        tuple(known.get("worker", ("", ""))),
        entry.params or entry.system_attrs.get("fixed_params", {}),
        known["config"],
    )


def _is_free(lock: Path) -> bool:
    try:
        with open(lock, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _record(trial: Trial) -> dict[str, Any]:
    """What makes a trial the same one: its configuration, what it starts from and what is drawn; not where its data lie."""
    record = config_record(trial.config)
    record.get("data", {}).pop("dir", None)
    ranges = [list(bounds) for bounds in trial.ranges]
    uses = {"uses": dict(trial.row.uses)} if trial.row.uses else {}
    return record | {"entry": trial.row.entry, "start": trial.start, "ranges": str(ranges)} | uses
