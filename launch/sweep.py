r"""Sweep: grids, rows and seeds of any config file, or a search over ranges; one table of medians, resumed by the same command.

    python launch/sweep.py --config=configs/efficient_transformer_quantization.py:minilm --data_dir=DATA --workdir=runs/minilm
    python launch/sweep.py --config=configs/finetune.py:rte --data_dir=DATA --workdir=runs/rates --seeds=1000,1001,1002 \
        --grid=phases.finetune.optimizer.learning_rate=2e-5,5e-5 --grid=phases.finetune.epochs=3,6
    python launch/sweep.py --config=configs/finetune.py:rte --data_dir=DATA --workdir=runs/search --sampler=tpe --samples=30 \
        --range=phases.finetune.optimizer.learning_rate=1e-5:1e-3:log

Several workers share the work if they have one `--workdir` (one machine), or also one `--storage` (many machines).
"""

import sys
from pathlib import Path

from absl import flags

from qtx.experiments.app import fields_given, keep_compiled, launch
from qtx.experiments.plan import SAMPLERS, parse_axis, parse_range, parse_seeds
from qtx.experiments.sweep import command_of, sweep, with_fields

DEFAULT = "configs/efficient_transformer_quantization.py"
flags.DEFINE_string("storage", "", "URL of an optuna storage that workers share; a SQLite file in workdir by default.")
flags.DEFINE_integer("trials", 0, "Run at most so many trials in this call; 0: all.", lower_bound=0)
flags.DEFINE_float("minutes", 0.0, "Start no trial after so many minutes; 0: no limit.", lower_bound=0.0)
flags.DEFINE_list("only", [], "Patterns over names of trials (rte/*/seed_1000); what they start from is run, too.")
flags.DEFINE_bool("report_only", False, "Run nothing; print the tables of what is there.")
flags.DEFINE_bool("retry_failed", False, "Run failed trials again, too.")
flags.DEFINE_multi_string("grid", [], "An axis, FIELD=VALUE,VALUE; replaces sweep.grid. May be repeated.")
flags.DEFINE_multi_string("range", [], "FIELD=LOW:HIGH or FIELD=LOW:HIGH:log; replaces sweep.ranges. May be repeated.")
flags.DEFINE_list("seeds", None, "Replaces sweep.seeds.")
flags.DEFINE_string("entry", None, "Replaces sweep.entry: train, quantize, evaluate or compare.")
flags.DEFINE_string("sampler", None, f"Replaces sweep.sampler: {', '.join(SAMPLERS)}.")
flags.DEFINE_integer("samples", None, "Replaces sweep.samples: points of a search.", lower_bound=1)


def main(config, workdir: str) -> None:
    """Puts the flags into the section `sweep`, and runs it."""
    given = flags.FLAGS
    fields = {name: given[name].value for name in ("entry", "sampler", "samples") if given[name].value is not None}
    if given.grid:
        fields["grid"] = tuple(parse_axis(text) for text in given.grid)
    if given.range:
        fields["ranges"] = tuple(parse_range(text) for text in given.range)
    if given.seeds is not None:
        fields["seeds"] = parse_seeds(given.seeds)
    keep_compiled(Path(workdir) / ".compiled")  # seeds have the same programs, and many a row has one with another
    sweep(
        with_fields(config, **fields),
        workdir,
        given.storage,
        given.trials,
        given.minutes,
        given.only,
        given.report_only,
        given.retry_failed,
        command_of(sys.argv),
        fields_given(sys.argv),
    )


if __name__ == "__main__":
    launch(main, DEFAULT)
