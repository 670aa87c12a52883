"""Quantization-aware training: fine-tune in full precision, calibrate, then train through the grids with learned ranges.

    python launch/train.py --config=configs/qat.py:w8a8 --workdir=runs/qat_w8a8
    python launch/train.py --config=configs/qat.py:w4a8 --workdir=runs/qat_w4a8

Expected for w8a8 on film reviews (seed 1000): 0.831 after fine-tuning, 0.828 quantized, in 20 minutes on one core, of which
training takes 10 and 11. The other settings were not run at full size.

`smoke` runs both phases for two steps.
"""

from qtx.errors import UserError, near_misses
from qtx.experiments.config import base

SETTINGS = {
    "w8a8": {},
    "w4a8": dict(weight_bits=4, weight_estimator="mse"),
    "w4a32": dict(weight_bits=4, weight_estimator="mse", activation_bits=32),
    "w4a8_e2": dict(weight_bits=4, weight_estimator="mse", overrides="Et=2"),
    "ternary": dict(weight_scheme="ternary", weight_granularity="channel"),
}


def get_config(arg: str = "w8a8"):
    """Returns the configuration for one setting."""
    config = base()
    if arg != "smoke" and arg not in SETTINGS:
        raise UserError(f"configs/qat.py: unknown setting {arg!r}{near_misses(arg, SETTINGS)}")
    config.recipe = ("finetune", "qat")
    config.phases.finetune.optimizer.learning_rate = 1e-4
    config.phases.qat.optimizer.learning_rate = 5e-5
    config.quant.update(SETTINGS.get(arg, {}))
    if arg == "smoke":
        config.data.limit_train = 64
        config.data.limit_eval = 64
        config.data.buckets = 1
        config.data.max_length = 32
        config.calibration.batches = 1
        config.phases.finetune.steps = 2
        config.phases.qat.steps = 2
    return config
