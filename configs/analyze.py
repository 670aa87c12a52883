r"""Look into a trained model: which quantizers cost its score, where its outliers are, how its weights are distributed, what
its tensors weigh; how curved its loss is, what the loss looks like around it, how far its layers are from the teacher's.

    python launch/analyze.py --config=configs/analyze.py:w8a8 --config.model.name=runs/quickstart/model --workdir=runs/analysis

The report names the group of sites to blame. The argument is `w8a8`, `paper` (activations alone, the ranges of every variant
from one text: the table of the paper), `efficiency` (operations, energy and bytes in theory beside measured latency and the
packed file), or `smoke` for a run of seconds. Or one of the analyses of teacher intervention, each
of the checkpoint in full precision and as a ternary student (fields of `quant` say otherwise):

    curvature     top eigenvalues, trace by layer and spectral density of the Hessian
    landscape     contours of the loss; a curve with --config.analysis.landscape.directions=1
    layer_errors  errors of every layer against the checkpoint in full precision, or against --config.teacher.name

`--config.analysis.models="('full_precision',)"` takes one of the two, and students that were trained in different ways go into
the same plots by `--config.analysis.also="(('TernaryBERT', 'runs/ternarybert/model'), ('gradual', 'runs/gradual/model'))"`.

Any other config file may stand in place of the setting, to look at its model with its policy; its fields and those of the
analyses can be changed. Weights and memory are looked at, or what `analyses` says:

    python launch/analyze.py --config=configs/analyze.py:configs/agnews.py:fully4 --config.model.name=runs/fully4/model \
        --config.analyses="('memory',)" --config.analysis.memory.bits="(32, 4, 2)" --workdir=runs/fully4_memory

What a trained BitTransGNN costs, its graph included, whose sizes are read from the run:

    python launch/analyze.py --config=configs/analyze.py:configs/bittransgnn.py:mr+dynamic --config.analyses=efficiency \
        --config.model.name=runs/dynamic/model --data_dir=DATA --workdir=runs/dynamic_efficiency

Expected of the quickstart's model with `w8a8`: the culprit is y. Without it the error of the logits falls from 0.39 to 0.23,
without h to 0.26, without any other group hardly at all; dimensions 99, 127, 223 and 319 hold the outliers. On 256 examples
the scores themselves carry two points of noise (`--config.data.limit_eval=0` takes all). Three minutes of CPU time.
"""

import runpy
from pathlib import Path

from qtx.errors import UserError, near_misses
from qtx.experiments.analyze import with_analyses
from qtx.experiments.config import analysis, base

LOSSES = ("curvature", "landscape", "layer_errors")
SETTINGS = ("w8a8", "paper", "efficiency", *LOSSES, "smoke")


def _of(path: str, *setting: str):
    """Returns the configuration of another file, with the sections that analyses need."""
    if not Path(path).is_file():
        raise UserError(f"configs/analyze.py: there is no file {path}")
    return with_analyses(runpy.run_path(path)["get_config"](*setting))


def get_config(arg: str = "w8a8"):
    """Returns the configuration for one setting, or that of another config file (`FILE.py:SETTING`) with the analyses."""
    if ".py" in arg:
        return _of(*arg.split(":", 1))
    if arg not in SETTINGS:
        raise UserError(f"configs/analyze.py: unknown setting {arg!r}{near_misses(arg, SETTINGS)}")
    config = base()
    config.model.fresh_head = False
    config.analyses = ("sensitivity", "outliers", "weights", "memory")
    config.analysis = analysis()
    config.analysis.sensitivity.groups = ("e", "s", "p", "c", "g", "u", "x", "h", "y", "z", "MHA+FFN")
    config.data.limit_train, config.data.limit_eval = 2048, 256
    if arg != "efficiency":  # where quant.bit may say how weights are quantized
        config.quant.weight_granularity = "channel"
    config.calibration.batches = 1  # of one shape: one compilation
    config.calibration.batch_size = 128
    config.data.max_length = 48
    config.data.eval_buckets = 1
    if arg == "paper":
        config.quant.weight_bits = 32
        config.calibration.batch_size = 1
        config.analysis.sensitivity.groups = ("s", "e", "g", "p", "y", "y10+y11")
        config.analysis.sensitivity.calibration = "variant"
        config.analysis.sensitivity.tables = ("leave_out",)
    if arg in LOSSES:
        config.analyses = (arg,)
        config.quant.update(student="corrected", weight_scheme="ternary", weight_granularity="tensor")
    if arg == "efficiency":
        config.analyses = ("efficiency",)
    if arg == "smoke":
        config.data.limit_train = config.data.limit_eval = 64
        config.data.max_length = 32
        config.calibration.batch_size = 32
        config.analysis.sensitivity.groups = ("x", "h", "y")
        config.analysis.outliers.batches = 1
    return config
