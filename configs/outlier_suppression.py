r"""Outlier suppression: move outliers out of the activations of a trained encoder, then quantize it.

    python launch/quantize.py --config=configs/outlier_suppression.py:w6a6_os \
        --config.model.name=runs/film_reviews/model --workdir=runs/os
    python launch/quantize.py --config=configs/outlier_suppression.py:w8a8_os+ --config.task=rte --data_dir=DATA \
        --config.model.name=runs/rte/model --workdir=runs/rte_os+

The argument is bits and method: `w8a8`, `w6a6` or `w4a4` with `os` (Wei et al. 2022: gains migrate, tokens are clipped,
ranges learn), `os+` (Wei et al. 2023: channels are shifted and scaled) or `os+_as_published` (a study's run of the latter, in
which nothing migrates and weights are quantized twice); or `smoke`. Calibration is on 256 training examples. The run leaves
the packed artifact as `quantized/` and the float model whose outliers moved as `model/`, to go on from: it computes what
the given one does. Training goes on with its grids and its ranges, clipped and learned, by `calibration.ranges` and the fields
of `quant` below. With a text graph (configs/bittransgnn.py), where scales stay fixed: `static` leaves the encoder as it was
quantized, and `dynamic` and `distillation` train its weights.

    python launch/quantize.py --config=configs/outlier_suppression.py:w6a6_os --config.task=mr --config.data.splits=graph \
        --data_dir=DATA --config.model.name=runs/full_precision/model --workdir=runs/mr_os
    python launch/train.py --config=configs/bittransgnn.py:mr+static --config.model.name=runs/mr_os/model \
        --config.calibration.ranges=runs/mr_os/quantized --config.quant.bit.states=0 \
        --config.quant.outlier_suppression=os --config.quant.weight_bits=6 --config.quant.activation_bits=6 \
        --data_dir=DATA --workdir=runs/mr_os_static

Encoders whose norms stand behind the residual sums migrate: BERT, RoBERTa, DistilBERT, SqueezeBERT and, within its layers,
ALBERT.

Expected on film reviews, accuracy by plain ranges, `os` and `os+` (300 reviews, calibrated on 64; full precision 0.847): 8 bits
0.837, 0.830, 0.850; 6 bits 0.790, 0.833, 0.833; 4 bits 0.530, 0.803, 0.563. One run; below four points nothing is shown.
"""

import re

from qtx.errors import UserError
from qtx.experiments.config import base

BATCH_SIZES = {"os": 16, "os+": 32, "os+_as_published": 32}


def get_config(arg: str = "w8a8_os+"):
    """Returns the configuration for bits and method."""
    config = base()
    config.model.fresh_head = False
    found = re.fullmatch(r"w(\d)a\1_(.+)", "w8a8_os+" if arg == "smoke" else arg)
    if not found or found[2] not in BATCH_SIZES:
        raise UserError(
            f"configs/outlier_suppression.py: unknown setting {arg!r}; give bits and method, such as 'w6a6_os', 'w4a4_os+'"
        )
    config.quant.outlier_suppression = found[2]
    config.quant.weight_bits = config.quant.activation_bits = int(found[1])
    config.calibration.batch_size = BATCH_SIZES[found[2]]
    config.calibration.batches = 256 // BATCH_SIZES[found[2]]
    if arg == "smoke":
        config.data.limit_train = 64
        config.data.limit_eval = 64
        config.data.max_length = 32
        config.calibration.batches = 2
    return config
