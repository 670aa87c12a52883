"""The packed artifact: a quantized model as a directory that someone else can run.

    model.qtx.safetensors   packed integers, scales, zero points, the float32 rest, activation ranges; a JSON header
    config.json             in the Hugging Face layout
    tokenizer files         if a tokenizer was given

Tensors have the names of their parameters. A quantized one, `encoder/layer_0/ffn/up/kernel`, is uint8 and has beside it
`encoder/layer_0/ffn/up/kernel:scale`, float32 `[rows]` or a scalar, and for asymmetric grids `...:zero_point`, unsigned
integers of the same shape. Activation ranges are `ranges/<site>/{scale,zero_point,signed,group}`, as in calibration. How
to read the tensors stands in the safetensors metadata, under `qtx`, as one JSON object: `version` of the format, `config`,
`policy`, `quantized` (an entry for each packed tensor) and the `sha256` of all this and of the tensors.

The grid values are rebuilt by the arithmetic of fake quantization, `scale (integer - zero_point)` in float32. So a
reloaded model has the very parameters of `quantized_weights`, and the same program gives the same bits. Two programs may
not: compiled with the fake quantization of its weights inside, a model may round its sums otherwise than without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.files import whole_file, write_text
from qtx.methods.calibrate import stored_qparams
from qtx.models.checkpoints import abstract_params
from qtx.models.families import get_family
from qtx.models.family import Family, ModelConfig
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.quant import estimators, grid, rows
from qtx.quant.pack import pack, pack_trits, unpack, unpack_trits
from qtx.quant.policy import Policy, Rule
from qtx.quant.spec import Granularity, MinMax, Search, Spec

VERSION = 1
WEIGHTS_FILE = "model.qtx.safetensors"

_estimate = jax.jit(estimators.estimate, static_argnums=0)
_quantize = jax.jit(grid.quantize, static_argnums=0)


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


# --- Policies as JSON ---


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """Returns a policy as plain dicts, lists and scalars; `policy_from_json` gives back an equal policy."""

    def spec_to_json(spec: Spec) -> dict[str, Any]:
        estimator = {"kind": type(spec.estimator).__name__, **dataclasses.asdict(spec.estimator)}
        return {**dataclasses.asdict(spec), "estimator": estimator}

    def rules(given: tuple[Rule, ...]) -> list[dict[str, Any]]:
        return [
            {
                "pattern": rule.pattern,
                "label": rule.label,
                "spec": None if rule.spec is None else spec_to_json(rule.spec),
            }
            for rule in given
        ]

    return {
        "weights": rules(policy.weights),
        "activations": rules(policy.activations),
        "inputs": rules(policy.inputs),
        "precedence": policy.precedence,
    }


def policy_from_json(data: Mapping[str, Any]) -> Policy:
    """Reads what `policy_to_json` returned, also after a trip through `json`.

    Raises:
      UserError: on unknown or missing fields, or values that no spec takes.
    """

    def spec(given: Mapping[str, Any]) -> Spec:
        how = dict(given.get("estimator", {}))
        kind = how.pop("kind", None)
        if kind not in ("MinMax", "Search"):
            raise UserError(f"policy: unknown range estimator {kind!r}; choose from: MinMax, Search")
        granularity = _granularity(given.get("granularity", {}))
        estimator = _build(MinMax if kind == "MinMax" else Search, how)
        return _build(Spec, {**given, "granularity": granularity, "estimator": estimator})

    def rule(given: Mapping[str, Any]) -> Rule:
        return _build(Rule, {**given, "spec": None if given.get("spec") is None else spec(given["spec"])})

    kinds = ("weights", "activations", "inputs")
    return _build(Policy, {**data, **{kind: tuple(rule(each) for each in data.get(kind, ())) for kind in kinds}})


def _granularity(data: Mapping[str, Any]) -> Granularity:
    axis = data.get("axis")
    return _build(Granularity, {**data, "axis": tuple(axis) if isinstance(axis, list | tuple) else axis})


def _build(cls: type, fields: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise UserError(f"policy: {cls.__name__} has no field {name!r}{near_misses(name, known)}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"policy: {cls.__name__}: {error}") from None


# --- Weights ---


def _weight_spec(policy: Policy, sites: Mapping[str, SiteInfo], name: str) -> Spec | None:
    """The grid of a parameter with concrete axes; None for full precision and for parameters that are no site."""
    info = sites.get(name)
    spec = policy.spec("weight", name) if info is not None and info.kind == "weight" else None
    return None if spec is None or info is None else spec.at(info.channel_axis, len(info.shape))


def packable(policy: Policy) -> bool:
    """Whether all quantized weights are integers times a scale: not so for the published `'tanh'` and `'shifted'`."""
    return all(rule.spec is None or rule.spec.scheme not in ("tanh", "shifted") for rule in policy.weights)


def _zero_point_dtype(spec: Spec) -> np.dtype:
    if spec.scheme == "offset":
        return np.dtype(np.float32)
    return np.dtype(np.uint8 if spec.bits <= 8 else np.uint16)


def _per_row(values: jax.Array, spec: Spec, shape: tuple[int, ...]) -> np.ndarray:
    """Inverts `rows.expand`: what broadcasts to a tensor of `shape`, as `[rows]` or a scalar."""
    count, flat = rows.row_count(spec.granularity, shape), np.ravel(np.asarray(values))
    if count is None:
        return flat.reshape(())
    return np.broadcast_to(flat[:: max(flat.size // count, 1)], (count,))


def _packed(
    spec: Spec, name: str, weight: jax.Array, ranges: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the header entry of one weight, and its tensors by name."""
    qparams = stored_qparams(ranges, name)
    if qparams is None and not spec.is_codebook:
        if spec.range != "dynamic":
            raise UserError(f"weight {name!r} has no range yet; calibrate the model before it is packed")
        qparams = _estimate(spec, weight)
    if qparams is not None and qparams.group is not None:
        raise UserError(f"weight {name!r}: permuted groups are for activations; use per_group(K) or per_channel()")
    integers, scale, zero_point = _quantize(spec, weight, qparams)
    codes, signed = np.asarray(integers), spec.is_codebook or (qparams is not None and bool(qparams.signed))
    signs = "trits" if spec.is_ternary else "signs" if spec.scheme == "binary" or spec.states == 2 else None
    if signs == "signs" and not codes.all():
        signs = "trits"  # of two states, where a value is the mean: its sign is 0
    bits = (
        spec.bits if signs or not spec.is_codebook else math.ceil(spec.storage_bits)
    )  # a magnitude has a sign besides
    minimum = -1 if signs else -(2 ** (bits - 1)) if spec.is_codebook else int(grid.limits(spec, signed)[0])
    entry = {
        "shape": list(weight.shape),
        "bits": bits,
        "scheme": spec.scheme,
        "granularity": dataclasses.asdict(spec.granularity),
        "packing": signs or "bits",
        "minimum": minimum,
        "signed": signed,
    }
    tensors = {name: _encode(entry, codes), f"{name}:scale": _per_row(scale, spec, weight.shape).astype(np.float32)}
    if spec.has_zero_point:
        tensors[f"{name}:zero_point"] = _per_row(zero_point, spec, weight.shape).astype(_zero_point_dtype(spec))
    return entry, tensors


def _encode(entry: Mapping[str, Any], codes: np.ndarray) -> np.ndarray:
    if entry["packing"] == "trits":
        return pack_trits(codes)
    if entry["packing"] == "signs":
        return pack((codes + 1) // 2, 1)
    return pack(codes, entry["bits"], entry["minimum"])


def _decode(entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    shape = tuple(entry["shape"])
    if entry["packing"] == "trits":
        return unpack_trits(data, shape)
    if entry["packing"] == "signs":
        return 2 * unpack(data, 1, 0, shape) - 1
    return unpack(data, entry["bits"], entry["minimum"], shape)


def _unpacked(name: str, entry: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> jax.Array:
    """Returns the grid values of one weight."""
    scale = tensors[f"{name}:scale"]
    zero_point = tensors.get(f"{name}:zero_point", np.float32(0))
    return _dequantize(_granularity(entry["granularity"]), _decode(entry, tensors[name]), scale, zero_point)


@partial(jax.jit, static_argnums=0)
def _dequantize(granularity: Granularity, codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    scale, zero_point = (rows.expand(value, granularity, codes.shape) for value in (scale, zero_point))
    return grid.dequantize(codes, scale, zero_point.astype(jnp.float32))


# --- The file ---


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
    sites = list_sites(model_family.module(config=config), {"params": abstract}, *model_family.example_inputs(config))
    check_policy(policy, sites)

    tensors = _range_tensors(policy, sites, ranges)
    entries, total = {}, 0
    for name, value in flat.items():
        spec = _weight_spec(policy, sites, name)
        if spec is None:
            made = {name: np.asarray(value, np.float32)}
        else:
            entries[name], made = _packed(spec, name, value, ranges)
        total += sum(array.nbytes for array in made.values())
        tensors |= made
    # safetensors writes the buffer as it lies, so every array must be contiguous.
    tensors = {name: np.array(tensors[name], order="C") for name in sorted(tensors)}

    hf = model_family.hf_config(config, labels)
    header = {"version": VERSION, "config": hf, "policy": policy_to_json(policy), "quantized": entries}
    # One key: safetensors writes several in random order, and equal models should be equal files.
    metadata = {"qtx": json.dumps({**header, "sha256": _digest(header, tensors)})}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    with whole_file(directory / WEIGHTS_FILE) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata)
    write_text(directory / "config.json", json.dumps(hf, indent=2) + "\n")
    return total


def _range_tensors(policy: Policy, sites: Mapping[str, SiteInfo], ranges: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the ranges of activations and inputs, flat."""
    tensors: dict[str, np.ndarray] = {}
    for name, info in sites.items():
        spec = policy.spec(info.kind, name)
        if info.kind == "weight" or spec is None or spec.range == "dynamic":
            continue
        stored = stored_qparams(ranges, name)
        if stored is None:
            raise UserError(f"site {name!r} has no range yet; calibrate the model before it is packed")
        fields = {field: value for field, value in stored._asdict().items() if value is not None}
        tensors |= {f"ranges/{name}/{field}": np.asarray(value) for field, value in fields.items()}
    return tensors


def _digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()


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
    header, tensors = _read(path)
    family = get_family(header["config"]["model_type"])
    config = family.config_from_hf(header["config"])
    _check_config(directory / "config.json", path, family, config)

    params: dict[str, jax.Array] = {}
    qparams: dict[str, dict[str, jax.Array]] = {}
    for name, value in tensors.items():
        if name.startswith("ranges/"):
            site, _, field = name.removeprefix("ranges/").rpartition("/")
            qparams.setdefault(site, {})[field] = jnp.asarray(value)
        elif name in header["quantized"]:
            params[name] = _unpacked(name, header["quantized"][name], tensors)
        elif ":" not in name:
            params[name] = jnp.asarray(value)
    ranges = {site: grid.QParams(**fields)._asdict() for site, fields in qparams.items()}
    original = policy_from_json(header["policy"])
    return Quantized(
        family=family,
        config=config,
        policy=dataclasses.replace(original, weights=()),
        params=traverse_util.unflatten_dict(params, sep="/"),
        ranges=traverse_util.unflatten_dict(ranges, sep="/"),
        original=original,
        directory=directory,
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the header and the tensors of a file, once both are known to be what was written."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; write it with qtx.export.packed.save_quantized")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); is the file truncated?") from None
    if "qtx" not in metadata:
        raise UserError(f"{path} is no packed qtx model; load it as a checkpoint with qtx.models.load")
    try:
        header = json.loads(metadata["qtx"])
        version, digest = header["version"], header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} has a broken header; copy it or pack the model again") from None
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version!r}, this qtx reads {VERSION}; "
            "load it with the qtx that wrote it, or pack the model again"
        )
    if digest != _digest(header, tensors):
        raise UserError(f"{path} is not what was written (its checksum differs); copy it or pack the model again")
    return header, tensors


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
