"""DistilBERT checkpoints: Hugging Face names and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtx.models import bert
from qtx.models.family import Family
from qtx.nn.distilbert import DistilBertClassifier, DistilBertConfig

MODULES = {  # `{i}` is the number of a layer
    "distilbert.embeddings.word_embeddings": "encoder/embeddings/word",
    "distilbert.embeddings.position_embeddings": "encoder/embeddings/position",
    "distilbert.embeddings.LayerNorm": "encoder/embeddings/norm",
    "distilbert.transformer.layer.{i}.attention.q_lin": "encoder/layer_{i}/attention/query",
    "distilbert.transformer.layer.{i}.attention.k_lin": "encoder/layer_{i}/attention/key",
    "distilbert.transformer.layer.{i}.attention.v_lin": "encoder/layer_{i}/attention/value",
    "distilbert.transformer.layer.{i}.attention.out_lin": "encoder/layer_{i}/attention/out",
    "distilbert.transformer.layer.{i}.sa_layer_norm": "encoder/layer_{i}/attention/norm",
    "distilbert.transformer.layer.{i}.ffn.lin1": "encoder/layer_{i}/ffn/up",
    "distilbert.transformer.layer.{i}.ffn.lin2": "encoder/layer_{i}/ffn/down",
    "distilbert.transformer.layer.{i}.output_layer_norm": "encoder/layer_{i}/ffn/norm",
    "pre_classifier": "pooler/dense",
    "classifier": "classifier",
}

FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "hidden_dim": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "activation": "hidden_act",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "seq_classif_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}


def modules(config: DistilBertConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths."""
    return bert.per_layer(MODULES, config.num_layers)


def config_from_hf(hf: Mapping[str, Any]) -> DistilBertConfig:
    """Reads the keys of a Hugging Face `config.json`."""
    return bert.read_fields(hf, DistilBertConfig, FIELDS)


def config_to_hf(config: DistilBertConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads."""
    return bert.write_fields(config, FIELDS)


FAMILY = Family(
    name="distilbert",
    architecture="DistilBertForSequenceClassification",
    module=DistilBertClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="distilbert.",
    fresh=("pooler/dense", "classifier"),
    ignored=("vocab_", "distilbert.embeddings.position_ids"),
)
