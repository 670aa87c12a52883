"""Measure what quantization costs, against its bars: one table, pairs measured in turn in one process.

    python launch/benchmark.py
    python launch/benchmark.py --only=train-fixed,search-tensor --rounds=31 --workdir=runs/benchmark

On a CPU the process is pinned to one core before JAX starts and CPU time is measured, so the ratios hold on a machine
that does other work as well. A bar that is missed is reported, never an error.
"""

import sys

from absl import flags

from qtx.experiments import benchmark
from qtx.experiments.app import launch
from qtx.experiments.measuring import pin_to_one_core

flags.DEFINE_list("only", [], f"Rows to measure, of: {', '.join(benchmark.COMPARISONS)}; all by default.")
flags.DEFINE_integer("rounds", None, "Overrides the rounds of every row.", lower_bound=1)
flags.DEFINE_bool("smoke", False, "Tiny sizes: short for --config=configs/benchmark.py:smoke.")


def main(config, workdir: str) -> None:
    """Measures and prints; with `--workdir`, saves the table too."""
    benchmark.run(config, workdir, flags.FLAGS.only, flags.FLAGS.rounds or 0)


if __name__ == "__main__":
    pin_to_one_core()
    launch(main, "configs/benchmark.py" + (":smoke" if "--smoke" in sys.argv else ""), "")
