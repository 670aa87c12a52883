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

import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.nn.aliases import policy as make_policy
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec

FINAL = "wC"
REPLACEMENTS = ("uniform", "normal")
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
    for module in _quantized_layers(flat, policy):
        if (bias := f"{module}bias") in flat:
            flat[bias] = jnp.zeros_like(flat[bias])
    return traverse_util.unflatten_dict(flat, sep="/")


def replaced_layers(
    params: Mapping[str, Any], policy: Policy, rule: str, key: jax.Array, kept: Container[str] = ()
) -> dict[str, Any]:
    """Returns parameters in which every layer with a quantized kernel is drawn anew.

    The study put new layers in the place of those that it quantized (section 3.2) or binarized (section 4.1), and so did
    "Compressed Transformers"; what the others had been initialised with was lost.

    Args:
      params: nested parameters.
      policy: says which kernels are quantized.
      rule: `'uniform'`: kernel and bias within `1 / sqrt(inputs)` of 0, as quantized layers began; `'normal'`: a kernel of
        variance `1 / inputs` and no bias, as binarized ones did.
      key: for what is drawn.
      kept: names of modules that keep their values: those that come from a checkpoint.

    Raises:
      UserError: on another rule.
    """
    if rule not in REPLACEMENTS:
        raise UserError(f"unknown quant.replaced_layers {rule!r}{near_misses(rule, REPLACEMENTS)}")
    flat = traverse_util.flatten_dict(params, sep="/")
    for number, module in enumerate(sorted(_quantized_layers(flat, policy))):
        if module.removesuffix("/") in kept:
            continue
        kernel, bias = f"{module}kernel", f"{module}bias"
        of_kernel, of_bias = jax.random.split(jax.random.fold_in(key, number))
        reach = math.prod(flat[kernel].shape[:-1]) ** -0.5
        for name, own in ((kernel, of_kernel), (bias, of_bias)):
            if name not in flat:
                continue
            shape, dtype = flat[name].shape, flat[name].dtype
            if rule == "uniform":
                flat[name] = jax.random.uniform(own, shape, dtype, -reach, reach)
            else:
                flat[name] = reach * jax.random.normal(own, shape, dtype) if name == kernel else jnp.zeros(shape, dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _quantized_layers(flat: Mapping[str, Any], policy: Policy) -> list[str]:
    """Returns what the names of the parameters of every layer with a quantized kernel begin with."""
    kernels = (name for name in flat if name.rpartition("/")[2] == "kernel")
    return [name.removesuffix("kernel") for name in kernels if policy.spec("weight", name) is not None]
