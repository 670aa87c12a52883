"""Rows of the README's results table: fine-tune MiniLM on a GLUE task, quantize weights, and weights and activations.

    python launch/quickstart.py --config=configs/results.py:rte --data_dir=DATA --workdir=runs/rte

The argument is a GLUE task. Three seeds; a seed that is finished is not run again when the command is repeated.
Expected means of full precision, W8A32 and W8A8: RTE 0.566, 0.568, 0.509; MRPC 0.828, 0.821, 0.678.
On one core, ten minutes a seed.
"""

from qtx.experiments.config import base


def get_config(arg: str = "mrpc"):
    """Returns the configuration for a task."""
    config = base()
    config.model.pooling = "mean"
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.data.buckets = 3
    config.task = arg
    config.seeds = (1000, 1001, 1002)
    config.phases.finetune.epochs = 2.0
    config.phases.finetune.optimizer.learning_rate = 1e-4
    config.phases.finetune.trainable = ("encoder/layer_*/**", "pooler/**", "classifier/**")
    config.rows = (
        dict(name="W8A32 PTQ", activation_bits=32),
        dict(name="W8A8 PTQ"),
    )
    return config
