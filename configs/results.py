"""Rows of the README's results table: fine-tune MiniLM on a GLUE task, quantize weights, and weights and activations.

    python launch/quickstart.py --config=configs/results.py:rte --data_dir=DATA --config.seed=1000 --workdir=runs/rte_1000

The argument is a GLUE task. Some 3 minutes on 2 CPU cores for RTE or MRPC.
"""

from qtx.experiments.config import base


def get_config(arg: str = "mrpc"):
    """Returns the configuration for a task."""
    config = base()
    config.model.pooling = "mean"
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.data.buckets = 3
    config.task = arg
    config.phases.finetune.epochs = 2.0
    config.phases.finetune.optimizer.learning_rate = 1e-4
    config.phases.finetune.trainable = ("encoder/layer_*/**", "pooler/**", "classifier/**")
    config.rows = (
        dict(name="W8A32 PTQ", activation_bits=32),
        dict(name="W8A8 PTQ"),
    )
    return config
