"""ViT and DeiT checkpoints: Hugging Face names and configuration, and what is said beside them about images."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qtx.errors import UserError
from qtx.files import write_text
from qtx.models import bert
from qtx.models.family import Family, transposed
from qtx.nn.vit import DeitConfig, VitClassifier, VitConfig

PREPROCESSOR_FILE = "preprocessor_config.json"

MODULES = {  # `{family}` is the name of the family, `{i}` the number of a layer
    "{family}.embeddings.cls_token": "encoder/embeddings/cls/table",
    "{family}.embeddings.position_embeddings": "encoder/embeddings/position/table",
    "{family}.embeddings.patch_embeddings.projection": "encoder/embeddings/patch",
    "{family}.encoder.layer.{i}.layernorm_before": "encoder/layer_{i}/attention/norm",
    "{family}.encoder.layer.{i}.attention.attention.query": "encoder/layer_{i}/attention/query",
    "{family}.encoder.layer.{i}.attention.attention.key": "encoder/layer_{i}/attention/key",
    "{family}.encoder.layer.{i}.attention.attention.value": "encoder/layer_{i}/attention/value",
    "{family}.encoder.layer.{i}.attention.output.dense": "encoder/layer_{i}/attention/out",
    "{family}.encoder.layer.{i}.layernorm_after": "encoder/layer_{i}/ffn/norm",
    "{family}.encoder.layer.{i}.intermediate.dense": "encoder/layer_{i}/ffn/up",
    "{family}.encoder.layer.{i}.output.dense": "encoder/layer_{i}/ffn/down",
    "{family}.layernorm": "encoder/norm",
}
FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "initializer_range",
    "image_mean": "image_mean",
    "image_std": "image_std",
}
_WITH_TEACHER = "DeiTForImageClassificationWithTeacher"
_PATCH, _LEARNED = "encoder/embeddings/patch/kernel", "encoder/embeddings/"


def modules(config: VitConfig) -> dict[str, str]:
    """Returns Hugging Face module names with their qtx paths."""
    is_deit = isinstance(config, DeitConfig)
    found = {theirs.replace("{family}", "deit" if is_deit else "vit"): ours for theirs, ours in MODULES.items()}
    if is_deit:
        found["deit.embeddings.distillation_token"] = "encoder/embeddings/distillation/table"
    if isinstance(config, DeitConfig) and config.distillation_head:
        found |= {"cls_classifier": "classifier", "distillation_classifier": "distillation_classifier"}
    else:
        found["classifier"] = "classifier"
    return bert.per_layer(found, config.num_layers)


def config_from_hf(hf: Mapping[str, Any], kind: type[VitConfig] = VitConfig) -> VitConfig:
    """Reads the keys of a Hugging Face `config.json`, with what `preprocessor_fields` gives.

    Raises:
      UserError: on images or patches that are not square, attention without biases, and what `bert.read_fields` refuses.
    """
    square = {}
    for name in ("image_size", "patch_size"):
        sides = hf.get(name)
        if isinstance(sides, list | tuple):
            if len(set(sides)) != 1:
                raise UserError(f"config.json: {name} {sides} is not supported; only squares are")
            square[name] = sides[0]
    if not hf.get("qkv_bias", True):
        raise UserError("config.json: qkv_bias false is not supported; only attention with biases is")
    config = bert.read_fields({**hf, **square}, kind, FIELDS)
    if isinstance(config, DeitConfig):
        config = dataclasses.replace(config, distillation_head=_WITH_TEACHER in (hf.get("architectures") or ()))
    return config


def config_to_hf(config: VitConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` that `transformers` reads; mean and deviation of images are keys of qtx's own."""
    hf = bert.write_fields(config, FIELDS)
    del hf["position_embedding_type"]
    hf["qkv_bias"] = True
    if isinstance(config, DeitConfig):
        del hf["qtx"]["distillation_head"]
        hf["architectures"] = [_WITH_TEACHER if config.distillation_head else "DeiTForImageClassification"]
    return hf


def preprocessor_fields(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `config_from_hf` takes of a `preprocessor_config.json`: mean and deviation.

    Raises:
      UserError: values of pixels are not brought to 0 to 1 first.
    """
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if not preprocessor.get("do_rescale", True) or not np.isclose(factor, 1 / 255):
        raise UserError(f"{PREPROCESSOR_FILE}: pixels must be rescaled by 1/255, which it does not do")
    if not preprocessor.get("do_normalize", True):
        return {"image_mean": [0.0], "image_std": [1.0]}
    return {name: preprocessor[name] for name in ("image_mean", "image_std") if name in preprocessor}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """What stands in for a tokenizer beside a model of images.

    Attributes:
      config: of the model.
    """

    config: VitConfig

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json`, which `transformers` reads: size, mean and deviation."""
        c = self.config
        found = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "resample": 2,  # bilinear
            "size": {"height": c.image_size, "width": c.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(c.image_mean),
            "image_std": list(c.image_std),
        }
        write_text(Path(directory) / PREPROCESSOR_FILE, json.dumps(found, indent=2) + "\n")


def value_from_hf(path: str, value: np.ndarray) -> np.ndarray:
    """Returns a parameter in the layout of qtx.

    Args:
      path: of the parameter.
      value: the weight of the patches is that of a convolution, `[D, K, P, P]`, here `[P * P * K, D]`; learned tokens and
        positions are `[1, rows, D]`, here `[rows, D]`.
    """
    if path == _PATCH:
        return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    if path.startswith(_LEARNED) and path.endswith("/table"):
        return value.reshape(-1, value.shape[-1])
    return transposed(path, value)


def value_to_hf(config: VitConfig, path: str, value: np.ndarray) -> np.ndarray:
    """Inverts `value_from_hf`."""
    if path == _PATCH:
        size = config.patch_size
        return value.reshape(size, size, config.num_channels, -1).transpose(3, 2, 0, 1)
    if path.startswith(_LEARNED) and path.endswith("/table"):
        return value[None]
    return transposed(path, value)


def _family(name: str, architecture: str, kind: type[VitConfig], fresh: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        architecture=architecture,
        module=VitClassifier,
        config_from_hf=partial(config_from_hf, kind=kind),
        config_to_hf=config_to_hf,
        modules=modules,
        prefix=f"{name}.",
        fresh=fresh,
        ignored=(f"{name}.pooler.", f"{name}.embeddings.mask_token", "decoder."),
        value_from_hf=value_from_hf,
        value_to_hf=value_to_hf,
    )


FAMILY = _family("vit", "ViTForImageClassification", VitConfig, ("classifier",))
DEIT = _family("deit", "DeiTForImageClassification", DeitConfig, ("classifier", "distillation_classifier"))
