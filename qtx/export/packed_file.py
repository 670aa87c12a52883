"""One file with a quantized model in it: packed integers, scales, and how to read them.

    save_packed(path, model, variables, *inputs)          # a module of your own, with its policy
    packed = load_packed(path)
    outputs = model.clone(policy=packed.policy).apply(packed.variables, *inputs)

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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qtx.errors import UserError
from qtx.export.policy_json import granularity_from_json, policy_from_json, policy_to_json
from qtx.files import whole_file
from qtx.methods.calibrate import stored_qparams
from qtx.nn.sites import SiteInfo, check_policy, list_sites
from qtx.quant import estimators, grid, rows
from qtx.quant.pack import pack, pack_trits, unpack, unpack_trits
from qtx.quant.policy import Policy
from qtx.quant.spec import Granularity, Spec

VERSION = 1

_estimate = jax.jit(estimators.estimate, static_argnums=0)
_quantize = jax.jit(grid.quantize, static_argnums=0)


class Packed(NamedTuple):
    """What a file holds.

    Attributes:
      policy: to run the model with: rules for activations and inputs alone, since the weights are on their grids already.
      variables: the nested collections `params` (float32; the quantized ones hold grid values) and `ranges`.
      original: the policy that the model was quantized with, weights included.
      config: of the model, in the Hugging Face layout; {} for a module of one's own.
    """

    policy: Policy
    variables: dict[str, Any]
    original: Policy
    config: dict[str, Any]


def save_packed(
    path: str | Path,
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Writes a quantized model; the file appears under its name only when it is whole.

    Args:
      path: of the file, such as `model.qtx.safetensors`; its directory is created if needed.
      model: any module with sites and a policy.
      variables: `params`, the float masters (grid values give the same file), and `ranges`, from calibration or training.
      *args: what the model is called with; arrays or `jax.ShapeDtypeStruct`s.
      config: stored with the model.

    Returns:
      Bytes of the weights with their scales, without the activation ranges and the header.

    Raises:
      UserError: if the model has no policy or it does not fit, a static range is missing, or a parameter has a name that
        means something else in such a file (`ranges/...`, or with a colon).
    """
    policy: Policy | None = getattr(model, "policy", None)
    if policy is None:
        raise UserError("a model without a policy has nothing to pack; clone it with model.clone(policy=...)")
    ranges = variables.get("ranges", {})
    sites = list_sites(model, variables, *args)
    check_policy(policy, sites)
    tensors = _range_tensors(policy, sites, ranges)
    entries, total = {}, 0
    for name, value in sorted(traverse_util.flatten_dict(variables["params"], sep="/").items()):
        if ":" in name or name.startswith("ranges/"):
            raise UserError(
                f"parameter {name!r}: packed files use such names themselves; rename the module that has it"
            )
        spec = _weight_spec(policy, sites, name)
        if spec is None:
            made = {name: np.asarray(value, np.float32)}
        else:
            entries[name], made = pack_weight(spec, name, value, ranges)
        total += sum(array.nbytes for array in made.values())
        tensors |= made
    # safetensors writes the buffer as it lies, so every array must be contiguous.
    tensors = {name: np.array(tensors[name], order="C") for name in sorted(tensors)}
    header = {"version": VERSION, "config": dict(config or {}), "policy": policy_to_json(policy), "quantized": entries}
    # One key: safetensors writes several in random order, and equal models should be equal files.
    metadata = {"qtx": json.dumps({**header, "sha256": _digest(header, tensors)})}
    with whole_file(Path(path)) as partial:
        safetensors.numpy.save_file(tensors, partial, metadata)
    return total


def load_packed(path: str | Path) -> Packed:
    """Reads a file that `save_packed` wrote.

    Raises:
      UserError: if it is missing, truncated, altered or of another format version.
    """
    header, tensors = _read(Path(path))
    params: dict[str, jax.Array] = {}
    qparams: dict[str, dict[str, jax.Array]] = {}
    for name, value in tensors.items():
        if name.startswith("ranges/"):
            site, _, field = name.removeprefix("ranges/").rpartition("/")
            qparams.setdefault(site, {})[field] = jnp.asarray(value)
        elif name in header["quantized"]:
            params[name] = unpack_weight(name, header["quantized"][name], tensors)
        elif ":" not in name:
            params[name] = jnp.asarray(value)
    ranges = {site: grid.QParams(**fields).stored() for site, fields in qparams.items()}
    original = policy_from_json(header["policy"])
    variables = {
        "params": traverse_util.unflatten_dict(params, sep="/"),
        "ranges": traverse_util.unflatten_dict(ranges, sep="/"),
    }
    return Packed(dataclasses.replace(original, weights=()), variables, original, header["config"])


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


def pack_weight(
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


def unpack_weight(name: str, entry: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> jax.Array:
    """Returns the grid values of one weight."""
    scale = tensors[f"{name}:scale"]
    zero_point = tensors.get(f"{name}:zero_point", np.float32(0))
    return _dequantize(granularity_from_json(entry["granularity"]), _decode(entry, tensors[name]), scale, zero_point)


@partial(jax.jit, static_argnums=0)
def _dequantize(granularity: Granularity, codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    scale, zero_point = (rows.expand(value, granularity, codes.shape) for value in (scale, zero_point))
    return grid.dequantize(codes, scale, zero_point.astype(jnp.float32))


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the header and the tensors of a file, once both are known to be what was written."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; write it with qtx.save_packed")
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
