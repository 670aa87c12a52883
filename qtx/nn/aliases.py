"""Short names for the sites of a transformer, and `policy`, which builds a `Policy` from them.

The one-letter names are those of Bondarenko et al. 2021 (e s p c g u x h y z P C, Et, wP, wC); a number after the name
picks one layer (`y11`), of an encoder and of a decoder. `Es` means the small tables, of positions and of token types. The
long names (`attn_scores`) are the keys that they published for MobileBERT. The block names (MHA, FFN, CLS ...) are those of
pattern studies on weights. A name reaches what a model has of its sites; it is an error if that is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from qtx.errors import UserError, near_misses
from qtx.quant.policy import Kind, Policy, Rule
from qtx.quant.spec import Spec

_LAYER = "encoder/layer_{i}/"
_DECODER_LAYER = "decoder/layer_{i}/"


def _layers(*roles: str) -> tuple[str, ...]:
    """Returns sites of the layers of encoder and decoder."""
    return tuple(layer + role for layer in (_LAYER, _DECODER_LAYER) for role in roles)


def _attention(*roles: str) -> tuple[str, ...]:
    """Returns sites of the attention blocks; a decoder's layer has two of them."""
    return tuple(block + role for block in (_LAYER + "attention/", _DECODER_LAYER + "*attention/") for role in roles)


ALIASES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "activation": {
        "e": ("encoder/embeddings/sum_*", "decoder/embeddings/sum_*"),
        "q": _attention("query/output"),
        "k": _attention("key/output"),
        "v": _attention("value/output"),
        "s": _attention("scores"),
        "p": _attention("probs"),
        "c": _attention("context"),
        "g": _attention("out/output"),
        "u": _attention("residual"),
        "x": _attention("norm/output"),
        "i": _layers("ffn*/up/output"),
        "h": _layers("ffn/down/output"),
        "y": _layers("ffn/residual"),
        "z": _layers("ffn/norm/output"),
        "L": _layers("**"),
        "P": ("pooler/dense/output",),
        "C": ("classifier/output", "classifier/out/output", "distillation_classifier/output", "generator/output"),
        "sum_input_pos_embd": ("encoder/embeddings/sum_position",),
        "sum_token_type_embd": ("encoder/embeddings/sum_token_type",),
        "attn_scores": _attention("scores"),
        "attn_probs": _attention("probs"),
        "attn_output": _attention("context"),
        "res_self_output": _attention("residual"),
        "res_ffn_output": (_LAYER + "ffn_*/residual",),
        "res_output": _layers("ffn/residual"),
        "res_output_bottleneck": (_LAYER + "bottleneck_out/residual",),
    },
    "weight": {
        "Et": ("encoder/embeddings/word/table", "decoder/embeddings/word/table"),
        "Es": ("encoder/embeddings/position/table", "encoder/embeddings/token_type/table"),
        "wP": ("pooler/dense/kernel",),
        "wC": ("classifier/kernel", "classifier/out/kernel", "distillation_classifier/kernel", "generator/kernel"),
        "MHA": _attention("*/kernel"),
        "FFN": _layers("ffn*/*/kernel"),
        "CLS": (
            "pooler/dense/kernel",
            "classifier/kernel",
            "classifier/hidden/kernel",
            "classifier/out/kernel",
            "distillation_classifier/kernel",
        ),
        "QK": _attention("query/kernel", "key/kernel"),
        "QV": _attention("query/kernel", "value/kernel"),
        "KV": _attention("key/kernel", "value/kernel"),
    },
    "input": {"P": ("pooler/dense/input", "classifier/hidden/input")},
}


def expand(kind: Kind, name: str) -> tuple[str, ...]:
    """Returns the patterns that a short name stands for; anything with `/` or `*` is already a pattern.

    A `/` at the front is dropped: `/gain` is the site `gain` of the outermost module, and no short name.
    """
    if "/" in name or "*" in name:
        return (name.removeprefix("/"),)
    found = re.fullmatch(r"([A-Za-z_]+)(\d+)?", name)
    table = ALIASES[kind]
    if not found or found[1] not in table or (found[2] and "{i}" not in table[found[1]][0]):
        raise UserError(
            f"unknown {kind} site {name!r}{near_misses(name, table)} "
            f"(or write a pattern such as '**/ffn/**', or '/{name}' for a site at the top of the model)"
        )
    return tuple(pattern.replace("{i}", found[2] or "*") for pattern in table[found[1]])


def short_name(kind: Kind, name: str) -> str | None:
    """Returns the short name of one site with the number of its layer, such as `y11`; None if it has none.

    Names of whole layers (`L`) are left out; of several the first in `ALIASES` counts. In a decoder they would be those of an
    encoder, or of two sites: its sites have none.
    """
    for alias, patterns in ALIASES[kind].items():
        for pattern in patterns:
            expression = re.escape(pattern).replace(r"\{i\}", r"(\d+)").replace(r"\*", "[^/]*")
            found = None if "**" in pattern or name.startswith("decoder/") else re.fullmatch(expression, name)
            if found:
                return alias + "".join(found.groups())
    return None


Rules = Spec | Mapping[str, Spec | None] | None


def policy(
    weights: Rules = None,
    activations: Rules = None,
    inputs: Rules = None,
    precedence: Literal["specific", "last"] = "specific",
) -> Policy:
    """Builds a policy; a bare spec stands for `{'**': spec}`.

        policy(symmetric(8), {'**': asymmetric(8), 'y': asymmetric(16), 's': None})

    Args:
      weights: spec, or ordered map from short names or patterns to specs (None: full precision). A site of the outermost
        module is `/name`.
      activations: likewise, for layer outputs and stand-alone nodes.
      inputs: likewise, for inputs of linear layers.
      precedence: see `qtx.quant.policy`.

    Raises:
      UserError: on an unknown short name.
    """

    def rules(kind: Kind, given: Rules) -> tuple[Rule, ...]:
        if given is None:
            return ()
        if isinstance(given, Spec):
            given = {"**": given}
        return tuple(Rule(pattern, spec, name) for name, spec in given.items() for pattern in expand(kind, name))

    return Policy(rules("weight", weights), rules("activation", activations), rules("input", inputs), precedence)
