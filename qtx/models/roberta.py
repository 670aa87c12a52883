"""RoBERTa checkpoints (DistilRoBERTa's too): Hugging Face names and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtx.models import bert
from qtx.nn.roberta import RobertaConfig

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
