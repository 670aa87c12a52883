"""Where arrays live: a mesh with a data and a model axis, and rules from parameter names to its axes.

One device is the 1x1 mesh. Under `jit` a per-tensor maximum is global, so quantization gives the same ranges however the
batch is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qtx.errors import UserError
from qtx.quant.policy import matches

# Megatron layout: the first product of a block is split by outputs, the second by inputs.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    ("**/attention/out/kernel", PartitionSpec("model", None)),
    ("**/ffn*/down/kernel", PartitionSpec("model", None)),
    ("**/attention/*/kernel", PartitionSpec(None, "model")),
    ("**/ffn*/up/kernel", PartitionSpec(None, "model")),
    ("**/table", PartitionSpec("model", None)),
)


def make_mesh(model_parallel: int = 1) -> Mesh:
    """Returns a mesh over all devices, with axes `data` and `model`.

    Args:
      model_parallel: how many devices share one copy of the model.

    Raises:
      UserError: if that does not divide the number of devices.
    """
    count = jax.device_count()
    if model_parallel < 1 or count % model_parallel:
        raise UserError(f"model_parallel={model_parallel} does not divide the {count} devices there are")
    return jax.make_mesh(
        (count // model_parallel, model_parallel), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def partition(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns how a parameter is split: by the first of `RULES` that matches, where every axis divides evenly."""
    spec = next((spec for pattern, spec in RULES if matches(pattern, name)), PartitionSpec())
    sizes = [mesh.shape[axis] if axis else 1 for axis in spec]
    if len(sizes) > len(shape) or any(n % size for n, size in zip(shape, sizes, strict=False)):
        return PartitionSpec()
    return spec


def shard_tree(tree: Any, mesh: Mesh) -> Any:
    """Places a nested dict of arrays on the mesh: by `RULES` where an axis divides evenly, replicated otherwise."""

    def place(name: str, x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, partition(name, np.shape(x), mesh)))

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({k: None if v is None else place(k, v) for k, v in flat.items()}, sep="/")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places a copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits a batch over the data axis; each host brings its own rows.

    Raises:
      UserError: if the rows do not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows, parts = len(next(iter(batch.values()))) * jax.process_count(), mesh.shape["data"]
    if rows % parts:
        raise UserError(f"a batch of {rows} rows cannot be split over {parts} devices; use a multiple of {parts}")
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
