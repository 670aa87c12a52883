"""From data sets to the documents of a graph."""

import os
from pathlib import Path

import numpy as np
import pytest

from qtx.data import TASKS, Dataset, Examples, Task, load
from qtx.data.cleaning import Cleaning
from qtx.data.corpus import make_corpus, new_documents, published_splits
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.textgcn import published_order
from qtx.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or SHARED)


def examples(name: str, count: int, columns: int = 1) -> Examples:
    texts = tuple([f"{name} {i}, side{c}!" for i in range(count)] for c in range(columns))
    return Examples(texts, np.arange(count, dtype=np.int32) % 2)


def dataset(task: str | Task, columns: int = 1, **sizes: int) -> Dataset:
    task = TASKS[task] if isinstance(task, str) else task
    return Dataset(task, {name: examples(name, count, columns) for name, count in sizes.items()})


def first_words(split: Examples) -> list[str]:
    return [" ".join(text.replace(",", "").split()[:2]) for text in split.texts[0]]


def test_validation_examples_of_glue_become_the_test_split():
    found = published_splits(dataset("rte", 2, train=30, validation=7, test=5)).splits
    train, test = published_order([True] * 30 + [False] * 7)
    assert first_words(found["train"]) == [f"train {i}" for i in train[:27]]
    assert first_words(found["validation"]) == [f"train {i}" for i in train[27:]]
    assert first_words(found["test"]) == [f"validation {i - 30}" for i in test]
    assert all(split.labels.tolist() == [int(w.split()[1]) % 2 for w in first_words(split)] for split in found.values())


def test_mrpc_keeps_most_of_its_validation_set():
    found = published_splits(dataset("mrpc", 2, train=35, validation=5, test=6)).splits
    assert {name: len(split) for name, split in found.items()} == {"train": 36, "validation": 4, "test": 6}
    assert sorted(first_words(found["validation"])) == [f"validation {i}" for i in (1, 2, 3, 4)]
    assert "validation 0" in first_words(found["train"])
    assert sorted(first_words(found["test"])) == [f"test {i}" for i in range(6)]


def test_sets_with_three_splits_stay_as_they_are():
    news = dataset("ag_news", train=30, validation=3, test=5)
    assert published_splits(news) is news
    reviews = published_splits(dataset("film_reviews", train=30, validation=3))
    assert {name: len(split) for name, split in reviews.splits.items()} == {"train": 27, "validation": 3, "test": 3}


def test_words_of_pairs_run_over_both_sides():
    corpus = make_corpus(dataset("rte", 2, train=2, validation=1, test=1))
    assert corpus.texts[0] == "train 0 , side0 ! train 0 , side1 !"
    assert corpus.n_train == 3 and len(corpus.texts) == 4 and corpus.skipped == 0


def test_textgcn_gets_its_backslashes_back():
    row = Examples((["is it ( so ) ?"],), np.zeros(1, np.int32))
    found = Dataset(TASKS["mr"], {"train": row, "validation": row}, Cleaning())
    assert make_corpus(found).texts == ["is it \\( so \\) \\?"] * 2
    assert make_corpus(found, "basic").texts == ["is it ( so ) ?"] * 2
    assert make_corpus(found, "cleaned").texts == make_corpus(found).texts  # they are, and nothing of mr is dropped
    found = Dataset(TASKS["mr"], {"train": row, "validation": row})  # another's file of that name
    assert make_corpus(found).texts == ["is it ( so ) ?"] * 2


def test_documents_that_cleaning_empties_are_left_out_of_texts_and_examples():
    task = Task("own", ("text",), ("x", "y"))
    texts = {"train": ["grain ship"] * 5 + ["rare", "grain"], "validation": ["the", "ship"], "test": ["grain"]}
    labels = {name: np.arange(len(split), dtype=np.int32) for name, split in texts.items()}
    own = Dataset(task, {name: Examples((split,), labels[name]) for name, split in texts.items()})
    corpus = make_corpus(own, "cleaned")
    assert corpus.texts == ["grain ship"] * 5 + ["grain", "ship", "grain"] and corpus.skipped == 2
    assert corpus.dataset.splits["train"].labels.tolist() == [0, 1, 2, 3, 4, 6]
    assert corpus.dataset.splits["validation"].labels.tolist() == [1] and corpus.n_train == 7
    texts["validation"] = ["the"]
    own = Dataset(task, {name: Examples((split,), labels[name][: len(split)]) for name, split in texts.items()})
    with pytest.raises(UserError, match="own: all documents of the split 'validation' are empty after cleaning"):
        make_corpus(own, "cleaned")
    own.splits["train"].texts[0][:] = ["the"] * 7
    own.splits["test"].texts[0][:] = ["the"]
    with pytest.raises(UserError, match="own: all 9 documents are empty after cleaning"):
        make_corpus(own, "cleaned")


def test_documents_that_come_later_get_words_of_the_same_kind():
    assert new_documents([["Is it (so)?", "Don't!"]], "cleaned") == ["is it \\( so \\) \\?", "do n't !"]
    assert new_documents([["is it ( so ) ?", "don't"]], "cleaned", is_clean=True) == ["is it \\( so \\) \\?", "don't"]
    assert new_documents([["A\u00e9 b."], ["C"]]) == ["ae b . c"]
    with pytest.raises(UserError, match="pairs of texts"):
        new_documents([["a"], ["b"]], "cleaned")
    with pytest.raises(UserError, match="unknown kind of words 'published'"):
        new_documents([["a"]], "published")


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="task 'rte' has pairs of texts, and 'cleaned' takes single ones; use 'basic'"):
        make_corpus(dataset("rte", 2, train=2, validation=1), "cleaned")
    with pytest.raises(UserError, match="unknown words 'clean' of a graph; did you mean 'cleaned'"):
        make_corpus(dataset("mr", train=2, validation=1), "clean")
    with pytest.raises(UserError, match="graphs of mrpc need its test examples with labels"):
        published_splits(dataset("mrpc", 2, train=30, validation=3))
    with pytest.raises(UserError, match="rte: 9 training examples are too few to split"):
        published_splits(dataset("rte", 2, train=9, validation=3))


def test_real_mrpc_keeps_all_but_one_of_its_validation_set():
    if not (DATA / "glue" / "MRPC").is_dir():
        pytest.skip(f"no {DATA / 'glue' / 'MRPC'}; set {DATA_DIR_VARIABLE}")
    official = load("mrpc", DATA)
    found = published_splits(official).splits
    assert {name: len(split) for name, split in found.items()} == {"train": 3669, "validation": 407, "test": 1725}
    known = set(zip(*official.splits["validation"].texts, strict=True))
    assert set(zip(*found["validation"].texts, strict=True)) <= known
