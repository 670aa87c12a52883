"""Files that readers see whole or not at all, even if the process dies while they are written; names for what they are of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from qtx.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name to write to; it becomes `path` at the end of the block, and vanishes on an error.

    The temporary file lies in the same directory, which is made if needed, and so on the same file system. The file gets the
    permissions of any new file, whatever wrote it (safetensors would let nobody else read it).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises a `UserError` if no file of this name could be written: so that it is said before the work, not behind it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")
    parent = next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {parent} is no directory that may be written to")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all, with line ends as they are."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def checksum(contents: Iterable[str | np.ndarray]) -> str:
    """Returns a name for all that decides what a file will hold, texts and arrays in their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content.encode() if isinstance(content, str) else np.ascontiguousarray(content).tobytes())
    return digest.hexdigest()[:16]
