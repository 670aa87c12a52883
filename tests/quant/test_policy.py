"""Patterns, precedence and the errors of policies."""

import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.quant.policy import Policy, Rule, matches

A, B, C, D = (quant.symmetric(bits) for bits in (2, 3, 4, 5))
NAME = "encoder/layer_0/ffn/residual"


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("**", "a/b", True),
        ("**", "a", True),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("**/c", "c", True),
        ("**/c", "a/b/c", True),
        ("**/c", "a/bc", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/x/y/c", True),
        ("layer_*/x", "layer_11/x", True),
        ("layer_1/x", "layer_11/x", False),
        ("layer_1*/x", "layer_11/x", True),
        ("a.c", "abc", False),
        ("a/b", "a/b/c", False),
        ("b", "a/b", False),
        ("a[0]+", "a[0]+", True),
    ],
)
def test_patterns(pattern, name, fits):
    assert matches(pattern, name) is fits


def rules(*pairs):
    return tuple(Rule(pattern, spec) for pattern, spec in pairs)


@pytest.mark.parametrize("turn", [1, -1])
def test_the_most_specific_rule_wins_in_any_order(turn):
    given = rules(("**", A), ("**/residual", B), ("encoder/layer_*/ffn/residual", C), (NAME, D))[::turn]
    policy = Policy(activations=given)
    assert policy.spec("activation", NAME) == D
    assert policy.spec("activation", NAME.replace("0", "1")) == C
    assert policy.spec("activation", "x/residual") == B
    assert policy.spec("activation", "x/y") == A


def test_of_equals_the_later_wins():
    policy = Policy(activations=rules(("**/residual", A), ("**/residual", B)))
    assert policy.spec("activation", NAME) == B


def test_precedence_last():
    given = rules((NAME, D), ("**", A))
    assert Policy(activations=given).spec("activation", NAME) == D
    assert Policy(activations=given, precedence="last").spec("activation", NAME) == A
    assert Policy(activations=given[::-1], precedence="last").spec("activation", NAME) == D


def test_none_keeps_full_precision():
    policy = Policy(activations=rules(("**", A), ("**/residual", None)))
    assert policy.spec("activation", NAME) is None
    assert policy.rule("activation", NAME).pattern == "**/residual"
    assert policy.spec("activation", "x/output") == A


def test_kinds_are_separate():
    policy = Policy(rules(("**", A)), rules(("**", B)), rules(("x", C)))
    assert [policy.spec(kind, "x") for kind in ("weight", "activation", "input")] == [A, B, C]
    assert policy.spec("input", "y") is None and policy.rule("input", "y") is None
    assert Policy().spec("weight", "x") is None


def test_check_names_the_pattern_and_what_is_near():
    names = {"activation": ["encoder/layer_0/ffn/residual", "encoder/layer_0/ffn/norm/output"], "weight": ["w"]}
    Policy(rules(("**", A)), rules(("encoder/layer_*/ffn/residual", A))).check(names)
    with pytest.raises(UserError) as error:
        Policy(activations=rules(("encoder/layer_0/ffn/residul", A))).check(names)
    assert str(error.value) == (
        "the activation pattern 'encoder/layer_0/ffn/residul' matches no site of this model; "
        "did you mean 'encoder/layer_0/ffn/residual' or 'encoder/layer_0/ffn/norm/output'?"
    )
    with pytest.raises(UserError) as error:
        Policy(activations=(Rule("encoder/layer_7/ffn/residual", A, "y7"),)).check(names)
    assert str(error.value) == (
        "the activation pattern 'y7' (that is, 'encoder/layer_7/ffn/residual') matches no site of this model; "
        "did you mean 'encoder/layer_0/ffn/residual' or 'encoder/layer_0/ffn/norm/output'?"
    )
    with pytest.raises(UserError) as error:
        Policy(weights=rules(("zzz", A))).check(names)
    assert str(error.value) == "the weight pattern 'zzz' matches no site of this model; choose from: w"


def test_some_patterns_of_a_short_name_may_match_nothing():
    Policy(weights=(Rule("position", A, "Es"), Rule("token_type", A, "Es"))).check({"weight": ["position", "word"]})
    for rules in [
        (Rule("position", A), Rule("token_type", A)),
        (Rule("token_type", A, "Es"), Rule("position", A, "Ep")),
    ]:
        with pytest.raises(UserError, match="token_type.*matches no site"):
            Policy(weights=rules).check({"weight": ["position", "word"]})


def test_a_pattern_of_another_kind_does_not_match():
    with pytest.raises(UserError, match="the weight pattern"):
        Policy(weights=rules(("a/output", A))).check({"activation": ["a/output"], "weight": ["a/kernel"]})


def test_policies_are_values():
    one, same = (Policy(rules(("**", quant.symmetric(4)))) for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != Policy(rules(("**", quant.symmetric(8))))


def test_map_specs_leaves_none_and_order():
    policy = Policy(rules(("**", A)), rules(("**", B), ("x", None)), rules(("y", C)), "last")
    changed = policy.map_specs(lambda spec: quant.asymmetric(spec.bits))
    assert changed.weights == rules(("**", quant.asymmetric(2)))
    assert changed.activations == rules(("**", quant.asymmetric(3)), ("x", None))
    assert changed.inputs == rules(("y", quant.asymmetric(4))) and changed.precedence == "last"
    assert policy.weights == rules(("**", A))


def test_rules_that_match_and_rules_of_two_policies():
    both = Policy(
        weights=(Rule("encoder/**", quant.symmetric(8)), Rule("gcn/**", quant.symmetric(8))),
        inputs=(Rule("gcn/*/input", quant.symmetric(8)),),
    )
    encoder = both.matching({"weight": ["encoder/a/kernel"], "input": ["encoder/a/input"]})
    assert encoder == Policy(weights=(Rule("encoder/**", quant.symmetric(8)),))
    assert encoder.followed_by(both.matching({"weight": ["gcn/b/kernel"], "input": ["gcn/b/input"]})) == both
