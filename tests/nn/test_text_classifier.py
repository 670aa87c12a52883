"""The pre-norm text classifier: its shortcut, what the published code did, its sites. Golden cases are in conformance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import quant
from qtx.errors import UserError
from qtx.nn import check_policy, policy
from qtx.nn.layers import Dense, DeviationNorm, LayerNorm, sinusoids
from qtx.nn.text_classifier import TextClassifier, TextClassifierConfig
from tests.nn import published, tiny

FAMILY = "qtx_text_classifier"
CONFIG = TextClassifierConfig(
    vocab_size=50, hidden_size=16, num_heads=2, intermediate_size=32, classifier_size=24, max_positions=8, num_labels=3
)
ONE = dataclasses.replace(CONFIG, num_layers=1, hidden_dropout=0.0, attention_dropout=0.0)
A = quant.asymmetric(8)


@functools.cache
def params():
    return published.random_params(FAMILY, CONFIG)


@functools.cache
def run(**changes):
    """Outputs, and captured tensors by name, of the two-layer model with some fields changed."""
    model, inputs = TextClassifier(dataclasses.replace(CONFIG, **changes)), tiny.inputs()
    out, seen = jax.jit(lambda p: model.apply({"params": p}, *inputs, mutable=["captures"]))(params())
    return out, traverse_util.flatten_dict(seen["captures"], sep="/")


def test_first_token_alone_gives_the_same_logits():
    short, shown = run()
    whole, seen = run(first_token_only=False)
    np.testing.assert_allclose(short.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(short.hidden_states[-1], whole.hidden_states[-1][:, :1], rtol=1e-5, atol=1e-5)
    assert short.hidden_states[-1].shape == (3, 1, 16) and short.hidden_states[1].shape == (3, 6, 16)
    last = "encoder/layer_1/attention/"
    assert (shown[last + "scores"].shape, seen[last + "scores"].shape) == ((3, 2, 1, 6), (3, 2, 6, 6))
    assert shown[last + "query/input"].shape == (3, 1, 16) and shown[last + "key/input"].shape == (3, 6, 16)
    assert shown.keys() == seen.keys()


def test_the_shortcut_has_the_same_gradients():
    def gradients(config):
        model = TextClassifier(config)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, *tiny.inputs()).logits))))(
            params()
        )

    short, whole = gradients(CONFIG), gradients(dataclasses.replace(CONFIG, first_token_only=False))
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(whole))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6 * size), short, whole)


def test_the_mean_of_the_tokens_needs_all_of_them():
    out, _ = run(pooling="mean")
    mask = tiny.inputs()[1][:, :, None]
    assert out.hidden_states[-1].shape == (3, 6, 16)
    np.testing.assert_allclose(out.pooled, (out.hidden_states[-1] * mask).sum(1) / mask.sum(1), rtol=1e-5)


def test_padding_counts_only_where_it_did_as_published():
    ids, mask, types = tiny.inputs()
    other = np.where(mask == 1, ids, 7)
    for kind, same in (("exact", True), ("published", False)):
        model = TextClassifier(dataclasses.replace(CONFIG, mask=kind))
        here, there = (model.apply({"params": params()}, given, mask, types).logits for given in (ids, other))
        assert np.array_equal(here[0], there[0]), "a row without padding"
        assert np.allclose(here[1:], there[1:], atol=1e-6) is same


def test_embeddings_enter_once_or_twice():
    ids = tiny.inputs()[0]
    tables = params()["encoder"]["embeddings"]
    e = (tables["word"]["table"][ids] + tables["position"]["table"][:6]) * 4
    once, twice = run()[0].hidden_states[0], run(embedding="twice")[0].hidden_states[0]
    np.testing.assert_allclose(once, e + sinusoids(6, 16), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(twice, 2 * e + sinusoids(6, 16), rtol=1e-5, atol=1e-5)


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(5, 6)
    assert table.dtype == np.float32 and table[3, 2] == pytest.approx(np.sin(3 / 10000 ** (2 / 6)))
    assert table[4, 5] == pytest.approx(np.cos(4 / 10000 ** (4 / 6))) and np.array_equal(table[0], [0, 1, 0, 1, 0, 1])


def test_relu_of_the_classifier_and_where_there_is_none():
    assert np.min(run()[1]["classifier/hidden/output"]) == 0
    assert np.min(run(classifier_relu=False)[1]["classifier/hidden/output"]) < 0


def test_token_types_have_no_effect_and_filler_rows_are_finite():
    ids, mask, types = tiny.inputs()
    mask = mask * np.array([[1], [0], [1]])
    model = TextClassifier(ONE)
    some = model.apply({"params": params()}, ids, mask, types)
    np.testing.assert_array_equal(some.logits, model.apply({"params": params()}, ids, mask, types * 0).logits)
    assert types.any() and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(some))


def test_norm_divides_by_the_unbiased_deviation_plus_epsilon():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)) * np.array([[1.0], [1e-2], [1e-6]]), jnp.float32)
    variables = {"params": {"scale": jnp.full(8, 2.0), "bias": jnp.ones(8)}}
    want = 2 * (x - x.mean(-1, keepdims=True)) / (np.std(x, axis=-1, ddof=1, keepdims=True) + 1e-6) + 1
    np.testing.assert_allclose(DeviationNorm().apply(variables, x), want, rtol=1e-4)
    assert not np.allclose(DeviationNorm().apply(variables, x), LayerNorm().apply(variables, x), atol=0.05)
    gradient = jax.grad(lambda x: jnp.sum(DeviationNorm().apply(variables, x) ** 2))(jnp.ones((1, 8)))
    assert np.all(np.isfinite(gradient)), "of a constant row"


def test_initial_values():
    """Xavier-uniform kernels and tables, biases within 1/sqrt(in), norms at 1 and 0."""
    model = TextClassifier(CONFIG)
    found = traverse_util.flatten_dict(model.init(jax.random.key(1), *tiny.inputs())["params"], sep="/")
    for path, value in found.items():
        if path.endswith("norm/scale") or path.endswith("norm/bias"):
            np.testing.assert_array_equal(value, float(path.endswith("scale")))
            continue
        inputs, outputs = (found[path.replace("bias", "kernel")] if path.endswith("bias") else value).shape
        bound = inputs**-0.5 if path.endswith("bias") else (6 / (inputs + outputs)) ** 0.5
        assert 0.6 * bound < np.max(np.abs(value)) <= bound, path


def test_dropout_of_an_input_is_behind_its_site():
    dense = Dense(4, input_dropout=0.5)
    x = jnp.ones((8, 32))
    variables = dense.init(jax.random.key(0), x)
    y, seen = dense.apply(variables, x, None, False, rngs={"dropout": jax.random.key(1)}, mutable=["captures"])
    np.testing.assert_array_equal(seen["captures"]["input"], x)
    plain = dense.apply(variables, x)
    assert np.ptp(y, axis=0).min() > 0 and np.ptp(plain, axis=0).max() == 0


def test_every_tensor_is_a_site():
    found = published.sites(FAMILY, CONFIG)
    weights = {name for name, info in found.items() if info.kind == "weight"}
    paths = traverse_util.flatten_dict(params(), sep="/")
    assert weights == {path for path in paths if not path.endswith("bias")}
    per_layer = ["query", "key", "value", "out"]
    inputs = {f"encoder/layer_{i}/attention/{name}/input" for i in range(2) for name in per_layer}
    inputs |= {f"encoder/layer_{i}/ffn/{name}/input" for i in range(2) for name in ("up", "down")}
    products = ("probs_dropped", "query_heads", "key_heads", "value_heads")
    inputs |= {f"encoder/layer_{i}/attention/{role}" for i in range(2) for role in products}
    inputs |= {"classifier/hidden/input", "classifier/out/input"}
    assert {name for name, info in found.items() if info.kind == "input"} == inputs
    assert published.count(found, "activation") == 13 * 2 + 4


def test_short_names_reach_its_classifier():
    found = published.sites(FAMILY, CONFIG)

    def reached(kind, rules):
        check_policy(rules, found)
        return {name for name, info in found.items() if info.kind == kind and rules.spec(kind, name) is not None}

    both = {"classifier/hidden/kernel", "classifier/out/kernel"}
    assert reached("weight", policy(weights={"CLS": A})) == both
    assert reached("weight", policy(weights={"wC": A})) == {"classifier/out/kernel"}
    assert reached("activation", policy(activations={"C": A})) == {"classifier/out/output"}
    dense = {path for path in traverse_util.flatten_dict(params(), sep="/") if path.endswith("kernel")}
    assert reached("weight", policy(weights={"MHA": A, "FFN": A, "CLS": A})) == dense
    assert len(dense) == 14


def test_inputs_can_have_ranges_of_their_own():
    names = [f"encoder/layer_0/attention/{name}/input" for name in ("query", "key", "value")]
    rules = policy(inputs={name: quant.asymmetric(bits) for name, bits in zip(names, (8, 4, 2), strict=True)})
    model = TextClassifier(ONE, policy=rules)
    _, seen = model.apply({"params": params()}, *tiny.inputs(), mutable=["captures", "ranges", "observers"])
    steps = [
        float(seen["ranges"]["encoder"]["layer_0"]["attention"][n]["input"]["scale"]) for n in ("query", "key", "value")
    ]
    assert steps[0] < steps[1] < steps[2]


def test_quantization(tmp_path):
    published.check_quantization(FAMILY, ONE, tmp_path)


def test_training_step_moves_everything():
    published.check_training_step(FAMILY, ONE)


def test_training_draws_dropout():
    model = TextClassifier(CONFIG)
    once, again = (
        model.apply(
            {"params": params()}, *tiny.inputs(), deterministic=False, rngs={"dropout": jax.random.key(seed)}
        ).logits
        for seed in (0, 1)
    )
    assert not np.allclose(once, again) and np.all(np.isfinite(once))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask": "publish"}, "'exact', 'published'"),
        ({"embedding": "thrice"}, "'once', 'twice'"),
        ({"pooling": "max"}, "'cls', 'mean'"),
        ({"num_heads": 3}, "3 heads do not divide the width 16"),
        ({"hidden_size": 15, "num_heads": 3}, "odd"),
        ({"num_layers": 0}, "num_layers must be a positive number"),
        ({"classifier_size": "large"}, "'large'"),
        ({"hidden_act": "relo"}, "'relu'"),
        ({"type_vocab_size": 2}, "no type_vocab_size"),
    ],
)
def test_configurations_that_cannot_be(change, named):
    with pytest.raises(UserError, match=named):
        dataclasses.replace(CONFIG, **change)
