"""The AG_NEWS study: which layers of a classifier are quantized or binarized (patterns), and how.

A pattern is a set of weight sites (see `qtx.methods.patterns`), so it fits other models, too:

    MHA, FFN, CLS      attention, feed-forward layers, head alone
    ALL                every linear layer; ALL_wo_final: but the last one
    ALL_QK             ... and without values; ALL_QV without keys, ALL_KV without queries
    MHA_QK_ONLY        queries, keys and the output projections

Embeddings and norms stay in full precision. (Course project, 2022; the specification's section 4.4. The launcher of the
original binarized keys and values for ALL_QK; what is meant here is what the name says.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from qtx.nn.aliases import policy as make_policy
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec

FINAL = "wC"
# Sites of a pattern by their short names, and those among them that it leaves out.
PATTERNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "MHA": (("MHA",), ()),
    "FFN": (("FFN",), ()),
    "CLS": (("CLS",), ()),
    "CLS_wo_final": (("CLS",), (FINAL,)),
    "ALL": (("**/kernel",), ()),
    "ALL_wo_final": (("**/kernel",), (FINAL,)),
    "ALL_QK": (("**/kernel",), (FINAL, "**/*attention/value/kernel")),
    "ALL_QV": (("**/kernel",), (FINAL, "**/*attention/key/kernel")),
    "ALL_KV": (("**/kernel",), (FINAL, "**/*attention/query/kernel")),
    "MHA_QK_ONLY": (tuple(f"**/*attention/{name}/kernel" for name in ("query", "key", "out")), ()),
}


def input_policy(activations: Spec) -> Policy:
    """Returns the policy that puts what linear layers see on a grid, all but the last one (section 5.1).

    Those are the inputs of query, key and value (three sites), of the output projection, of both feed-forward layers and of
    the head's first layer.
    """
    return make_policy(inputs={"encoder/**/input": activations, "P": activations})


def without_quantized_biases(params: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """Returns parameters in which the bias of every layer with a quantized kernel is zero.

    That is what the study evaluated, as published: it kept 32-bit codes of biases in one byte, which leaves less than 1e-7 of
    them (section 3.2).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, value in flat.items():
        module, _, leaf = name.rpartition("/")
        kernel = "/".join(filter(None, (module, "kernel")))
        if leaf == "bias" and kernel in flat and policy.spec("weight", kernel) is not None:
            flat[name] = jnp.zeros_like(value)
    return traverse_util.unflatten_dict(flat, sep="/")
