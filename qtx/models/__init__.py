"""Model families and their checkpoints."""

from qtx.models.checkpoints import (
    ARCHITECTURES,
    Pretrained,
    architecture,
    create,
    keep_layers,
    load,
    load_masked_lm,
    locate,
    read_config,
    read_labels,
    save,
)
from qtx.models.families import FAMILIES, get_family
from qtx.models.family import Family, ModelConfig

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Family",
    "ModelConfig",
    "Pretrained",
    "architecture",
    "create",
    "get_family",
    "keep_layers",
    "load",
    "load_masked_lm",
    "locate",
    "read_config",
    "read_labels",
    "save",
]
