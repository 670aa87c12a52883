"""From a task's data set to the documents of a text graph: which documents, in which order, and their words."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qtx.data.cleaning import basic_words, clean_corpus, clean_string, with_backslashes
from qtx.data.sources import Dataset, Examples
from qtx.data.textgcn import published_order, validation_size
from qtx.errors import UserError, near_misses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("basic", "cleaned")
WORDS = ("published", *KINDS)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of a graph.

    Attributes:
      dataset: `train`, `validation` and, if there is one, `test`: row for row the documents, in that order.
      texts: their words, joined by blanks.
      skipped: documents that were left out because no word was left of them.
    """

    dataset: Dataset
    texts: list[str]
    skipped: int

    @property
    def n_train(self) -> int:
        """Documents for training and validation; the others are for testing."""
        return len(self.dataset.splits["train"]) + len(self.dataset.splits["validation"])


def make_corpus(dataset: Dataset, words: str = "published", tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """Returns the documents of a data set's splits `train`, `validation` and `test`; see also `published_splits`.

    Args:
      dataset: the data set.
      words: `published`: the cleaned words of TextGCN's corpora, `basic` for all else; `basic`: BERT's words; `cleaned`: as
        TextGCN cleans, for single texts. The splits keep the texts of the data set, whatever the words of the graph are.
      tokenizer: see `cleaning.basic_words`.

    Raises:
      UserError: an unknown kind of words, pairs of texts where single ones are needed, no document with words.
    """
    kind = words_kind(dataset, words)
    splits = {name: dataset.splits[name] for name in ("train", "validation", "test") if name in dataset.splits}
    columns = [list(itertools.chain(*parts)) for parts in zip(*(split.texts for split in splits.values()), strict=True)]
    if kind == "basic":
        texts = basic_words(columns, tokenizer)
    elif dataset.cleaning is not None:  # TextGCN's corpora are clean when they are loaded
        texts = [with_backslashes(text) for text in columns[0]]
    else:
        texts = clean_corpus(columns[0])
    has_words = np.array([bool(text) for text in texts])
    if not has_words.any():
        raise UserError(f"{dataset.task.name}: all {len(texts)} documents are empty after cleaning; check the texts")
    kept: dict[str, Examples] = {}
    start = 0
    for name, split in splits.items():
        rows = np.flatnonzero(has_words[start : start + len(split)])
        start += len(split)
        if not len(rows):
            raise UserError(f"{dataset.task.name}: all documents of the split {name!r} are empty after cleaning")
        kept[name] = split.take(rows)
    return Corpus(dataclasses.replace(dataset, splits=kept), [text for text in texts if text], int(np.sum(~has_words)))


def words_kind(dataset: Dataset, words: str) -> str:
    """Returns how documents of a data set get their words, one of `KINDS`, if `words` is as in `make_corpus`.

    Raises:
      UserError: an unknown kind of words, or pairs of texts where single ones are needed.
    """
    if words not in WORDS:
        raise UserError(f"unknown words {words!r} of a graph{near_misses(words, WORDS)}")
    if words == "published":
        return "basic" if dataset.cleaning is None else "cleaned"
    task = dataset.task
    if words == "cleaned" and len(task.columns) > 1:
        raise UserError(f"task {task.name!r} has pairs of texts, and 'cleaned' takes single ones; use 'basic'")
    return words


def new_documents(
    columns: Sequence[list[str]],
    kind: str = "basic",
    tokenizer: PreTrainedTokenizerBase | None = None,
    is_clean: bool = False,
) -> list[str]:
    """Returns the words of documents that come later, as `text_graph.attach` takes them.

    Which words are rare, or stop words, the graph's vocabulary says.

    Args:
      columns: one list of M texts for each text column of the task, as its data set has them.
      kind: one of `KINDS`: that of the graph, from `words_kind`.
      tokenizer: as in `make_corpus`.
      is_clean: the data set's texts are cleaned, and so are these: `Dataset.cleaning`.

    Raises:
      UserError: an unknown kind, or pairs of texts where single ones are needed.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of words {kind!r}{near_misses(kind, KINDS)}")
    if kind == "cleaned" and len(columns) > 1:
        raise UserError("these are pairs of texts, and a graph of cleaned words takes single ones")
    if kind == "basic":
        return basic_words(columns, tokenizer)
    return [with_backslashes(text) if is_clean else clean_string(text) for text in columns[0]]


def published_splits(dataset: Dataset) -> Dataset:
    """Returns a data set with the splits that text graphs of it were published with.

    TextGCN's corpora, and other sets that are no part of GLUE and have all three splits, stay as they are. Else validation
    examples become the test split, and the last tenth of the shuffled training examples are for validation. Of mrpc, whose
    test labels are public, test examples are the test split, and validation examples come after the training examples before
    both are shuffled apart; as the last tenth is less than they are, a few of them become training examples.

    Raises:
      UserError: mrpc without its test split, or too few examples.
    """
    task, splits = dataset.task, dataset.splits
    in_glue = (task.tfds or "").startswith("glue/")
    if "test" in splits and not in_glue:
        return dataset
    test_name = "test" if task.name == "mrpc" else "validation"
    if test_name not in splits:
        raise UserError(
            f"graphs of {task.name} need its test examples with labels: put test_labelled.tsv beside train.tsv"
        )
    train, test = splits["train"], splits[test_name]
    if task.name == "mrpc":
        train = _joined(train, splits["validation"])
    is_train = [True] * len(train) + [False] * len(test)
    train_rows, test_rows = published_order(is_train, validation_last=task.name == "mrpc")
    held_out = validation_size(len(train_rows))
    if not held_out:
        raise UserError(f"{task.name}: {len(train)} training examples are too few to split; at least 10 are needed")
    rows = {"train": train_rows[:-held_out], "validation": train_rows[-held_out:], "test": test_rows}
    everything = _joined(train, test)
    return dataclasses.replace(dataset, splits={name: everything.take(np.array(part)) for name, part in rows.items()})


def _joined(first: Examples, second: Examples) -> Examples:
    texts = tuple(a + b for a, b in zip(first.texts, second.texts, strict=True))
    return Examples(texts, np.concatenate([first.labels, second.labels]))
