"""RoBERTa checkpoints (DistilRoBERTa's too): Hugging Face names and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtx.models import bert
from qtx.models.family import Family
from qtx.nn.roberta import RobertaClassifier, RobertaConfig

MODULES = {
    theirs.replace("bert.", "roberta.", 1): ours for theirs, ours in bert.MODULES.items() if ours.startswith("encoder/")
}
MODULES |= {"classifier.dense": "pooler/dense", "classifier.out_proj": "classifier"}


def modules(config: RobertaConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths."""
    return bert.per_layer(MODULES, config.num_layers)


def config_from_hf(hf: Mapping[str, Any]) -> RobertaConfig:
    """Reads the keys of a Hugging Face `config.json`, whose number of positions is that of the table's rows."""
    config = bert.read_fields(hf, RobertaConfig, bert.FIELDS)
    rows = hf.get("max_position_embeddings", RobertaConfig().position_rows)
    return dataclasses.replace(config, max_positions=rows - config.pad_token_id - 1)


def config_to_hf(config: RobertaConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads."""
    return bert.write_fields(config, bert.FIELDS) | {"max_position_embeddings": config.position_rows}


FAMILY = Family(
    name="roberta",
    architecture="RobertaForSequenceClassification",
    module=RobertaClassifier,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="roberta.",
    fresh=("pooler/dense", "classifier"),
    ignored=("lm_head.", "roberta.pooler.", "roberta.embeddings.position_ids"),
)
