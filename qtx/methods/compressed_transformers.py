"""Compressed Transformers: which layers of a translation model are quantized or binarized (scopes).

    attention            query, key and value of all attention blocks, as published: without the output projection
    attention_out        ... and with it
    all_linear           every linear layer of the blocks, not the generator
    attention_embedding  query, key and value, and the embedding tables
    everything           every linear layer with the generator, and the tables

Norms stay in full precision. A scope is a pattern (`qtx.methods.patterns`): it fits encoders, too. (Course project on IWSLT,
2020; the specification's section 3.3.)
"""

from __future__ import annotations

_PROJECTIONS = tuple(f"**/*attention/{name}/kernel" for name in ("query", "key", "value"))
_TABLES = "**/embeddings/word/table"

# Sites of a scope, and those among them that it leaves out.
PATTERNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention": (_PROJECTIONS, ()),
    "attention_out": (("**/*attention/*/kernel",), ()),
    "all_linear": (("**/*attention/*/kernel", "**/ffn*/*/kernel"), ()),
    "attention_embedding": ((*_PROJECTIONS, _TABLES), ()),
    "everything": (("**/kernel", _TABLES), ()),
}
