"""Policies of published configurations: reference, sections 6.2 to 6.4, with the bugs of section 14.B corrected."""

import functools

import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.methods.efficient_quantization import policy_of, with_value
from qtx.nn import BertClassifier, check_policy, list_sites
from tests.nn import tiny

W, A = quant.symmetric(8), quant.asymmetric(8, estimator=quant.MinMax("running", padding="include"))
FFN = "encoder/layer_{}/ffn/"


@functools.cache
def sites():
    return list_sites(BertClassifier(tiny.CONFIG), {"params": tiny.params()}, *tiny.inputs())


def specs(rules):
    """Spec of every quantized site of the two-layer model, which the policy must fit."""
    check_policy(rules, sites())
    found = {name: rules.spec(info.kind, name) for name, info in sites().items() if info.kind != "input"}
    return {name: spec for name, spec in found.items() if spec is not None}


def of(quant_dict=None, weights=W, activations=A, num_layers=2, **options):
    return specs(policy_of(weights, activations, quant_dict, num_layers, **options))


PLAIN = of()


def changed(got, want=PLAIN):
    return {name for name in want.keys() | got.keys() if got.get(name) != want.get(name)}


def refuse(words, *args, **options):
    with pytest.raises(UserError) as error:
        policy_of(W, A, *args, **{"num_layers": 2} | options)
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


# Values


def test_with_value():
    assert with_value(A, 16) == quant.asymmetric(16, estimator=A.estimator)
    assert with_value(A, "fp32") is None
    assert with_value(None, "fp32") is None
    assert with_value(A, None) is A and with_value(None, None) is None
    assert with_value(A, "per_embd").granularity == quant.per_embedding()
    assert with_value(A, "ng6").granularity == quant.per_group(6)
    assert with_value(A, "ngp6").granularity == quant.per_group(6, permute=True)
    assert with_value(A, "ngp6").bits == 8 and with_value(A, "ngp6").estimator == A.estimator
    logits = with_value(A, "cross_entropy").estimator
    assert logits.loss == "cross_entropy" and logits.padding == A.estimator.padding


@pytest.mark.parametrize("value", ["ng", "npg6", "ng6p", "16", 8.0, True, "FP32", "ng-1"])
def test_unknown_values(value):
    with pytest.raises(UserError, match="unknown quantization value"):
        with_value(A, value)


@pytest.mark.parametrize("value", [1, 17, "ng0"])
def test_values_out_of_range(value):
    with pytest.raises(UserError):
        with_value(A, value)


def test_a_more_specific_key_brings_a_site_back_from_full_precision():
    found = policy_of(W, A, {"y": "fp32", "y0": 4}, num_layers=2)
    assert found.spec("activation", "encoder/layer_0/ffn/residual").bits == 4
    assert found.spec("activation", "encoder/layer_1/ffn/residual") is None


# Policies


def test_plain_is_everything():
    quantized = {name for name, info in sites().items() if info.kind != "input"}
    assert set(PLAIN) == quantized
    assert {PLAIN[name] for name, info in sites().items() if info.kind == "activation"} == {A}
    assert {PLAIN[name] for name, info in sites().items() if info.kind == "weight"} == {W}


def test_rules_are_written_only_for_what_differs():
    def patterns(*args, **options):
        return [rule.pattern for rule in policy_of(W, A, *args, num_layers=2, **options).activations]

    assert patterns() == ["**"]
    assert patterns({"y1": 16}) == ["**", "encoder/layer_1/ffn/residual", "decoder/layer_1/ffn/residual"]
    logits = ["classifier/output", "classifier/out/output", "distillation_classifier/output", "generator/output"]
    assert patterns({"C": 16}, setup="FP_logits") == ["**", *logits]


def test_weights_or_activations_alone():
    assert {sites()[name].kind for name in of(activations=None)} == {"weight"}
    assert {sites()[name].kind for name in of(weights=None)} == {"activation"}
    assert policy_of(None, None).rules("weight") == policy_of(None, None).rules("activation") == ()


def test_mixed_precision():
    got = of({"y": 16, "h": 16, "x": 16})
    ends = ("ffn/residual", "ffn/down/output", "attention/norm/output")
    want = {f"encoder/layer_{i}/{end}" for i in range(2) for end in ends}
    assert changed(got) == want
    assert {got[name].bits for name in want} == {16}


def test_groups():
    got = of({"y1": "ngp6", "h": "ng3", "P": "per_embd"})
    assert changed(got) == {
        "encoder/layer_1/ffn/residual", "encoder/layer_0/ffn/down/output", "encoder/layer_1/ffn/down/output",
        "pooler/dense/output",
    }  # fmt: skip
    assert got["encoder/layer_1/ffn/residual"].granularity == quant.per_group(6, permute=True)


def test_most_specific_key_wins_in_any_order():
    for given in ({"L": 4, "L1": 6, "y": 16, "y1": 12}, {"y1": 12, "y": 16, "L1": 6, "L": 4}):
        got = of(given)
        assert [got[FFN.format(i) + "residual"].bits for i in range(2)] == [16, 12]
        assert [got[FFN.format(i) + "up/output"].bits for i in range(2)] == [4, 6]
        assert got["classifier/output"].bits == 8


def test_published_order():
    """The global key overrides the indexed one, `L0` overrides both, and `L` everything."""
    got = of({"y": 16, "y0": 12, "h0": 10}, order="published")
    assert [got[FFN.format(i) + "residual"].bits for i in range(2)] == [16, 16]
    assert got["encoder/layer_0/ffn/down/output"].bits == 10
    got = of({"y": 16, "L0": 6}, order="published")
    assert [got[FFN.format(i) + "residual"].bits for i in range(2)] == [6, 16]
    got = of({"L": 4, "L0": 6, "y": 16, "y0": 12}, order="published")
    assert [got[FFN.format(i) + "residual"].bits for i in range(2)] == [4, 4]


def test_full_precision_for_some():
    got = of({"s": "fp32", "e": "fp32", "C": "fp32"})
    gone = {"encoder/layer_0/attention/scores", "encoder/layer_1/attention/scores", "classifier/output"}
    gone |= {"encoder/embeddings/sum_token_type", "encoder/embeddings/sum_position"}
    assert changed(got) == gone and not gone & got.keys()


def test_weight_keys_change_weights():
    """In the released code `wP` changes an activation (14.B 6)."""
    got = of({"wP": 4, "wC": "fp32", "Et": 2})
    assert changed(got) == {"pooler/dense/kernel", "classifier/kernel", "encoder/embeddings/word/table"}
    assert got["pooler/dense/kernel"] == quant.symmetric(4)
    assert "classifier/kernel" not in got
    assert got["encoder/embeddings/word/table"] == quant.symmetric(
        2, estimator=quant.Search("mse", "brent", extent="tensor")
    )


def test_the_word_table_is_searched_even_at_the_same_bits():
    assert changed(of({"Et": 8})) == {"encoder/embeddings/word/table"}
    assert changed(of({"Et": "fp32"})) == {"encoder/embeddings/word/table"}


def test_setups():
    assert changed(of(setup="FP_logits")) == {"classifier/output"}
    assert "classifier/output" not in of(setup="FP_logits") and "classifier/kernel" in of(setup="FP_logits")
    logits = of(setup="MSE_logits")["classifier/output"]
    assert logits.estimator == quant.Search("mse", "brent", extent="tensor", padding="include")
    assert changed(of(setup="MSE_logits")) == {"classifier/output"}
    assert of({"C": 16, "P": 16}, setup="MSE_logits")["classifier/output"] == quant.asymmetric(
        16, estimator=logits.estimator
    )
    assert "classifier/output" not in of({"C": 16}, setup="FP_logits")


@pytest.mark.parametrize(
    "granularity", [quant.per_embedding(), quant.per_group(3), quant.per_group(6, permute=True)], ids=str
)
def test_everywhere(granularity):
    """Section 6.3: not scores, probabilities, GELU output, classifier; the pooler with per-embedding alone."""
    got = of(everywhere=granularity)
    activations = {name for name, info in sites().items() if info.kind == "activation"}
    kept = {
        f"encoder/layer_{i}/{end}" for i in range(2) for end in ("attention/scores", "attention/probs", "ffn/up/output")
    }
    kept |= {"classifier/output"} | (set() if granularity == quant.per_embedding() else {"pooler/dense/output"})
    assert changed(got) == activations - kept
    assert {got[name].granularity for name in activations - kept} == {granularity}


def test_everywhere_comes_before_the_dictionary():
    got = of({"y": "ng3", "x": "fp32"}, everywhere=quant.per_embedding())
    assert got["encoder/layer_0/ffn/residual"].granularity == quant.per_group(3)
    assert "encoder/layer_0/attention/norm/output" not in got


# Errors


def test_errors():
    refuse("unknown activation site 'Y'", {"Y": 16})
    refuse("unknown activation site 'P0'", {"P0": 16})
    refuse("unknown activation site 'wQ'", {"wQ": 4})
    refuse("'y2' names layer 2, but the model has layers 0 to 1", {"y2": 16})
    refuse("'L12' names layer 12, but the model has layers 0 to 11", {"L12": 16}, num_layers=12)
    refuse("unknown quantization value 'ng'", {"y": "ng"})
    refuse("unknown setup 'logits'", setup="logits")


def test_all_layers_of_a_large_model_are_covered():
    """The released code stops at layer 11 (14.B 8)."""
    rules = policy_of(W, A, {"y": 16, "L23": 4}, num_layers=24)
    assert rules.spec("activation", FFN.format(12) + "residual").bits == 16
    assert rules.spec("activation", FFN.format(23) + "up/output").bits == 4


def test_a_policy_for_more_layers_than_the_model_has_is_refused():
    with pytest.raises(UserError, match="matches no site"):
        check_policy(policy_of(W, A, {"y": 16}, num_layers=3), sites())


def test_groups_on_scores_are_refused_by_the_model():
    """`L` reaches the scores, whose last axis is the key position (14.B 32)."""
    with pytest.raises(UserError, match="has no feature axis"):
        check_policy(policy_of(W, A, {"L": "ng3"}, 2), sites())
