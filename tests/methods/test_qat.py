from typing import get_args

import pytest

from qtx import asymmetric, policy, symmetric, ternary
from qtx.errors import UserError
from qtx.methods.qat import Ranges, training_policy

POLICY = policy(
    weights={"**": symmetric(8), "Et": ternary()},
    activations={"**": asymmetric(8), "y": asymmetric(8, range="dynamic")},
)


@pytest.mark.parametrize(
    ("rule", "of_weights", "weight", "activation"),
    [
        ("learned", None, "learned", "learned"),
        ("fixed", None, "static", "static"),
        ("updated", None, "dynamic", "static"),
        ("updated", "fixed", "static", "static"),
        ("learned", "updated", "dynamic", "learned"),
        ("fixed", "learned", "learned", "static"),
    ],
)
def test_how_ranges_are_treated(rule, of_weights, weight, activation):
    found = training_policy(POLICY, rule, of_weights)
    assert found.spec("weight", "encoder/layer_0/ffn/up/kernel").range == weight
    assert found.spec("activation", "encoder/layer_0/ffn/up/output").range == activation
    # What is dynamic already stays so.
    assert found.spec("weight", "encoder/embeddings/word/table") == ternary()
    assert found.spec("activation", "encoder/layer_0/ffn/residual").range == "dynamic"


def test_fixed_ranges_stay_where_the_policy_learns_them():
    rules = policy(activations={"**": asymmetric(8, range="learned")})
    found = {rule: training_policy(rules, rule).spec("activation", "encoder/x").range for rule in get_args(Ranges)}
    assert found == {"learned": "learned", "fixed": "static", "updated": "static"}


def test_an_unknown_rule():
    with pytest.raises(UserError, match="'lerned'.*'learned'"):
        training_policy(POLICY, "lerned")
    with pytest.raises(UserError, match="'fix'.*'fixed'"):
        training_policy(POLICY, "learned", "fix")
