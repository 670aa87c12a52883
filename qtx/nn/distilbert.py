"""DistilBERT (Sanh et al. 2019) with every tensor a site.

BERT's sites (`qtx.nn.bert`) without `encoder/embeddings/token_type/table` and `encoder/embeddings/sum_token_type`: it has
no token types. The pooler is what is published as `pre_classifier`; its activation is ReLU.
"""

from __future__ import annotations

import dataclasses

from qtx.nn import bert


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(bert.BertConfig):
    """Sizes and rates of a DistilBERT model; the defaults are those of `transformers`."""

    num_layers: int = 6
    type_vocab_size: int = 0
    classifier_dropout: float | None = 0.2


class Pooler(bert.Pooler):
    """One vector per sequence."""

    activation = "relu"


class DistilBertClassifier(bert.BertClassifier):
    """DistilBERT with its head for sequence classification or regression (one label)."""

    pooler_type = Pooler
