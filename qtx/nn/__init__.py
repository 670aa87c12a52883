"""Flax linen modules whose tensors are sites."""

from qtx.nn.aliases import policy
from qtx.nn.bert import BertClassifier, BertConfig
from qtx.nn.layers import Dense, Embed, LayerNorm
from qtx.nn.sites import check_policy, list_sites, site

__all__ = [
    "BertClassifier",
    "BertConfig",
    "Dense",
    "Embed",
    "LayerNorm",
    "check_policy",
    "list_sites",
    "policy",
    "site",
]
