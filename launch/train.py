"""Train: run the recipe of a config file, evaluate after every phase, write models and report.

    python launch/train.py --config=configs/finetune.py:rte --data_dir=DATA --workdir=runs/rte
    python launch/train.py --config=configs/qat.py:w8a8 --workdir=runs/qat --config.phases.qat.epochs=2

The same command goes on with a run that was interrupted.
"""

from qtx.experiments.app import launch
from qtx.experiments.run import train_and_evaluate

if __name__ == "__main__":
    launch(train_and_evaluate, "configs/finetune.py")
