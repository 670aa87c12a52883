"""MobileBERT against the published one, its sites and their names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import models, quant
from qtx.errors import UserError
from qtx.methods.efficient_quantization import policy_of
from qtx.models import mobilebert
from qtx.nn import check_policy, policy
from qtx.nn.mobilebert import MobileBertClassifier, MobileBertConfig, NoNorm
from tests.models.hf import write_checkpoint
from tests.nn import published, tiny

NAMES = ("mobilebert", "mobilebert_plain", "mobilebert_attention")
CONFIG = MobileBertConfig(
    50, 16, 1, 2, 8, 8, num_labels=3, attention_dropout=0.0,
    embedding_size=8, intra_bottleneck_size=8, num_feedforward_networks=2,
)  # fmt: skip
TWO = dataclasses.replace(CONFIG, num_layers=2, num_feedforward_networks=4)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_published_one(name):
    published.check_forward(name)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    published.check_round_trip(name, tmp_path)


def test_defaults_are_the_published_ones():
    assert mobilebert.config_from_hf({"model_type": "mobilebert"}) == MobileBertConfig()


@pytest.mark.parametrize(
    ("change", "activations", "weights"),
    [
        ({}, (16 + 4 * 4) * 2 + 6, (11 + 3 * 4) * 2 + 7),
        ({"classifier_activation": False}, (16 + 4 * 4) * 2 + 5, (11 + 3 * 4) * 2 + 6),
        ({"num_feedforward_networks": 1}, 20 * 2 + 6, 14 * 2 + 7),
        ({"use_bottleneck": False}, (9 + 4 * 4) * 2 + 6, (5 + 3 * 4) * 2 + 7),
        ({"use_bottleneck_attention": True}, (14 + 4 * 4) * 2 + 6, (9 + 3 * 4) * 2 + 7),
        ({"trigram_input": False}, (16 + 4 * 4) * 2 + 6, (11 + 3 * 4) * 2 + 7),
        ({"trigram_input": False, "embedding_size": 16}, (16 + 4 * 4) * 2 + 5, (11 + 3 * 4) * 2 + 6),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("norm", ["no_norm", "layer_norm"])
def test_number_of_sites(change, activations, weights, norm):
    found = published.sites("mobilebert", dataclasses.replace(TWO, normalization_type=norm, **change))
    assert (published.count(found, "activation"), published.count(found, "weight")) == (activations, weights)


def test_the_nodes_of_a_layer():
    """Every quantizer of the published model, written out from its description."""
    found = published.sites("mobilebert", TWO)
    prefix = "encoder/layer_1/"
    got = {name.removeprefix(prefix) for name, info in found.items() if prefix in name and info.kind == "activation"}
    want = {"attention/scores", "attention/probs", "attention/context", "attention/residual", "bottleneck_out/residual"}
    want |= {f"attention/{part}/output" for part in ("query", "key", "value", "out", "norm")}
    want |= {f"bottleneck_{where}/{part}/output" for where in ("in", "attention", "out") for part in ("dense", "norm")}
    for ffn in ("ffn_0", "ffn_1", "ffn_2", "ffn"):
        want |= {f"{ffn}/up/output", f"{ffn}/down/output", f"{ffn}/residual", f"{ffn}/norm/output"}
    assert got == want
    shapes = {name.removeprefix(prefix): found[name].shape for name in found if prefix in name}
    assert shapes["bottleneck_in/dense/kernel"] == shapes["attention/value/kernel"] == (16, 8)
    assert shapes["attention/query/kernel"] == (8, 8) and shapes["bottleneck_out/dense/kernel"] == (8, 16)
    assert found["encoder/embeddings/word/table"].shape == (50, 8)
    assert found["encoder/embeddings/transformation/kernel"].shape == (24, 16)


def test_quantization(tmp_path):
    published.check_quantization("mobilebert", CONFIG, tmp_path)


def test_training_step_moves_everything():
    published.check_training_step("mobilebert", CONFIG)


@pytest.mark.parametrize("change", [{}, {"classifier_activation": False}, {"use_bottleneck": False}], ids=str)
def test_published_policies(change):
    specs = published.check_published_policies("mobilebert", dataclasses.replace(TWO, **change), groups=4)
    got = specs({"res_output": 16, "attn_scores": "fp32", "attn_probs1": 4})
    layer = "encoder/layer_{}/"
    assert [got[layer.format(i) + "ffn/residual"].bits for i in range(2)] == [16, 16]
    assert [got[layer.format(i) + "attention/scores"] for i in range(2)] == [None, None]
    assert [got[layer.format(i) + "attention/probs"].bits for i in range(2)] == [8, 4]
    assert got[layer.format(0) + "ffn_2/residual"].bits == 8


# Names


def reached(config=TWO, **rules):
    rules, found = policy(**rules), published.sites("mobilebert", config)
    check_policy(rules, found)
    return {name for name, info in found.items() if rules.spec(info.kind, name)}


def in_layers(*ends):
    return {f"encoder/layer_{i}/{end}" for i in range(2) for end in ends}


@pytest.mark.parametrize(
    ("name", "ends"),
    {
        "s": ["attention/scores"],
        "p": ["attention/probs"],
        "c": ["attention/context"],
        "g": ["attention/out/output"],
        "u": ["attention/residual"],
        "x": ["attention/norm/output"],
        "i": ["ffn_0/up/output", "ffn_1/up/output", "ffn_2/up/output", "ffn/up/output"],
        "h": ["ffn/down/output"],
        "y": ["ffn/residual"],
        "z": ["ffn/norm/output"],
        "attn_scores": ["attention/scores"],
        "attn_probs": ["attention/probs"],
        "attn_output": ["attention/context"],
        "res_self_output": ["attention/residual"],
        "res_ffn_output": ["ffn_0/residual", "ffn_1/residual", "ffn_2/residual"],
        "res_output": ["ffn/residual"],
        "res_output_bottleneck": ["bottleneck_out/residual"],
    }.items(),
)
def test_names_of_activations(name, ends):
    assert reached(activations={name: published.A}) == in_layers(*ends)
    assert reached(activations={f"{name}1": published.A}) == {f"encoder/layer_1/{end}" for end in ends}


def test_names_outside_the_layers():
    embeddings = "encoder/embeddings/"
    for name, want in {
        "e": {embeddings + "sum_position", embeddings + "sum_token_type"},
        "sum_input_pos_embd": {embeddings + "sum_position"},
        "sum_token_type_embd": {embeddings + "sum_token_type"},
        "P": {"pooler/dense/output"},
        "C": {"classifier/output"},
    }.items():
        assert reached(activations={name: published.A}) == want
    assert reached(activations={"L1": published.A}) == {
        name
        for name, info in published.sites("mobilebert", TWO).items()
        if name.startswith("encoder/layer_1/") and info.kind == "activation"
    }


def test_names_of_weights():
    kernels = [f"{ffn}/{part}/kernel" for ffn in ("ffn_0", "ffn_1", "ffn_2", "ffn") for part in ("up", "down")]
    assert reached(weights={"FFN": published.W}) == in_layers(*kernels)
    heads = ("query", "key", "value", "out")
    assert reached(weights={"MHA": published.W}) == in_layers(*(f"attention/{head}/kernel" for head in heads))
    assert reached(weights={"Et": published.W, "CLS": published.W}) == {
        "encoder/embeddings/word/table",
        "pooler/dense/kernel",
        "classifier/kernel",
    }


def test_names_of_what_the_model_does_not_have():
    headless = dataclasses.replace(TWO, classifier_activation=False)
    assert reached(headless, weights={"CLS": published.W}) == {"classifier/kernel"}
    with pytest.raises(UserError, match="the activation pattern 'P' .* matches no site of this model"):
        reached(headless, activations={"P": published.A})
    with pytest.raises(UserError, match="'res_output_bottleneck' .* matches no site"):
        reached(dataclasses.replace(TWO, use_bottleneck=False), activations={"res_output_bottleneck": published.A})
    with pytest.raises(UserError, match="unknown activation site 'res_ffn_outputs'; did you mean 'res_ffn_output'"):
        policy(activations={"res_ffn_outputs": published.A})
    with pytest.raises(UserError, match="is a pattern"):
        policy_of(published.W, published.A, {"**/ffn_0/residual": 16})


# Parts


def test_no_norm():
    x, scale, bias = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4), 4, 4))
    variables = {"params": {"scale": scale, "bias": bias}}
    np.testing.assert_allclose(NoNorm().apply(variables, x), x * scale + bias, rtol=1e-6)
    assert NoNorm(jnp.bfloat16).apply(variables, x).dtype == jnp.bfloat16


def test_the_shift_of_no_norm_does_not_touch_the_grid_of_the_scale():
    """The published code quantizes both, on the shift's range."""
    scale, bias = np.float32([0.5, -1.0, 0.25]), np.float32([1000.0, -2000.0, 0.125])
    rules = policy(quant.symmetric(8, range="dynamic"))
    got = NoNorm(policy=rules).apply({"params": {"scale": scale, "bias": bias}}, jnp.ones((1, 3)))
    np.testing.assert_allclose(got[0] - bias, scale, atol=1 / 127)
    np.testing.assert_array_equal(
        NoNorm(policy=rules).apply({"params": {"scale": scale, "bias": bias}}, jnp.zeros(3)), bias
    )


def test_a_token_sees_its_neighbours():
    ids, mask, types = tiny.inputs()
    params = published.random_params("mobilebert", CONFIG)

    def embedded(ids, config=CONFIG):
        params = published.random_params("mobilebert", config)
        return np.asarray(MobileBertClassifier(config).apply({"params": params}, ids, mask, types).hidden_states[0])

    changed = ids.copy()
    changed[0, 2] = ids[0, 2] % 49 + 1
    moved = np.any(embedded(ids)[0] != embedded(changed)[0], axis=-1)
    np.testing.assert_array_equal(moved, [False, True, True, True, False, False])
    alone = dataclasses.replace(CONFIG, trigram_input=False)
    moved = np.any(embedded(ids, alone)[0] != embedded(changed, alone)[0], axis=-1)
    np.testing.assert_array_equal(moved, [False, False, True, False, False, False])
    table = np.asarray(params["encoder"]["embeddings"]["word"]["table"])
    _, found = MobileBertClassifier(CONFIG).apply({"params": params}, ids, mask, types, mutable=["captures"])
    three = np.asarray(found["captures"]["encoder"]["embeddings"]["transformation"]["input"])
    np.testing.assert_array_equal(three[0, 0], np.concatenate([table[ids[0, 1]], table[ids[0, 0]], np.zeros(8)]))
    np.testing.assert_array_equal(three[0, 5], np.concatenate([np.zeros(8), table[ids[0, 5]], table[ids[0, 4]]]))


@pytest.mark.parametrize("bottleneck", [True, False])
def test_dropout(bottleneck):
    """With bottlenecks hidden dropout is in the embeddings, the bottleneck's output and the head alone."""
    config = dataclasses.replace(CONFIG, hidden_dropout=0.5, use_bottleneck=bottleneck, classifier_dropout=0.0)
    params = published.random_params("mobilebert", config)
    args = ({"params": params}, *tiny.inputs())
    model = MobileBertClassifier(config)
    key = {"dropout": jax.random.key(0)}
    out, found = model.apply(*args, deterministic=False, rngs=key, mutable=["captures"])
    layer = found["captures"]["encoder"]["layer_0"]
    if bottleneck:
        np.testing.assert_allclose(
            layer["attention"]["residual"],
            layer["attention"]["out"]["output"] + layer["bottleneck_in"]["norm"]["output"],
            rtol=1e-6,
        )
        down, residual = layer["ffn"]["down"]["output"], layer["ffn"]["residual"]
        np.testing.assert_allclose(residual, down + layer["ffn_0"]["norm"]["output"], rtol=1e-6)
        added = layer["bottleneck_out"]["residual"] - out.hidden_states[0]
    else:
        added = layer["ffn"]["residual"] - layer["ffn_0"]["norm"]["output"]
    assert 0.3 < np.mean(np.asarray(added) == 0) < 0.7
    assert 0.3 < np.mean(np.asarray(out.hidden_states[0]) == 0) < 0.7
    assert np.all(np.asarray(found["captures"]["classifier"]["input"]) != 0)


def test_dropout_of_the_head():
    config = dataclasses.replace(CONFIG, classifier_dropout=0.5)
    args = ({"params": published.random_params("mobilebert", config)}, *tiny.inputs())
    key = {"dropout": jax.random.key(0)}
    out, found = MobileBertClassifier(config).apply(*args, deterministic=False, rngs=key, mutable=["captures"])
    assert 0.2 < np.mean(np.asarray(found["captures"]["classifier"]["input"]) == 0) < 0.8
    assert np.all(np.asarray(out.pooled) != 0)


# Errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalization_type": "nonorm"}, "unknown normalization_type 'nonorm'; did you mean 'no_norm'"),
        ({"normalization_type": "rms"}, "unknown normalization_type 'rms'"),
        ({"num_feedforward_networks": 0}, "num_feedforward_networks is 0"),
        ({"num_heads": 3}, "3 heads do not divide the width 8 within the layers"),
        ({"key_query_shared_bottleneck": False}, "set key_query_shared_bottleneck or use_bottleneck_attention"),
    ],
)
def test_what_does_not_go_together(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_a_checkpoint_with_an_unknown_normalization(tmp_path):
    write_checkpoint(tmp_path, {"model_type": "mobilebert", "normalization_type": "batch_norm"}, {})
    with pytest.raises(UserError, match="unknown normalization_type 'batch_norm'"):
        models.load(str(tmp_path))
