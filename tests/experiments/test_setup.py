"""What an experiment evaluates: validation splits make the score, a test split is told beside it."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from qtx.data import Encoded, get_task
from qtx.experiments.classification import Classification
from qtx.experiments.compare import tfidf_predictions
from qtx.experiments.experiment import VALIDATION, family_and_sizes
from qtx.experiments.run import evaluate, make_recipe, quantize, train
from qtx.experiments.setup import setup
from qtx.train.logging import read_metrics
from tests.conftest import WORDS

SUBJECTS = ("city house", "actor film", "good time", "quite bad")


@pytest.fixture
def news(tiny_config, tmp_path) -> Classification:
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


@pytest.fixture
def from_nothing(tiny_config, tiny_checkpoint):
    """The tiny experiment with a text classifier that no checkpoint holds."""
    section = tiny_config.model
    section.name, section.tokenizer = "text_classifier", str(tiny_checkpoint)
    section.sizes = ConfigDict(
        dict(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, classifier_size=16)
    )
    return tiny_config


def test_a_model_from_nothing_is_trained_quantized_and_packed(from_nothing, tmp_path):
    from_nothing.phases.finetune.steps = 30
    from_nothing.phases.finetune.optimizer.learning_rate = 1e-2
    experiment = setup(from_nothing)
    assert experiment.pretrained.config.num_labels == 2 and experiment.pretrained.config.hidden_dropout == 0
    reached = train(experiment, tmp_path / "run")["metrics"]["finetune"]["score"]
    assert reached > 0.8
    # The sizes may stay in the configuration: they are those of the checkpoint.
    from_nothing.model.name, from_nothing.model.fresh_head = str(tmp_path / "run" / "model"), False
    found = quantize(from_nothing, tmp_path / "w8a8")
    assert found["full_precision"]["score"] == pytest.approx(reached) and found["quantized"]["score"] > 0.7
    from_nothing.model.name = str(tmp_path / "w8a8" / "quantized")
    assert evaluate(from_nothing)["score"] == pytest.approx(found["quantized"]["score"])


def test_the_seed_makes_the_model(from_nothing):
    def kernel(seed):
        from_nothing.seed = seed
        return setup(from_nothing).pretrained.params["classifier"]["hidden"]["kernel"]

    assert np.array_equal(kernel(1), kernel(1)) and not np.array_equal(kernel(1), kernel(2))


def test_sizes_of_a_section(from_nothing, tiny_checkpoint):
    from_nothing.model.sizes.max_positions = 24
    family, sizes = family_and_sizes(from_nothing.model)
    assert (family.name, sizes.max_positions, sizes.num_layers) == ("qtx_text_classifier", 24, 1)
    from_nothing.model.name, from_nothing.model.sizes = str(tiny_checkpoint), ConfigDict({"num_layers": 1})
    family, sizes = family_and_sizes(from_nothing.model)
    assert (family.name, sizes.num_layers) == ("bert", 1)


def test_a_run_keeps_its_best_model_and_tells_of_the_last(news, tmp_path):
    config = news.config
    config.recipe, config.evaluate_test, config.save_models = ("finetune", "qat"), True, False
    config.phases.finetune.update({"steps": 16, "evaluate_every": 0.25, "keep_best": True, "patience": 3})
    config.phases.qat.update({"steps": 2, "quantized": False})
    trained = train(news, tmp_path / "run")
    found, lines = trained["metrics"], read_metrics(tmp_path / "run")
    history = [line for line in lines if "finetune/eval/score" in line]
    scores = [line["finetune/eval/score"] for line in history]
    assert history[0]["step"] == 4 and history[0]["finetune/eval/epoch"] == 0.25
    assert found["finetune"]["score"] == max(scores) and found["finetune"]["last_score"] == scores[-1]
    assert found["finetune"]["best_epoch"] == history[scores.index(max(scores))]["finetune/eval/epoch"]
    best = history[scores.index(max(scores))]
    assert found["finetune"]["test_accuracy"] == best["finetune/eval/test_accuracy"]
    assert list(found["qat"]) == ["accuracy", "test_accuracy", "score"]
    result = json.loads((tmp_path / "run" / "result_finetune.json").read_text())
    assert result == found["finetune"] | {"step": history[-1]["step"]}
    header = (tmp_path / "run" / "report.csv").read_text().splitlines()[0].split(",")
    names = ["accuracy", "test_accuracy", "score", "last_accuracy", "last_test_accuracy", "last_score", "best_epoch"]
    assert header == ["phase", *names, "seconds"]
    rows = list(csv.DictReader((tmp_path / "run" / "curves.csv").open()))
    assert [row["phase"] for row in rows][:: len(rows) - 1] == ["finetune", "qat"]
    assert [float(row["score"]) for row in rows if row["score"]] == scores
    assert (tmp_path / "run" / "curves.png").is_file()


def test_evaluation_while_training_looks_at_validation_alone_unless_it_is_told(news):
    section = news.config.phases.finetune
    assert make_recipe(news)[0][0].evaluation is None
    section.evaluate_every = 0.5
    for evaluate_test, names in ((False, ["accuracy", "score"]), (True, ["accuracy", "test_accuracy", "score"])):
        news.config.evaluate_test = evaluate_test
        (phase,), _ = make_recipe(news)
        assert (phase.evaluation.every, phase.evaluation.keep_best, phase.evaluation.patience) == (0.5, False, 0)
        assert list(phase.evaluation.run(phase, news.variables)) == names
