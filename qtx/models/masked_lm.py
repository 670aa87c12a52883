"""Checkpoints of masked language models: Hugging Face names of their heads.

A family here has the name, the configuration and the encoder of its namesake in `qtx.models.families`; its head is another.
"""

from __future__ import annotations

import dataclasses

from qtx.models import bert, roberta
from qtx.models.family import Family
from qtx.nn.bert import BertConfig
from qtx.nn.masked_lm import BertMaskedLM, RobertaMaskedLM

# A bias has two names in files, of which the last is written. The decoder's weight is the table of the word embeddings.
_BERT_HEAD = {
    "cls.predictions.transform.dense": "transform/dense",
    "cls.predictions.transform.LayerNorm": "transform/norm",
    "cls.predictions.decoder": "decoder",
    "cls.predictions": "decoder",
}
_ROBERTA_HEAD = {
    "lm_head.dense": "transform/dense",
    "lm_head.layer_norm": "transform/norm",
    "lm_head.decoder": "decoder",
    "lm_head": "decoder",
}
WORD_TABLE = "encoder/embeddings/word/table"


def _family(of: Family, architecture: str, module: type, head: dict[str, str], ignored: tuple[str, ...]) -> Family:
    def modules(config: BertConfig) -> dict[str, str]:
        encoder = {theirs: ours for theirs, ours in of.modules(config).items() if ours.startswith("encoder/")}
        return encoder | head

    ignored = (*ignored, f"{of.prefix}pooler.", f"{of.prefix}embeddings.position_ids", "classifier.")
    return dataclasses.replace(of, architecture=architecture, module=module, modules=modules, fresh=(), ignored=ignored)


MASKED_LM: dict[str, Family] = {
    "bert": _family(bert.FAMILY, "BertForMaskedLM", BertMaskedLM, _BERT_HEAD, ("cls.seq_relationship.",)),
    "roberta": _family(roberta.FAMILY, "RobertaForMaskedLM", RobertaMaskedLM, _ROBERTA_HEAD, ()),
}
"""Families that have a masked-LM head, by their Hugging Face `model_type`."""
