import pytest

from qtx import asymmetric, policy, symmetric, ternary
from qtx.errors import UserError
from qtx.methods.qat import training_policy

POLICY = policy(
    weights={"**": symmetric(8), "Et": ternary()},
    activations={"**": asymmetric(8), "y": asymmetric(8, range="dynamic")},
)


@pytest.mark.parametrize(
    ("rule", "weight", "activation"),
    [("learned", "learned", "learned"), ("fixed", "static", "static"), ("updated", "dynamic", "static")],
)
def test_how_ranges_are_treated(rule, weight, activation):
    found = training_policy(POLICY, rule)
    assert found.spec("weight", "encoder/layer_0/ffn/up/kernel").range == weight
    assert found.spec("activation", "encoder/layer_0/ffn/up/output").range == activation
    # What is dynamic already stays so.
    assert found.spec("weight", "encoder/embeddings/word/table") == ternary()
    assert found.spec("activation", "encoder/layer_0/ffn/residual").range == "dynamic"


def test_an_unknown_rule():
    with pytest.raises(UserError, match="'lerned'.*'learned'"):
        training_policy(POLICY, "lerned")
