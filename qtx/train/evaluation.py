"""Evaluating a model while it trains: when, which evaluation is the best, and when a phase has gone on for long enough.

What has been measured is a history: one JSON-able record for each evaluation of a phase, `{"step", "epoch", **metrics}`.
All decisions are functions of it, so a run that resumes with its history decides as if it had not stopped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtx.errors import UserError, near_misses

Record = Mapping[str, Any]

PUBLISHED_STARTS = {"graph": 0.0, "cola": -100.0, "encoder": -1e-6}
"""What the first evaluation must exceed in BitTransGNN: with a graph, with one on CoLA, and in fine-tuning of the encoder."""


def improvements(values: Sequence[float], start: float = -math.inf) -> list[int]:
    """Returns the indices of values that are greater than `start` and all values before them.

    NaN is worse than all numbers. With the default, the first value counts whatever it is.
    """
    best, found = start, []
    for i, value in enumerate(values):
        if value > best or (i == 0 and start == -math.inf):
            best = -math.inf if math.isnan(value) else value
            found.append(i)
    return found


def published_choice(
    values: Sequence[float], patience: int, start: float = PUBLISHED_STARTS["graph"]
) -> tuple[int | None, int | None, float]:
    """Returns what BitTransGNN's training would have made of a metric: to see what its early stopping does to a run.

    Patience counts from 0, and after the first evaluation so does the choice of the best: one below 0 is forgotten.

    Args:
      values: of the metric after each epoch.
      patience: in epochs.
      start: one of `PUBLISHED_STARTS`.

    Returns:
      The index after which it stops (None: it does not), the index of what it keeps (None: it has no checkpoint), and the
      metric that it reports. (Where it does not stop, it keeps that index
      but returns no weights.)
    """
    stop = None
    for i in range(len(values)):
        better = improvements(values[: i + 1], 0.0) or [-1]
        if i - better[-1] >= patience:
            stop = i
            break
    seen = values if stop is None else values[: stop + 1]
    better = improvements(seen, 0.0)
    kept = better[-1] if better else 0 if seen and seen[0] > start else None
    return stop, kept, seen[better[-1]] if better else 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How a phase is evaluated while it trains, and what follows from it.

    Attributes:
      run: `(phase, variables) -> {metric: value}`; the variables are the caller's during the call only.
      every: epochs between evaluations, above 0; the end of the phase is always evaluated.
      metric: the one that evaluations are compared by; more is better.
      keep_best: the phase ends with the variables of its best evaluation instead of its last ones.
      patience: the phase stops after so many evaluations without a better one; 0: never.
      start: what the first evaluation must exceed to count as better, for `patience` alone: the best one is kept whatever
        it is. BitTransGNN counts from 0, so that it stops while a metric that can be negative rises towards 0.

    Raises:
      UserError: `every` is not positive, or `patience` is negative.
    """

    run: Callable[[Any, Mapping[str, Any]], Mapping[str, float]]
    every: float = 1.0
    metric: str = "score"
    keep_best: bool = False
    patience: int = 0
    start: float = -math.inf

    def __post_init__(self):
        if not self.every > 0:
            raise UserError(f"cannot evaluate every {self.every} epochs; give a number above 0")
        if self.patience < 0:
            raise UserError(f"a patience of {self.patience} evaluations is negative; 0 switches early stopping off")

    def steps(self, length: int, batches_per_epoch: int) -> frozenset[int]:
        """Returns the steps of a phase, counted from 1 to `length`, after which it is evaluated."""
        period = max(self.every * batches_per_epoch, 1.0)
        return frozenset({round(k * period) for k in range(1, int(length / period) + 1)} | {length})

    def measure(self, phase: Any, variables: Mapping[str, Any]) -> dict[str, float]:
        """Runs the evaluation; raises a `UserError` if the metric to compare by is not among the values."""
        values = {name: float(value) for name, value in self.run(phase, variables).items()}
        if self.metric not in values:
            raise UserError(
                f"phase {phase.name!r}: its evaluation gives no metric {self.metric!r}{near_misses(self.metric, values)}"
            )
        return values

    def best(self, history: Sequence[Record]) -> Record:
        """Returns the first of the best evaluations; one without a number is worse than all others."""
        return history[improvements([record[self.metric] for record in history])[-1]]

    def is_over(self, history: Sequence[Record]) -> bool:
        """Whether patience has run out."""
        if not self.patience or not history:
            return False
        better = improvements([record[self.metric] for record in history], self.start) or [-1]
        return len(history) - 1 - better[-1] >= self.patience

    def summary(self, history: Sequence[Record], batches_per_epoch: int) -> dict[str, float]:
        """Returns what a report says beside the metrics of the model that was kept.

        That is `best_epoch`, counted from the beginning of the run as in its curves and plots (`epoch` of a record is within
        the phase), and the metrics of the other model: with `keep_best` those of the last evaluation under `last_...`,
        otherwise those of the best one under `best_...`.
        """
        best = self.best(history)
        prefix, other = ("last_", history[-1]) if self.keep_best else ("best_", best)
        metrics = {prefix + name: value for name, value in other.items() if name not in ("step", "epoch")}
        return metrics | {"best_epoch": best["step"] / batches_per_epoch}
