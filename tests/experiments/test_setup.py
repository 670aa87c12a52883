"""What an experiment evaluates: validation splits make the score, a test split is told beside it."""

import dataclasses

import numpy as np
import pytest

from qtx.data import Encoded, get_task
from qtx.experiments.compare import tfidf_predictions
from qtx.experiments.run import train
from qtx.experiments.setup import VALIDATION, Experiment, setup
from tests.conftest import WORDS

SUBJECTS = ("city house", "actor film", "good time", "quite bad")


@pytest.fixture
def news(tiny_config, tmp_path) -> Experiment:
    """AG_NEWS made of the tiny model's words: 128 training, 8 validation and 12 test rows."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 136), ("test", 12)):
        rows = [f'"{1 + i % 4}","{SUBJECTS[i % 4]}","{" ".join(rng.choice(WORDS, 3))} {i}"' for i in range(count)]
        (tmp_path / f"{split}.csv").write_text("\n".join(rows) + "\n")
    tiny_config.task, tiny_config.data.dir = "ag_news", str(tmp_path)
    return setup(tiny_config)


def logits_with(labels: np.ndarray, right: int, classes: int) -> np.ndarray:
    """Logits `[N, C]` of which the first `right` are right."""
    answers = np.where(np.arange(len(labels)) < right, labels, (labels + 1) % classes)
    return np.eye(classes, dtype=np.float32)[answers]


def test_the_test_split_has_its_own_names_and_is_not_in_the_score(news):
    sizes = {name: len(split) for name, split in news.encoded.items()}
    assert sizes == {"train": 128, "validation": 8, "test": 12}
    logits = {
        name: logits_with(news.encoded[name].labels, right, 4) for name, right in (("validation", 2), ("test", 9))
    }
    assert news.metrics(logits) == {"accuracy": 0.25, "test_accuracy": 0.75, "score": 0.25}
    assert news.metrics({"test": logits["test"]}) == {"test_accuracy": 0.75}


def test_the_score_of_mnli_is_the_mean_of_both_validation_splits(news):
    def encoded(count: int) -> Encoded:
        return Encoded(np.zeros(count), np.zeros(count), np.arange(count + 1), np.arange(count, dtype=np.int32) % 3)

    splits = {"validation": encoded(4), "validation_mismatched": encoded(2)}
    dataset = dataclasses.replace(news.dataset, task=get_task("mnli"))
    experiment = dataclasses.replace(news, dataset=dataset, encoded=splits)
    logits = {name: logits_with(split.labels, 1, 3) for name, split in splits.items()}
    assert experiment.metrics(logits) == {"accuracy": 0.25, "mismatched_accuracy": 0.5, "score": 0.375}


def test_a_run_reports_the_test_split_and_callers_choose_splits(news, tmp_path):
    trained = train(news, tmp_path / "run")
    found = trained["metrics"]["finetune"]
    assert list(found) == ["accuracy", "test_accuracy", "score"] and found["score"] == found["accuracy"]
    assert "test_accuracy" in (tmp_path / "run" / "report.md").read_text()
    variables = {"params": trained["params"]}
    logits = news.logits(news.model, variables)
    assert {name: values.shape for name, values in logits.items()} == {"validation": (8, 4), "test": (12, 4)}
    assert found["test_accuracy"] == np.mean(logits["test"].argmax(-1) == news.encoded["test"].labels)
    assert news.evaluate(news.model, variables) == pytest.approx(found)
    chosen = {name: found[name] for name in ("accuracy", "score")}
    assert news.evaluate(news.model, variables, VALIDATION) == pytest.approx(chosen)
    assert news.evaluate(news.model, variables, ("test",)) == {"test_accuracy": found["test_accuracy"]}


def test_the_tfidf_baseline_learns_the_news(news):
    assert np.mean(tfidf_predictions(news.dataset) == news.dataset.splits["validation"].labels) > 0.7
