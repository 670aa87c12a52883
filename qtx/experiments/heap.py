"""What glibc's malloc does with memory that is freed; where malloc is another one, nothing happens here."""

from __future__ import annotations

import ctypes
import gc
import os
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def _of_libc(name: str) -> Any:
    """Returns a function of the C library, or None if it has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def keep_freed_memory() -> bool:
    """Tells malloc to keep what is freed, and returns whether it does; call it before threads start.

    XLA asks for the temporary memory of a program anew at every call. By default such a block is mapped, zeroed page by page
    and unmapped again: 45,000 page faults in a train step of MiniLM, an eighth of its time. Nothing happens if the environment
    says how malloc should behave (`MALLOC_ARENA_MAX` and the like).
    """
    mallopt = _of_libc("mallopt")
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all([mallopt(option, value) for option, value in options.items()])


def return_freed_memory() -> None:
    """Gives the system what is freed by now, even if malloc keeps it; call it between one run and the next.

    A run leaves holes that the arrays of another one do not fit into: behind five runs on a graph of 21,000 nodes a process had
    10 GiB.
    """
    gc.collect()
    malloc_trim = _of_libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
