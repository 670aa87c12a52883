"""Memory that malloc keeps, and that it gives back."""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from qtx.experiments.heap import keep_freed_memory, return_freed_memory
print(keep_freed_memory())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MiB, more than any threshold of malloc can be
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
return_freed_memory()
print(before - resident())
"""


def python(program, **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = plain | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is another one here"
)
def test_freed_memory_is_kept_until_it_is_given_back():
    kept, _, *again, given_back = python(FAULTS)
    assert int(given_back) > 0.9 * 2**26  # the last of these arrays
    assert kept == "True" and all(int(faults) < 100 for faults in again)  # 16,384 pages of 4 KiB
    assert python(FAULTS, MALLOC_ARENA_MAX="8")[0] == "False"  # who says how malloc should behave is not overruled
