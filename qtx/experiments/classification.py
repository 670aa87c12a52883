"""Experiments on texts with labels: classification and regression."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from qtx import data, models
from qtx.data.batching import Batches, bucket_lengths
from qtx.data.corpus import published_splits
from qtx.errors import UserError
from qtx.experiments.config import bittransgnn
from qtx.experiments.experiment import (
    LABELLED,
    VALIDATION,
    Experiment,
    check_model,
    family_and_sizes,
    from_nothing,
    load_model,
)
from qtx.experiments.graph_part import warn_of_unused
from qtx.nn.bert import BertConfig
from qtx.train import metrics
from qtx.train.loop import predict

_PREFIXES = {"validation": "", "validation_mismatched": "mismatched_"}
"""Of the metrics of a split; of any other it is its name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(Experiment):
    """An experiment on a task of `qtx.data.tasks`; see `Experiment` for the other attributes.

    Attributes:
      dataset: texts and labels by split.
    """

    dataset: data.Dataset

    @classmethod
    def make(cls, config: ConfigDict) -> Classification:
        """Loads and checks everything that a run without a graph needs: see `prepare`."""
        warn_of_unused(config.bittransgnn, bittransgnn())
        return prepare(config)

    @property
    def task(self) -> data.Task:
        """What is to be predicted."""
        return self.dataset.task

    @property
    def pad_id(self) -> int:
        """The token id to pad with."""
        sizes = self.pretrained.config
        assert isinstance(sizes, BertConfig), "only models of texts are padded"
        return sizes.pad_token_id

    @property
    def labels(self) -> tuple[str, ...]:
        return self.task.labels

    def alone(self) -> Classification:
        """Returns the experiment on the encoder with its classifier, without the graph that a model may have: here itself."""
        return self

    def save_beside(self, directory: Path) -> None:
        if self.dataset.cleaning is not None:
            self.dataset.cleaning.save(directory)

    def batches(self, split: str, batch_size: int, shuffle: bool, epochs: int | None, seed: int = 0) -> Batches:
        """Returns the batches of a split."""
        encoded, c = self.encoded[split], self.config.data
        buckets = bucket_lengths(encoded.lengths, c.max_length, c.buckets if shuffle else c.eval_buckets, c.padding)
        return Batches(
            encoded,
            batch_size,
            buckets,
            seed=seed,
            shuffle=shuffle,
            pad_id=self.pad_id,
            epochs=epochs,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def first_batches(self, count: int, batch_size: int, split: str = "train") -> Sequence[Mapping[str, np.ndarray]]:
        encoded = self.encoded[split]
        longest = bucket_lengths(encoded.lengths, self.config.data.max_length, 1, self.config.data.padding)
        found = Batches(encoded, batch_size, longest, seed=self.config.seed, pad_id=self.pad_id)
        return [b for b in (found[i] for i in range(found.batches_per_epoch)) if b["weights"].all()][:count]

    def evaluate(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED, quick: bool = False
    ) -> dict[str, float]:
        """Returns the task's metrics, with `score`, their mean on the validation splits.

        Validation metrics have plain names, those of MNLI's second validation split are under `mismatched_...`, and the
        score is the mean of both. Test metrics are under `test_...` and not in the score.
        """
        del quick
        return self.metrics(self.logits(model, variables, splits))

    def logits(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED
    ) -> dict[str, np.ndarray]:
        """Returns the logits `[N, C]` of splits; see `evaluate`."""
        return self._outputs(model, variables, splits, "logits")

    def pooled(self, model: nn.Module, variables: Mapping[str, Any], split: str) -> np.ndarray:
        """Returns what the classifier of the encoder sees of a split's examples, `[N, D]`."""
        return self._outputs(model, variables, [split], "pooled")[split]

    def _outputs(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str], output: str
    ) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        variables, draws = self.published_form(model, variables)
        if draws is None and self.config.quant.evaluation_rounding == "drawn":
            model, variables = self.frozen(model, variables)
        for split in splits:
            if split in self.encoded:
                batches = self.batches(split, self.config.data.eval_batch_size, shuffle=False, epochs=1)
                found[split] = predict(model, variables, batches, self.mesh, draws, output)
        return found

    def check_teacher(self, name: str, directory: Path, sizes: models.ModelConfig) -> None:
        """Raises a `UserError` if a teacher reads something else than the model in the batches of the run.

        Args:
          name: of the teacher, for the message.
          directory: of its checkpoint.
          sizes: of the teacher.
        """
        del sizes
        if data.load_tokenizer(directory).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"teacher.name: the vocabulary of {name} is not that of {self.config.model.name}; both must read the same ids"
            )

    def metric_names(self, splits: Sequence[str]) -> tuple[str, ...]:
        prefixes = [_PREFIXES.get(split, f"{split}_") for split in splits if split in self.encoded]
        names = (*self.task.metrics, *self.task.also)
        return ("score", *(f"{prefix}{name}" for prefix in prefixes for name in names))

    def metrics(self, logits: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of what `logits` gave; see `evaluate`. Without a validation split there is no `score`."""
        found: dict[str, float] = {}
        scores = []
        for split, its_logits in logits.items():
            prefix = _PREFIXES.get(split, f"{split}_")
            predictions = metrics.predictions_from_logits(its_logits, self.task.is_regression)
            values = metrics.compute((*self.task.metrics, *self.task.also), predictions, self.encoded[split].labels)
            found |= {prefix + name: value for name, value in values.items()}
            if split in VALIDATION:
                scores.append(metrics.score({name: values[name] for name in self.task.metrics}))
        return found | ({"score": float(np.mean(scores))} if scores else {})


def prepare(config: ConfigDict, dataset: data.Dataset | None = None) -> Classification:
    """Loads and checks everything that a run needs, cheapest first.

    Args:
      config: the configuration.
      dataset: what to take for the one that it names.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    if config.task not in ("table", "folder"):
        data.get_task(config.task)  # a slip of the pen there is no fault of the model
    mesh = check_model(config.model, config.model_parallel)
    _, sizes = family_and_sizes(config.model)
    if not isinstance(sizes, BertConfig):
        raise UserError(
            f"task {config.task!r} needs a model that classifies texts, unlike {config.model.name!r}; "
            "set --config.task to a task that the model is for"
        )
    directory = models.locate(config.model.tokenizer if from_nothing(config.model) else config.model.name)
    if config.data.max_length > sizes.max_positions:
        raise UserError(f"data.max_length {config.data.max_length} exceeds the model's {sizes.max_positions} positions")
    dataset = dataset or load_dataset(config)
    tokenizer = data.load_tokenizer(directory)
    data.check_tokenizer(tokenizer, sizes.vocab_size)
    model, ranges, pretrained = load_model(config, dataset.task.num_labels)
    length = config.data.max_length
    encoded = {name: data.encode(tokenizer, split, length) for name, split in dataset.splits.items()}
    return Classification(config, tokenizer, pretrained, model, ranges, encoded, mesh, dataset)


def load_dataset(config: ConfigDict) -> data.Dataset:
    """Loads the data set that a configuration names, with its augmented training examples if it names any."""
    c = config.data
    if c.augmented and c.limit_train:
        raise UserError(
            f"data.limit_train is {c.limit_train}, but data.augmented holds the training examples, which are all taken; leave "
            "it at 0, or give it to launch/augment.py"
        )
    found = load_originals(config)
    if not c.augmented:
        return found
    splits = found.splits | {"train": data.load_augmented(found.task, c.augmented)}
    return dataclasses.replace(found, splits=splits)


def load_originals(config: ConfigDict) -> data.Dataset:
    """Loads the data set that a configuration names."""
    c = config.data
    if config.task == "table":
        found = data.load_table(c.train, c.validation, tuple(c.text_columns), c.label_column)
    elif config.task == "folder":
        found = data.load_folder(c.train, seed=c.seed)
    else:
        found = data.load(config.task, c.dir, c.seed, c.limit_train or None, c.limit_eval or None)
    if c.splits not in ("own", "graph"):
        raise UserError(f"unknown data.splits {c.splits!r}; choose from 'own', 'graph'")
    if c.splits == "graph":
        found = published_splits(found)
    return data.with_label_order(found, c.label_order) if c.label_order else found
