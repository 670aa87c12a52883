"""The BERT encoder against the published one: values in golden/encoder-reference.npz (see the .md beside it)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from qtx import models
from qtx.errors import UserError
from qtx.models.checkpoints import to_hf_tensors
from qtx.models.families import get_family
from qtx.nn import BertClassifier
from tests.models.hf import write_checkpoint
from tests.nn import tiny

FILE = Path(__file__).parent.parent / "golden" / "encoder-reference.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def part(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def args_of(values):
    return tuple(jnp.asarray(values[name]) for name in ("input_ids", "attention_mask", "token_type_ids"))


# The published models


def test_minilm_is_the_published_encoder(golden):
    try:
        found = models.load("all-MiniLM-L6-v2")
    except UserError as error:
        pytest.skip(str(error))
    want = part(golden, "minilm/")
    args = args_of(want)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(BertClassifier(found.config).apply)({"params": found.params}, *args)
    real = want["attention_mask"] > 0
    for layer, name in {0: "embeddings", 1: "layer1", 3: "layer3", 6: "layer6"}.items():
        np.testing.assert_allclose(out.hidden_states[layer][real], want[name][real], atol=2e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(out.pooled, want["pooler_output"], atol=2e-5, rtol=0)
    assert len(out.hidden_states) == 7
    assert found.fresh == ("classifier",)


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """The tiny classifier, read as a checkpoint."""
    want = part(golden, "tiny/")
    hf = json.loads(str(want["config"]))
    labels = hf.pop("num_labels")
    hf["id2label"] = {str(i): str(i) for i in range(labels)}
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint(directory, hf | {"model_type": "bert"}, part(golden, "tiny/state/"))
    return models.load(str(directory)), want


def test_tiny_classifier_values_and_all_gradients(published, golden):
    found, want = published
    assert found.fresh == ()
    labels = jnp.asarray(want["labels"])

    def loss_of(params):
        out = BertClassifier(found.config).apply({"params": params}, *args_of(want), deterministic=False, rngs={})
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean(), out

    with jax.default_matmul_precision("highest"):
        (loss, out), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(found.params)
    real = want["attention_mask"] > 0
    np.testing.assert_allclose(out.logits, want["logits"], atol=2e-5)
    np.testing.assert_allclose(out.hidden_states[-1][real], want["last_hidden_state"][real], atol=2e-5)
    np.testing.assert_allclose(loss, want["loss"], atol=1e-5)

    got = to_hf_tensors(found.family, found.config, gradient)
    expected = part(golden, "tiny/grad/")
    assert set(got) == set(expected)
    for name, value in expected.items():
        # key.bias has no gradient in exact arithmetic.
        limits = (
            dict(atol=1e-6) if name.endswith("key.bias") else dict(rtol=1e-4, atol=2e-5 * np.abs(value).max() + 1e-7)
        )
        mine = np.array(got[name])
        if name.endswith("word_embeddings.weight"):
            mine[0] = 0  # the padding token: PyTorch sets its gradient to zero
        np.testing.assert_allclose(mine, value, err_msg=name, **limits)


# What must hold for any model


def apply(config=tiny.CONFIG, args=None, **options):
    args = tiny.inputs() if args is None else args
    return BertClassifier(config).apply({"params": tiny.params()}, *args, **options)


def test_shapes():
    out = apply()
    assert out.logits.shape == (3, 3) and out.logits.dtype == jnp.float32
    assert out.pooled.shape == (3, 12)
    assert [state.shape for state in out.hidden_states] == [(3, 6, 12)] * 3


def test_dropout_only_where_it_is_asked_for():
    """The rates 0.1 are those of the configuration; an rng alone switches nothing on."""
    key = {"dropout": jax.random.key(0)}
    plain = apply().logits
    np.testing.assert_array_equal(apply(rngs=key).logits, plain)
    dropped = apply(deterministic=False, rngs=key).logits
    assert np.all(np.any(np.asarray(dropped) != np.asarray(plain), axis=1))
    np.testing.assert_array_equal(apply(deterministic=False, rngs=key).logits, dropped)
    assert np.any(np.asarray(apply(deterministic=False, rngs={"dropout": jax.random.key(1)}).logits) != dropped)
    off = dataclasses.replace(tiny.CONFIG, hidden_dropout=0.0, attention_dropout=0.0)
    np.testing.assert_array_equal(apply(off, deterministic=False).logits, plain)


@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_both_rates_are_used(rates):
    config = dataclasses.replace(tiny.CONFIG, hidden_dropout=rates[0], attention_dropout=rates[1])
    out = apply(config, deterministic=False, rngs={"dropout": jax.random.key(0)})
    same = np.array_equal(out.hidden_states[0], apply().hidden_states[0])
    assert same == (rates[0] == 0), "the embeddings have hidden dropout, no attention dropout"
    assert not np.array_equal(out.logits, apply().logits)


def test_content_of_padding_does_not_matter():
    ids, mask, types = tiny.inputs()
    other = (np.where(mask, ids, 17), mask, np.where(mask, types, 1))
    a, b = apply(), apply(args=other)
    np.testing.assert_array_equal(a.logits, b.logits)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[mask > 0], np.asarray(y)[mask > 0])
    assert np.any(np.asarray(a.hidden_states[0]) != np.asarray(b.hidden_states[0]))


def test_more_padding_does_not_matter():
    ids, mask, types = tiny.inputs()
    longer = tuple(np.pad(v, ((0, 0), (0, 3))) for v in (ids, mask, types))
    np.testing.assert_allclose(apply(args=longer).logits, apply().logits, atol=2e-6)


def test_rows_do_not_see_each_other():
    args = tiny.inputs()
    turned = tuple(v[::-1] for v in args)
    np.testing.assert_allclose(apply(args=turned).logits[::-1], apply().logits, atol=2e-6)


def test_every_input_matters():
    ids, mask, types = tiny.inputs()
    changed = ids.copy()
    changed[0, 2] = ids[0, 2] % 49 + 1
    swapped = ids.copy()
    swapped[0, [1, 2]] = ids[0, [2, 1]]
    assert ids[0, 1] != ids[0, 2]
    plain = np.asarray(apply().logits)
    masked = mask * (ids != ids[0, 1])
    for args in [(changed, mask, types), (swapped, mask, types), (ids, mask, 1 - types), (ids, masked, types)]:
        assert np.any(np.abs(np.asarray(apply(args=args).logits)[0] - plain[0]) > 1e-4)


def test_filler_rows_are_finite():
    ids, mask, types = tiny.inputs(lengths=(6, 0, 2))
    out = apply(args=(ids, mask, types))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling(pooling):
    out = apply(dataclasses.replace(tiny.CONFIG, pooling=pooling))
    mask = tiny.inputs()[1]
    last = np.asarray(out.hidden_states[-1])
    x = last[:, 0] if pooling == "cls" else np.stack([last[i, : mask[i].sum()].mean(0) for i in range(3)])
    dense = tiny.params()["pooler"]["dense"]
    np.testing.assert_allclose(out.pooled, np.tanh(x @ dense["kernel"] + dense["bias"]), atol=1e-5)


def test_mean_pooling_of_a_filler_row_is_finite():
    out = apply(dataclasses.replace(tiny.CONFIG, pooling="mean"), tiny.inputs(lengths=(6, 0, 2)))
    assert np.all(np.isfinite(out.logits))


def test_logit_range_clamps_inclusively():
    low, high = (float(v) for v in np.sort(np.ravel(apply().logits))[[2, 5]])
    config = dataclasses.replace(tiny.CONFIG, logit_range=(low, high))
    np.testing.assert_array_equal(apply(config).logits, jnp.clip(apply().logits, low, high))
    bias = tiny.params()["classifier"]["bias"]

    def total(bias):
        params = tiny.params() | {"classifier": tiny.params()["classifier"] | {"bias": bias}}
        return BertClassifier(config).apply({"params": params}, *tiny.inputs()).logits.sum()

    logits = np.asarray(apply().logits)
    np.testing.assert_array_equal(jax.grad(total)(bias), ((logits >= low) & (logits <= high)).sum(0))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "tanh"])
def test_activation_functions(act):
    out, found = BertClassifier(dataclasses.replace(tiny.CONFIG, hidden_act=act)).apply(
        {"params": tiny.params()}, *tiny.inputs(), mutable=["captures"]
    )
    up = found["captures"]["encoder"]["layer_0"]["ffn"]["up"]
    dense = tiny.params()["encoder"]["layer_0"]["ffn"]["up"]
    x = np.asarray(up["input"] @ dense["kernel"] + dense["bias"], np.float64)
    erf = np.vectorize(__import__("math").erf)
    want = {
        "gelu": lambda: x * 0.5 * (1 + erf(x / 2**0.5)),
        "gelu_new": lambda: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda: np.maximum(x, 0),
        "silu": lambda: x / (1 + np.exp(-x)),
        "tanh": lambda: np.tanh(x),
    }[act]()
    np.testing.assert_allclose(up["output"], want, atol=1e-6, rtol=1e-5)


def test_scores_are_captured_before_scaling_and_mask():
    _, found = BertClassifier(tiny.CONFIG).apply({"params": tiny.params()}, *tiny.inputs(), mutable=["captures"])
    attention = found["captures"]["encoder"]["layer_0"]["attention"]
    q, k, v = (np.asarray(attention[n]["output"], np.float64).reshape(3, 6, 2, 6) for n in ("query", "key", "value"))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k)
    np.testing.assert_allclose(attention["scores"], scores, atol=1e-4, rtol=1e-5)
    masked = scores / 6**0.5 + np.where(tiny.inputs()[1], 0, -10000.0)[:, None, None, :]
    probs = np.exp(masked - masked.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(attention["probs"], probs, atol=1e-5)
    np.testing.assert_allclose(
        attention["context"], np.einsum("bhqk,bkhd->bqhd", probs, v).reshape(3, 6, 12), atol=1e-4
    )


def test_sixteen_bit_arithmetic_stays_close():
    model = BertClassifier(tiny.CONFIG, jnp.bfloat16)
    out = model.apply({"params": tiny.params()}, *tiny.inputs())
    assert out.logits.dtype == jnp.float32 and out.hidden_states[-1].dtype == jnp.bfloat16
    np.testing.assert_allclose(out.logits, apply().logits, atol=0.15)


def test_family_knows_every_parameter():
    flat = traverse_util.flatten_dict(tiny.params(), sep="/")
    assert len(to_hf_tensors(get_family("bert"), tiny.CONFIG, tiny.params())) == len(flat) == 5 + 16 * 2 + 2 + 2
