"""The function stays, the activations grow, and quantizers feel it as they feel real outliers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.analysis.amplify import amplify
from qtx.errors import UserError
from qtx.methods.calibrate import calibrate
from qtx.methods.efficient_quantization import policy_of
from qtx.nn import BertClassifier
from tests.nn import tiny

SITES = {"x": ("attention/norm/output", "ffn/down/output"), "z": ("ffn/norm/output",), "y": ("ffn/residual",)}
SITES["c"] = ("attention/context", "attention/value/output")


def largest(params, config, args):
    """Largest magnitudes of the captured sites of each layer, and the logits."""
    outputs, found = BertClassifier(config).apply({"params": params}, *args, mutable=["captures"])
    return lambda layer, site: float(
        jnp.abs(
            functools.reduce(lambda t, k: t[k], [f"layer_{layer}", *site.split("/")], found["captures"]["encoder"])
        ).max()
    ), outputs.logits


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_same_function_with_larger_activations(site, pooling):
    config = dataclasses.replace(tiny.CONFIG, pooling=pooling)
    params, args = tiny.params(config), tiny.inputs()
    harder = amplify(params, config, (site,), factor=100.0, channels=2)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), harder) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    (before, want), (after, got) = (largest(p, config, args) for p in (params, harder))
    np.testing.assert_allclose(got, want, atol=2e-4)
    for layer in range(2):
        for name in SITES[site]:
            assert after(layer, name) > 15 * before(layer, name), name
    if site == "x":
        assert after(0, "ffn/residual") == pytest.approx(before(0, "ffn/residual"), rel=1e-4)


def test_all_at_once_is_exact_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tiny.params())
        model, args = BertClassifier(tiny.CONFIG, dtype=jnp.float64), tiny.inputs()
        harder = amplify(params, tiny.CONFIG, tuple(SITES), factor=100.0, channels=3)
        got, want = (model.apply({"params": p}, *args).pooled for p in (harder, params))
        assert got.dtype == jnp.float64
        # The softmax of attention is float32 in any case.
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_layers_can_be_chosen():
    params, args = tiny.params(), tiny.inputs()
    harder = amplify(params, tiny.CONFIG, ("x",), layers=[1])
    after, _ = largest(harder, tiny.CONFIG, args)
    before, _ = largest(params, tiny.CONFIG, args)
    assert after(0, "ffn/down/output") == before(0, "ffn/down/output")
    assert after(1, "ffn/down/output") > 5 * before(1, "ffn/down/output")


WIDE = dataclasses.replace(tiny.ONE_LAYER, hidden_size=192, intermediate_size=192, num_heads=4)
REMEDIES = {"tensor": {}, "groups": dict.fromkeys("xhcv", "ngp6"), "16 bits": dict.fromkeys("xhcv", 16)}


@pytest.fixture(scope="module")
def errors():
    """Relative error of the logits of W8A8 by model and remedy."""
    params, args = tiny.params(WIDE), tiny.inputs(9, (16,) * 16, 16)
    models = {"plain": params, "x": amplify(params, WIDE, ("x",), 200.0), "c": amplify(params, WIDE, ("c",), 60.0)}
    want = BertClassifier(WIDE).apply({"params": params}, *args).logits
    found = {}
    for remedy, values in REMEDIES.items():
        rules = policy_of(quant.symmetric(8, quant.per_channel()), quant.asymmetric(8), values, 1)
        model = BertClassifier(WIDE, policy=rules)
        apply = jax.jit(model.apply)
        for name, given in models.items():
            ranges = calibrate(model, given, [tiny.inputs(1, (16,) * 16, 16)])
            got = apply({"params": given, "ranges": ranges}, *args).logits
            found[name, remedy] = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    return found


@pytest.mark.parametrize("site", ["x", "c"])
def test_one_range_per_tensor_loses_and_groups_and_16_bits_win_back(errors, site):
    plain, hard = errors["plain", "tensor"], errors[site, "tensor"]
    assert hard > 2.5 * plain
    lost = hard - plain
    assert errors[site, "groups"] - plain < 0.6 * lost
    assert errors[site, "16 bits"] - plain < 0.4 * lost


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": ("h",)}, "'h' cannot be amplified"),
        ({"factor": 0.0}, "not positive"),
        ({"channels": 13}, "width 12"),
        ({"layers": [2]}, "layer 2"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(UserError, match=words):
        amplify(tiny.params(), tiny.CONFIG, **options)
    with pytest.raises(UserError, match="post-LayerNorm"):
        amplify({"kernel": jnp.ones(2)}, tiny.CONFIG)
