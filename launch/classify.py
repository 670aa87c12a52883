"""Classify lines with a trained model, from a file or standard input; new texts attach to the graph of a BitTransGNN.

    python launch/classify.py --model=runs/dynamic/quantized --input=texts.txt --output=labels.txt
    echo "Oil prices rose again on Monday." | python launch/classify.py --model=runs/dynamic/quantized

Every line is a text, or two that a tab separates, as the model was trained on; line n of the output is the label of line n
of the input and its probability (the number, twice, for a regression).
"""

from absl import flags

from qtx.experiments.app import run
from qtx.experiments.classify import classify_file

FLAGS = flags.FLAGS


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "Directory of a checkpoint or a packed artifact.", required=True)
    flags.DEFINE_string("graph", "", "Graph that a BitTransGNN was trained with; default: graph.npz of its run.")
    flags.DEFINE_string("input", "-", "File to classify, plain or compressed; - is standard input.")
    flags.DEFINE_string("output", "-", "File to write; - is standard output.")
    flags.DEFINE_integer("max_length", 128, "Tokens; the rest of a longer text is left out.")
    flags.DEFINE_integer("batch_size", 32, "Texts that are encoded together.")


if __name__ == "__main__":
    run(
        lambda: classify_file(FLAGS.model, FLAGS.graph, FLAGS.input, FLAGS.output, FLAGS.max_length, FLAGS.batch_size),
        define,
    )
