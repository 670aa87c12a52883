"""SqueezeBERT (Iandola et al. 2020) with every tensor a site: BERT whose layers are grouped convolutions of width 1.

Sites, short names and counts are those of `qtx.nn.bert`. A grouped kernel is `[in / groups, out]` (see
`qtx.nn.layers.Dense`), so per-channel grids mean output channels, as everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from qtx.errors import UserError
from qtx.nn import bert
from qtx.nn.layers import Dense, LayerNorm

LAYER_NORM_EPS = 1e-12  # in the layers; the configuration's is that of the embeddings, as published

_GROUPS = {  # linear layer of an encoder layer: field of the configuration
    "query": "q_groups",
    "key": "k_groups",
    "value": "v_groups",
    "out": "post_attention_groups",
    "up": "intermediate_groups",
    "down": "output_groups",
}


@dataclasses.dataclass(frozen=True)
class SqueezeBertConfig(bert.BertConfig):
    """Sizes and rates; the defaults are SqueezeBERT uncased.

    Attributes:
      q_groups: groups of the query projection; likewise `k_groups` and `v_groups`.
      post_attention_groups: of the attention's output projection.
      intermediate_groups: of the first layer of the FFN.
      output_groups: of the second.

    Raises:
      UserError: if a number of groups does not divide the widths of its layer, or the heads do not divide the width.
    """

    q_groups: int = 4
    k_groups: int = 4
    v_groups: int = 4
    post_attention_groups: int = 1
    intermediate_groups: int = 4
    output_groups: int = 4

    def __post_init__(self):
        for layer, field in _GROUPS.items():
            groups, widths = getattr(self, field), [self.hidden_size]
            if layer in ("up", "down"):
                widths.append(self.intermediate_size)
            for width in widths:
                if groups < 1 or width % groups:
                    raise UserError(f"{field} {groups} does not divide the width {width}; choose a divisor of {width}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide the width {self.hidden_size}")


class _Block(bert.Block):
    """A part of a layer: its linear layers are grouped."""

    config: SqueezeBertConfig

    def dense(self, features: int, name: str, activation=None, groups: int | None = None, **fields: Any) -> Dense:
        return super().dense(features, name, activation, groups or getattr(self.config, _GROUPS[name]), **fields)

    def norm(self) -> nn.Module:
        return LayerNorm(LAYER_NORM_EPS, self.dtype, self.policy, name="norm")


class Attention(_Block, bert.Attention):
    """Self-attention with grouped projections."""


class FeedForward(_Block, bert.FeedForward):
    """The perceptron with grouped layers."""


class Layer(bert.Layer):
    """One encoder layer."""

    attention_type = Attention
    feed_forward_type = FeedForward


class Encoder(bert.Encoder):
    """Embeddings and all layers."""

    layer_type = Layer


class SqueezeBertClassifier(bert.BertClassifier):
    """SqueezeBERT with a pooler and a linear head."""

    config: SqueezeBertConfig

    encoder_type = Encoder
