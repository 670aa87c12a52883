"""Task metrics: what is computed from predictions, by scikit-learn and scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qtx.errors import UserError, near_misses

# Both libraries are imported where a metric is computed: they take a second, which every command would wait for.


def _agreement(function: str, **options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a function of `sklearn.metrics` by its name."""

    def metric(predictions: np.ndarray, labels: np.ndarray) -> float:
        from sklearn import metrics

        return getattr(metrics, function)(labels, predictions, **options)

    return metric


def _correlation(function: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a correlation of `scipy.stats` by its name; one that is undefined is 0.

    A correlation with a constant (or a single value) is 0/0. A model that answers the same to everything has learnt
    nothing, which is what 0 says; a NaN would poison the mean over metrics and every comparison for the best step.
    """

    def correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
        from scipy import stats

        if len(labels) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(getattr(stats, function)(predictions, labels).statistic)
        return value if np.isfinite(value) else 0.0

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _agreement("accuracy_score"),
    "f1": _agreement("f1_score", pos_label=1, zero_division=0.0),
    "weighted_f1": _agreement("f1_score", average="weighted", zero_division=0.0),
    "matthews": _agreement("matthews_corrcoef"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
"""Functions of (predictions [N], labels [N]); `f1` is binary with positive class 1, `weighted_f1` the mean of that of
every class, weighted by its number of labels, and the last two are for scores."""


def compute(names: Iterable[str], predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Computes the named metrics of a whole evaluation set.

    Args:
      names: keys of `METRICS`.
      predictions: class ids [N], or scores [N] for regression.
      labels: what they are compared to, [N].

    Returns:
      One finite float for each name, as a fraction (not percent). For constant predictions `matthews`, `pearson` and
      `spearman` are undefined and returned as 0.0, without a warning.

    Raises:
      UserError: an unknown metric, arrays that are empty, not finite or of different lengths, or a metric that does
        not fit the values (such as `f1` of more than two classes).
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise UserError(
            f"metrics need one prediction for each label, but predictions have shape {predictions.shape} and labels "
            f"{labels.shape}: give arrays [N] without padding examples"
        )
    if not len(labels):
        raise UserError("no examples to compute metrics of: the evaluation set is empty")
    for what, array in (("predictions", predictions), ("labels", labels)):
        if not np.isfinite(array.astype(np.float64)).all():
            raise UserError(f"{what} hold NaN or infinite values: the model has diverged or the labels are missing")
    values = {}
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}{near_misses(name, METRICS)}")
        try:
            values[name] = float(METRICS[name](predictions, labels))
        except ValueError as error:
            raise UserError(f"metric {name!r} does not fit this task's predictions and labels: {error}") from error
    return values


def score(values: Mapping[str, float]) -> float:
    """Returns the one number of a task: the unweighted mean of its metrics, which is GLUE's rule.

    Raises:
      UserError: there is no metric.
    """
    if not values:
        raise UserError("no metric to take the score of: name at least one of " + ", ".join(METRICS))
    return float(np.mean(list(values.values())))


def predictions_from_logits(logits: ArrayLike, is_regression: bool) -> np.ndarray:
    """Turns the outputs of a task head into what `compute` takes.

    Args:
      logits: [N, C], any float dtype; [N, 1] or [N] for regression.
      is_regression: whether the head gives a score instead of classes.

    Returns:
      Class ids [N] int64 (the first of equal logits), or scores [N] float64.

    Raises:
      UserError: a NaN among the logits, or a shape that does not fit.
    """
    array = np.asarray(logits).astype(np.float64)
    if np.isnan(array).any():
        bad = int(np.isnan(array.reshape(len(array), -1)).any(axis=1).sum())
        raise UserError(
            f"logits of {bad} of {len(array)} examples are NaN: the model has diverged; lower the learning rate, or "
            "use more bits or a calibrated range"
        )
    if not is_regression and array.ndim == 2:
        return array.argmax(axis=1)
    if is_regression and (array.ndim == 1 or array.ndim == 2 and array.shape[1] == 1):
        return array.reshape(-1)
    expected = "[N, 1] or [N] for regression" if is_regression else "[N, C] for classification"
    raise UserError(f"logits have shape {array.shape}, expected {expected}: check the task's number of classes")
