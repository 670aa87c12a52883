"""Tensors of a file that `torch.save` wrote, read without torch: `pytorch_model.bin` of models that have nothing newer.

A file is a pickle of the state dict, in which a tensor is a view (offset, shape, strides) of a numbered storage, and the bytes
of the storages beside it: as members of a zip file (PyTorch 1.6 and later), or one after the other behind the pickle (before).
Unpickling calls nothing but what the allow list below names, so a file cannot run code.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from qtx.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C  # what a file of the older kind begins with, as a pickle
_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage by its number: `size` elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as it is pickled; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, data: np.ndarray) -> np.ndarray:
        """Returns the tensor, given its storage."""
        last = self.offset + sum((length - 1) * step for length, step in zip(self.shape, self.strides, strict=True))
        if 0 in self.shape:
            return np.zeros(self.shape, data.dtype)
        if min((self.offset, *self.strides)) < 0 or last >= data.size:
            raise ValueError("a tensor reaches beyond its storage")
        strides = [step * data.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.shape, strides).copy()


def _rebuild_tensor(storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _View, *_: Any) -> _View:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): np.dtype(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or view not in ([], [None]):
            raise pickle.UnpicklingError("its storages are of a kind that is not known")
        return _Storage(str(key), dtype, size)


def load_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict, by name.

    Raises:
      UserError: the file is damaged, or holds anything but a flat state dict.
    """
    try:
        with open(path, "rb") as file:
            tensors = _load_zip(file) if zipfile.is_zipfile(file) else _load_older(file)
    except (ValueError, TypeError, LookupError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as a state dict of PyTorch ({error}); is the file truncated? A model that "
            "`transformers` can load can be saved again as safetensors there"
        ) from None
    return tensors


def _load_zip(file: IO[bytes]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("a zip file without data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        with archive.open(f"{root}data.pkl") as stream:
            views = _views(_Unpickler(stream).load())
        storages = {view.storage.key: view.storage for view in views.values()}
        data = {
            key: np.frombuffer(archive.read(f"{root}data/{key}"), storage.dtype) for key, storage in storages.items()
        }
    return {name: view.of(data[view.storage.key]) for name, view in views.items()}


def _load_older(file: IO[bytes]) -> dict[str, np.ndarray]:
    file.seek(0)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("not a file of torch.save")
    for _ in ("protocol", "sizes of numbers where it was written"):
        _Unpickler(file).load()
    views = _views(_Unpickler(file).load())
    storages = {view.storage.key: view.storage for view in views.values()}
    data = {}
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little")
        if key not in storages:
            raise ValueError(f"storage {key} belongs to no tensor")
        raw = file.read(size * storages[key].dtype.itemsize)
        data[key] = np.frombuffer(raw, storages[key].dtype)
        if len(data[key]) != size:
            raise EOFError("its last bytes are missing")
    return {name: view.of(data[view.storage.key]) for name, view in views.items()}


def _views(found: object) -> dict[str, _View]:
    if not isinstance(found, Mapping):
        raise TypeError(f"a {type(found).__name__} instead of a state dict")
    others = [name for name, value in found.items() if not isinstance(value, _View)]
    if others:
        raise TypeError(f"{others[0]!r} is no tensor")
    return {str(name): view for name, view in found.items()}
