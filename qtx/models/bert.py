"""BERT checkpoints: Hugging Face names and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from qtx.errors import UserError, near_misses
from qtx.models.family import Family
from qtx.nn.bert import ACTIVATIONS, BertClassifier, BertConfig
from qtx.nn.vit import VitConfig

MODULES = {  # `{i}` is the number of a layer
    "bert.embeddings.word_embeddings": "encoder/embeddings/word",
    "bert.embeddings.position_embeddings": "encoder/embeddings/position",
    "bert.embeddings.token_type_embeddings": "encoder/embeddings/token_type",
    "bert.embeddings.LayerNorm": "encoder/embeddings/norm",
    "bert.encoder.layer.{i}.attention.self.query": "encoder/layer_{i}/attention/query",
    "bert.encoder.layer.{i}.attention.self.key": "encoder/layer_{i}/attention/key",
    "bert.encoder.layer.{i}.attention.self.value": "encoder/layer_{i}/attention/value",
    "bert.encoder.layer.{i}.attention.output.dense": "encoder/layer_{i}/attention/out",
    "bert.encoder.layer.{i}.attention.output.LayerNorm": "encoder/layer_{i}/attention/norm",
    "bert.encoder.layer.{i}.intermediate.dense": "encoder/layer_{i}/ffn/up",
    "bert.encoder.layer.{i}.output.dense": "encoder/layer_{i}/ffn/down",
    "bert.encoder.layer.{i}.output.LayerNorm": "encoder/layer_{i}/ffn/norm",
    "bert.pooler.dense": "pooler/dense",
    "classifier": "classifier",
}


def per_layer(templates: Mapping[str, str], num_layers: int) -> dict[str, str]:
    """Writes out a map of module names once for every layer."""
    found = {}
    for theirs, ours in templates.items():
        for i in range(num_layers if "{i}" in theirs else 1):
            found[theirs.replace("{i}", str(i))] = ours.replace("{i}", str(i))
    return found


def modules(config: BertConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths."""
    return per_layer(MODULES, config.num_layers)


FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
    "classifier_dropout": "classifier_dropout",
}

Config = TypeVar("Config", bound=BertConfig)
AnyConfig = TypeVar("AnyConfig", bound=BertConfig | VitConfig)


def fields_of(kind: type[BertConfig]) -> dict[str, str]:
    """Hugging Face keys with their fields; what a family adds to BERT's has the same name on both sides."""
    common = {field.name for field in dataclasses.fields(BertConfig)}
    return FIELDS | {field.name: field.name for field in dataclasses.fields(kind) if field.name not in common}


def config_from_hf(hf: Mapping[str, Any], kind: type[Config] = BertConfig) -> Config:  # type: ignore[assignment]
    """Reads the keys of a Hugging Face `config.json`; `kind` has BERT's fields, and perhaps further ones."""
    return read_fields(hf, kind, fields_of(kind))


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads."""
    return write_fields(config, fields_of(type(config)))


def read_fields(hf: Mapping[str, Any], kind: type[AnyConfig], fields: Mapping[str, str]) -> AnyConfig:
    """Reads a configuration of any family; keys of qtx's own stand under `qtx`.

    Args:
      hf: content of a `config.json`.
      kind: class of the configuration; what `hf` does not say keeps its defaults.
      fields: Hugging Face keys with the fields of `kind`.

    Raises:
      UserError: on an activation function or position embedding that qtx does not have.
    """
    known = {ours: hf[theirs] for theirs, ours in fields.items() if hf.get(theirs) is not None}
    act = known.get("hidden_act", kind.hidden_act)
    if act not in ACTIVATIONS:
        key = next(theirs for theirs, ours in fields.items() if ours == "hidden_act")
        raise UserError(f"config.json: {key} {act!r} is not supported{near_misses(act, ACTIVATIONS)}")
    position = hf.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise UserError(f"config.json: position_embedding_type {position!r} is not supported; only 'absolute' is")
    own = dict(hf.get("qtx", {}))
    if own.get("logit_range") is not None:
        own["logit_range"] = tuple(own["logit_range"])
    labels = len(hf["id2label"]) if "id2label" in hf else hf.get("num_labels", 2)
    return kind(**known, num_labels=labels, **own)


def write_fields(config: BertConfig | VitConfig, fields: Mapping[str, str]) -> dict[str, Any]:
    """Inverts `read_fields`; fields that Hugging Face has no key for go under `qtx`."""
    hf = {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
    hf["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    if config.num_labels == 1:
        hf["problem_type"] = "regression"
    hf["position_embedding_type"] = "absolute"
    named = {*fields.values(), "num_labels"}
    own = [field.name for field in dataclasses.fields(config) if field.name not in named]
    hf["qtx"] = {name: getattr(config, name) for name in own}
    return hf


FAMILY = Family(
    name="bert",
    architecture="BertForSequenceClassification",
    module=BertClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="bert.",
    fresh=("pooler/dense", "classifier"),
    ignored=("cls.", "bert.embeddings.position_ids"),
)
