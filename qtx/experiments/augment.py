"""Augmenting a task's training data: a masked language model and word vectors in, `train_aug.tsv` out.

`--config.data.augmented=WORKDIR` then trains on it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qtx import data, models
from qtx.data.augmentation import COPIES, Augmentation, Vectors, check_word_pieces, read_vectors, require_vectors
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import load_originals
from qtx.files import checksum, write_text
from qtx.methods.augmentation import SHARD, Augmenter, MaskedWords, NearestWords, write_augmented
from qtx.train.logging import progress
from qtx.train.report import Table, save_config
from qtx.train.sharding import make_mesh

FILE = "train_aug.tsv"
_RECORD = "augmentation.json"


def augment(
    config: ConfigDict,
    workdir: str | Path,
    masked_lm: str,
    vectors: str,
    settings: Augmentation | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Writes `workdir/train_aug.tsv`, the augmented training examples in the layout of the task's official file.

    When it was interrupted, the same call goes on; when it is done already, it only says so.

    Args:
      config: names the task and its data; see `qtx.experiments.config`.
      workdir: run directory, created if needed; gets `augmentation.json`, what the file was made of, too.
      masked_lm: a checkpoint of `BertForMaskedLM`; see `qtx.models.locate`.
      vectors: a file of word vectors; see `qtx.data.augmentation.read_vectors`.
      settings: how; None: as published, with the task's number of copies and the seed of the configuration.
      batch_size: rows of a batch of the masked language model.

    Returns:
      What `augmentation.json` says.

    Raises:
      UserError: on anything that is missing or does not fit, before anything is computed.
    """
    workdir, started = Path(workdir), time.perf_counter()
    settings = settings or default_settings(config)
    _check(config, masked_lm, vectors, batch_size)
    directory, c = models.locate(masked_lm), config.data
    rows = data.training_rows(load_originals(config), c.dir, c.seed, c.limit_train or None)
    found = models.load_masked_lm(masked_lm)
    tokenizer = data.load_tokenizer(directory)
    check_word_pieces(tokenizer, masked_lm)
    data.check_tokenizer(tokenizer, found.config.vocab_size)  # type: ignore[union-attr]
    words = read_vectors(vectors)
    made_of = {
        "task": config.task,
        **dataclasses.asdict(settings),
        "masked_lm": masked_lm,
        "vectors": vectors,
        "examples": len(rows),
        "checksum": made_from(rows, settings, found, tokenizer, words),
    }
    save_config(config, workdir)
    path = workdir / _RECORD
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("checksum") != made_of["checksum"] or not (workdir / FILE).is_file():
        path.unlink(missing_ok=True)  # of another file, which is about to be replaced
        mesh = make_mesh()
        model = found.family.module(config=found.config)
        guesses = MaskedWords(model, found.params, tokenizer, mesh, batch_size)
        augmenter = Augmenter(settings, tokenizer, guesses, NearestWords(words, mesh))
        cache = workdir / f"parts_{made_of['checksum']}"
        done = min(SHARD * len(list(cache.glob("*.tsv"))), len(rows))
        with progress(len(rows), f"augment {config.task}", done, examples_per_step=1) as bar:
            bar.update(done)
            lines = write_augmented(workdir / FILE, rows, augmenter, cache, bar.update)
        record = made_of | {"rows": lines, "seconds": round(time.perf_counter() - started, 1)}
        write_text(path, json.dumps(record, indent=2) + "\n")
        shutil.rmtree(cache)
    columns = ["task", "examples", "copies", "rows", "seconds"]
    table = Table(columns, [[record[name] for name in columns]], title=str(workdir / FILE))
    table.print()
    table.save(workdir, "report")
    return record


def made_from(
    rows: data.TrainingRows, settings: Augmentation, found: models.Pretrained, tokenizer: Any, vectors: Vectors
) -> str:
    """Returns a name for all that decides what comes out; see `qtx.files.checksum`."""
    texts = json.dumps([rows.rows, vectors.words, tokenizer.backend_tokenizer.to_str()])
    settings_of = repr((settings, rows.names, rows.texts, found.config))
    return checksum((settings_of, texts, vectors.table, *map(np.asarray, jax.tree.leaves(found.params))))


def default_settings(config: ConfigDict, **changes: Any) -> Augmentation:
    """Returns the published settings for a task, some of them changed."""
    copies = {"copies": COPIES[config.task]} if config.task in COPIES else {}
    return Augmentation(**{"seed": config.seed} | copies | changes)


def _check(config: ConfigDict, masked_lm: str, vectors: str, batch_size: int) -> None:
    """Raises a `UserError` for what can be seen without reading a file."""
    tasks = (*data.TASKS, "table", "folder")
    if config.task not in tasks:
        raise UserError(
            f"task {config.task!r} has no texts with labels that could be augmented{near_misses(config.task, tasks)}"
        )
    if config.data.augmented:
        raise UserError("data.augmented is for training; leave it out here, where the original examples are augmented")
    if not masked_lm:
        raise UserError(
            "augmentation needs a masked language model: give --masked_lm, a checkpoint of BertForMaskedLM such as "
            "bert-base-uncased"
        )
    if not vectors:
        raise UserError(
            "augmentation needs word vectors: give --vectors, a file such as glove.840B.300d.txt (.gz will do)"
        )
    require_vectors(vectors)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if jax.process_count() > 1:
        raise UserError("augmentation runs on one host; leave --multihost out")
