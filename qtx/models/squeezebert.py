"""SqueezeBERT checkpoints: Hugging Face names, configuration and convolution weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtx.errors import UserError
from qtx.models import bert
from qtx.models.family import Family, transposed
from qtx.nn.squeezebert import SqueezeBertClassifier, SqueezeBertConfig

MODULES = {  # `{i}` is the number of a layer
    "transformer.embeddings.word_embeddings": "encoder/embeddings/word",
    "transformer.embeddings.position_embeddings": "encoder/embeddings/position",
    "transformer.embeddings.token_type_embeddings": "encoder/embeddings/token_type",
    "transformer.embeddings.LayerNorm": "encoder/embeddings/norm",
    "transformer.encoder.layers.{i}.attention.query": "encoder/layer_{i}/attention/query",
    "transformer.encoder.layers.{i}.attention.key": "encoder/layer_{i}/attention/key",
    "transformer.encoder.layers.{i}.attention.value": "encoder/layer_{i}/attention/value",
    "transformer.encoder.layers.{i}.post_attention.conv1d": "encoder/layer_{i}/attention/out",
    "transformer.encoder.layers.{i}.post_attention.layernorm": "encoder/layer_{i}/attention/norm",
    "transformer.encoder.layers.{i}.intermediate.conv1d": "encoder/layer_{i}/ffn/up",
    "transformer.encoder.layers.{i}.output.conv1d": "encoder/layer_{i}/ffn/down",
    "transformer.encoder.layers.{i}.output.layernorm": "encoder/layer_{i}/ffn/norm",
    "transformer.pooler.dense": "pooler/dense",
    "classifier": "classifier",
}


def modules(config: SqueezeBertConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths."""
    return bert.per_layer(MODULES, config.num_layers)


def config_from_hf(hf: Mapping[str, Any]) -> SqueezeBertConfig:
    """Reads the keys of a Hugging Face `config.json`.

    Raises:
      UserError: if the embeddings do not have the width of the layers, or as for BERT.
    """
    config = bert.config_from_hf(hf, SqueezeBertConfig)
    if hf.get("embedding_size", config.hidden_size) != config.hidden_size:
        raise UserError(
            f"config.json: embedding_size {hf['embedding_size']} differs from hidden_size {config.hidden_size}; "
            "SqueezeBERT has one width for both"
        )
    return config


def config_to_hf(config: SqueezeBertConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads."""
    return bert.config_to_hf(config) | {"embedding_size": config.hidden_size}


def value_from_hf(path: str, value: np.ndarray) -> np.ndarray:
    """Returns a parameter; a kernel is `[in / groups, out]`.

    Args:
      path: of the parameter.
      value: of a kernel, the weight of a convolution of width 1, `[out, in / groups, 1]`, or of a linear layer of the head,
        `[out, in]`.
    """
    return value.reshape(value.shape[:2]).T if path.endswith("/kernel") else value


def value_to_hf(config: SqueezeBertConfig, path: str, value: np.ndarray) -> np.ndarray:
    """Inverts `value_from_hf`: the layers hold convolutions, the head holds linear layers."""
    if path.startswith("encoder/") and path.endswith("/kernel"):
        return value.T[:, :, None]
    return transposed(path, value)


FAMILY = Family(
    name="squeezebert",
    architecture="SqueezeBertForSequenceClassification",
    module=SqueezeBertClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="transformer.",
    fresh=("pooler/dense", "classifier"),
    ignored=("cls.", "transformer.embeddings.position_ids"),
    value_from_hf=value_from_hf,
    value_to_hf=value_to_hf,
)
