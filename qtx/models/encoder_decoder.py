"""Encoder-decoder checkpoints: published names, and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qtx.models.bert import per_layer
from qtx.models.family import Family
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig


def _attention(theirs: str, ours: str) -> dict[str, str]:
    """Returns the names of the linear layers of an attention block."""
    projections = {f"{theirs}.qkv_nets.{i}": f"{ours}/{name}" for i, name in enumerate(("query", "key", "value"))}
    return projections | {f"{theirs}.out_projection_net": f"{ours}/out"}


_ENCODER, _DECODER = "encoder.encoder_layers.{i}", "decoder.decoder_layers.{i}"

# `{i}` is the number of a layer.
ENCODER_MODULES = {
    "src_embedding.embeddings_table": "encoder/embeddings/word",
    f"{_ENCODER}.sublayers.0.norm": "encoder/layer_{i}/attention/norm",
    **_attention(f"{_ENCODER}.multi_headed_attention", "encoder/layer_{i}/attention"),
    f"{_ENCODER}.sublayers.1.norm": "encoder/layer_{i}/ffn/norm",
    f"{_ENCODER}.pointwise_net.linear1": "encoder/layer_{i}/ffn/up",
    f"{_ENCODER}.pointwise_net.linear2": "encoder/layer_{i}/ffn/down",
    "encoder.norm": "encoder/norm",
}
DECODER_MODULES = {
    "trg_embedding.embeddings_table": "decoder/embeddings/word",
    f"{_DECODER}.sublayers.0.norm": "decoder/layer_{i}/self_attention/norm",
    **_attention(f"{_DECODER}.trg_multi_headed_attention", "decoder/layer_{i}/self_attention"),
    f"{_DECODER}.sublayers.1.norm": "decoder/layer_{i}/cross_attention/norm",
    **_attention(f"{_DECODER}.src_multi_headed_attention", "decoder/layer_{i}/cross_attention"),
    f"{_DECODER}.sublayers.2.norm": "decoder/layer_{i}/ffn/norm",
    f"{_DECODER}.pointwise_net.linear1": "decoder/layer_{i}/ffn/up",
    f"{_DECODER}.pointwise_net.linear2": "decoder/layer_{i}/ffn/down",
    "decoder.norm": "decoder/norm",
    "decoder_generator.linear": "generator",
}


def modules(config: EncoderDecoderConfig) -> dict[str, str]:
    """Returns published module names with their qtx paths."""
    return per_layer(ENCODER_MODULES, config.num_layers) | per_layer(DECODER_MODULES, config.decoder_layers)


def config_from_hf(hf: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Reads the keys of a `config.json`, which are the fields; what it does not say keeps its defaults."""
    names = [field.name for field in dataclasses.fields(EncoderDecoderConfig)]
    return EncoderDecoderConfig(**{name: hf[name] for name in names if name in hf})


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Inverts `config_from_hf`."""
    return dataclasses.asdict(config)


FAMILY = Family(
    name="qtx_encoder_decoder",
    architecture="EncoderDecoder",
    module=EncoderDecoder,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    modules=modules,
    prefix="",
    fresh=(),
    ignored=("src_pos_embedding.", "trg_pos_embedding."),
)
