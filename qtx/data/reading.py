"""Finding and reading what data comes from: files below a data directory, compressed or not, and tensorflow-datasets.

What is wrong with a file is said with its name and line; what is missing, with every place that was looked at.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib.util
import os
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qtx.errors import UserError, near_misses

DATA_DIR_VARIABLE = "QTX_DATA_DIR"
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}


def places(data_dir: str | os.PathLike[str] | None, below: Sequence[str]) -> list[Path]:
    """Returns where a task's files may be; none without a data directory.

    Args:
      data_dir: the data directory; the environment variable QTX_DATA_DIR when not given.
      below: names of directories in it.

    Raises:
      UserError: the data directory does not exist.
    """
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        return []
    if not Path(root).is_dir():
        origin = "data_dir" if data_dir else DATA_DIR_VARIABLE
        raise UserError(f"{origin} {root} is not a directory; it must hold {below[0]}")
    return [Path(root) / name for name in below]


def find_files(
    task: str, folder: Path, files: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, Path]:
    """Returns the file of each split, by the first name that is there, plain or .gz; optional splits may have none.

    Raises:
      UserError: a split that is not optional has no file.
    """
    found = {}
    for name, names in files.items():
        path = first_file(folder, names)
        if path is not None:
            found[name] = path
        elif name not in optional:
            wanted = " or ".join(f"{folder / file}[.gz]" for file in names)
            raise UserError(f"{task}: missing file {wanted}; put the official file there")
    return found


def first_file(folder: Path, names: Iterable[str]) -> Path | None:
    """Returns the first of these files that is there, plain or .gz."""
    candidates = (folder / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_bytes(path: Path) -> bytes:
    """Reads a file, compressed or not.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; it is damaged or cut short, fetch it again") from error


def read_text(path: Path, fallback: str | None = None) -> str:
    """Reads a UTF-8 file, compressed or not; `fallback` is the encoding of files that are not UTF-8.

    Raises:
      UserError: there is no such file, it is damaged, or it is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback:
            return data.decode(fallback)
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert it with iconv -t utf-8") from None


def read_lines(path: Path) -> list[str]:
    r"""Reads the lines of a UTF-8 file, stripped of white space on both sides.

    Only `\n` ends a line: other line separators of Unicode occur inside sentences, and splitting there would move all that
    follows away from its translation.

    Raises:
      UserError: as in `read_text`, or the file has no line with text.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty; give a file with one sentence per line")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def labelled_files(root: Path, suffixes: Collection[str]) -> list[Path]:
    """Returns every file `root/LABEL/*` with one of these suffixes, in an order that no file system changes.

    Raises:
      UserError: there is no such directory.
    """
    if not root.is_dir():
        raise UserError(f"no such directory: {root}")
    return [file for file in sorted(root.glob("[!.]*/*")) if file.suffix.lower() in suffixes]


def labelled_folders(root: Path, suffixes: Collection[str]) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Finds files that are sorted into folders, one for each label.

    Args:
      root: has either `train/LABEL/*` and `validation/LABEL/*`, or `LABEL/*`.
      suffixes: of the files, such as `.txt`.

    Returns:
      The files of `train`, and of `validation` if it has a folder, and the sorted labels of the training files.

    Raises:
      UserError: a missing or empty folder, an unknown label, fewer than two labels.
    """
    folders = {name: root / name for name in ("train", "validation") if (root / name).is_dir()}
    if len(folders) == 1:
        raise UserError(f"{root} has only one of the folders train and validation; give both, or the labels alone")
    found = {name: labelled_files(folder, suffixes) for name, folder in (folders or {"train": root}).items()}
    labels = label_names([file.parent.name for file in found["train"]], folders.get("train", root))
    for name, files in found.items():
        if not files:
            kinds = " or ".join(f"LABEL/*{suffix}" for suffix in suffixes)
            raise UserError(f"{folders[name]} holds no {kinds} files; every class needs a folder")
        for file in files:
            if file.parent.name not in labels:
                raise UserError(
                    f"{file.parent}: unknown label {file.parent.name!r}{near_misses(file.parent.name, labels)}"
                )
    return found, labels


def label_names(labels: Iterable[str], path: Path) -> tuple[str, ...]:
    """Returns the sorted names of classes; raises a `UserError` if there are fewer than two, or one is empty."""
    names = tuple(sorted(set(labels)))
    if len(names) < 2 or "" in names:
        raise UserError(
            f"{path}: needs at least two labels, none of them empty, found {', '.join(map(repr, names)) or 'none'}"
        )
    return names


# -------------------------------------------------------------------------------------- tensorflow-datasets


def from_tfds(
    task: str, builder: str, host: str, official: str, searched: Sequence[Path]
) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Loads through tensorflow-datasets, or says everything that was looked for and how to get it.

    Args:
      task: what is loaded.
      builder: its name in tensorflow-datasets.
      host: where the builder downloads from.
      official: a file that would do instead, below the data directory; empty where none would.
      searched: where it was not.

    Returns:
      The rows of every split.

    Raises:
      UserError: it cannot be had.
    """
    looked = " or ".join(map(str, searched)) if searched else f"any directory, as {DATA_DIR_VARIABLE} is not set"
    try:
        return _fetch_tfds(builder, host)
    except Exception as error:  # tensorflow-datasets fails in many ways, and none of them names the remedy
        needs = "" if importlib.util.find_spec("tensorflow") else " (TensorFlow is not installed)"
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        files = f"no official files found in {looked}, and " if official else ""
        remedy = f"point --data_dir or {DATA_DIR_VARIABLE} at a folder with {official}, or " if official else ""
        raise UserError(
            f"{task}: {files}tensorflow-datasets gave no {builder}{needs}: {reason}; "
            f"{remedy}pip install 'qtx[tensorflow]' and connect to the network"
        ) from error


def _fetch_tfds(builder: str, host: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Returns the splits of a tensorflow-datasets builder: prepared ones first, then downloaded, then by TensorFlow."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text.glue  # noqa: F401  (registers the builder: the lazy registry misses it)

    tensorflow = importlib.util.find_spec("tensorflow") is not None
    # Something prepared but unreadable is an error of many types; downloading again says what is wrong. What was never
    # prepared has no splits. Without TensorFlow only array records can be read, with it what older versions wrote, too.
    with contextlib.suppress(Exception):
        if prepared := tfds.data_source(builder, download=False):
            return prepared
    if tensorflow:
        with contextlib.suppress(Exception):
            if prepared := tfds.load(builder, download=False):
                return tfds.as_numpy(prepared)
    _require_network(host)
    try:
        return tfds.data_source(builder)
    except Exception:
        if not tensorflow:
            raise
        return tfds.as_numpy(tfds.load(builder))


def _require_network(url: str) -> None:
    """Fails within seconds where the downloader would retry for many minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # an answer is all that matters
    except OSError as error:
        raise ConnectionError(f"{url} cannot be reached ({error})") from error


def as_text(value: Any) -> str:
    """Returns a text feature of tensorflow-datasets, bytes or not, as a string."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


# ------------------------------------------------------------------------------------------ splits and limits


class Rows(Protocol):
    """One split of any kind."""

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def take(self, rows: np.ndarray) -> Any:
        """Returns the examples at these row numbers, in that order."""
        ...


Split = TypeVar("Split", bound=Rows)


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns a [N] mask with that fraction of every class, and at least one of each class that has two or more."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        mask[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return mask


def held_apart(rows: Split, held_out: np.ndarray, path: Path) -> dict[str, Split]:
    """Returns the splits `train` and `validation`, the rows of the latter being true in the mask `[N]`.

    Raises:
      UserError: one of them, from this path, would be empty.
    """
    if not held_out.any() or held_out.all():
        raise UserError(f"{path}: too few examples ({len(rows)}) to split into train and validation; add some")
    return {"train": rows.take(np.flatnonzero(~held_out)), "validation": rows.take(np.flatnonzero(held_out))}


def limited(
    splits: Mapping[str, Split], limit_train: int | None, limit_eval: int | None, seed: int
) -> dict[str, Split]:
    """Keeps random subsets of splits, each in its original order.

    Args:
      splits: the splits by name.
      limit_train: the most examples of `train`; None keeps all.
      limit_eval: the same for every other split.
      seed: of the subsets.
    """
    limits = {"train": limit_train}
    return {name: _limit(split, limits.get(name, limit_eval), seed) for name, split in splits.items()}


def check_limits(limit_train: int | None, limit_eval: int | None) -> None:
    """Raises a `UserError` for a limit below 1."""
    for name, limit in (("limit_train", limit_train), ("limit_eval", limit_eval)):
        if limit is not None and limit < 1:
            raise UserError(f"{name} must be at least 1, got {limit}; leave it out to keep everything")


def _limit(split: Split, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng(seed).choice(len(split), limit, replace=False)))


def standard_input() -> str:
    """Returns what stands in standard input; raises a `UserError` if that is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 ({error}); convert it") from None
