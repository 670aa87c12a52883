"""The corpora of TextGCN (Yao, Mao and Luo 2019): 20ng, R8, R52, ohsumed and mr, with the published splits.

`NAME.txt` has a line for each document, `name<TAB>split<TAB>label`; its text is on the same line of `corpus/NAME.txt`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qtx.data.cleaning import Cleaning, clean_corpus, without_backslashes
from qtx.data.reading import first_file, places, read_bytes
from qtx.data.tasks import Task
from qtx.errors import UserError, near_misses, warn

CORPORA = ("20ng", "R8", "R52", "ohsumed", "mr")
_KEEP_ALL = ("mr",)  # of which no stop word and no rare word is dropped
_SHUFFLE_SEED = 0
_VALIDATION_SHARE = 0.1


def load_split_texts(
    task: Task, data_dir: str | os.PathLike[str] | None = None
) -> tuple[dict[str, tuple[list[str], np.ndarray]], Cleaning]:
    """Loads a corpus, cleaned, with the published splits.

    The files (plain or .gz) are in `<data_dir>/textgcn/` or `<data_dir>/`, as the published repositories have them. A cleaned
    corpus, `corpus/NAME.clean.txt`, is taken where it is there; else the raw one is cleaned, to the same bytes. Documents that
    are empty after cleaning are left out before the split, as published, and standard error says so.

    Args:
      task: one of `CORPORA`.
      data_dir: where the files are; the environment variable QTX_DATA_DIR when not given.

    Returns:
      Texts, without backslashes, and [N] int32 class ids of `train`, `validation` and `test`; and how they were cleaned.

    Raises:
      UserError: missing or damaged files, an unknown label, nothing left of a split.
    """
    folder = _folder(task, data_dir)
    path = _need(folder, f"{task.name}.txt")
    labels, is_train = _read_index(path, task)
    texts, source = _read_texts(folder, task)
    if len(texts) != len(labels):
        raise UserError(f"{path} lists {len(labels)} documents but {source} has {len(texts)} lines; fetch both again")
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        raise UserError(f"{source}: all {len(texts)} documents are empty after cleaning; check the file")
    if skipped := len(texts) - len(kept):
        first = texts.index("") + 1
        warn(f"{source}: {skipped} of {len(texts)} documents, the first on line {first}, are left out: no word is left")
    train, test = published_order([is_train[i] for i in kept])
    size = validation_size(len(train))
    parts = {"train": train[: len(train) - size], "validation": train[len(train) - size :], "test": test}
    found = {}
    for name, positions in parts.items():
        if not positions:
            raise UserError(f"{path}: no documents for the split {name!r}; at least 10 train and 1 test are needed")
        rows = [kept[i] for i in positions]
        found[name] = ([without_backslashes(texts[i]) for i in rows], np.array([labels[i] for i in rows], np.int32))
    words = None if task.name in _KEEP_ALL else frozenset(word for text in texts for word in text.split())
    return found, Cleaning(words)


def validation_size(train_documents: int) -> int:
    """Returns how many of the training documents, the last in `published_order`, are for validation."""
    return int(_VALIDATION_SHARE * train_documents)


def published_order(is_train: Sequence[bool], validation_last: bool = False) -> tuple[list[int], list[int]]:
    """Shuffles documents as published: Python's generator, seed 0, training documents first.

    Args:
      is_train: [D] whether each document is for training (validation included) or for testing.
      validation_last: the last tenth of the training documents are the published validation set, and stay the last tenth:
        they and the rest are shuffled apart (mrpc).

    Returns:
      Positions of training documents, of which the last `validation_size` are for validation, and of test documents.
    """
    generator = random.Random(_SHUFFLE_SEED)
    train = [i for i, flag in enumerate(is_train) if flag]
    test = [i for i, flag in enumerate(is_train) if not flag]
    border = len(train) - validation_size(len(train)) if validation_last else len(train)
    parts = [train[:border], train[border:], test] if validation_last else [train, test]
    for part in parts:
        generator.shuffle(part)
    return sum(parts[:-1], []), parts[-1]


def read_raw(path: Path) -> list[str]:
    r"""Reads the documents of a raw or cleaned corpus, one a line, stripped.

    Only `\n` ends a line: 20ng holds carriage returns inside documents. Bytes are Latin-1.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    lines = read_bytes(path).split(b"\n")
    if not lines[-1]:
        lines.pop()  # the line end of the last document
    return [line.strip().decode("latin-1") for line in lines]


def _folder(task: Task, data_dir: str | os.PathLike[str] | None) -> Path:
    searched = places(data_dir, ("textgcn", "."))
    folder = next((path for path in searched if first_file(path, [f"{task.name}.txt"])), None)
    if folder is None:
        looked = f"no {task.name}.txt in {' or '.join(map(str, searched))}" if searched else "no data directory is set"
        raise UserError(
            f"{task.name}: {looked}; point --data_dir or QTX_DATA_DIR at a folder with textgcn/{task.name}.txt and "
            f"textgcn/corpus/{task.name}.txt, as in the repository of TextGCN"
        )
    return folder


def _need(folder: Path, *names: str) -> Path:
    path = first_file(folder, names)
    if path is None:
        raise UserError(f"missing file {' or '.join(f'{folder / name}[.gz]' for name in names)}; put it there")
    return path


def _read_index(path: Path, task: Task) -> tuple[list[int], list[bool]]:
    """Returns the class id of every document, and whether it is for training."""
    ids = {name: i for i, name in enumerate(task.labels)}
    labels, is_train = [], []
    for number, line in enumerate(read_raw(path), 1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise UserError(f"{path}, line {number}: expected name, split and label, found {len(fields)} fields")
        _, split, label = fields
        if label not in ids:
            raise UserError(f"{path}, line {number}: unknown label {label!r}{near_misses(label, task.labels)}")
        if ("train" in split) == ("test" in split):
            raise UserError(
                f"{path}, line {number}: the split {split!r} must name one of train and test; repair the line"
            )
        labels.append(ids[label])
        is_train.append("train" in split)
    return labels, is_train


def _read_texts(folder: Path, task: Task) -> tuple[list[str], Path]:
    """Returns the cleaned documents, and the file that they are from."""
    source = _need(folder, f"corpus/{task.name}.clean.txt", f"corpus/{task.name}.txt")
    texts = read_raw(source)
    is_clean = source.name.removesuffix(".gz").endswith(".clean.txt")
    return texts if is_clean else clean_corpus(texts, keep_all=task.name in _KEEP_ALL), source
