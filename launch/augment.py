r"""Augment a task's training data with a masked language model and word vectors (TinyBERT's procedure), to train on it.

    python launch/augment.py --config=configs/finetune.py:rte --data_dir=DATA --masked_lm=bert-base-uncased \
        --vectors=glove.840B.300d.txt --workdir=runs/rte_augmented
    python launch/train.py --config=configs/finetune.py:rte --data_dir=DATA --config.data.augmented=runs/rte_augmented \
        --workdir=runs/rte

The same command goes on with a run that was interrupted.
"""

from absl import flags

from qtx.data.augmentation import Augmentation
from qtx.experiments.app import launch
from qtx.experiments.augment import augment, default_settings

FLAGS = flags.FLAGS
flags.DEFINE_string("masked_lm", "", "Checkpoint of BertForMaskedLM: a directory, or an id of the Hugging Face hub.")
flags.DEFINE_string("vectors", "", "Word vectors as text, plain or compressed, such as glove.840B.300d.txt.")
flags.DEFINE_integer("copies", None, "Copies of each sentence; by default as published for the task, else 30.")
flags.DEFINE_integer("candidates", Augmentation.candidates, "Words that may stand for a word, at most.")
flags.DEFINE_float("probability", Augmentation.probability, "Of each word to be replaced.")
flags.DEFINE_string("pairs", Augmentation.pairs, "Two sentences: 'separate', or 'published' (they are mixed).")
flags.DEFINE_integer("batch_size", 64, "Rows that the masked language model sees together.")


def main(config, workdir: str) -> None:
    """Puts the flags together and augments."""
    copies = {} if FLAGS.copies is None else {"copies": FLAGS.copies}
    fields = {name: FLAGS[name].value for name in ("candidates", "probability", "pairs")}
    settings = default_settings(config, **copies, **fields)
    augment(config, workdir, FLAGS.masked_lm, FLAGS.vectors, settings, FLAGS.batch_size)


if __name__ == "__main__":
    launch(main, "configs/finetune.py")
