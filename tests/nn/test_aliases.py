"""Every published short name reaches the sites of section 6.2 of the reference, and no others."""

import dataclasses
import functools

import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.nn import BertClassifier, check_policy, list_sites, policy
from qtx.nn.aliases import expand, short_name
from qtx.quant.policy import matches
from tests.nn import tiny

SPEC = quant.symmetric(4)

# Written out from the table, not from the library.
IN_LAYER = {
    "s": ["attention/scores"],
    "p": ["attention/probs"],
    "c": ["attention/context"],
    "g": ["attention/out/output"],
    "u": ["attention/residual"],
    "x": ["attention/norm/output"],
    "h": ["ffn/down/output"],
    "y": ["ffn/residual"],
    "z": ["ffn/norm/output"],
    "q": ["attention/query/output"],
    "k": ["attention/key/output"],
    "v": ["attention/value/output"],
    "i": ["ffn/up/output"],
}
IN_LAYER["L"] = [site for sites in list(IN_LAYER.values()) for site in sites]
ONCE = {
    "e": ["encoder/embeddings/sum_token_type", "encoder/embeddings/sum_position"],
    "P": ["pooler/dense/output"],
    "C": ["classifier/output"],
}
WEIGHTS = {
    "Et": ["encoder/embeddings/word/table"],
    "Es": ["encoder/embeddings/position/table", "encoder/embeddings/token_type/table"],
    "wP": ["pooler/dense/kernel"],
    "wC": ["classifier/kernel"],
    "CLS": ["pooler/dense/kernel", "classifier/kernel"],
}
WEIGHTS_IN_LAYER = {
    "MHA": ["attention/query/kernel", "attention/key/kernel", "attention/value/kernel", "attention/out/kernel"],
    "FFN": ["ffn/up/kernel", "ffn/down/kernel"],
    "QK": ["attention/query/kernel", "attention/key/kernel"],
    "QV": ["attention/query/kernel", "attention/value/kernel"],
    "KV": ["attention/key/kernel", "attention/value/kernel"],
}


@functools.cache
def sites(layers):
    model = BertClassifier(dataclasses.replace(tiny.CONFIG, num_layers=layers))
    return list_sites(model, {"params": tiny.shapes(model)}, *tiny.inputs())


def reached(rules, layers):
    found = sites(layers)
    check_policy(rules, found)
    return {(info.kind, name) for name, info in found.items() if rules.spec(info.kind, name) is not None}


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("name", IN_LAYER)
def test_names_in_every_layer(name, layers):
    def want(i):
        return {("activation", f"encoder/layer_{i}/{site}") for site in IN_LAYER[name]}

    assert reached(policy(activations={name: SPEC}), layers) == set().union(*(want(i) for i in range(layers)))
    for i in {0, 1, layers - 1}:
        assert reached(policy(activations={f"{name}{i}": SPEC}), layers) == want(i)


@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize("name", ONCE)
def test_names_outside_the_layers(name, layers):
    assert reached(policy(activations={name: SPEC}), layers) == {("activation", site) for site in ONCE[name]}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_names(name):
    assert reached(policy(weights={name: SPEC}), 2) == {("weight", site) for site in WEIGHTS[name]}


@pytest.mark.parametrize("name", WEIGHTS_IN_LAYER)
def test_weight_names_in_layers(name):
    def want(i):
        return {("weight", f"encoder/layer_{i}/{site}") for site in WEIGHTS_IN_LAYER[name]}

    assert reached(policy(weights={name: SPEC}), 12) == set().union(*(want(i) for i in range(12)))
    assert reached(policy(weights={f"{name}1": SPEC}), 12) == want(1)


def test_all_layers_and_the_rest_are_everything():
    """`L`, `e`, `P`, `C` and the embedding norm, which has no short name."""
    names = {"L": SPEC, "e": SPEC, "P": SPEC, "C": SPEC, "encoder/embeddings/norm/output": SPEC}
    assert reached(policy(activations=names), 2) == reached(policy(activations=SPEC), 2)


def test_a_bare_spec_is_everything_of_its_kind():
    got = reached(policy(SPEC, SPEC, SPEC), 2)
    assert got == {(info.kind, name) for name, info in sites(2).items()}
    assert {kind for kind, _ in reached(policy(inputs=SPEC), 2)} == {"input"}
    assert reached(policy(), 2) == set()


def test_an_indexed_name_beats_the_global_one_and_none_is_full_precision():
    wide = quant.asymmetric(16)
    rules = policy(activations={"y1": wide, "y": SPEC, "**": quant.asymmetric(8), "h": None, "L": quant.asymmetric(2)})
    spec = functools.partial(rules.spec, "activation")
    assert spec("encoder/layer_1/ffn/residual") == wide
    assert spec("encoder/layer_0/ffn/residual") == SPEC
    assert spec("encoder/layer_0/ffn/down/output") is None
    assert spec("encoder/layer_0/attention/scores") == quant.asymmetric(2)
    assert spec("classifier/output") == quant.asymmetric(8)


def test_precedence_last_takes_the_order_of_writing():
    rules = policy(activations={"y1": SPEC, "L": quant.asymmetric(8)}, precedence="last")
    assert rules.spec("activation", "encoder/layer_1/ffn/residual") == quant.asymmetric(8)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (lambda: policy(activations={"yy": SPEC}), "unknown activation site 'yy'"),
        (lambda: policy(activations={"Et": SPEC}), "unknown activation site 'Et'"),
        (lambda: policy(weights={"y": SPEC}), "unknown weight site 'y'"),
        (lambda: policy(activations={"P1": SPEC}), "unknown activation site 'P1'"),
        (lambda: policy(activations={"e0": SPEC}), "unknown activation site 'e0'"),
        (lambda: policy(weights={"MHAA": SPEC}), "did you mean 'MHA'?"),
        (lambda: policy(inputs={"y": SPEC}), "or write a pattern"),
    ],
)
def test_unknown_names(rules, message):
    with pytest.raises(UserError) as error:
        rules()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_layer_that_does_not_exist():
    with pytest.raises(UserError) as error:
        check_policy(policy(activations={"y7": SPEC}), sites(2))
    message = str(error.value)
    assert message.startswith("the activation pattern 'y7' (that is, 'encoder/layer_7/ffn/residual') matches no site")
    assert "did you mean 'encoder/layer_1/ffn/residual'" in message or "'encoder/layer_0/ffn/residual'" in message
    assert "\n" not in message


def test_policies_from_names_are_hashable_values():
    one, same = (policy(SPEC, {"y": quant.asymmetric(16), "s": None}) for _ in range(2))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1


@pytest.mark.parametrize(
    ("kind", "name", "short"),
    [
        ("activation", "encoder/layer_11/ffn/residual", "y11"),
        ("activation", "encoder/embeddings/sum_position", "e"),
        ("activation", "encoder/embeddings/norm/output", None),
        ("activation", "classifier/output", "C"),
        ("weight", "classifier/kernel", "wC"),
        ("weight", "encoder/layer_2/attention/out/kernel", "MHA2"),
        ("weight", "encoder/layer_2/attention/norm/scale", None),
        ("activation", "classifier/kernel", None),
    ],
)
def test_short_names_of_sites(kind, name, short):
    assert short_name(kind, name) == short
    if short:
        assert any(matches(pattern, name) for pattern in expand(kind, short))


def test_a_site_at_the_top_of_a_model_is_no_short_name():
    assert expand("activation", "/y") == ("y",) and expand("weight", "/gain") == ("gain",)
    with pytest.raises(UserError, match="or '/gain' for a site at the top"):
        expand("weight", "gain")
