"""Text data: tasks, sources, tokenization and static-shape batches, in that order.

`sources.load` gives texts, `tokenize.encode` ragged token ids, `batching.Batches` what a compiled step eats.
"""

from qtx.data.batching import Batches, bucket_lengths, in_order
from qtx.data.sources import Dataset, Examples, load, load_folder, load_table
from qtx.data.tasks import TASKS, Task, get_task
from qtx.data.tokenize import Encoded, check_tokenizer, encode, load_tokenizer

__all__ = [
    "TASKS",
    "Batches",
    "Dataset",
    "Encoded",
    "Examples",
    "Task",
    "bucket_lengths",
    "check_tokenizer",
    "encode",
    "get_task",
    "in_order",
    "load",
    "load_folder",
    "load_table",
    "load_tokenizer",
]
