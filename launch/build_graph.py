r"""Build the text graph of a task: save it as graph.npz in the run directory, and print what is in it.

    python launch/build_graph.py --config=configs/finetune.py:R8 --data_dir=DATA --workdir=runs/R8_graph
    python launch/build_graph.py --config=configs/finetune.py:rte --config.graph.adj_type=no_doc --data_dir=DATA \
        --workdir=runs/rte_graph

A graph that is there already is checked against data and settings.
"""

from qtx.experiments.app import launch
from qtx.experiments.graph import build

if __name__ == "__main__":
    launch(build, "configs/finetune.py")
