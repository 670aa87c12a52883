"""What launchers do before anything else: programs that are kept."""

import os
import platform
import subprocess
import sys

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


def test_programs_are_kept(tmp_path):
    kept, other = tmp_path / "kept", tmp_path / "other"
    python(PROGRAM, kept)
    programs = {path.name: path.stat().st_mtime_ns for path in (kept / platform.node()).glob("*-cache")}
    assert programs
    python(PROGRAM, kept)
    assert {path.name: path.stat().st_mtime_ns for path in (kept / platform.node()).glob("*-cache")} == programs
    python(PROGRAM, kept, JAX_COMPILATION_CACHE_DIR=str(other))
    assert list(other.glob("*-cache"))  # a cache that is there already stays the one
