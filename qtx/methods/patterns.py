"""Patterns: which weights of a model a method puts on its grid, by name.

Each study has its own, `agnews_study` and `compressed_transformers`; they are sets of weight sites, so any of them fits any
model that has such sites.
"""

from __future__ import annotations

from qtx.errors import UserError, near_misses
from qtx.methods import agnews_study, compressed_transformers
from qtx.nn.aliases import policy as make_policy
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec

PATTERNS = agnews_study.PATTERNS | compressed_transformers.PATTERNS
"""Sites of a pattern by their short names, and those among them that it leaves out."""


def pattern_policy(pattern: str, weights: Spec) -> Policy:
    """Returns the policy that puts the weights of a pattern on a grid.

    Args:
      pattern: a key of `PATTERNS`.
      weights: their grid.

    Raises:
      UserError: on an unknown pattern.
    """
    if pattern not in PATTERNS:
        raise UserError(f"unknown pattern {pattern!r}{near_misses(pattern, PATTERNS)}")
    chosen, left_out = PATTERNS[pattern]
    return make_policy(weights=dict.fromkeys(chosen, weights) | dict.fromkeys(left_out))
