"""Pairs of programs, measured in turn in one process, against their bars.

Machines are noisy, so nothing here is an absolute time. The two sides of a pair run alternately (A B A B ...), each round
gives one ratio, and the median of the rounds is reported with their spread. On a CPU the clock is the CPU time of the
process, which other processes do not add to; it is fair only on one core (waiting threads spin), so the process is pinned
before JAX starts (`pin_to_one_core`). On an accelerator the clock is wall time to `block_until_ready`.

Temporary memory is what the compiler reserves besides arguments and results (`memory_analysis`). It is exact: such rows
have one ratio and no seconds.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from qtx.train.optimizer import make_optimizer
from qtx.train.phase import Phase, Span, make_state, make_step

Program = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A ratio to keep to: at most `limit`, or at least, for speed-ups."""

    limit: float
    at_least: bool = False

    def holds(self, ratio: float) -> bool:
        """Whether a measured ratio keeps to the bar."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of A held against bytes of B, with what each is and the bar for A/B."""

    a: int
    b: int
    a_is: str
    b_is: str
    bar: Bar


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two programs to measure.

    Attributes:
      a: what is judged.
      b: what it is held against.
      a_is: description of A.
      b_is: description of B.
      rounds: how often both are run.
      bar: for A/B, or for B/A if it is a speed-up (`at_least`); None: for information.
      memory: compared besides.
      speedup: whether B/A is reported without a bar, too.
    """

    a: Program
    b: Program
    a_is: str
    b_is: str
    rounds: int
    bar: Bar | None = None
    memory: Memory | None = None
    speedup: bool = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of A and of B in each round."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    def ratios(self, speedup: bool = False) -> list[float]:
        """Returns A/B of every round, or B/A for a speed-up."""
        return [b / a if speedup else a / b for a, b in zip(self.a, self.b, strict=True)]


def pin_to_one_core() -> None:
    """Keeps this process on one of its cores; to be called before JAX makes its threads. Does nothing but on Linux."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def default_clock() -> Callable[[], float]:
    """Returns CPU time on a CPU, wall time on an accelerator."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def measure(a: Program, b: Program, rounds: int, clock: Callable[[], float] | None = None) -> Timing:
    """Runs two programs in turn, after one unmeasured run of each.

    Args:
      a: returns what is to be waited for (any pytree of arrays).
      b: likewise.
      rounds: how often.
      clock: seconds; by default `default_clock()`.
    """
    clock = clock or default_clock()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for program, taken in zip((a, b), seconds, strict=True):
            start = clock()
            jax.block_until_ready(program())
            if number:
                taken.append(clock() - start)
    return Timing(tuple(seconds[0]), tuple(seconds[1]))


COLUMNS = ("row", "A", "B", "A seconds", "B seconds", "ratio", "spread", "bar", "holds")
FORMATS = {"A seconds": ".4f", "B seconds": ".4f", "ratio": ".3f"}


def rows_of(name: str, comparison: Comparison, timing: Timing) -> list[list[Any]]:
    """Returns the table rows of one comparison: its time and, if it has one, its memory."""

    def row(name: str, a: str, b: str, seconds: Sequence[float | None], ratios: Sequence[float], bar: Bar | None):
        ratio = statistics.median(ratios)
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}" if len(ratios) > 1 else ""
        verdict = "" if bar is None else "yes" if bar.holds(ratio) else "NO"
        return [name, a, b, *seconds, ratio, spread, "" if bar is None else str(bar), verdict]

    bar = comparison.bar
    speedup = comparison.speedup or (bar is not None and bar.at_least)
    seconds = [statistics.median(timing.a), statistics.median(timing.b)]
    rows = [row(name, comparison.a_is, comparison.b_is, seconds, timing.ratios(speedup), bar)]
    if (memory := comparison.memory) is not None:
        a, b = (f"{what}, {size / 2**20:.1f} MiB" for what, size in ((memory.a_is, memory.a), (memory.b_is, memory.b)))
        rows.append(row(f"{name} memory", a, b, [None, None], [memory.a / memory.b], memory.bar))
    return rows


def environment() -> dict[str, str]:
    """Returns what the numbers depend on: device, clock, cores, load and versions."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "machine": f"{platform.machine()}, {cores} of {os.cpu_count()} cores",
        "clock": "CPU time" if device.platform == "cpu" else "wall time",
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        **versions,
    }


def random_batch(config: ConfigDict | FrozenConfigDict, num_labels: int = 2) -> dict[str, jax.Array]:
    """Returns a batch of random texts of half to all of `config.tokens` tokens, with labels."""
    rng = np.random.default_rng(config.seed)
    shape = config.batch, config.tokens
    lengths = rng.integers(config.tokens // 2, config.tokens + 1, config.batch)
    mask = np.arange(config.tokens) < lengths[:, None]
    return dict(
        input_ids=jnp.asarray(rng.integers(1, config.model.vocab_size, shape) * mask, jnp.int32),
        attention_mask=jnp.asarray(mask, jnp.int32),
        token_type_ids=jnp.zeros(shape, jnp.int32),
        labels=jnp.asarray(rng.integers(0, num_labels, config.batch), jnp.int32),
        weights=jnp.ones(config.batch, jnp.float32),
    )


def temporary_memory(compiled: Any) -> int:
    """Returns a compiled program's bytes of temporary memory, 0 where the backend does not tell."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes


def train_program(
    phase: Phase, variables: Mapping[str, Any], batch: Mapping[str, jax.Array], memory: Mapping[str, Any] | None = None
) -> tuple[Program, int]:
    """Returns the train step of the library as a program, which takes a step at every run, and its temporary memory.

    Args:
      phase: whose step.
      variables: `params` and `ranges`.
      batch: of every step.
      memory: see `Phase.memory`; by default there is none.
    """
    steps = 10_000
    optimizer = make_optimizer(phase.optimizer, steps)
    state = make_state(phase, variables, optimizer, 0, batch).replace(memory=dict(memory or {}))
    state = jax.tree.map(jnp.copy, state)  # the step takes its memory; the parameters are used again
    step = make_step(phase, optimizer, 0, Span(0, 0, steps, steps))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, phase.constants).compile()

    def program():
        nonlocal state
        state, measured = compiled(state, batch, phase.constants)
        return measured

    return program, temporary_memory(compiled)
