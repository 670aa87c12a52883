"""Which model families exist: their Hugging Face `model_type`, configuration and tensor names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qtx.errors import UserError
from qtx.models import albert, bert, distilbert, encoder_decoder, mobilebert, roberta, squeezebert, text_classifier
from qtx.nn.albert import AlbertClassifier
from qtx.nn.bert import BertClassifier, BertConfig
from qtx.nn.distilbert import DistilBertClassifier
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qtx.nn.mobilebert import MobileBertClassifier
from qtx.nn.roberta import RobertaClassifier
from qtx.nn.sites import SiteInfo, list_sites
from qtx.nn.squeezebert import SqueezeBertClassifier
from qtx.nn.text_classifier import TextClassifier

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


FAMILIES: dict[str, Family] = {
    "bert": Family(
        name="bert",
        architecture="BertForSequenceClassification",
        module=BertClassifier,
        config_from_hf=bert.config_from_hf,
        config_to_hf=bert.config_to_hf,
        modules=bert.modules,
        prefix="bert.",
        fresh=("pooler/dense", "classifier"),
        ignored=("cls.", "bert.embeddings.position_ids"),
    ),
    "roberta": Family(
        name="roberta",
        architecture="RobertaForSequenceClassification",
        module=RobertaClassifier,
        config_from_hf=roberta.config_from_hf,
        config_to_hf=roberta.config_to_hf,
        modules=roberta.modules,
        prefix="roberta.",
        fresh=("pooler/dense", "classifier"),
        ignored=("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids"),
    ),
    "distilbert": Family(
        name="distilbert",
        architecture="DistilBertForSequenceClassification",
        module=DistilBertClassifier,
        config_from_hf=distilbert.config_from_hf,
        config_to_hf=distilbert.config_to_hf,
        modules=distilbert.modules,
        prefix="distilbert.",
        fresh=("pooler/dense", "classifier"),
        ignored=("vocab_", "distilbert.embeddings.position_ids"),
    ),
    "albert": Family(
        name="albert",
        architecture="AlbertForSequenceClassification",
        module=AlbertClassifier,
        config_from_hf=albert.config_from_hf,
        config_to_hf=albert.config_to_hf,
        modules=albert.modules,
        prefix="albert.",
        fresh=("pooler/dense", "classifier"),
        ignored=("predictions.", "sop_classifier.", "albert.embeddings.position_ids"),
    ),
    "mobilebert": Family(
        name="mobilebert",
        architecture="MobileBertForSequenceClassification",
        module=MobileBertClassifier,
        config_from_hf=mobilebert.config_from_hf,
        config_to_hf=bert.config_to_hf,
        modules=mobilebert.modules,
        prefix="mobilebert.",
        fresh=("pooler/dense", "classifier"),
        ignored=("cls.", "mobilebert.embeddings.position_ids"),
    ),
    "squeezebert": Family(
        name="squeezebert",
        architecture="SqueezeBertForSequenceClassification",
        module=SqueezeBertClassifier,
        config_from_hf=squeezebert.config_from_hf,
        config_to_hf=squeezebert.config_to_hf,
        modules=squeezebert.modules,
        prefix="transformer.",
        fresh=("pooler/dense", "classifier"),
        ignored=("cls.", "transformer.embeddings.position_ids"),
        kernel_from_hf=squeezebert.kernel_from_hf,
        kernel_to_hf=squeezebert.kernel_to_hf,
    ),
    "qtx_text_classifier": Family(
        name="qtx_text_classifier",
        architecture="TextClassifier",
        module=TextClassifier,
        config_from_hf=text_classifier.config_from_hf,
        config_to_hf=bert.config_to_hf,
        modules=text_classifier.modules,
        prefix="",
        fresh=("classifier",),
        ignored=("input_encodings.pe",),
    ),
    "qtx_encoder_decoder": Family(
        name="qtx_encoder_decoder",
        architecture="EncoderDecoder",
        module=EncoderDecoder,
        config_from_hf=encoder_decoder.config_from_hf,
        config_to_hf=encoder_decoder.config_to_hf,
        modules=encoder_decoder.modules,
        prefix="",
        fresh=(),
        ignored=("src_pos_embedding.", "trg_pos_embedding."),
    ),
}


def get_family(model_type: str) -> Family:
    """Returns a family by its Hugging Face `model_type`, or raises a `UserError` that lists what there is."""
    if model_type not in FAMILIES:
        # All of them, not the nearest: another family is another model, not a slip of the pen.
        raise UserError(f"model family {model_type!r} is not supported; choose from: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
