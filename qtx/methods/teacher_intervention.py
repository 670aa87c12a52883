"""Teacher intervention: ternary transformers that learn from their own full-precision version.

Kim et al. 2023, "Teacher Intervention: Improving Convergence of Quantization Aware Training for Ultra-Low Precision
Transformers". The student is that of TernaryBERT (Zhang et al. 2020): ternary weights, a ternary row for every word, and 8 bits
for what enters a product.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qtx.nn.aliases import policy
from qtx.nn.bert import BertConfig
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec, per_channel, ternary

CLIP = (-2.5, 2.5)
WEIGHTS = ternary(clip=CLIP)
TABLE = ternary(per_channel(), clip=CLIP)
ACTIVATIONS = Spec(8, "narrow", range="dynamic", clip=CLIP)

_TABLE = "encoder/embeddings/word/table"
_ATTENTION = "encoder/layer_*/attention/"


def student_policy(
    weights: Spec = WEIGHTS,
    table: Spec = TABLE,
    activations: Spec = ACTIVATIONS,
    *,
    emb: bool = True,
    qkv: bool = True,
    ffn_1: bool = True,
    ffn_2: bool = True,
    cls: bool = True,
    quantize: bool = True,
    published: bool = False,
) -> Policy:
    """Returns the policy of the student, by the published switches.

    Weights and inputs of the chosen linear layers are on grids, and query, key, value and the attention map with `qkv`.
    Position and token-type tables, norms, biases and the classifier stay in full precision.

    Args:
      weights: grid of the matrices.
      table: grid of the word table.
      activations: grid of the inputs of linear layers and of what enters the products of attention.
      emb: the word table.
      qkv: the four linear layers of attention.
      ffn_1: the first linear layer of the perceptron.
      ffn_2: its second one.
      cls: the pooler's linear layer (not the classifier).
      quantize: False: nothing is quantized.
      published: ranges of activations include padding; `quantize` does not reach attention's output projection, and no switch
        query, key, value and the map, which are always on their grids.
    """
    if published:
        estimator = dataclasses.replace(activations.estimator, padding="include")
        activations = dataclasses.replace(activations, estimator=estimator)
    layers = {
        _ATTENTION + "query": qkv and quantize,
        _ATTENTION + "key": qkv and quantize,
        _ATTENTION + "value": qkv and quantize,
        _ATTENTION + "out": qkv and (quantize or published),
        "encoder/layer_*/ffn/up": ffn_1 and quantize,
        "encoder/layer_*/ffn/down": ffn_2 and quantize,
        "pooler/dense": cls and quantize,
    }
    chosen = [layer for layer, on in layers.items() if on]
    kernels: dict[str, Spec | None] = {f"{layer}/kernel": weights for layer in chosen}
    factors = ("query/output", "key/output", "value/output", "probs") if published or (qkv and quantize) else ()
    return policy(
        weights=kernels | ({_TABLE: table} if emb and quantize else {}),
        activations={_ATTENTION + factor: activations for factor in factors},
        inputs={f"{layer}/input": activations for layer in chosen},
    )


def untrained_padding(config: BertConfig) -> dict[str, Any]:
    """Returns the collection that keeps the gradient off the padding row of the word table, to be given to `apply`.

    The row is looked up as ever. Published students have this where their table is quantized.

    Returns:
      `{"detach": ...}` with bool `[V, 1]` at the table.
    """
    row = jnp.arange(config.vocab_size)[:, None] == config.pad_token_id
    return {"detach": {"encoder": {"embeddings": {"word": {"table": row}}}}}
