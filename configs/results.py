"""Fine-tune MiniLM on a GLUE task, quantize weights, and weights and activations, by plain min-max ranges; three seeds.

    python launch/sweep.py --config=configs/results.py:rte --data_dir=DATA --workdir=runs/rte

The argument is a GLUE task, or `smoke` for two seeds on a few examples of MRPC. Expected medians of full precision, W8A32 and
W8A8: RTE 0.567, 0.556, 0.513; MRPC 0.828, 0.824, 0.665. On one core, ten minutes a seed.
"""

from qtx.experiments.config import base, sweeping


def get_config(arg: str = "mrpc"):
    """Returns the configuration for a task, or a tiny one for `smoke`."""
    config = base()
    config.model.pooling = "mean"
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.data.buckets = 3
    config.task = "mrpc" if arg == "smoke" else arg
    config.phases.finetune.epochs = 2.0
    config.phases.finetune.optimizer.learning_rate = 1e-4
    config.phases.finetune.trainable = ("encoder/layer_*/**", "pooler/**", "classifier/**")
    config.rows = (
        dict(name="W8A32 PTQ", activation_bits=32),
        dict(name="W8A8 PTQ"),
    )
    config.sweep = sweeping(entry="compare", seeds=(1000, 1001, 1002))
    if arg == "smoke":
        config.data.update(limit_train=64, limit_eval=64, buckets=1, max_length=32)
        config.phases.finetune.steps = 2
        config.calibration.batches = 1
        config.sweep.seeds = (1000, 1001)
    return config
