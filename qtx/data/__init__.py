"""Text data: tasks, sources, tokenization and static-shape batches, in that order.

`sources.load` gives texts, `tokenize.encode` ragged token ids, `batching.Batches` what a compiled step eats.
"""
