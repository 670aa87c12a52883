"""Data: tasks, sources, tokenization and static-shape batches, in that order.

`sources.load` gives texts, `tokenize.encode` ragged token ids, `batching.Batches` what a compiled step eats; for translation
`parallel.load_pairs`, `pair_tokenizer.encode_pairs` and `pair_batching.PairBatches` do. For text graphs `corpus.make_corpus`
gives documents and `text_graph.build_graph` the graph. Images come from `images.load_images`, and their batches are
`images.ImageBatches`.
"""

from qtx.data.batching import Batches, bucket_lengths, in_order
from qtx.data.corpus import Corpus, make_corpus, new_documents, published_splits
from qtx.data.pair_batching import PairBatches, bucket_shapes
from qtx.data.pair_tokenizer import EncodedPairs, PairTokenizer, encode_pairs
from qtx.data.parallel import Pairs, ParallelDataset, load_pairs, load_parallel
from qtx.data.sources import (
    Dataset,
    Examples,
    TrainingRows,
    load,
    load_augmented,
    load_folder,
    load_table,
    training_rows,
    with_label_order,
)
from qtx.data.tasks import CORPORA, TASKS, Task, TranslationTask, get_task, get_translation_task
from qtx.data.text_graph import GraphSettings, TextGraph, attach, build_graph, load_graph, save_graph
from qtx.data.tokenize import Encoded, check_tokenizer, encode, load_tokenizer

__all__ = [
    "CORPORA",
    "TASKS",
    "Batches",
    "Corpus",
    "Dataset",
    "Encoded",
    "EncodedPairs",
    "Examples",
    "GraphSettings",
    "PairBatches",
    "PairTokenizer",
    "Pairs",
    "ParallelDataset",
    "Task",
    "TextGraph",
    "TrainingRows",
    "TranslationTask",
    "attach",
    "bucket_lengths",
    "bucket_shapes",
    "build_graph",
    "check_tokenizer",
    "encode",
    "encode_pairs",
    "get_task",
    "get_translation_task",
    "in_order",
    "load",
    "load_augmented",
    "load_folder",
    "load_graph",
    "load_pairs",
    "load_parallel",
    "load_table",
    "load_tokenizer",
    "make_corpus",
    "new_documents",
    "published_splits",
    "save_graph",
    "training_rows",
    "with_label_order",
]
