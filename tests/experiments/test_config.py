import pytest

from qtx.errors import UserError
from qtx.experiments.compare import bits_of
from qtx.experiments.config import parse_overrides, policy_from, quantization

POSITION = "encoder/embeddings/position/table"
UP = "encoder/layer_1/ffn/up/kernel"
NORM = "encoder/layer_0/ffn/norm/scale"


def section(**fields):
    found = quantization()
    found.update(fields)
    return found


def test_overrides():
    assert parse_overrides(" y=16, h=ngp6,z1=fp32 ") == {"y": 16, "h": "ngp6", "z1": "fp32"}
    for broken in ("y", "y=", "=8", "y=16,,h"):
        with pytest.raises(UserError, match="quant.overrides"):
            parse_overrides(broken)


def test_bits_of_activations():
    policy = policy_from(section(overrides="y=16"), 2)
    assert (bits_of(policy, "weight"), bits_of(policy, "activation")) == ("8", "8/16")
    assert policy_from(section(weight_bits=32, activation_bits=32), 2) is None


def test_weights_with_bits_of_their_own():
    policy = policy_from(section(weight_bits=4, weight_overrides="**/position/table=8, FFN1=2, **/norm/scale=fp32"), 2)
    assert policy.spec("weight", POSITION).bits == 8
    assert policy.spec("weight", UP).bits == 2
    assert policy.spec("weight", UP.replace("1", "0")).bits == 4
    assert policy.spec("weight", NORM) is None
    assert bits_of(policy, "weight") == "2/4/8"


def test_what_leaves_a_codebook_has_a_uniform_grid():
    policy = policy_from(section(weight_scheme="ternary", overrides="wC=4", weight_overrides="**/position/table=8"), 2)
    assert policy.spec("weight", UP).scheme == "ternary"
    assert policy.spec("weight", NORM) is None  # three values cannot hold a norm's scale
    for name, bits in ((POSITION, 8), ("classifier/kernel", 4)):
        spec = policy.spec("weight", name)
        assert (spec.scheme, spec.bits, spec.range) == ("symmetric", bits, "static")


def test_overrides_of_weights_that_are_not_quantized():
    with pytest.raises(UserError, match="weight_overrides"):
        policy_from(section(weight_bits=32, weight_overrides="FFN=4"), 2)
