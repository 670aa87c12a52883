"""What launchers do before anything else: memory that is kept, programs that are kept."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from qtx.experiments.app import keep_freed_memory
print(keep_freed_memory())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MiB, more than any threshold of malloc can be
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PROGRAM = """
import sys
from qtx.experiments.app import keep_compiled
keep_compiled(sys.argv[1])
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 2 + 1)(3))
"""


def python(program, *arguments, **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "JAX_COMPILATION"))}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=plain | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is another one here"
)
def test_freed_memory_is_kept():
    kept, _, *again = python(FAULTS)
    assert kept == "True" and all(int(faults) < 100 for faults in again)  # 16,384 pages of 4 KiB
    assert python(FAULTS, MALLOC_ARENA_MAX="8")[0] == "False"  # who says how malloc should behave is not overruled


def test_programs_are_kept(tmp_path):
    kept, other = tmp_path / "kept", tmp_path / "other"
    python(PROGRAM, kept)
    programs = {path.name: path.stat().st_mtime_ns for path in (kept / platform.node()).glob("*-cache")}
    assert programs
    python(PROGRAM, kept)
    assert {path.name: path.stat().st_mtime_ns for path in (kept / platform.node()).glob("*-cache")} == programs
    python(PROGRAM, kept, JAX_COMPILATION_CACHE_DIR=str(other))
    assert list(other.glob("*-cache"))  # a cache that is there already stays the one
