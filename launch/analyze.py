"""Analyze a trained checkpoint: sensitivity to its quantizers, outliers, weights, memory.

python launch/analyze.py --config=configs/analyze.py:w8a8 --config.model.name=runs/quickstart/model --workdir=runs/analysis
"""

from qtx.experiments.analyze import analyze
from qtx.experiments.app import launch

if __name__ == "__main__":
    launch(analyze, "configs/analyze.py")
