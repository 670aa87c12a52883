"""The quickstart: fine-tune MiniLM on film reviews, quantize it seven ways, one table.

    python launch/quickstart.py --workdir=runs/quickstart

Shows what bits, granularity and range estimators are worth after training, against TF-IDF. Expected on 2 CPU cores: 5 to 9
minutes; full precision 0.82 to 0.83, TF-IDF 0.771, W8A8 PEG within a point of full precision, naive W8A8 three to
four points below.

`smoke` does the same on a few examples in seconds; its scores mean nothing.
"""

from qtx.experiments.config import base

# Fields of `quant` in which a row differs from the default, W8A8 with min-max ranges per tensor. Both W8A8 rows have
# weights per channel, so that they differ in nothing but the groups of three activations.
CHANNEL = dict(weight_granularity="channel")
# Two tables of 514 rows hold the outlier columns and almost no bytes; at 4 bits they cost points for nothing.
LOW = dict(activation_bits=32, weight_overrides="Es=8")
FOUR = dict(LOW, weight_bits=4, weight_overrides=f"{LOW['weight_overrides']}, **/norm/scale=8")
ROWS = (
    dict(name="W8A8 naive", **CHANNEL),
    dict(name="W8A8 PEG", **CHANNEL, overrides="x=ngp6, h=ngp6, y=ngp6"),
    dict(name="W4 per tensor", **FOUR),
    dict(name="W4 per tensor, MSE ranges", **FOUR, weight_estimator="mse"),
    dict(name="W4 per channel", **FOUR, **CHANNEL),
    dict(name="W4 per channel, MSE ranges", **FOUR, **CHANNEL, weight_estimator="mse"),
    dict(name="ternary per channel", **LOW, **CHANNEL, weight_scheme="ternary"),
)


def get_config(arg: str = "full"):
    """Returns the configuration; `smoke` shrinks it."""
    config = base()
    config.model.hidden_dropout = 0.0  # one epoch does not overfit, and random numbers are a quarter of a step on a CPU
    config.model.attention_dropout = 0.0
    config.data.max_length = 48  # one review in twenty is cut; a tenth of the time
    config.model.pooling = "mean"  # as the sentence encoder was trained
    config.phases.finetune.optimizer.learning_rate = 1e-4
    # The tables and the two lowest layers stay as they are, which is a quarter of the time of a step.
    config.phases.finetune.trainable = (*(f"encoder/layer_{i}/**" for i in range(2, 6)), "pooler/**", "classifier/**")
    config.calibration.batches = 1  # of one shape: one compilation
    config.calibration.batch_size = 128
    config.rows = ROWS
    if arg == "smoke":
        config.data.limit_train = 96
        config.data.limit_eval = 64
        config.data.buckets = 1
        config.data.max_length = 32
        config.phases.finetune.steps = 2
        config.calibration.batch_size = 32
    elif arg != "full":
        raise ValueError(f"unknown argument {arg!r}: 'full' or 'smoke'")
    return config
