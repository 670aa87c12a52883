"""Post-training quantization of a trained checkpoint.

    python launch/quantize.py --config=configs/ptq.py:w8a8 --config.model.name=runs/film_reviews/model --workdir=runs/w8a8

Expected with the model of `configs/finetune.py:film_reviews` (0.823 in full precision), accuracy: w8a8 0.796, w8a8_mixed 0.822,
w8a8_peg 0.816, w8a32 0.817, w4a8 0.814, w4a32 0.816, ternary 0.679, published 0.819; each in a minute and a half on one
core. Single runs, 2,047 reviews: differences below a point mean little.

The argument is one of the settings below, or `smoke` (W8A8 on a few examples; give it a trained model as well).
"""

from qtx.errors import UserError, near_misses
from qtx.experiments.config import base

SETTINGS = {
    "w8a8": {},
    "w8a8_mixed": dict(overrides="x=16, h=16, y=16"),
    "w8a8_peg": dict(overrides="x=ngp6, h=ngp6, y=ngp6"),
    "w8a32": dict(activation_bits=32),
    "w4a8": dict(weight_bits=4, weight_granularity="channel", weight_estimator="mse"),
    "w4a32": dict(weight_bits=4, weight_granularity="channel", weight_estimator="mse", activation_bits=32),
    "ternary": dict(weight_scheme="ternary", weight_granularity="channel", activation_bits=32),
    # As published: symmetric MSE weights by bounded search, one batch of one unpadded sentence for the activations.
    "published": dict(weight_estimator="mse_brent", weight_options=dict(relative_margin=False, extent="tensor")),
}


def get_config(arg: str = "w8a8"):
    """Returns the configuration for one setting."""
    config = base()
    config.model.fresh_head = False
    if arg != "smoke" and arg not in SETTINGS:
        raise UserError(f"configs/ptq.py: unknown setting {arg!r}{near_misses(arg, SETTINGS)}")
    config.quant.update(SETTINGS.get(arg, {}))
    if arg == "published":
        config.calibration.batches = 1
        config.calibration.batch_size = 1
    if arg == "smoke":
        config.data.limit_train = 64
        config.data.limit_eval = 64
        config.data.max_length = 32
        config.calibration.batches = 1
    return config
