"""What a family of models is: its module, its Hugging Face `model_type`, configuration and tensor names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtx.nn.bert import BertConfig
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from qtx.nn.sites import SiteInfo, list_sites

ModelConfig = BertConfig | EncoderDecoderConfig
"""Sizes and rates of a model of any family."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: Hugging Face `model_type`; `qtx_...` for a model of qtx's own.
      architecture: Hugging Face class name of the model with its head.
      module: linen class; takes `config`, `dtype` and `policy`.
      config_from_hf: from the keys of `config.json`.
      config_to_hf: back.
      modules: Hugging Face module name to qtx path, for the sizes of a configuration.
      prefix: what Hugging Face puts before the encoder's tensors in a model with a head.
      fresh: qtx paths that may be missing from a checkpoint and are then initialised.
      ignored: prefixes of tensors of other heads, left out when a checkpoint is read.
      kernel_from_hf: a weight of a linear layer, `[out, in]`, in the layout of qtx, `[in, out]`.
      kernel_to_hf: back, for the parameter of this qtx path.
    """

    name: str
    architecture: str
    module: type[nn.Module]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    config_to_hf: Callable[[Any], dict[str, Any]]
    modules: Callable[[Any], Mapping[str, str]]
    prefix: str
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]
    kernel_from_hf: Callable[[np.ndarray], np.ndarray] = np.transpose
    kernel_to_hf: Callable[[str, np.ndarray], np.ndarray] = lambda path, kernel: kernel.T

    def names(self, config: Any) -> dict[str, str]:
        """Returns the module names of a checkpoint with their qtx paths: `modules`, and what only qtx's own checkpoints hold.

        A scaled residual branch (`BertConfig.shortcuts`) is named after the norm that follows it.
        """
        found = dict(self.modules(config))
        if getattr(config, "shortcuts", False):
            for theirs, path in list(found.items()):
                block = path.removesuffix("/norm")
                if block != path and block.rpartition("/")[2] in ("attention", "ffn"):
                    found[f"{theirs}.shortcut"] = f"{block}/shortcut"
        return found

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what a model is called with."""
        return self.module.inputs  # type: ignore[attr-defined]

    def example_inputs(self) -> tuple[jax.Array, ...]:
        """Returns what a model is called with, to trace it: int32 `[1, 8]` for each of its `inputs`."""
        return (jnp.zeros((1, 8), jnp.int32),) * len(self.inputs)

    def sites(self, config: ModelConfig) -> dict[str, SiteInfo]:
        """Returns the sites of a model of this family and size; nothing is computed."""
        model, args = self.module(config=config), self.example_inputs()
        return list_sites(model, jax.eval_shape(model.init, jax.random.key(0), *args), *args)
