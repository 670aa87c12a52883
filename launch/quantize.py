r"""Quantize a trained checkpoint without training: calibrate, quantize, validate, write the packed artifact.

    python launch/quantize.py --config=configs/ptq.py:w8a8 --config.model.name=runs/rte/model --config.task=rte \
        --data_dir=DATA --workdir=runs/rte_w8a8
"""

from qtx.experiments.app import launch
from qtx.experiments.run import quantize

if __name__ == "__main__":
    launch(quantize, "configs/ptq.py")
