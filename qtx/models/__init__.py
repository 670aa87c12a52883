"""Model families and their checkpoints."""

from qtx.models.checkpoints import (
    ARCHITECTURES,
    Pretrained,
    architecture,
    create,
    load,
    load_masked_lm,
    locate,
    read_config,
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
    "load",
    "load_masked_lm",
    "locate",
    "read_config",
    "save",
]
