"""What a family of models is: its module, its Hugging Face `model_type`, configuration and tensor names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from qtx.nn.bert import BertConfig
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from qtx.nn.sites import SiteInfo, example_inputs, list_sites
from qtx.nn.vit import VitConfig

ModelConfig = BertConfig | EncoderDecoderConfig | VitConfig
"""Sizes and rates of a model of any family."""


def transposed(path: str, value: np.ndarray) -> np.ndarray:
    """Returns the parameter of a path in the other of the two layouts: kernels are transposed, nothing else is."""
    return value.T if path.endswith("/kernel") else value


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: Hugging Face `model_type`; `qtx_...` for a model of qtx's own.
      architecture: Hugging Face class name of the model with its head.
      module: linen class; takes `config`, `dtype` and `policy`.
      config_from_hf: from the keys of `config.json`.
      config_to_hf: back.
      modules: Hugging Face module name to qtx path, for the sizes of a configuration; of tensors that are no weight or bias
        of a module, the whole names.
      prefix: what Hugging Face puts before the encoder's tensors in a model with a head.
      fresh: qtx paths that may be missing from a checkpoint and are then initialised.
      ignored: prefixes of tensors of other heads, left out when a checkpoint is read.
      value_from_hf: a tensor in the layout of qtx, for the parameter of this path: weights of linear layers are `[out, in]`
        there and `[in, out]` here.
      value_to_hf: back, for a model of these sizes.
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
    value_from_hf: Callable[[str, np.ndarray], np.ndarray] = transposed
    value_to_hf: Callable[[Any, str, np.ndarray], np.ndarray] = lambda config, path, value: transposed(path, value)

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

    def hf_config(self, config: ModelConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the content of `config.json`.

        Args:
          config: of the model.
          labels: names of the classes in the order of the outputs; (): they have none.
        """
        hf = {"architectures": [self.architecture], "model_type": self.name, **self.config_to_hf(config)}
        if labels:
            hf["id2label"] = {str(number): label for number, label in enumerate(labels)}
            hf["label2id"] = {label: number for number, label in enumerate(labels)}
        return hf

    def example_inputs(self, config: ModelConfig | None = None) -> tuple[jax.Array, ...]:
        """Returns what a model of these sizes is called with, to trace it (`qtx.nn.sites.example_inputs`).

        Args:
          config: may be left out for models of texts, which take any length.
        """
        return example_inputs(self.module, config)

    def sites(self, config: ModelConfig) -> dict[str, SiteInfo]:
        """Returns the sites of a model of this family and size; nothing is computed."""
        model, args = self.module(config=config), self.example_inputs(config)
        return list_sites(model, jax.eval_shape(model.init, jax.random.key(0), *args), *args)
