"""The quickstart: fine-tune MiniLM on film reviews, quantize it six ways, one table.

    python launch/quickstart.py --workdir=runs/quickstart

`smoke` does the same on a few examples in seconds; its scores mean nothing.
"""

from qtx.experiments.config import base

# Fields of `quant` in which a row differs from the default, W8A8 with min-max ranges per tensor.
WEIGHTS = dict(activation_bits=32)
ROWS = (
    dict(name="W8A8 naive, per tensor"),
    dict(name="W8A8 PEG, per channel", overrides="x=ngp6, h=ngp6, y=ngp6", weight_granularity="channel"),
    dict(name="W4 per tensor", weight_bits=4, **WEIGHTS),
    dict(name="W4 per tensor, MSE ranges", weight_bits=4, weight_estimator="mse", **WEIGHTS),
    dict(name="W4 per channel", weight_bits=4, weight_granularity="channel", **WEIGHTS),
    dict(name="ternary per channel", weight_scheme="ternary", weight_granularity="channel", **WEIGHTS),
)


def get_config(arg: str = "full"):
    """Returns the configuration; `smoke` shrinks it."""
    config = base()
    config.model.hidden_dropout = 0.0  # one epoch does not overfit, and random numbers are a quarter of a step on a CPU
    config.model.attention_dropout = 0.0
    config.model.pooling = "mean"  # as the sentence encoder was trained
    config.phases.finetune.optimizer.learning_rate = 1e-4
    # The table stays as it is: Adam on 11.7 million more parameters is a tenth of the time of a step.
    config.phases.finetune.trainable = ("encoder/layer_*/**", "pooler/**", "classifier/**")
    config.rows = ROWS
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
