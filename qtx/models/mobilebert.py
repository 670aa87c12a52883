"""MobileBERT checkpoints: Hugging Face names and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtx.models import bert
from qtx.models.family import Family
from qtx.nn.mobilebert import MobileBertClassifier, MobileBertConfig

MODULES = {  # `{i}` is the number of a layer, `{j}` of one of its stacked FFNs
    "mobilebert.embeddings.word_embeddings": "encoder/embeddings/word",
    "mobilebert.embeddings.position_embeddings": "encoder/embeddings/position",
    "mobilebert.embeddings.token_type_embeddings": "encoder/embeddings/token_type",
    "mobilebert.embeddings.embedding_transformation": "encoder/embeddings/transformation",
    "mobilebert.embeddings.LayerNorm": "encoder/embeddings/norm",
    "mobilebert.encoder.layer.{i}.bottleneck.input.dense": "encoder/layer_{i}/bottleneck_in/dense",
    "mobilebert.encoder.layer.{i}.bottleneck.input.LayerNorm": "encoder/layer_{i}/bottleneck_in/norm",
    "mobilebert.encoder.layer.{i}.bottleneck.attention.dense": "encoder/layer_{i}/bottleneck_attention/dense",
    "mobilebert.encoder.layer.{i}.bottleneck.attention.LayerNorm": "encoder/layer_{i}/bottleneck_attention/norm",
    "mobilebert.encoder.layer.{i}.attention.self.query": "encoder/layer_{i}/attention/query",
    "mobilebert.encoder.layer.{i}.attention.self.key": "encoder/layer_{i}/attention/key",
    "mobilebert.encoder.layer.{i}.attention.self.value": "encoder/layer_{i}/attention/value",
    "mobilebert.encoder.layer.{i}.attention.output.dense": "encoder/layer_{i}/attention/out",
    "mobilebert.encoder.layer.{i}.attention.output.LayerNorm": "encoder/layer_{i}/attention/norm",
    "mobilebert.encoder.layer.{i}.ffn.{j}.intermediate.dense": "encoder/layer_{i}/ffn_{j}/up",
    "mobilebert.encoder.layer.{i}.ffn.{j}.output.dense": "encoder/layer_{i}/ffn_{j}/down",
    "mobilebert.encoder.layer.{i}.ffn.{j}.output.LayerNorm": "encoder/layer_{i}/ffn_{j}/norm",
    "mobilebert.encoder.layer.{i}.intermediate.dense": "encoder/layer_{i}/ffn/up",
    "mobilebert.encoder.layer.{i}.output.dense": "encoder/layer_{i}/ffn/down",
    "mobilebert.encoder.layer.{i}.output.LayerNorm": "encoder/layer_{i}/ffn/norm",
    "mobilebert.encoder.layer.{i}.output.bottleneck.dense": "encoder/layer_{i}/bottleneck_out/dense",
    "mobilebert.encoder.layer.{i}.output.bottleneck.LayerNorm": "encoder/layer_{i}/bottleneck_out/norm",
    "mobilebert.pooler.dense": "pooler/dense",
    "classifier": "classifier",
}


def modules(config: MobileBertConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths; which of them exist, the configuration's flags decide."""
    found = {}
    for theirs, ours in bert.per_layer(MODULES, config.num_layers).items():
        for j in range(config.num_feedforward_networks - 1 if "{j}" in theirs else 1):
            found[theirs.replace("{j}", str(j))] = ours.replace("{j}", str(j))
    return found


def config_from_hf(hf: Mapping[str, Any]) -> MobileBertConfig:
    """Reads the keys of a Hugging Face `config.json`; raises a `UserError` as for BERT and on what the sizes forbid."""
    return bert.config_from_hf(hf, MobileBertConfig)


FAMILY = Family(
    name="mobilebert",
    architecture="MobileBertForSequenceClassification",
    module=MobileBertClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=bert.config_to_hf,
    modules=modules,
    prefix="mobilebert.",
    fresh=("pooler/dense", "classifier"),
    ignored=("cls.", "mobilebert.embeddings.position_ids"),
)
