"""Quickstart: fine-tune a pretrained encoder, quantize it several ways, print one table.

python launch/quickstart.py --workdir=runs/quickstart
python launch/quickstart.py --config=configs/results.py:rte --data_dir=DATA --workdir=runs/results_rte
"""

from qtx.experiments.app import define_flags, launch
from qtx.experiments.compare import compare

define_flags("configs/quickstart.py", "runs/quickstart")

if __name__ == "__main__":
    launch(compare)
