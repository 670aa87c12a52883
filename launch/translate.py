"""Translate lines with a trained model, from a file or standard input.

    python launch/translate.py --model=runs/en_de/model --input=sentences.txt --output=translations.txt
    echo "Two dogs play in the snow." | python launch/translate.py --model=runs/en_de/quantized

Every line is a sentence, and line n of the output translates line n of the input; an empty one stays empty. The output is
written when everything is translated; until then what is done lies in OUTPUT.parts_..., and the same command goes on from there
if it was interrupted.
"""

from absl import flags

from qtx.experiments.app import run
from qtx.experiments.translate import translate_file
from qtx.methods.translation import Decoding

FLAGS = flags.FLAGS


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "Directory of a checkpoint or a packed artifact.", required=True)
    flags.DEFINE_string("input", "-", "File to translate, plain or compressed; - is standard input.")
    flags.DEFINE_string("output", "-", "File to write when everything is translated; - is standard output.")
    flags.DEFINE_string("direction", None, "Languages that the model must have, such as en-de.")
    flags.DEFINE_integer("beam", Decoding.beam, "Hypotheses of each sentence; 1 is greedy search.")
    flags.DEFINE_float("length_penalty", Decoding.length_penalty, "Exponent of the length factor.")
    flags.DEFINE_integer("limit", Decoding.limit, "Tokens of a translation at most.")
    flags.DEFINE_integer("max_length", 100, "Source tokens; the rest of a longer sentence is left out, with a warning.")
    flags.DEFINE_integer("batch_size", Decoding.batch_size, "Sentences that are decoded together at most.")


def main() -> None:
    """Reads the flags and translates."""
    decoding = Decoding(FLAGS.beam, FLAGS.length_penalty, FLAGS.limit, FLAGS.batch_size)
    translate_file(FLAGS.model, FLAGS.input, FLAGS.output, FLAGS.direction, decoding, FLAGS.max_length)


if __name__ == "__main__":
    run(main, define)
