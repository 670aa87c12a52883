"""Evaluate a trained checkpoint or a packed artifact on the validation data of a task.

python launch/evaluate.py --config.model.name=runs/rte_w8a8/quantized --config.task=rte --data_dir=DATA --workdir=runs/eval
"""

from qtx.experiments.app import launch
from qtx.experiments.run import evaluate

if __name__ == "__main__":
    launch(evaluate, "configs/ptq.py", "")
