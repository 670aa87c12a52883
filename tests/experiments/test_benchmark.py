"""The benchmark: ratios on a fake clock, the plain reference, every row at tiny sizes, the launcher's flags."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.errors import UserError
from qtx.experiments import benchmark
from qtx.experiments.benchmark import Bar, Comparison, Memory, Timing, measure, rows_of

ROOT = Path(__file__).parents[2]


def _smoke():
    spec = importlib.util.spec_from_file_location("benchmark_config", ROOT / "configs" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


class FakeClock:
    """A clock that programs move."""

    def __init__(self):
        self.now = 0.0
        self.order = ""

    def __call__(self):
        return self.now

    def program(self, name, seconds):
        steps = iter(seconds)

        def run():
            self.now += next(steps)
            self.order += name

        return run


def _comparison(bar=None, memory=None):
    return Comparison(lambda: None, lambda: None, "ours", "theirs", 3, bar, memory)


def _cells(row):
    return dict(zip(benchmark.COLUMNS, row, strict=True))


def test_measure_takes_turns_and_leaves_the_first_run_out():
    clock = FakeClock()
    timing = measure(clock.program("A", [100, 2, 3, 8]), clock.program("B", [100, 1, 2, 4]), 3, clock)
    assert clock.order == "ABABABAB"
    assert timing == Timing((2.0, 3.0, 8.0), (1.0, 2.0, 4.0))


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    timing = Timing((2.0, 3.0, 8.0), (1.0, 3.0, 2.0))  # ratios 2, 1, 4; the ratio of the medians would be 1.5
    (row,) = rows_of("pair", _comparison(Bar(1.10)), timing)
    cells = _cells(row)
    assert (cells["A seconds"], cells["B seconds"], cells["ratio"]) == (3.0, 2.0, 2.0)
    assert (cells["spread"], cells["bar"], cells["holds"]) == ("1.000-4.000", "at most 1.1", "NO")


def test_a_speed_up_is_the_other_way_round():
    (row,) = rows_of("pair", _comparison(Bar(10, at_least=True)), Timing((1.0, 1.0, 1.0), (12.0, 9.0, 11.0)))
    cells = _cells(row)
    assert (cells["ratio"], cells["bar"], cells["holds"]) == (11.0, "at least 10", "yes")


def test_memory_has_a_row_of_its_own_and_no_bar_gives_no_verdict():
    memory = Memory(3 * 2**20, 2 * 2**20, "ours", "theirs", Bar(1.25))
    time, space = map(_cells, rows_of("pair", _comparison(memory=memory), Timing((1.0,), (1.0,))))
    assert (time["bar"], time["holds"]) == ("", "")
    assert (space["row"], space["A"], space["B"]) == ("pair memory", "ours, 3.0 MiB", "theirs, 2.0 MiB")
    assert (space["ratio"], space["holds"], space["A seconds"]) == (1.5, "NO", None)


def test_bars_include_their_limit():
    assert Bar(1.1).holds(1.1) and not Bar(1.1).holds(1.11)
    assert Bar(10, at_least=True).holds(10) and not Bar(10, at_least=True).holds(9.9)


def test_the_loop_search_finds_the_least_error():
    x = jax.random.normal(jax.random.key(0), (4, 256))
    for by_row in (True, False):
        found = np.atleast_1d(benchmark.loop_search(x, 20, by_row))
        for row, best in zip(np.asarray(x) if by_row else [np.asarray(x)], found, strict=True):
            extent = 1.5 * np.abs(np.asarray(row)).max()
            highs = extent * np.arange(1, 21) / 20
            errors = [np.mean((h / 127 * np.clip(np.round(row * 127 / h), -128, 127) - row) ** 2) for h in highs]
            assert best == pytest.approx(highs[np.argmin(errors)], rel=1e-6)


def test_programs_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(benchmark, "loop_search", lambda x, candidates, by_row: jnp.max(jnp.abs(x)))
    config = _smoke()
    config.candidates = 1  # 1.5 times the largest magnitude: worse than the magnitude itself
    with pytest.raises(ArithmeticError, match="times the error"):
        benchmark.search(config, by_row=False)


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match="unknown row 'train-fixd'; did you mean 'train-fixed'"):
        benchmark.run(_smoke(), only=["train-fixd"])


def test_smoke_measures_every_row(tmp_path, capsys):
    config = _smoke()
    table = benchmark.run(config, tmp_path)
    printed = capsys.readouterr().out
    found = [row[0] for row in table.rows]
    assert [name for name in found if not name.endswith(" memory")] == list(benchmark.COMPARISONS)
    assert {f"{name} memory" for name in ("train-fixed", "train-learned", "search-tensor")} <= set(found)
    assert all(f"| {name} " in printed for name in found) and "jax: " in printed
    assert all(_cells(row)["ratio"] > 0 for row in table.rows if not row[0].endswith(" memory"))
    assert (tmp_path / "benchmark.csv").read_text() == table.csv()
    assert (tmp_path / "benchmark.md").exists() and "device: " in (tmp_path / "environment.txt").read_text()


def test_the_launcher_measures_the_chosen_rows():
    command = [sys.executable, ROOT / "launch" / "benchmark.py", "--smoke", "--rounds=3", "--only=forward-plain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| forward-plain |" in done.stdout and "train-fixed" not in done.stdout
