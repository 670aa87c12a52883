"""From a configuration to what an experiment is made of: data, model, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qtx import data, models
from qtx.analysis.amplify import amplify
from qtx.data.batching import Batches, bucket_lengths
from qtx.errors import UserError, near_misses
from qtx.export.packed import WEIGHTS_FILE, load_quantized
from qtx.methods.agnews_study import without_quantized_biases
from qtx.nn.bert import BertConfig
from qtx.nn.sites import SiteInfo, list_sites
from qtx.train import metrics
from qtx.train.loop import inputs, predict
from qtx.train.sharding import make_mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
VALIDATION = ("validation", "validation_mismatched")
"""What models are chosen on: the score is the mean over these splits."""
LABELLED = (*VALIDATION, "test")
"""What models are evaluated on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The parts that every kind of run shares.

    Attributes:
      config: the resolved configuration.
      dataset: texts and labels by split.
      tokenizer: of the checkpoint.
      pretrained: the checkpoint with its head.
      model: full-precision module, or that of a packed artifact.
      ranges: of a packed artifact; else empty.
      encoded: token ids by split.
      mesh: where to compute.
    """

    config: ConfigDict
    dataset: data.Dataset
    tokenizer: PreTrainedTokenizerBase
    pretrained: models.Pretrained
    model: nn.Module
    ranges: dict[str, Any]
    encoded: dict[str, Any]
    mesh: Mesh

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to."""
        return {"params": self.pretrained.params, "ranges": self.ranges}

    @property
    def task(self) -> data.Task:
        """What is to be predicted."""
        return self.dataset.task

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
            pad_id=self.pretrained.config.pad_token_id,
            epochs=epochs,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
        )

    def calibration_batches(self, count: int | None = None) -> list[tuple[np.ndarray, ...]]:
        """Returns the model's arguments for the first training batches (no filler rows, one padded length).

        Args:
          count: how many at most; None: `calibration.batches`.
        """
        c = self.config.calibration
        if c.batches < 1:
            raise UserError(f"calibration.batches is {c.batches}: calibration needs at least one batch")
        if c.batch_size > (examples := len(self.encoded["train"])):
            raise UserError(f"calibration.batch_size {c.batch_size} is more than the {examples} training examples")
        return self._first_batches(c.batches if count is None else count, c.batch_size)

    def rounding_batches(self) -> list[tuple[np.ndarray, ...]]:
        """Returns the model's arguments for the first training examples, as many as `adaround.examples`, in batches of 32."""
        examples = min(self.config.adaround.examples, len(self.encoded["train"]))
        if examples < 1:
            raise UserError(f"adaround.examples is {self.config.adaround.examples}: rounding needs at least one")
        size = min(32, examples)
        return self._first_batches(examples // size, size)

    def _first_batches(self, count: int, batch_size: int) -> list[tuple[np.ndarray, ...]]:
        encoded = self.encoded["train"]
        longest = bucket_lengths(encoded.lengths, self.config.data.max_length, 1, self.config.data.padding)
        found = Batches(encoded, batch_size, longest, seed=self.config.seed, pad_id=self.pretrained.config.pad_token_id)
        return [
            inputs(self.model, b) for b in (found[i] for i in range(found.batches_per_epoch)) if b["weights"].all()
        ][:count]

    def sites(self, *args: Any) -> dict[str, SiteInfo]:
        """Returns the sites of the model, for its arguments or, without any, for the example ones."""
        return list_sites(
            self.model, {"params": self.pretrained.params}, *(args or self.pretrained.family.example_inputs())
        )

    def evaluate(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED
    ) -> dict[str, float]:
        """Returns the task's metrics, with `score`, their mean on the validation splits.

        Validation metrics have plain names, those of MNLI's second validation split are under `mismatched_...`, and the
        score is the mean of both. Test metrics are under `test_...` and not in the score.

        Args:
          model: module to evaluate.
          variables: what it is applied to.
          splits: which splits to evaluate on; those that the data set lacks are left out.
        """
        return self.metrics(self.logits(model, variables, splits))

    def logits(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED
    ) -> dict[str, np.ndarray]:
        """Returns the logits `[N, C]` of splits; see `evaluate`."""
        found: dict[str, np.ndarray] = {}
        policy, draws = model.policy, None  # type: ignore[attr-defined]
        if self.config.quant.published_evaluation and policy is not None:
            draws = self.config.seed
            variables = {**variables, "params": without_quantized_biases(variables["params"], policy)}
        for split in splits:
            if split in self.encoded:
                batches = self.batches(split, self.config.data.eval_batch_size, shuffle=False, epochs=1)
                found[split] = predict(model, variables, batches, self.mesh, draws)
        return found

    def metrics(self, logits: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the metrics of what `logits` gave; see `evaluate`. Without a validation split there is no `score`."""
        prefixes = {"validation": "", "validation_mismatched": "mismatched_"}
        found: dict[str, float] = {}
        scores = []
        for split, its_logits in logits.items():
            prefix = prefixes.get(split, f"{split}_")
            predictions = metrics.predictions_from_logits(its_logits, self.task.is_regression)
            values = metrics.compute(self.task.metrics, predictions, self.encoded[split].labels)
            found |= {prefix + name: value for name, value in values.items()}
            if split in VALIDATION:
                scores.append(metrics.score(values))
        return found | ({"score": float(np.mean(scores))} if scores else {})


def load_dataset(config: ConfigDict) -> data.Dataset:
    """Loads the data set that a configuration names."""
    c = config.data
    if config.task == "table":
        return data.load_table(c.train, c.validation, tuple(c.text_columns), c.label_column)
    if config.task == "folder":
        return data.load_folder(c.train, seed=c.seed)
    return data.load(config.task, c.dir, c.seed, c.limit_train or None, c.limit_eval or None)


def from_nothing(section: ConfigDict) -> bool:
    """Whether the section `model` names an architecture, not a checkpoint."""
    return section.name in models.ARCHITECTURES


def family_and_sizes(section: ConfigDict) -> tuple[models.Family, models.ModelConfig]:
    """Returns the family and sizes of the model that the section `model` describes; no weights are read.

    Raises:
      UserError: if there is no such checkpoint, or fields do not fit the model or one another.
    """
    sizes = section.sizes.to_dict()
    if "num_labels" in sizes:
        raise UserError("model.sizes: num_labels is the task's; leave it out")
    for name in sizes:
        if name in section:
            raise UserError(f"model.sizes: {name} has a place of its own, model.{name}; set it there")
    if from_nothing(section):
        return models.architecture(section.name, section.start, **sizes)
    if section.start is not None:
        raise UserError(
            f"model.start is for models made from nothing, but {section.name} is a checkpoint; leave it out"
        )
    family, config = models.read_config(models.locate(section.name))
    for name, value in sizes.items():
        if getattr(config, name, None) != value:
            has = f"has {getattr(config, name)!r}" if hasattr(config, name) else "has no such field"
            raise UserError(f"model.sizes says {name} {value!r}, but the checkpoint {section.name} {has}; leave it out")
    return family, config


def setup(config: ConfigDict) -> Experiment:
    """Loads and checks everything that a run needs, cheapest first.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    if config.model.dtype not in DTYPES:
        raise UserError(f"unknown model.dtype {config.model.dtype!r}{near_misses(config.model.dtype, DTYPES)}")
    if config.model.pooling not in ("cls", "mean"):
        raise UserError(f"unknown model.pooling {config.model.pooling!r}; choose from 'cls', 'mean'")
    mesh = make_mesh(config.model_parallel)
    _, sizes = family_and_sizes(config.model)
    if not isinstance(sizes, BertConfig):
        raise UserError(f"model {config.model.name!r} translates; task {config.task!r} needs a model that classifies")
    directory = models.locate(config.model.tokenizer if from_nothing(config.model) else config.model.name)
    if config.data.max_length > sizes.max_positions:
        raise UserError(f"data.max_length {config.data.max_length} exceeds the model's {sizes.max_positions} positions")
    dataset = load_dataset(config)
    tokenizer = data.load_tokenizer(directory)
    data.check_tokenizer(tokenizer, sizes.vocab_size)
    model, ranges, pretrained = _load_model(config, directory, dataset.task)
    encoded = {name: data.encode(tokenizer, split, config.data.max_length) for name, split in dataset.splits.items()}
    return Experiment(config, dataset, tokenizer, pretrained, model, ranges, encoded, mesh)


def _load_model(
    config: ConfigDict, directory: Path, task: data.Task
) -> tuple[nn.Module, dict[str, Any], models.Pretrained]:
    dtype = DTYPES[config.model.dtype]
    if not from_nothing(config.model) and (directory / WEIGHTS_FILE).is_file():
        artifact = load_quantized(directory)
        assert isinstance(artifact.config, BertConfig)
        if artifact.config.num_labels != task.num_labels:
            raise UserError(
                f"{directory} has {artifact.config.num_labels} labels, task {task.name!r} has {task.num_labels}"
            )
        pretrained = models.Pretrained(artifact.family, artifact.config, artifact.params, (), directory)
        return artifact.model.clone(dtype=dtype), artifact.ranges, pretrained
    fields = ("hidden_dropout", "attention_dropout", "classifier_dropout")
    rates = {field: config.model[field] for field in fields if config.model[field] is not None}
    if config.model.fresh_head:
        rates["pooling"] = config.model.pooling
    if from_nothing(config.model):
        rates = config.model.sizes.to_dict() | rates
        pretrained = models.create(config.model.name, task.num_labels, config.seed, config.model.start, **rates)
    else:
        pretrained = models.load(str(directory), task.num_labels, config.model.fresh_head, config.seed, **rates)
    if config.model.amplify.sites:
        assert isinstance(pretrained.config, BertConfig)
        harder = amplify(pretrained.params, pretrained.config, **config.model.amplify)
        pretrained = dataclasses.replace(pretrained, params=harder)
    return pretrained.family.module(config=pretrained.config, dtype=dtype), {}, pretrained
