"""Layers that share their parameters: weights exist once, activations once a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import asymmetric, calibrate, policy, symmetric
from qtx.errors import UserError
from qtx.methods.calibrate import quantized_weights
from qtx.nn import check_policy, list_sites
from qtx.nn.albert import AlbertClassifier, AlbertConfig
from tests.nn import tiny

CONFIG = AlbertConfig(
    vocab_size=50, hidden_size=12, num_layers=3, num_heads=2, intermediate_size=24, max_positions=16, embedding_size=6
)


@functools.cache
def params():
    rng = np.random.default_rng(0)
    shapes = tiny.shapes(AlbertClassifier(CONFIG))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4 + 0.1, jnp.float32), shapes)


@functools.cache
def sites():
    return list_sites(AlbertClassifier(CONFIG), {"params": params()}, *tiny.inputs())


def apply(rules=None, values=None, **options):
    return AlbertClassifier(CONFIG, policy=rules).apply(values or {"params": params()}, *tiny.inputs(), **options)


@pytest.mark.parametrize(
    ("layers", "groups", "owners"),
    [(12, 1, [0] * 12), (4, 2, [0, 0, 2, 2]), (3, 2, [0, 0, 2]), (3, 3, [0, 1, 2]), (5, 3, [0, 0, 2, 2, 4])],
)
def test_the_first_layer_of_a_group_owns_its_parameters(layers, groups, owners):
    config = dataclasses.replace(CONFIG, num_layers=layers, num_groups=groups)
    assert list(config.owners) == owners
    encoder = tiny.shapes(AlbertClassifier(config))["encoder"]
    assert set(encoder) == {"embeddings", *(f"layer_{i}" for i in set(owners))}


def test_names():
    """Weights under the first layer, everything else under every layer, and nothing twice."""
    names = {
        kind: {name for name, i in sites().items() if i.kind == kind} for kind in ("weight", "activation", "input")
    }
    layers = {kind: {name.split("/")[1] for name in found if "layer_" in name} for kind, found in names.items()}
    every = {"layer_0", "layer_1", "layer_2"}
    assert layers == {"weight": {"layer_0"}, "activation": every, "input": every}
    parts = {name.partition("layer_1/")[2] for name in names["activation"] if "layer_1" in name}
    assert parts == {name.partition("layer_0/")[2] for name in names["activation"] if "layer_0" in name}
    assert len(parts) == 13
    assert sites()["encoder/layer_2/ffn/residual"].shape == (3, 6, 12)
    assert sites()["encoder/embeddings/sum_position"].shape == (3, 6, 6)


def test_captures_of_every_layer_differ():
    out, found = apply(mutable=["captures", "masks"])
    for i in range(3):
        captured = found["captures"]["encoder"][f"layer_{i}"]["ffn"]["norm"]["output"]
        np.testing.assert_array_equal(captured, out.hidden_states[i + 1])
        assert "output" in found["masks"]["encoder"][f"layer_{i}"]["ffn"]["norm"]


def test_one_layer_can_be_replaced():
    given = jnp.ones((3, 6, 12))
    teacher = {"encoder": {"layer_1": {"ffn": {"norm": {"output": given}}}}}
    out = apply(values={"params": params(), "teacher": teacher})
    np.testing.assert_array_equal(out.hidden_states[2], given)
    np.testing.assert_array_equal(out.hidden_states[1], apply().hidden_states[1])
    assert np.any(out.hidden_states[3] != given)


def test_every_layer_has_ranges_of_its_own_and_weights_have_one():
    rules = policy(weights=symmetric(8), activations={"y": asymmetric(8), "y1": asymmetric(4), "z": None})
    check_policy(rules, sites())
    model = AlbertClassifier(CONFIG, policy=rules)
    ranges = calibrate(model, params(), [tiny.inputs()])
    flat = traverse_util.flatten_dict(ranges, sep="/")
    scales = {name: float(flat[f"encoder/{name}/ffn/residual/scale"]) for name in ("layer_0", "layer_1", "layer_2")}
    assert len(set(scales.values())) == 3 and scales["layer_1"] > 5 * min(scales.values())
    weights = {name.rpartition("/")[0] for name in flat if name.endswith("kernel/scale")}
    assert {name.split("/")[1] for name in weights if "layer_" in name} == {"layer_0"}

    # Each layer's residual is on its own grid, in the model as in the list.
    values = {"params": quantized_weights(rules, sites(), params(), ranges), "ranges": ranges}
    out, found = AlbertClassifier(CONFIG, policy=dataclasses.replace(rules, weights=())).apply(
        values, *tiny.inputs(), mutable=["captures"]
    )
    np.testing.assert_allclose(out.logits, apply(rules, {"params": params(), "ranges": ranges}).logits, atol=1e-5)
    broken = traverse_util.flatten_dict(ranges, sep="/")
    broken["encoder/layer_2/ffn/residual/scale"] = broken["encoder/layer_2/ffn/residual/scale"] * 50
    changed = apply(rules, {"params": params(), "ranges": traverse_util.unflatten_dict(broken, sep="/")})
    np.testing.assert_allclose(changed.hidden_states[2], out.hidden_states[2], atol=1e-5)
    assert np.abs(changed.hidden_states[3] - out.hidden_states[3]).max() > 0.1


def test_a_shared_weight_cannot_have_bits_for_a_later_layer():
    check_policy(policy(weights={"FFN": symmetric(4), "MHA0": symmetric(2)}), sites())
    with pytest.raises(UserError, match="'MHA2'.*matches no site.*encoder/layer_0/attention"):
        check_policy(policy(weights={"MHA2": symmetric(4)}), sites())


def test_dropout_differs_between_layers_that_share_parameters():
    """The key of a shared module moves on from run to run."""
    config = dataclasses.replace(CONFIG, hidden_dropout=0.5, hidden_act="relu")
    zeros = jax.tree.map(jnp.zeros_like, params()["encoder"]["layer_0"])
    zeros["attention"]["out"]["bias"] = jnp.ones(12)
    values = {"params": params() | {"encoder": params()["encoder"] | {"layer_0": zeros}}}
    _, found = AlbertClassifier(config).apply(
        values, *tiny.inputs(), deterministic=False, rngs={"dropout": jax.random.key(0)}, mutable=["captures"]
    )
    # Norms are zero, so after the first layer the residual sum is the dropped bias alone.
    drops = [found["captures"]["encoder"][f"layer_{i}"]["attention"]["residual"] for i in (1, 2)]
    assert all(set(np.unique(drop)) == {0.0, 2.0} for drop in drops) and np.any(drops[0] != drops[1])
