"""Experiments on images with labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from qtx.data.images import ImageBatches, ImageDataset, load_image_folder, load_images
from qtx.data.tasks import IMAGE_TASKS
from qtx.errors import UserError
from qtx.experiments.classification import Classification
from qtx.experiments.experiment import check_model, family_and_sizes, load_model
from qtx.models import ModelConfig
from qtx.models.vit import Preprocessor
from qtx.nn.vit import VitConfig

TASKS = (*IMAGE_TASKS, "image_folder")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageClassification(Classification):
    """An experiment on a task of images: `dataset` and `encoded` hold the images by split, `tokenizer` the preprocessor."""

    dataset: ImageDataset  # type: ignore[assignment]

    @classmethod
    def make(cls, config: ConfigDict) -> ImageClassification:
        """Loads and checks everything that a run needs, cheapest first.

        Raises:
          UserError: on anything in the configuration, the data or the checkpoint that does not fit.
        """
        mesh = check_model(config.model, config.model_parallel)
        _, sizes = family_and_sizes(config.model)
        if not isinstance(sizes, VitConfig):
            raise UserError(
                f"task {config.task!r} has images, which model {config.model.name!r} does not read; see configs/vit.py"
            )
        dataset = load_dataset(config, sizes)
        for name, split in dataset.splits.items():
            _check_images(config, name, split.pixels.shape, sizes)
        model, ranges, pretrained = load_model(config, dataset.task.num_labels)
        assert isinstance(pretrained.config, VitConfig)
        return cls(
            config, Preprocessor(pretrained.config), pretrained, model, ranges, dict(dataset.splits), mesh, dataset
        )

    def batches(  # type: ignore[override]
        self, split: str, batch_size: int, shuffle: bool, epochs: int | None, seed: int = 0
    ) -> ImageBatches:
        """Returns the batches of a split; shuffled ones, of training, are shifted and mirrored as `data` says."""
        c = self.config.data
        drawn = dict(crop=c.crop, flip=c.flip) if shuffle else {}
        return self._batches(split, batch_size, shuffle, epochs, seed, **drawn)

    def save_beside(self, directory: Path) -> None:
        return  # images are not cleaned

    def first_batches(self, count: int, batch_size: int, split: str = "train") -> Sequence[Mapping[str, np.ndarray]]:
        found = self._batches(split, batch_size, shuffle=True, epochs=1, seed=self.config.seed)
        # All but one of its batches are whole.
        first = (found[i] for i in range(min(count + 1, len(found))))
        return [batch for batch in first if batch["weights"].all()][:count]

    def check_teacher(self, name: str, directory: Path, sizes: ModelConfig) -> None:
        for field in ("image_size", "num_channels", "image_mean", "image_std"):
            ours, theirs = getattr(self.pretrained.config, field), getattr(sizes, field, None)
            if ours != theirs:
                raise UserError(
                    f"teacher.name: {name} has {field} {theirs}, {self.config.model.name} has {ours}; both must read the same "
                    "images"
                )

    def _batches(
        self, split: str, batch_size: int, shuffle: bool, epochs: int | None, seed: int, **drawn: int
    ) -> ImageBatches:
        sizes = self.pretrained.config
        assert isinstance(sizes, VitConfig)
        return ImageBatches(
            self.encoded[split],
            batch_size,
            sizes.image_size,
            sizes.num_channels,
            seed=seed,
            shuffle=shuffle,
            epochs=epochs,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
            **drawn,  # type: ignore[arg-type]
        )


def load_dataset(config: ConfigDict, sizes: VitConfig) -> ImageDataset:
    """Loads the images that a configuration names, for a model of these sizes."""
    c = config.data
    limits = c.limit_train or None, c.limit_eval or None
    if config.task == "image_folder":
        return load_image_folder(c.train, sizes.num_channels, sizes.image_size if c.resize else None, c.seed, *limits)
    return load_images(config.task, c.dir, c.seed, *limits)


def _check_images(config: ConfigDict, split: str, shape: tuple[int, ...], sizes: VitConfig) -> None:
    _, side, _, channels = shape
    if side != sizes.image_size and not config.data.resize:
        raise UserError(
            f"the {split} images of task {config.task!r} have {side} pixels a side, model {config.model.name!r} takes "
            f"{sizes.image_size}: set data.resize=True, or for a model from nothing model.sizes.image_size={side}"
        )
    if channels not in (1, sizes.num_channels):
        raise UserError(
            f"the images of task {config.task!r} have {channels} channels, model {config.model.name!r} takes "
            f"{sizes.num_channels}: give a model for {channels}"
        )
