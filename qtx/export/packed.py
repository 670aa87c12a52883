"""The packed artifact: a quantized model as a directory that someone else can run.

    model.qtx.safetensors   packed integers, scales, zero points, the float32 rest, activation ranges; a JSON header
    config.json             in the Hugging Face layout
    tokenizer files         if a tokenizer was given

`qtx.export.packed_file` says what is in the first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
from flax import traverse_util

from qtx.errors import UserError
from qtx.export.packed_file import load_packed, save_packed
from qtx.files import write_text
from qtx.models.checkpoints import abstract_params
from qtx.models.families import get_family
from qtx.models.family import Family, ModelConfig
from qtx.quant.policy import Policy

WEIGHTS_FILE = "model.qtx.safetensors"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A packed model in memory, ready to run.

    Attributes:
      family: which family it is of.
      config: its sizes.
      policy: to run it with: rules for activations and inputs alone, since the weights are on their grids already.
      params: nested dict of float32 arrays; the quantized ones hold grid values.
      ranges: the `ranges` collection of activations and inputs.
      original: the policy that the model was quantized with, weights included.
      directory: where config and tokenizer files lie.
    """

    family: Family
    config: ModelConfig
    policy: Policy
    params: dict[str, Any]
    ranges: dict[str, Any]
    original: Policy
    directory: Path

    @property
    def model(self) -> nn.Module:
        """The module, to be applied to `variables`."""
        return self.family.module(config=self.config, policy=self.policy)

    @property
    def variables(self) -> dict[str, Any]:
        """What the module is applied to."""
        return {"params": self.params, "ranges": self.ranges}


def save_quantized(
    directory: str | Path,
    model_family: Family,
    config: ModelConfig,
    policy: Policy,
    params: Mapping[str, Any],
    ranges: Mapping[str, Any],
    tokenizer: Any = None,
    labels: Sequence[str] = (),
) -> int:
    """Writes a packed model; files appear under their names only when they are whole.

    Args:
      directory: created if needed.
      model_family: of the model.
      config: of the model.
      policy: as in calibration or training.
      params: nested parameters: the float masters (grid values give the same file).
      ranges: the `ranges` collection, from `calibrate` or training.
      tokenizer: a `transformers` tokenizer, saved beside the weights.
      labels: names of the classes in the order of the outputs.

    Returns:
      Bytes of the weights with their scales, without the activation ranges and the header.

    Raises:
      UserError: if parameters or policy do not fit the model, or a static range is missing.
    """
    abstract = abstract_params(model_family, config)
    flat, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, abstract))
    for name in sorted(flat.keys() | expected.keys()):
        found, wanted = (tree[name].shape if name in tree else "missing" for tree in (flat, expected))
        if found != wanted:
            raise UserError(
                f"parameter {name!r}: {found} in the params, {wanted} by the config; save them with their own"
            )
    hf, directory = model_family.hf_config(config, labels), Path(directory)
    model = model_family.module(config=config, policy=policy)
    variables = {"params": params, "ranges": ranges}
    total = save_packed(directory / WEIGHTS_FILE, model, variables, *model_family.example_inputs(config), config=hf)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_text(directory / "config.json", json.dumps(hf, indent=2) + "\n")
    return total


def load_quantized(directory: str | Path) -> Quantized:
    """Loads a packed model.

        packed = load_quantized(directory)
        logits = packed.model.apply(packed.variables, *inputs).logits

    Args:
      directory: written by `save_quantized`.

    Raises:
      UserError: naming the file, if it is missing, truncated, altered, of another format version, or if config.json
        describes another model.
    """
    directory = Path(directory)
    path = directory / WEIGHTS_FILE
    found = load_packed(path)
    if "model_type" not in found.config:
        raise UserError(f"{path} holds a module that is no model of qtx; read it with qtx.load_packed")
    family = get_family(found.config["model_type"])
    config = family.config_from_hf(found.config)
    _check_config(directory / "config.json", path, family, config)
    return Quantized(
        family=family,
        config=config,
        policy=found.policy,
        params=found.variables["params"],
        ranges=found.variables["ranges"],
        original=found.original,
        directory=directory,
    )


def _check_config(path: Path, weights: Path, family: Family, config: ModelConfig) -> None:
    """Raises a `UserError` unless config.json describes the model in the weights file."""
    try:
        hf = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again beside {weights.name}") from None
    if hf.get("model_type") != family.name:
        raise UserError(
            f"{path} is of the family {hf.get('model_type')!r}, but {weights.name} holds a {family.name!r} model"
        )
    theirs = family.config_from_hf(hf)
    for field in dataclasses.fields(config):
        here, there = getattr(theirs, field.name), getattr(config, field.name)
        if here != there:
            raise UserError(f"{path} says {field.name} {here!r}, but {weights.name} was packed with {there!r}")
