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
        (dict(weight_bits=64), "quant.weight_bits is 64: uniform grids take 2 to 16"),
        (dict(activation_bits=1), "quant.activation_bits is 1: uniform grids take 2 to 16"),
        (
            dict(activation_bits=17, activation_scheme="offset"),
            "quant.activation_bits is 17: uniform grids take 1 to 16",
        ),
        (dict(weight_scheme="magnitude_int8", weight_bits=9), "1 to 8 bits, not 9"),
    ],
)
def test_patterns_and_schemes_that_do_not_exist(fields, words):
    with pytest.raises(UserError, match=words):
        policy_from(section(**fields), 1)


DRAWN = dict(weight_rounding="stochastic", evaluation_rounding="drawn")
WEIGHTS = dict(pattern="ALL", activation_bits=32)
IR_NET = dict(weight_scheme="ir_net", weight_granularity="channel", **WEIGHTS)
SIGNS = dict(weight_scheme="binary", weight_scale="one", weight_gradient="clipped", **WEIGHTS)
INPUTS = dict(activation_sites="inputs", activation_scheme="shifted", weight_bits=32)


@pytest.mark.parametrize(
    ("fields", "field", "value"),
    [
        (dict(weight_bits=4, **DRAWN, **WEIGHTS), "weight_gradient", "clipped"),
        (dict(weight_bits=4, **WEIGHTS), "weight_scale", "one"),
        (IR_NET, "weight_scale", "one"),
        (IR_NET, "weight_gradient", "clipped"),
        (IR_NET, "weight_rounding", "stochastic"),
        (SIGNS, "weight_estimator", "mse"),
        (SIGNS, "weight_rounding", "stochastic"),
        (SIGNS, "weight_granularity", "channel"),
        (SIGNS, "scale_domain", "log"),
        (dict(weight_scheme="sign", **WEIGHTS), "weight_granularity", "channel"),
        (dict(weight_scheme="tanh", **WEIGHTS), "weight_gradient", "decay"),
        (dict(weight_scheme="magnitude_int8", **WEIGHTS), "weight_scale", "norm"),
        (dict(weight_scheme="shifted", **WEIGHTS), "weight_rounding", "stochastic"),
        (INPUTS, "weight_rounding", "stochastic"),
        (INPUTS, "weight_gradient", "decay"),
        (INPUTS, "published_evaluation", True),
        (INPUTS, "setup", "FP_logits"),
        (WEIGHTS, "evaluation_rounding", "drawn"),
        (WEIGHTS, "activation_scheme", "symmetric"),
        (WEIGHTS, "activation_range", "dynamic"),
        (WEIGHTS, "activation_estimator", "mse"),
        (WEIGHTS, "setup", "FP_logits"),
        (dict(weight_bits=32), "overrides", "Et=4"),
        (dict(activation_bits=32), "overrides", "y=16"),
        ({}, "student_without", "emb"),
        ({}, "student_activations", "fields"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(fields, field, value):
    assert policy_from(section(**fields), 2) is not None
    with pytest.raises(UserError, match=f"^quant.{field} "):
        policy_from(section(**fields, **{field: value}), 2)


def test_fields_that_are_read_make_another_policy():
    policies = [
        policy_from(section(**fields), 2)
        for fields in (
            {},
            dict(weight_scheme="magnitude"),
            dict(weight_scheme="magnitude", weight_scale="norm"),
            dict(weight_scheme="magnitude", weight_rounding="stochastic"),
            dict(weight_scheme="binary"),
            dict(weight_scheme="binary", weight_granularity="channel"),
            dict(weight_scheme="binary", weight_gradient="clipped"),
            dict(weight_scheme="ternary", scale_domain="log"),  # of the activations
            dict(weight_scheme="ternary", padding="include"),
        )
    ]
    assert len(set(policies)) == len(policies)


def test_what_evaluations_are_compared_by_and_where_patience_begins():
    fields = phase()
    fields.update(evaluate_every=1.0, patience=3)
    found = evaluation_from("finetune", fields, print)
    assert (found.metric, found.start, found.patience) == ("score", -math.inf, 3)
    fields.update(metric="matthews", patience_start=0.0)
    found = evaluation_from("finetune", fields, print)
    assert (found.metric, found.start) == ("matthews", 0.0)
