"""BitTransformer: which sites have which grids, published widths, and the older code's options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.experiments.config import base, quantization
from qtx.experiments.from_config import policy_from
from qtx.experiments.graph_classification import graph_sites
from qtx.methods.bit_transformer import activation_spec, bit_policy, weight_spec, without_linear_bias
from qtx.models import FAMILIES
from qtx.nn import BertClassifier, check_policy, list_sites
from qtx.nn.graph import GCN, adjacency
from qtx.quant.policy import Policy
from tests.nn import tiny


def sites():
    return list_sites(BertClassifier(tiny.ONE_LAYER), {"params": tiny.params(tiny.ONE_LAYER)}, *tiny.inputs())


def quantized(policy: Policy, found=None) -> dict[str, str]:
    """Sites on a grid, with their grid in words."""
    found = sites() if found is None else found
    check_policy(policy, found)
    return {name: str(spec) for name, info in found.items() if (spec := policy.spec(info.kind, name)) is not None}


def test_linear_layers_tables_and_heads():
    found = quantized(bit_policy(3))
    kernels = {name for name in sites() if name.endswith("/kernel")}
    tables = {f"encoder/embeddings/{name}/table" for name in ("word", "position", "token_type")}
    heads = {f"encoder/layer_0/attention/{name}_heads" for name in ("query", "key", "value")}
    entering = {name.replace("/kernel", "/input") for name in kernels}
    assert len(kernels) == 6 + 2 and set(found) == kernels | tables | heads | entering
    assert {found[name] for name in kernels | tables} == {"3-state absmean, per channel"}
    assert {found[name] for name in heads | entering} == {"8-bit narrow, per token, dynamic"}
    assert set(quantized(bit_policy(5, 1.58, embeddings=False, attention=False))) == kernels | entering
    assert set(quantized(bit_policy(2, 32))) == kernels | tables
    assert set(quantized(bit_policy(2, 32, attention_act_32="eight_bit"))) == kernels | tables | heads
    assert set(quantized(bit_policy(0))) == heads
    assert bit_policy(0, attention=False) == Policy()


@pytest.mark.parametrize("name", ["roberta", "albert", "mobilebert"])
def test_it_fits_other_families(name):
    config = dataclasses.replace(FAMILIES[name].config_from_hf({}), num_layers=1)
    check_policy(bit_policy(2), FAMILIES[name].sites(config))


def test_the_older_code():
    found = quantized(bit_policy(4, 2.0, attention=False, weight_scale="tensor", low_bit_act_scale="tensor"))
    assert set(found.values()) == {"4-state absmean, per tensor"}
    assert activation_spec(8, "tensor") == activation_spec(8)
    assert weight_spec(2, "tensor").eps == 0 < weight_spec(3, "tensor").eps == weight_spec(2).eps


def test_heads_have_a_scale_for_each_token():
    found = sites()
    spec = bit_policy(2, 1.0).spec("input", "encoder/layer_0/attention/key_heads")
    shape = found["encoder/layer_0/attention/key_heads"].shape
    _, step, _ = quant.quantize(spec.at(-1, 4), jnp.ones(shape))
    assert step.shape == (*shape[:2], tiny.CONFIG.num_heads, 1)


def test_a_gcn_beside_the_encoder():
    graph, x = adjacency(np.eye(3), "edges"), jnp.ones((3, 4))
    model = GCN(2, hidden_size=5)
    below = list_sites(model, model.init(jax.random.key(0), graph, x), graph, x)
    joint = sites() | {f"gcn/{name}": info for name, info in below.items()}
    intended, as_run = quantized(bit_policy(3, gcn_states=2), joint), quantized(bit_policy(3, 2.0, gcn_states=3), joint)
    assert {name for name in intended if name.startswith("gcn/")} == {
        f"gcn/layer_{i}/{role}" for i in (0, 1) for role in ("kernel", "input")
    }
    assert intended["gcn/layer_0/kernel"] == "2-state absmean, per channel"
    assert as_run["gcn/layer_0/input"] == "8-bit narrow, per token, dynamic"
    assert not [name for name in quantized(bit_policy(3), joint) if name.startswith("gcn/")]
    with pytest.raises(UserError, match="'gcn'"):
        quantized(bit_policy(3, gcn_states=2))


def test_biases_of_the_older_code_are_zero_and_not_trained():
    params = tiny.params(tiny.ONE_LAYER)
    dropped, trainable = without_linear_bias(params, bit_policy(3))
    assert not np.any(dropped["classifier"]["bias"]) and not np.any(dropped["encoder"]["layer_0"]["ffn"]["up"]["bias"])
    norm = dropped["encoder"]["embeddings"]["norm"]["bias"]
    np.testing.assert_array_equal(norm, params["encoder"]["embeddings"]["norm"]["bias"])
    assert "encoder/embeddings/norm/bias" in trainable and "classifier/kernel" in trainable
    assert len(jax.tree.leaves(params)) - len(trainable) == 8
    _, every = without_linear_bias(params, Policy())
    assert len(every) == len(jax.tree.leaves(params))


def test_configured():
    section = quantization()
    section.bit.update(states=4, activation_bits=1.58, weight_scale="tensor", embeddings=False)
    assert policy_from(section, 12) == bit_policy(4, 1.58, weight_scale="tensor", embeddings=False)


def test_configured_with_a_gcn():
    section = quantization()
    section.bit.update(states=3, gcn_states=2, gcn_activation_bits=2.32)
    policy = policy_from(section, 1)
    assert policy == bit_policy(3, gcn_states=2, gcn_activation_bits=2.32) != bit_policy(3)
    config = base()
    config.bittransgnn.method = "dynamic"
    joint = graph_sites(config, FAMILIES["bert"], dataclasses.replace(tiny.ONE_LAYER, pooler=False))
    found = quantized(policy, joint)
    assert {found[f"gcn/layer_{i}/kernel"] for i in (0, 1)} == {"2-state absmean, per channel"}
    assert {found[f"gcn/layer_{i}/input"] for i in (0, 1)} == {"5-state absmean, per token"}
    assert found["encoder/layer_0/ffn/up/kernel"] == "3-state absmean, per channel"
    with pytest.raises(UserError, match="'gcn'"):
        quantized(policy)
    section.bit.update(states=0)
    alone = quantized(policy_from(section, 1), joint)
    assert alone and all(name.startswith("gcn/") for name in alone)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            dict(bit=dict(states=3), activation_bits=4),
            "leave quant.activation_bits at 8 and set quant.bit.activation_bits",
        ),
        (dict(bit=dict(states=3), weight_bits=4), "leave quant.weight_bits at None"),
        (dict(bit=dict(states=3), weight_granularity="channel"), "leave quant.weight_granularity at 'tensor'"),
        (dict(bit=dict(states=3), outlier_suppression="os"), "leave quant.outlier_suppression empty"),
        (dict(bit=dict(states=3), student_without="emb"), "leave quant.student_without empty"),
        (dict(bit=dict(states=6)), "quant.bit.states: weights take states=2 to 5, not 6"),
        (dict(bit=dict(gcn_states=1)), "quant.bit.gcn_states: .* not 1"),
        (dict(bit=dict(activation_bits=1.58)), "quant.bit.activation_bits is 1.58, but .*quant.bit.states"),
        (dict(bit=dict(states=3, gcn_activation_bits=2.0)), "quant.bit.gcn_activation_bits .*gcn_states is 0"),
        (dict(bit=dict(gcn_states=2, embeddings=False)), "quant.bit.embeddings is False, but quant.bit.states is 0"),
    ],
)
def test_fields_that_do_nothing_beside_states(fields, words):
    section = quantization()
    section.update(fields)
    with pytest.raises(UserError, match=words):
        policy_from(section, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(states=6), "states=2 to 5, not 6"),
        (dict(states=3, activation_bits=4), "4 bits: choose from 1, 1.58, 2, 2.32, 8 and 32"),
        (dict(states=3, weight_scale="rows"), "did you mean 'row'"),
        (dict(states=3, low_bit_act_scale="tokens"), "did you mean 'token'"),
        (dict(states=3, attention_act_32="of"), "did you mean 'off'"),
    ],
)
def test_what_does_not_exist(fields, words):
    with pytest.raises(UserError, match=words):
        bit_policy(**fields)
