import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from qtx.errors import UserError
from qtx.train import metrics

# Confusion matrix: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
PREDICTIONS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
LABELS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_classification_metrics_follow_the_confusion_matrix():
    values = metrics.compute(["accuracy", "f1", "matthews"], PREDICTIONS, LABELS)
    assert values == pytest.approx(
        {"accuracy": 7 / 10, "f1": 6 / 9, "matthews": (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6)}
    )
    assert list(values) == ["accuracy", "f1", "matthews"]
    assert all(type(value) is float for value in values.values())


def test_weighted_f1_weighs_classes_by_their_labels():
    # Class 0: 2 of 3 found, one too many: 4/6. Class 1: 1 of 1, one too many: 2/3. Class 2: never predicted: 0.
    found = metrics.compute(["weighted_f1"], [0, 0, 1, 1, 0], [0, 0, 0, 1, 2])
    expected = (3 * 4 / 6 + 1 * 2 / 3 + 0) / 5
    assert found["weighted_f1"] == pytest.approx(expected)


def test_f1_is_that_of_class_one():
    flipped = metrics.compute(["f1"], 1 - np.array(PREDICTIONS), 1 - np.array(LABELS))
    assert flipped["f1"] == pytest.approx(8 / 11)


def test_correlations_of_a_monotone_relation():
    labels = np.linspace(0.0, 5.0, 21)
    values = metrics.compute(["pearson", "spearman"], labels**3, labels)
    assert values["spearman"] == pytest.approx(1.0)
    assert values["pearson"] == pytest.approx(np.corrcoef(labels**3, labels)[0, 1])
    assert values["pearson"] < 0.95


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_score_zero_without_a_warning(constant, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classes = metrics.compute(["matthews"], [constant] * 4, [0, 1, 1, 0])
        scores = metrics.compute(["pearson", "spearman"], [float(constant)] * 4, [0.1, 2.0, 3.0, 5.0])
        nearly = metrics.compute(["pearson"], np.float64(1e8) + np.array([0, 0, 1e-8, 0]), [0.1, 2.0, 3.0, 5.0])
        single = metrics.compute(["pearson", "spearman"], [1.0], [2.0])
        never = metrics.compute(["f1"], [0, 0], [0, 0])
    assert classes == {"matthews": 0.0}
    assert scores == {"pearson": 0.0, "spearman": 0.0} == single
    assert np.isfinite(nearly["pearson"])
    assert never == {"f1": 0.0}
    assert capsys.readouterr() == ("", "")


def test_score_is_the_mean_of_the_metrics():
    assert metrics.score({"accuracy": 0.5, "f1": 0.75}) == 0.625
    with pytest.raises(UserError, match="no metric"):
        metrics.score({})


def test_predictions_from_logits():
    logits = jnp.array([[0.1, 0.2, -1.0], [3.0, 3.0, -jnp.inf]], jnp.bfloat16)
    classes = metrics.predictions_from_logits(logits, is_regression=False)
    np.testing.assert_array_equal(classes, [1, 0])
    assert np.issubdtype(classes.dtype, np.integer)
    for shape in ((3, 1), (3,)):
        scores = metrics.predictions_from_logits(np.array([0.5, 1.5, 2.5], np.float32).reshape(shape), True)
        np.testing.assert_array_equal(scores, [0.5, 1.5, 2.5])


@pytest.mark.parametrize("shape, is_regression", [((4, 2), True), ((4,), False), ((4, 2, 2), False)])
def test_logits_of_the_wrong_shape(shape, is_regression):
    with pytest.raises(UserError, match="logits have shape"):
        metrics.predictions_from_logits(np.zeros(shape), is_regression)


@pytest.mark.parametrize("is_regression", [False, True])
def test_nan_logits_are_reported_with_their_number(is_regression):
    logits = np.zeros((4, 1))
    logits[2] = np.nan
    with pytest.raises(UserError, match="1 of 4 examples are NaN"):
        metrics.predictions_from_logits(logits, is_regression)


@pytest.mark.parametrize(
    "names, predictions, labels, message",
    [
        (["acuracy"], [0], [0], "unknown metric 'acuracy'; did you mean 'accuracy'"),
        (["accuracy"], [0, 1], [0], r"\(2,\) and labels \(1,\)"),
        (["accuracy"], [[0], [1]], [[0], [1]], "shape"),
        (["accuracy"], [], [], "empty"),
        (["f1"], [0, 1, 2], [0, 1, 2], "'f1' does not fit"),
        (["accuracy"], [0.5, 0.25], [0, 1], "'accuracy' does not fit"),
        (["pearson"], [np.nan, 1.0], [0.0, 1.0], "predictions hold NaN"),
        (["pearson"], [0.0, 1.0], [np.nan, 1.0], "labels hold NaN"),
    ],
)
def test_bad_input_is_named(names, predictions, labels, message):
    with pytest.raises(UserError, match=message):
        metrics.compute(names, predictions, labels)
