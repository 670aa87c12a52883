import math

import pytest

from qtx.errors import UserError
from qtx.experiments.compare import bits_of
from qtx.experiments.config import phase, quantization
from qtx.experiments.from_config import evaluation_from, parse_overrides, policy_from

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


def kernels(policy):
    """Which linear layers of an encoder have a grid, as letters."""
    names = {
        "q": "encoder/layer_0/attention/query/kernel",
        "k": "encoder/layer_0/attention/key/kernel",
        "v": "encoder/layer_0/attention/value/kernel",
        "o": "encoder/layer_0/attention/out/kernel",
        "1": "encoder/layer_0/ffn/up/kernel",
        "2": "encoder/layer_0/ffn/down/kernel",
        "h": "pooler/dense/kernel",
        "f": "classifier/kernel",
    }
    assert policy.spec("weight", POSITION) is None and policy.spec("weight", NORM) is None
    return "".join(letter for letter, name in names.items() if policy.spec("weight", name) is not None)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    {
        "MHA": "qkvo",
        "FFN": "12",
        "CLS": "hf",
        "CLS_wo_final": "h",
        "ALL": "qkvo12hf",
        "ALL_wo_final": "qkvo12h",
        "ALL_QK": "qko12h",
        "ALL_QV": "qvo12h",
        "ALL_KV": "kvo12h",
        "MHA_QK_ONLY": "qko",
    }.items(),
)
def test_patterns(pattern, layers):
    assert kernels(policy_from(section(pattern=pattern, weight_scheme="binary", activation_bits=32), 1)) == layers


def test_what_linear_layers_see():
    policy = policy_from(section(activation_sites="inputs", activation_scheme="offset"), 1)
    assert policy.spec("activation", "encoder/layer_0/ffn/residual") is None
    for name in ("encoder/layer_0/attention/key/input", "encoder/layer_0/ffn/down/input", "pooler/dense/input"):
        assert policy.spec("input", name).scheme == "offset"
    assert policy.spec("input", "classifier/input") is None
    assert kernels(policy) == "qkvo12hf"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(pattern="ALL_QKV", activation_bits=32), "'ALL_QK'"),
        (dict(pattern="ALL"), "activation_bits=32"),
        (dict(pattern="ALL", weight_bits=32, activation_sites="inputs"), "weight_bits is 32"),
        (dict(pattern="ALL", activation_bits=32, weight_overrides="wC=4"), "'wC'"),
        (dict(activation_sites="input"), "'inputs'"),
        (dict(weight_scheme="ir_net", weight_bits=4), "1 bit, not 4"),
        (dict(weight_scheme="magnitude", weight_bits=16), "1 to 15 bits, not 16"),
        (dict(weight_rounding="random"), "'stochastic'|unknown rounding"),
    ],
)
def test_patterns_and_schemes_that_do_not_exist(fields, words):
    with pytest.raises(UserError, match=words):
        policy_from(section(**fields), 1)


def test_what_evaluations_are_compared_by_and_where_patience_begins():
    fields = phase()
    fields.update(evaluate_every=1.0, patience=3)
    found = evaluation_from("finetune", fields, print)
    assert (found.metric, found.start, found.patience) == ("score", -math.inf, 3)
    fields.update(metric="matthews", patience_start=0.0)
    found = evaluation_from("finetune", fields, print)
    assert (found.metric, found.start) == ("matthews", 0.0)
