"""The benchmark: the plain references, every row at tiny sizes, the launcher's flags."""

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
from qtx.experiments.measuring import COLUMNS

ROOT = Path(__file__).parents[2]


def smoke_config():
    spec = importlib.util.spec_from_file_location("benchmark_config", ROOT / "configs" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke")


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
    config = smoke_config()
    config.candidates = 1  # 1.5 times the largest magnitude: worse than the magnitude itself
    with pytest.raises(ArithmeticError, match="times the error"):
        benchmark.search(config, by_row=False)


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match="unknown row 'train-fixd'; did you mean 'train-fixed'"):
        benchmark.run(smoke_config(), only=["train-fixd"])


def test_smoke_measures_every_row(tmp_path, capsys):
    config = smoke_config()
    table = benchmark.run(config, tmp_path)
    printed = capsys.readouterr().out
    found = [row[0] for row in table.rows]
    assert [name for name in found if not name.endswith(" memory")] == list(benchmark.COMPARISONS)
    assert {f"{name} memory" for name in ("train-fixed", "train-learned", "train-bfloat16", "search-tensor")} <= set(
        found
    )
    assert all(f"| {name} " in printed for name in found) and "jax: " in printed
    assert all(row[COLUMNS.index("ratio")] > 0 for row in table.rows if not row[0].endswith(" memory"))
    assert (tmp_path / "benchmark.csv").read_text() == table.csv()
    assert (tmp_path / "benchmark.md").exists() and "device: " in (tmp_path / "environment.txt").read_text()


def test_the_launcher_measures_the_chosen_rows():
    command = [
        sys.executable,
        ROOT / "launch" / "benchmark.py",
        "--smoke",
        "--rounds=3",
        "--only=graph-build",
    ]  # compiles nothing
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| graph-build ")]
    assert "train-fixed" not in done.stdout
    assert "-" in found[COLUMNS.index("spread")], "more rounds than the configuration's one"
