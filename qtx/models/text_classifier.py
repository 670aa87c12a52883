"""Text classifier checkpoints: published names and configuration, and what a BERT checkpoint gives to start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtx.errors import UserError
from qtx.models import bert
from qtx.models.family import Family
from qtx.nn.bert import BertConfig
from qtx.nn.text_classifier import TextClassifier, TextClassifierConfig

MODULES = {  # `{i}` is the number of a layer
    "input_embeddings.token_embedding": "encoder/embeddings/word",
    "input_embeddings.pos_embedding": "encoder/embeddings/position",
    "sublayer_attention.{i}.multiheads.heads.0": "encoder/layer_{i}/attention/query",
    "sublayer_attention.{i}.multiheads.heads.1": "encoder/layer_{i}/attention/key",
    "sublayer_attention.{i}.multiheads.heads.2": "encoder/layer_{i}/attention/value",
    "sublayer_attention.{i}.multiheads.output": "encoder/layer_{i}/attention/out",
    "sublayer_attention.{i}.layernorm": "encoder/layer_{i}/attention/norm",
    "sublayer_ffn.{i}.ffn.w_1": "encoder/layer_{i}/ffn/up",
    "sublayer_ffn.{i}.ffn.w_2": "encoder/layer_{i}/ffn/down",
    "sublayer_ffn.{i}.layernorm": "encoder/layer_{i}/ffn/norm",
    "classifier.hidden": "classifier/hidden",
    "classifier.classifier": "classifier/out",
}

_STARTED = (
    "encoder/embeddings/word",
    "encoder/embeddings/position",
    *(f"encoder/layer_{{i}}/attention/{name}" for name in ("query", "key", "value", "out", "norm")),
)


def modules(config: BertConfig) -> dict[str, str]:
    """Returns published module names with their qtx paths."""
    return bert.per_layer(MODULES, config.num_layers)


def config_from_hf(hf: Mapping[str, Any]) -> TextClassifierConfig:
    """Reads the keys of a `config.json`, which are BERT's and those of the fields that BERT does not have."""
    return bert.config_from_hf(hf, TextClassifierConfig)


def started_modules(config: BertConfig) -> frozenset[str]:
    """Returns the qtx paths of the modules that have the values of a BERT checkpoint where the model starts from one.

    They have the same paths in both models. BERT's norm behind the attention gives the norm before it, as published;
    token types, the norm of the embeddings, the FFN and the head give nothing.
    """
    return frozenset(bert.per_layer({path: path for path in _STARTED}, config.num_layers))


def check_start(name: str, theirs: BertConfig, config: BertConfig) -> None:
    """Raises a `UserError` unless a model of these sizes can start from a BERT checkpoint of those.

    Args:
      name: of the checkpoint, for the message.
      theirs: the checkpoint's sizes.
      config: the model's.
    """
    for field in ("hidden_size", "vocab_size", "num_heads"):
        here, there = getattr(config, field), getattr(theirs, field)
        if here != there:
            raise UserError(
                f"{name} has {field} {there}, the model that is to start from it has {here}: give it {there}"
            )
    for field, what in (("num_layers", "layers"), ("max_positions", "positions")):
        here, there = getattr(config, field), getattr(theirs, field)
        if here > there:
            raise UserError(
                f"{name} has {there} {what}, the model that is to start from it has {here}: give it {there}"
            )


FAMILY = Family(
    name="qtx_text_classifier",
    architecture="TextClassifier",
    module=TextClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=bert.config_to_hf,
    modules=modules,
    prefix="",
    fresh=("classifier",),
    ignored=("input_encodings.pe",),
)
