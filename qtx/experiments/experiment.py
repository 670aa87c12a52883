"""What an experiment is made of: model, data and mesh, and what every kind of run asks of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from qtx import models
from qtx.analysis.amplify import amplify
from qtx.errors import UserError, near_misses, warn
from qtx.experiments.from_config import policy_from
from qtx.export.packed import WEIGHTS_FILE, load_quantized, save_quantized
from qtx.export.packed_file import packable
from qtx.methods.agnews_study import replaced_layers, without_quantized_biases
from qtx.methods.calibrate import with_frozen_weights
from qtx.models.text_classifier import started_modules
from qtx.nn.bert import BertConfig
from qtx.nn.sites import SiteInfo, list_sites
from qtx.quant.policy import Policy
from qtx.train.phase import inputs, task_loss
from qtx.train.sharding import make_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
VALIDATION = ("validation", "validation_mismatched")
"""What models are chosen on: the score is the mean over these splits."""
LABELLED = (*VALIDATION, "test")
"""What models are evaluated on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment(abc.ABC):
    """The parts that every kind of run shares.

    Attributes:
      config: the resolved configuration.
      tokenizer: of the checkpoint; has `save_pretrained(directory)`.
      pretrained: the checkpoint with its head.
      model: full-precision module, or that of a packed artifact.
      ranges: of a packed artifact; else empty.
      encoded: token ids by split.
      mesh: where to compute.
    """

    config: ConfigDict
    tokenizer: Any
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
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, which a saved model keeps; () where there are none."""
        return ()

    def frozen(self, model: nn.Module, variables: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """Returns a module and its variables with quantized weights on their grids, as `quant` wants them evaluated."""
        policy = model.policy  # type: ignore[attr-defined]
        if policy is None or not policy.weights:
            return model, dict(variables)
        drawn = self.config.quant.evaluation_rounding == "drawn"
        key = jax.random.key(self.config.seed) if drawn else None
        model, params = with_frozen_weights(model, self.sites(), variables["params"], variables["ranges"], key)
        return model, {**variables, "params": params}

    def published_form(self, model: nn.Module, variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], int | None]:
        """Returns what is evaluated with `quant.published_evaluation`: variables without the biases of quantized layers, and
        the seed of rounding, which is drawn in every call. Else, or without a policy, the variables as they are and None."""
        policy = model.policy  # type: ignore[attr-defined]
        if policy is None or not self.config.quant.published_evaluation:
            return variables, None
        params = without_quantized_biases(variables["params"], policy)
        return {**variables, "params": params}, self.config.seed

    @property
    def measured(self) -> str:
        """How metrics were computed, where their names do not say it; the title of result tables."""
        return ""

    def metric_names(self, splits: Sequence[str]) -> tuple[str, ...]:
        """Returns what an evaluation of some splits gives; empty where that is not known before."""
        del splits
        return ()

    def training(self) -> dict[str, Any]:
        """Returns the fields of every `Phase` that are up to the kind of experiment: the objective, for one."""
        return {"objective": task_loss}

    def check_packable(self) -> None:
        """Raises a `UserError` if the model is none that a packed artifact holds whole."""
        return

    def save(self, workdir: Path, trained: nn.Module, policy: Policy | None, variables: Mapping[str, Any]) -> None:
        """Writes the float master as `model/` and, after a quantized phase, the packed artifact as `quantized/`.

        Weights on a published grid without integers (`qtx.export.packed.packable`) are not packed: there is no artifact then.

        Args:
          workdir: run directory.
          trained: the module of the last phase.
          policy: as it was asked for; None: the last phase was not quantized.
          variables: what training ended with.
        """
        family, sizes = self.pretrained.family, self.pretrained.config
        models.save(workdir / "model", family, sizes, variables["params"], self.tokenizer, self.labels)
        self.save_beside(workdir / "model")
        if policy is None:
            return
        if not packable(policy):
            warn(
                f"no {workdir / 'quantized'} is written: weights on these grids are no integers; model/ has them as floats"
            )
            return
        if self.config.quant.published_evaluation:
            warn(
                f"{workdir / 'quantized'} holds weights that were rounded once; with quant.published_evaluation the scores of "
                "the run are of weights drawn in every call"
            )
        variables, _ = self.published_form(trained, variables)
        params = variables["params"]
        if self.config.quant.evaluation_rounding == "drawn":  # what is packed is the draw that was evaluated
            params = self.frozen(trained, variables)[1]["params"]
        chosen = trained.policy  # type: ignore[attr-defined]
        kept = self.tokenizer, self.labels
        save_quantized(workdir / "quantized", family, sizes, chosen, params, variables["ranges"], *kept)
        self.save_beside(workdir / "quantized")

    def save_beside(self, directory: Path) -> None:
        """Writes into a saved model's directory what else is needed to give it new examples: of most experiments nothing."""
        return

    @abc.abstractmethod
    def batches(self, split: str, batch_size: int, shuffle: bool, epochs: int | None, seed: int = 0) -> Any:
        """Returns the batches of a split, with the interface of `qtx.data.batching.Batches`."""

    @abc.abstractmethod
    def evaluate(
        self, model: nn.Module, variables: Mapping[str, Any], splits: Sequence[str] = LABELLED, quick: bool = False
    ) -> dict[str, float]:
        """Returns the task's metrics, with `score`, the one that models are chosen by, of the validation splits.

        Validation metrics have plain names, those of another split are under `<split>_...` and not in the score.

        Args:
          model: module to evaluate.
          variables: what it is applied to.
          splits: which splits to evaluate on; those that the data set lacks are left out.
          quick: while training: cheaper, where a task has such a way.
        """

    @abc.abstractmethod
    def first_batches(self, count: int, batch_size: int) -> Sequence[Mapping[str, np.ndarray]]:
        """Returns the first batches of training examples in an order drawn with the seed: no filler rows, one shape."""

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
        return self._arguments(c.batches if count is None else count, c.batch_size)

    def rounding_batches(self) -> list[tuple[np.ndarray, ...]]:
        """Returns the model's arguments for the first training examples, as many as `adaround.examples`, in batches of 32."""
        examples = min(self.config.adaround.examples, len(self.encoded["train"]))
        if examples < 1:
            raise UserError(f"adaround.examples is {self.config.adaround.examples}: rounding needs at least one")
        size = min(32, examples)
        return self._arguments(examples // size, size)

    def _arguments(self, count: int, batch_size: int) -> list[tuple[np.ndarray, ...]]:
        return [inputs(self.model, batch) for batch in self.first_batches(count, batch_size)]

    def sites(self, *args: Any) -> dict[str, SiteInfo]:
        """Returns the sites of the model, for its arguments or, without any, for the example ones."""
        return list_sites(
            self.model,
            {"params": self.pretrained.params},
            *(args or self.pretrained.family.example_inputs(self.pretrained.config)),
        )


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
        family, config = models.architecture(section.name, section.start, **sizes)
        return family, dataclasses.replace(config, **_head(section, config))
    if section.start is not None:
        raise UserError(
            f"model.start is for models made from nothing, but {section.name} is a checkpoint; leave it out"
        )
    directory = models.locate(section.name)
    family, config = models.read_config(directory)
    packed = (directory / WEIGHTS_FILE).is_file()
    changed = {} if packed else _changed(section, config)
    for name, value in sizes.items():
        if name not in changed and getattr(config, name, None) != value:
            has = f"has {getattr(config, name)!r}" if hasattr(config, name) else "has no such field"
            raise UserError(f"model.sizes says {name} {value!r}, but the checkpoint {section.name} {has}; leave it out")
    return family, dataclasses.replace(config, **changed, **({} if packed else _head(section, config)))


def _head(section: ConfigDict, config: models.ModelConfig) -> dict[str, Any]:
    """Returns what `model` says of a new head, as far as a model of this kind has a choice."""
    known = {field.name for field in dataclasses.fields(config)} if section.fresh_head else ()
    return {name: section[name] for name in ("pooling", "pooler") if name in known}


def _changed(section: ConfigDict, config: models.ModelConfig) -> dict[str, Any]:
    """Returns the fields in `model.sizes` that a checkpoint with this configuration may be given another value of."""
    changeable = getattr(config, "changeable", ())
    return {name: value for name, value in section.sizes.items() if name in changeable}


def check_model(section: ConfigDict, model_parallel: int) -> Mesh:
    """Checks the section `model` without reading a file, and returns the mesh to compute on.

    Raises:
      UserError: on a dtype or pooling that does not exist, or devices that do not divide.
    """
    if section.dtype not in DTYPES:
        raise UserError(f"unknown model.dtype {section.dtype!r}{near_misses(section.dtype, DTYPES)}")
    if section.pooling not in ("cls", "mean"):
        raise UserError(f"unknown model.pooling {section.pooling!r}; choose from 'cls', 'mean'")
    return make_mesh(model_parallel)


def load_model(
    config: ConfigDict, num_labels: int | None, **sizes: Any
) -> tuple[nn.Module, dict[str, Any], models.Pretrained]:
    """Loads or makes the model that the section `model` describes.

    Args:
      config: the configuration.
      num_labels: width of the head; None: the model has no labels.
      **sizes: of a model from nothing, beside those in the section.

    Returns:
      The module (of a packed artifact: with its policy), the ranges of an artifact, and the checkpoint.
    """
    dtype = DTYPES[config.model.dtype]
    directory = None if from_nothing(config.model) else models.locate(config.model.name)
    if directory is not None and (directory / WEIGHTS_FILE).is_file():
        if config.model.layers:
            raise UserError(f"model.layers: {config.model.name} is a packed artifact; give a float checkpoint")
        artifact = load_quantized(directory)
        theirs = getattr(artifact.config, "num_labels", None)
        if theirs != num_labels:
            raise UserError(f"{directory} has {theirs} labels, task {config.task!r} has {num_labels}")
        pretrained = models.Pretrained(artifact.family, artifact.config, artifact.params, (), directory)
        return artifact.model.clone(dtype=dtype), artifact.ranges, pretrained
    fields = ("hidden_dropout", "attention_dropout", "classifier_dropout")
    rates = {field: config.model[field] for field in fields if config.model[field] is not None}
    if num_labels is not None:
        rates |= _head(config.model, family_and_sizes(config.model)[1])
    if directory is None:
        if config.model.layers:
            raise UserError(
                f"model.layers is for checkpoints, but {config.model.name} is made from nothing; leave it out"
            )
        rates = config.model.sizes.to_dict() | sizes | rates
        pretrained = models.create(config.model.name, num_labels, config.seed, config.model.start, **rates)
        if config.quant.replaced_layers:
            pretrained = _with_replaced_layers(pretrained, config)
    else:
        rates |= _changed(config.model, models.read_config(directory)[1])
        pretrained = models.load(str(directory), num_labels, config.model.fresh_head, config.seed, **rates)
    if config.model.layers:
        pretrained = models.keep_layers(pretrained, tuple(config.model.layers))
    if config.model.amplify.sites:
        if not isinstance(pretrained.config, BertConfig):
            raise UserError("model.amplify is for encoders with a classifier; leave model.amplify.sites empty")
        harder = amplify(pretrained.params, pretrained.config, **config.model.amplify)
        pretrained = dataclasses.replace(pretrained, params=harder)
    return pretrained.family.module(config=pretrained.config, dtype=dtype), {}, pretrained


def _with_replaced_layers(pretrained: models.Pretrained, config: ConfigDict) -> models.Pretrained:
    """Returns a model from nothing in which layers that `quant` quantizes begin anew; see `replaced_layers`."""
    policy = policy_from(config.quant, pretrained.config.num_layers)
    if policy is None:
        raise UserError(
            f"quant.replaced_layers is {config.quant.replaced_layers!r}, but `quant` keeps everything in full precision"
        )
    kept = started_modules(pretrained.config) if config.model.start is not None else ()  # type: ignore[arg-type]
    key = jax.random.key(config.seed)
    params = replaced_layers(pretrained.params, policy, config.quant.replaced_layers, key, kept)
    return dataclasses.replace(pretrained, params=params)
