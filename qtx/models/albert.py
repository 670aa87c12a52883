"""ALBERT checkpoints: Hugging Face names and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtx.errors import UserError
from qtx.models import bert
from qtx.models.family import Family
from qtx.nn.albert import AlbertClassifier, AlbertConfig

_LAYER = "albert.encoder.albert_layer_groups.{i}.albert_layers.0."  # `{i}` is the number of a group
MODULES = {
    "albert.embeddings.word_embeddings": "encoder/embeddings/word",
    "albert.embeddings.position_embeddings": "encoder/embeddings/position",
    "albert.embeddings.token_type_embeddings": "encoder/embeddings/token_type",
    "albert.embeddings.LayerNorm": "encoder/embeddings/norm",
    "albert.encoder.embedding_hidden_mapping_in": "encoder/embeddings/projection",
    "albert.pooler": "pooler/dense",
    "classifier": "classifier",
}
IN_LAYER = {
    "attention.query": "attention/query",
    "attention.key": "attention/key",
    "attention.value": "attention/value",
    "attention.dense": "attention/out",
    "attention.LayerNorm": "attention/norm",
    "ffn": "ffn/up",
    "ffn_output": "ffn/down",
    "full_layer_layer_norm": "ffn/norm",
}

_DROPOUT = {"classifier_dropout": "classifier_dropout_prob"}
FIELDS = {_DROPOUT.get(theirs, theirs): ours for theirs, ours in bert.FIELDS.items()}
FIELDS |= {"embedding_size": "embedding_size", "num_hidden_groups": "num_groups"}


def modules(config: AlbertConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths: a group's tensors belong to its first layer."""
    found = dict(MODULES)
    for group, layer in enumerate(dict.fromkeys(config.owners)):
        for theirs, ours in IN_LAYER.items():
            found[f"{_LAYER.format(i=group)}{theirs}"] = f"encoder/layer_{layer}/{ours}"
    return found


def config_from_hf(hf: Mapping[str, Any]) -> AlbertConfig:
    """Reads the keys of a Hugging Face `config.json`.

    Raises:
      UserError: on several layers in a group's turn, more groups than layers, and what `bert.read_fields` refuses.
    """
    if hf.get("inner_group_num", 1) != 1:
        raise UserError(f"config.json: inner_group_num {hf['inner_group_num']} is not supported; only 1 is")
    config = bert.read_fields(hf, AlbertConfig, FIELDS)
    if not 1 <= config.num_groups <= config.num_layers:
        raise UserError(
            f"config.json: num_hidden_groups is {config.num_groups}; give 1 to {config.num_layers}, one layer each"
        )
    return config


def config_to_hf(config: AlbertConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads."""
    return bert.write_fields(config, FIELDS) | {"inner_group_num": 1}


FAMILY = Family(
    name="albert",
    architecture="AlbertForSequenceClassification",
    module=AlbertClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="albert.",
    fresh=("pooler/dense", "classifier"),
    ignored=("predictions.", "sop_classifier.", "albert.embeddings.position_ids"),
)
