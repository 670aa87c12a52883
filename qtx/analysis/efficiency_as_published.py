"""Bytes, operations and energy of BitTransGNN by the formulas that its figures were drawn with, errors included.

Here to compute the published numbers again. `qtx.analysis.efficiency` is what to use for anything else. What is wrong:

    the GCN's parameters are multiplied by bits, not by bytes, which is 8 times too much
    a head of a large model is 1024 / 12 wide, where it should be 64
    scales of quantizers are not counted
    1.58 bits cost what 1 bit costs, 2.32 bits what 2 bits cost: 2 and 3 additions for each weight
    the GCN's operations have the data type of the encoder, whatever the GCN is made of
    neighbours are summed at the width of the features in both layers; the code sums at the width of each layer's output
    the classifier has 20 outputs, whatever the data set
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from qtx.analysis.efficiency import energy_per_operation
from qtx.errors import UserError
from qtx.nn.bert import BertConfig

TOKENS = 128
CLASSES = 20
_ADDITIONS = {1: 2, 1.58: 2, 2: 3, 2.32: 3}  # for each weight, by its bits


class Operations(NamedTuple):
    """Numbers of `additions` and `multiplications`."""

    additions: float
    multiplications: float

    def times(self, count: float) -> Operations:
        """Returns the operations of so many repetitions."""
        return Operations(self.additions * count, self.multiplications * count)

    def energy(self, dtype: str, process: str = "7nm") -> float:
        """Returns joule, every operation at one data type; see `energy_per_operation`."""
        addition, multiplication = energy_per_operation(dtype, process)
        return self.additions * addition + self.multiplications * multiplication


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Sizes of the four encoders that have published figures.

    Attributes:
      roberta: RoBERTa instead of BERT.
      large: large instead of base.
    """

    roberta: bool = False
    large: bool = False

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return 1024 if self.large else 768

    @property
    def layers(self) -> int:
        """Their number."""
        return 24 if self.large else 12

    @property
    def heads(self) -> int:
        """Their number in a layer."""
        return 16 if self.large else 12

    def parameters(self) -> dict[str, float]:
        """Returns the parameters of each part: embeddings, attention, ffn, pooler, norms, classifier."""
        d, layers, heads = self.width, self.layers, self.heads
        rows = 50265 + 514 + 1 if self.roberta else 30522 + 512 + 2
        of_head = d / 12  # of large models, too
        return {
            "embeddings": rows * d,
            "attention": layers * (3 * heads * (d * of_head + of_head) + d * d + d),
            "ffn": layers * (8 * d * d + 5 * d),
            "pooler": d * d + d,
            "norms": layers * 4 * d + 2 * d,
            "classifier": CLASSES * (d + 1),
        }

    def bytes(self, bits: float, embedding_bits: float, classifier: bool = True) -> float:
        """Returns the bytes of an encoder: linear layers at `bits`, norms at 32."""
        n = self.parameters()
        linear = n["attention"] + n["ffn"] + n["pooler"] + n["classifier"] * classifier
        return embedding_bits / 8 * n["embeddings"] + bits / 8 * linear + 4 * n["norms"]

    def operations(self, bits: float = 32) -> Operations:
        """Returns the operations of one sequence of 128 tokens.

        Args:
          bits: of the linear layers: 32, 1, 1.58, 2 or 2.32.
        """
        m, d, layers, c = TOKENS, self.width, self.layers, CLASSES
        f, rows = 4 * d, 2 * m * d  # `rows`: embeddings, and the residual sums of each half of a layer
        products = 2 * m * d * m  # of attention: all heads, scores and context
        sums = 2 * m * d * (m - 1)
        if bits == 32:
            linear = layers * (4 * m * d * d + 2 * m * d * f) + d * d + d * c
            other = rows + layers * 2 * rows
            return Operations(linear + other + layers * sums, linear + other + layers * products)
        k = _additions(bits)
        linear = layers * m * (4 * (k * d - 1) * d + (k * d - 1) * f + (k * f - 1) * d) + (k * d - 1) * (d + c)
        outputs = layers * (4 * m * d + m * f + m * d) + d + c
        other = rows + layers * 2 * rows
        return Operations(linear + other + layers * sums, outputs + other + layers * products)


def encoder_of(family: str, config: BertConfig) -> Encoder:
    """Returns the encoder with published figures that a model is, or raises a `UserError` if there is none."""
    for roberta in (False, True):
        for large in (False, True):
            found = Encoder(roberta, large)
            sizes = found.width, found.layers, found.heads
            same = sizes == (config.hidden_size, config.num_layers, config.num_heads)
            if same and family == ("roberta" if roberta else "bert"):
                return found
    raise UserError(
        f"there are published figures of BERT and RoBERTa, base and large; this is {family} with {config.num_layers} "
        f"layers of width {config.hidden_size}: use rule='corrected'"
    )


def gcn_parameters(width: int, hidden: int, classes: int) -> int:
    """Returns the parameters of the two-layer GCN: features of `width` to `hidden` units to `classes`."""
    return width * hidden + hidden + hidden * classes + classes


def gcn_bytes(width: int, hidden: int, classes: int, bits: float = 32) -> float:
    """Returns what is added to the bytes of an encoder for its GCN (really bits)."""
    return bits * gcn_parameters(width, hidden, classes)


def gcn_operations(
    nodes: int, edges: int, width: int, hidden: int, classes: int, bits: float = 32, passes: float = 1
) -> Operations:
    """Returns the operations of a two-layer GCN.

    Args:
      nodes: of the graph.
      edges: stored entries of the adjacency before it is made symmetric.
      width: of the features.
      hidden: units.
      classes: outputs.
      bits: of its weights: 32, 1, 1.58, 2 or 2.32.
      passes: over the whole graph: 1 for static training, sequences / batch size for dynamic.
    """
    n, e, d, h, c = nodes, edges, width, hidden, classes
    if bits == 32:
        additions = 2 * e * (d - 1) + n * d * (h - 1) + n * h + n * h * (c - 1) + n * c
        multiplications = 2 * e * d + n * d * h + n * h * c
    else:
        k = _additions(bits)
        additions = 2 * e * (d - 1) + n * d * (k * h - 1) + n * h * (k * c - 1)
        multiplications = e * d
    return Operations(additions, multiplications).times(passes)


def _additions(bits: float) -> int:
    if bits not in _ADDITIONS:
        raise UserError(f"no published operations for {bits:g} bits; there are 32, {', '.join(map(str, _ADDITIONS))}")
    return _ADDITIONS[bits]
