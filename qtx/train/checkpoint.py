"""Checkpoints of a run: the one module that knows Orbax.

A state goes to Orbax as a flat map from leaf names to plain arrays, next to a JSON record of every leaf's shape, dtype
and checksum. Tree structure therefore always comes from the program, never from the file: tuples stay tuples, optimizer
states keep their classes, a state that does not fit is explained by name before a byte of it is read, and one whose
bytes have changed on disk is not taken for the one that was saved.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.experimental import multihost_utils

from qtx.errors import UserError

PyTree = Any

# A step that lacks one of these was cut off while being copied or deleted: Orbax itself publishes steps by rename.
_COMPLETE = ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata")
_WORDS = {1: np.uint8, 2: np.uint16}  # wider elements are summed as words of 32 bits


class Checkpoints:
    """The checkpoints under one directory, one subdirectory for each step.

    A context manager; leaving it waits for the last write. Saving is asynchronous and atomic: `save` returns once the
    arrays are copied to the host, so that the train step may donate them, and a killed write leaves the earlier
    checkpoints as they were. On several hosts, every process makes the same calls.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        """Opens `directory`, which the first `save` creates; nothing is written or deleted before that.

        Args:
          directory: a local (or shared) directory.
          keep: how many of the newest checkpoints are kept, at least 1.
        """
        self.directory = Path(directory).expanduser().absolute()
        self._keep = keep
        self._opened_to_write = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, in increasing order. Waits for a write in progress."""
        self.wait()
        return sorted(int(path.name) for path in self._step_directories() if _is_complete(path))

    def latest_step(self) -> int | None:
        """Returns the newest step with a complete checkpoint, None without one. Waits for a write in progress."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Starts writing a checkpoint, after the previous write has ended.

        Args:
          step: the number of train steps behind `state`; larger than every step already saved.
          state: any pytree of arrays of any dtype but uint4 (sharded ones too), typed PRNG keys, NumPy arrays and
            scalars, and Python numbers. Every leaf needs a name of its own.
          meta: a JSON-able record that comes back with the state, such as the phase and the data iterator's position.

        Raises:
          UserError: the directory holds this or a later step.
          TypeError: `meta` is not JSON-able, or a leaf is not a number or an array.
          Exception: whatever made the previous, asynchronous write fail, such as a full disk.
        """
        json.dumps(meta)  # in the caller's stack, not in the writer's thread
        leaves = _named_leaves(state)
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise UserError(
                f"cannot save step {step}: {self.directory} already has step {latest}; resume from it, or use another "
                "workdir"
            )
        if not self._opened_to_write:
            self._remove_debris()
            self._manager.reload()
            self._opened_to_write = True
        arrays = {name: _encode(leaf) for name, leaf in leaves.items() if np.size(leaf)}  # Orbax refuses size 0
        record = {
            "meta": meta,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "checksums": _checksums(arrays),
        }
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(record))
        )

    def restore(self, target_state: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Reads a checkpoint into the form of `target_state`.

        Args:
          target_state: a state as `save` takes it, such as a freshly initialised one; arrays may be abstract
            (`jax.ShapeDtypeStruct`; without a sharding they come to the first device). Tree type, shapes, dtypes,
            shardings and kinds of leaves are kept, values are replaced.
          step: which checkpoint; the latest by default.

        Returns:
          (state, meta), bit for bit as they were saved.

        Raises:
          UserError: there is no such checkpoint, it is damaged, or it has another tree, shape or dtype: the message
            names the first leaf that differs.
        """
        step, stored = self._record(step)
        leaves = _named_leaves(target_state)
        self._check_fits(step, stored["leaves"], {name: _describe(leaf) for name, leaf in leaves.items()})
        form = {name: _form(leaf) for name, leaf in leaves.items() if np.size(leaf)}
        arrays = self._read(step, "state", ocp.args.StandardRestore(form))
        for name, checksum in _checksums(arrays).items():
            if checksum != stored["checksums"][name]:
                raise self._damaged(step, f"the values of {name!r} have changed since they were written")
        restored = [_decode(leaf, arrays[name]) if np.size(leaf) else _empty(leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(target_state), restored), stored["meta"]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns the `meta` of a checkpoint, the latest by default, without reading its state; raises as `restore`."""
        return self._record(step)[1]["meta"]

    def rewind(self, step: int) -> None:
        """Deletes every checkpoint after `step`, as if the run had stopped there."""
        self.wait()
        if jax.process_index() == 0:
            for path in self._step_directories():
                if int(path.name) > step:
                    shutil.rmtree(path)
        multihost_utils.sync_global_devices("qtx_checkpoints_rewound")
        if self._opened_to_write:
            self._manager.reload()

    def wait(self) -> None:
        """Waits for the write in progress, and raises what made it fail, if it did."""
        if self._opened_to_write:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the write in progress and frees the writer's threads. Closing twice is fine."""
        manager = self.__dict__.pop("_manager", None)
        self._opened_to_write = False
        if manager is not None:
            manager.close()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                create=False,
                lightweight_initialize=True,
            ),
        )

    def _step_directories(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir()]

    def _remove_debris(self) -> None:
        """Creates the directory and removes what killed writes left, so that their steps can be written again."""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            debris = [path for path in self._step_directories() if not _is_complete(path)]
            for path in [*debris, *self.directory.glob("*.orbax-checkpoint-tmp*")]:
                shutil.rmtree(path)
        multihost_utils.sync_global_devices("qtx_checkpoints_opened")

    def _record(self, step: int | None) -> tuple[int, dict[str, Any]]:
        """Returns a step, the latest by default, and the JSON record of its checkpoint."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}: check the workdir, or train first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; there are steps {steps}")
        return step, self._read(step, "meta", ocp.args.JsonRestore())

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax, TensorStore and JSON each have their own, none of them documented
            line = next(iter(str(error).strip().splitlines()), "")
            raise self._damaged(step, f"{type(error).__name__}: {line[:100]}") from error

    def _damaged(self, step: int, why: str) -> UserError:
        earlier = [other for other in self.steps() if other < step]
        remedy = f"resume from step {earlier[-1]}" if earlier else "start again"
        return UserError(
            f"checkpoint {self.directory / str(step)} is truncated or corrupted ({why}); delete that directory to "
            f"{remedy}"
        )

    def _check_fits(self, step: int, stored: dict[str, str], target: dict[str, str]) -> None:
        for name in [*target, *stored]:
            if stored.get(name) != target.get(name):
                there, here = stored.get(name, "absent"), target.get(name, "absent")
                raise UserError(
                    f"checkpoint {self.directory / str(step)} does not fit this run: {name!r} is {there} in the "
                    f"checkpoint and {here} here; use another workdir, or the config that the checkpoint was written "
                    "with (config.json in the run directory)"
                )


def _is_complete(path: Path) -> bool:
    return all((path / part).is_file() for part in _COMPLETE)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, such as `params/dense/kernel`, in the order of the tree."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise UserError(f"two leaves of the state are both called {name!r}: rename the key that contains '/'")
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise TypeError(f"leaf {name!r} of the state is neither an array nor a number but a {type(leaf).__name__}")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
    """Returns dtype and shape, such as `float32[2, 3]`."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return f"{dtype}{list(np.shape(leaf))}"


def _encode(leaf: Any) -> jax.Array | np.ndarray:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _checksums(arrays: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Returns for each array the sum of its bits as unsigned words modulo 2**32, which no sharding changes."""
    sums = {name: _device_sum(x) if isinstance(x, jax.Array) else _host_sum(x) for name, x in arrays.items()}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _device_sum(x: jax.Array) -> jax.Array:
    x = x.astype(np.int8) if _lacks_bytes(x) else x
    if jnp.iscomplexobj(x):
        return _device_sum(x.real) + _device_sum(x.imag)
    return jnp.sum(lax.bitcast_convert_type(x, _WORDS.get(x.dtype.itemsize, np.uint32)), dtype=np.uint32)


def _host_sum(x: np.ndarray) -> int:
    x = x.astype(np.int8) if _lacks_bytes(x) else x
    word = np.uint32 if np.iscomplexobj(x) else _WORDS.get(x.dtype.itemsize, np.uint32)
    return int(np.ascontiguousarray(x).reshape(-1).view(word).sum(dtype=np.uint64)) % 2**32


def _lacks_bytes(x: jax.Array | np.ndarray) -> bool:
    return x.dtype == bool or x.dtype.name in ("int2", "int4")


def _form(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns what Orbax needs to know to read `leaf`: shape, dtype and, on devices, sharding."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _empty(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _decode(target: Any, array: Any) -> Any:
    """Gives what was read the kind of the target leaf."""
    if _is_key(target):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), target.dtype)))
    if isinstance(target, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
        return array
    return array[()] if isinstance(target, np.generic) else type(target)(array.item())
