"""A policy says which tensor is put on which grid: ordered rules from site patterns to specs.

Site names are module paths with a role, such as `encoder/layer_3/ffn/residual`. In a pattern `*` stands for any part of
one name, `**` for any number of names; everything else is literal. A rule whose spec is `None` keeps its sites in full
precision. With `precedence='specific'` the rule with most literal characters wins (the later one, if equal), so
`encoder/layer_0/ffn/residual` beats `**/residual` beats `**`, in whatever order they stand. `'last'` takes the last
rule that matches.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from qtx.errors import UserError, near_misses
from qtx.quant.spec import Spec

Kind = Literal["weight", "activation", "input"]
KINDS: tuple[Kind, ...] = ("weight", "activation", "input")


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern)
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.compile("".join(translated.get(part, re.escape(part)) for part in parts))


def matches(pattern: str, name: str) -> bool:
    """Whether the whole of `name` fits `pattern`."""
    return _compiled(pattern).fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Rule:
    """Sites that fit `pattern` get `spec`; None keeps them in full precision. `label` is what the user wrote."""

    pattern: str
    spec: Spec | None
    label: str = ""

    @property
    def specificity(self) -> int:
        """Number of literal characters."""
        return len(self.pattern.replace("*", ""))


@dataclasses.dataclass(frozen=True)
class Policy:
    """Rules for each kind of site.

    Attributes:
      weights: for parameters, where they are used.
      activations: for outputs of layers and stand-alone nodes.
      inputs: for what enters a linear layer (an alternative to quantizing outputs).
      precedence: which of several matching rules wins.
    """

    weights: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()
    inputs: tuple[Rule, ...] = ()
    precedence: Literal["specific", "last"] = "specific"

    def rules(self, kind: Kind) -> tuple[Rule, ...]:
        """The rules for one kind of site."""
        return {"weight": self.weights, "activation": self.activations, "input": self.inputs}[kind]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - policies are few, immutable and live as long as the program
    def rule(self, kind: Kind, name: str) -> Rule | None:
        """Returns the rule that decides about a site, or None if no rule matches."""
        found = [(rule.specificity, i, rule) for i, rule in enumerate(self.rules(kind)) if matches(rule.pattern, name)]
        if not found:
            return None
        return max(found, key=lambda f: (f[0] if self.precedence == "specific" else 0, f[1]))[2]

    def spec(self, kind: Kind, name: str) -> Spec | None:
        """Returns the grid of a site, or None if it stays in full precision."""
        rule = self.rule(kind, name)
        return rule.spec if rule else None

    def check(self, names: Mapping[Kind, Iterable[str]]) -> None:
        """Raises a `UserError` if something that the user wrote matches none of a model's sites.

        Of the patterns that a short name stands for some may match nothing: a model without token types has no table of them.

        Args:
          names: the model's site names by kind.
        """
        for kind in KINDS:
            existing = list(names.get(kind, ()))
            reached = {
                rule.label or rule.pattern
                for rule in self.rules(kind)
                if rule.pattern == "**" or any(matches(rule.pattern, name) for name in existing)
            }
            for rule in self.rules(kind):
                written = rule.label or rule.pattern
                if written in reached:
                    continue
                shown = f"{written!r}" + (f" (that is, {rule.pattern!r})" if written != rule.pattern else "")
                hint = near_misses(rule.pattern, existing)
                raise UserError(f"the {kind} pattern {shown} matches no site of this model{hint}")

    def map_rules(self, change: Callable[[Kind, tuple[Rule, ...]], Iterable[Rule]]) -> Policy:
        """Returns the policy with `change(kind, rules)` in place of the rules for every kind."""
        weights, activations, inputs = (tuple(change(kind, self.rules(kind))) for kind in KINDS)
        return dataclasses.replace(self, weights=weights, activations=activations, inputs=inputs)

    def map_specs(self, change: Callable[[Spec], Spec | None]) -> Policy:
        """Returns the policy with `change(spec)` in place of every spec that is not None."""
        return self.map_rules(
            lambda _, rules: [replace(r, spec=None if r.spec is None else change(r.spec)) for r in rules]
        )

    def matching(self, names: Mapping[Kind, Iterable[str]]) -> Policy:
        """Returns the policy without the rules that match none of some sites.

        Args:
          names: of the sites, by kind.
        """

        def kept(kind: Kind, rules: tuple[Rule, ...]) -> list[Rule]:
            existing = list(names.get(kind, ()))
            return [rule for rule in rules if any(matches(rule.pattern, name) for name in existing)]

        return self.map_rules(kept)

    def followed_by(self, other: Policy) -> Policy:
        """Returns the policy with the rules of another one behind its own."""
        return self.map_rules(lambda kind, rules: (*rules, *other.rules(kind)))
