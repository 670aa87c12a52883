"""Quickstart: fine-tune a pretrained encoder, quantize it several ways, print one table.

python launch/quickstart.py --workdir=runs/quickstart
python launch/quickstart.py --config=configs/results.py:rte --data_dir=DATA --workdir=runs/results_rte
"""

from qtx.experiments.app import launch
from qtx.experiments.compare import compare

if __name__ == "__main__":
    launch(compare, "configs/quickstart.py", "runs/quickstart")
