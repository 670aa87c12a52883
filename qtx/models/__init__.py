"""Model families and their checkpoints."""

from qtx.models.checkpoints import Pretrained, load, locate, read_config, save
from qtx.models.families import FAMILIES, Family, example_inputs, get_family

__all__ = ["FAMILIES", "Family", "Pretrained", "example_inputs", "get_family", "load", "locate", "read_config", "save"]
