"""The quickstart: fine-tune MiniLM on film reviews, quantize it eight ways, one table.

    python launch/quickstart.py --workdir=runs/quickstart

`smoke` does the same on a few examples in seconds; its scores mean nothing.
"""

from ml_collections import ConfigDict

from qtx.experiments.config import base

ROWS = {
    "W8 weights only": dict(activation_bits=32),
    "W8A8 naive (per tensor)": {},
    "W8A8 mixed, x h y at 16 bits": dict(overrides="x=16, h=16, y=16"),
    "W8A8 PEG, 6 permuted groups": dict(overrides="x=ngp6, h=ngp6, y=ngp6"),
    "W4 per tensor": dict(weight_bits=4, activation_bits=32),
    "W4 per channel": dict(weight_bits=4, activation_bits=32, weight_granularity="channel"),
    "W4 per channel, MSE ranges": dict(
        weight_bits=4, activation_bits=32, weight_granularity="channel", weight_estimator="mse"
    ),
    "ternary per channel": dict(weight_scheme="ternary", activation_bits=32, weight_granularity="channel"),
}


def get_config(arg: str = "full"):
    """Returns the configuration; `smoke` shrinks it."""
    config = base()
    config.model.hidden_dropout = 0.0  # one epoch does not overfit, and random numbers are a quarter of a step on a CPU
    config.model.attention_dropout = 0.0
    config.phases.finetune.optimizer.learning_rate = 1e-4
    config.rows = ConfigDict(ROWS)
    if arg == "smoke":
        config.data.limit_train = 96
        config.data.limit_eval = 64
        config.data.buckets = 1
        config.data.max_length = 32
        config.phases.finetune.steps = 2
        config.calibration.batches = 1
    elif arg != "full":
        raise ValueError(f"unknown argument {arg!r}: 'full' or 'smoke'")
    return config
