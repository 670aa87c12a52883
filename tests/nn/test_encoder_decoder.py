"""The encoder-decoder: step by step as in one pass, what is seen, tied matrices, its sites. Golden cases are in conformance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import models, quant
from qtx.errors import UserError
from qtx.methods.calibrate import calibrate, quantized_weights
from qtx.models.checkpoints import abstract_params
from qtx.nn import check_policy, list_sites, policy
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from tests.nn import published

FAMILY = models.get_family("qtx_encoder_decoder")
CONFIG = EncoderDecoderConfig(
    source_vocab_size=13,
    target_vocab_size=13,
    hidden_size=16,
    num_layers=1,
    decoder_layers=2,
    num_heads=2,
    intermediate_size=24,
    max_positions=12,
)
SMALL = dataclasses.replace(CONFIG, decoder_layers=1)
TIED = dataclasses.replace(SMALL, tied="all")
SOURCE = np.array([[4, 5, 6, 7, 8], [9, 10, 11, 1, 1]])
TARGET = np.array([[2, 4, 5, 6], [2, 7, 8, 1]])
# Another hypothesis for each sentence, of the same shape.
OTHER = np.array([[2, 9, 9, 12], [2, 6, 4, 5]])
W8A8 = policy(quant.symmetric(8), quant.asymmetric(8))


@functools.cache
def params(config=CONFIG):
    return published.random_params(FAMILY.name, config)


@functools.cache
def variables(config=CONFIG, rules=None):
    if rules is None:
        return {"params": params(config)}
    ranges = calibrate(EncoderDecoder(config, policy=rules), params(config), [(SOURCE, TARGET), (SOURCE, OTHER)])
    return {"params": params(config), "ranges": ranges}


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, source, target):
    return model.apply(variables, source, target)


@functools.partial(jax.jit, static_argnums=0)
def start(model, variables, source):
    return model.apply(variables, source, method="start")


@functools.partial(jax.jit, static_argnums=0)
def step(model, variables, memory, cache, tokens, position):
    return model.apply(variables, memory, cache, tokens, position, method="step")


def close_to_all_but_a_few(got, want):
    """Grids may round the last digit of a number to another level: nearly all values agree, and the others nearly."""
    error = np.abs(np.asarray(got) - np.asarray(want))
    assert np.mean(error < 1e-3) > 0.9 and np.max(error) < 0.2, error


@pytest.mark.parametrize(("config", "rules"), [(CONFIG, None), (SMALL, W8A8)], ids=["full precision", "W8A8"])
def test_steps_are_the_whole(config, rules):
    """Two hypotheses of each sentence, that change places half-way as in beam search."""
    model, given = EncoderDecoder(config, policy=rules), variables(config, rules)
    check = functools.partial(np.testing.assert_allclose, atol=2e-5) if rules is None else close_to_all_but_a_few
    want = np.stack([forward(model, given, SOURCE, target).logits for target in (TARGET, OTHER)], 1)
    memory, cache = start(model, given, SOURCE), model.empty_cache(2, 2, 6)
    tokens = np.stack([TARGET, OTHER], 1)
    for position in range(4):
        if position == 2:
            cache = jax.tree.map(lambda leaf: leaf[:, ::-1], cache)
            tokens, want = tokens[:, ::-1], want[:, ::-1]
        logits, cache = step(model, given, memory, cache, tokens[:, :, position], position)
        real = tokens[:, :, position] != 1
        assert logits.shape == (2, 2, 13) and logits.dtype == jnp.float32
        check(logits[real], want[:, :, position][real])
    np.testing.assert_array_equal(cache["mask"][:, :, :4], tokens != 1)
    assert not cache["mask"][:, :, 4:].any()


def test_one_program_serves_all_steps():
    model = EncoderDecoder(CONFIG)
    memory, cache = start(model, variables(), SOURCE), model.empty_cache(2, 2, 6)
    traced = []

    @jax.jit
    def counted(cache, position):
        traced.append(position)
        return model.apply(variables(), memory, cache, jnp.full((2, 2), 2), position, method="step")[1]

    for position in range(3):
        cache = counted(cache, position)
    assert len(traced) == 1


def test_steps_have_the_sites_of_the_whole():
    model, shapes = EncoderDecoder(CONFIG), {"params": abstract_params(FAMILY, CONFIG)}
    memory = jax.eval_shape(functools.partial(model.apply, method="start"), shapes, SOURCE)
    cache = model.empty_cache(2, 3, 6)
    tokens = jnp.zeros((2, 3), jnp.int32)
    found = list_sites(model, shapes, SOURCE, method="start")
    found |= list_sites(model, shapes, memory, cache, tokens, jnp.int32(0), method="step")
    whole = list_sites(model, shapes, SOURCE, TARGET)
    assert {name: info.kind for name, info in found.items()} == {name: info.kind for name, info in whole.items()}
    assert found["decoder/layer_0/cross_attention/scores"].shape == (2, 2, 3, 5), "K queries to one source"
    assert found["decoder/layer_0/self_attention/scores"].shape == (6, 2, 1, 6)


def test_memory_and_cache_are_ordered_by_sentence_and_hypothesis():
    model = EncoderDecoder(CONFIG)
    memory = start(model, variables(), SOURCE)
    assert {leaf.shape for leaf in jax.tree.leaves(memory)} == {(2, 5), (2, 5, 16)}
    cache = model.bind(variables()).empty_cache(2, 3, 6)
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(2, 3, 6), (2, 3, 6, 16)}
    with pytest.raises(UserError, match="13 tokens is outside 1 to the model's 12 positions"):
        model.empty_cache(2, 3, 13)


def test_later_words_and_padding_are_not_seen():
    model, target = EncoderDecoder(CONFIG), TARGET.copy()
    target[:, 2:] = [[9, 1], [10, 3]]
    here, there = (forward(model, variables(), SOURCE, given).logits for given in (TARGET, target))
    np.testing.assert_allclose(here[:, :2], there[:, :2], atol=1e-5)
    assert np.all(np.max(np.abs(here - there)[:, 2], -1) > 1e-3)
    wider = forward(model, variables(), np.pad(SOURCE, ((0, 0), (0, 2)), constant_values=1), TARGET).logits
    np.testing.assert_allclose(wider, here, atol=1e-5)


def test_every_word_of_the_source_counts():
    model = EncoderDecoder(CONFIG)
    here = forward(model, variables(), SOURCE, TARGET).logits
    for column in range(3):
        other = SOURCE.copy()
        other[:, column] = 12
        assert np.all(np.max(np.abs(forward(model, variables(), other, TARGET).logits - here)[:, 0], -1) > 1e-3)


def test_filler_rows_are_finite_and_do_not_touch_the_others():
    model = EncoderDecoder(CONFIG)
    source, target = SOURCE.copy(), TARGET.copy()
    source[1], target[1] = 1, 1
    out = forward(model, variables(), source, target)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    np.testing.assert_allclose(out.logits[0], forward(model, variables(), SOURCE, TARGET).logits[0], atol=1e-6)


def test_hidden_states():
    out = forward(EncoderDecoder(CONFIG), variables(), SOURCE, TARGET)
    assert [state.shape for state in out.encoder_states] == [(2, 5, 16)] * 2
    assert [state.shape for state in out.decoder_states] == [(2, 4, 16)] * 3
    head = params()["generator"]
    np.testing.assert_allclose(out.logits, out.decoded @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params):
    def loss(params):
        logits = model.apply({"params": params}, SOURCE, TARGET).logits
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 5])

    return traverse_util.flatten_dict(jax.grad(loss)(params), sep="/")


def test_tied_matrices_collect_all_gradients():
    tied = params(TIED)
    table = tied["encoder"]["embeddings"]["word"]["table"]
    flat = traverse_util.flatten_dict(tied, sep="/")
    three = flat | {"decoder/embeddings/word/table": table, "generator/kernel": table.T}
    three = traverse_util.unflatten_dict(three, sep="/")
    one, each = gradients(EncoderDecoder(TIED), tied), gradients(EncoderDecoder(SMALL), three)
    total = each["encoder/embeddings/word/table"] + each["decoder/embeddings/word/table"] + each["generator/kernel"].T
    np.testing.assert_allclose(one["encoder/embeddings/word/table"], total, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(one["generator/bias"], each["generator/bias"], rtol=1e-3, atol=1e-6)
    assert one.keys() == flat.keys()


def test_target_table_and_generator_alone_can_be_tied():
    paths = traverse_util.flatten_dict(
        abstract_params(FAMILY, dataclasses.replace(CONFIG, tied="target", source_vocab_size=7)), sep="/"
    )
    assert paths["encoder/embeddings/word/table"].shape == (7, 16)
    assert paths["decoder/embeddings/word/table"].shape == (13, 16) and "generator/kernel" not in paths


def test_a_tied_matrix_is_on_its_grid_in_the_generator_too():
    rules = policy(weights={"Et": quant.symmetric(2, range="dynamic")})
    model, plain = EncoderDecoder(TIED, policy=rules), EncoderDecoder(TIED)
    on_grid = quantized_weights(rules, FAMILY.sites(TIED), params(TIED), {})
    want = forward(plain, {"params": on_grid}, SOURCE, TARGET).logits
    np.testing.assert_allclose(forward(model, {"params": params(TIED)}, SOURCE, TARGET).logits, want, atol=1e-5)
    assert not np.allclose(want, forward(plain, {"params": params(TIED)}, SOURCE, TARGET).logits, atol=0.1)


def test_every_tensor_is_a_site():
    found = FAMILY.sites(CONFIG)
    paths = traverse_util.flatten_dict(params(), sep="/")
    assert {name for name, info in found.items() if info.kind == "weight"} == {
        path for path in paths if not path.endswith("bias")
    }
    kernels = {path.removesuffix("kernel") for path in paths if path.endswith("kernel")}
    blocks = {path.removesuffix("query/") for path in kernels if path.endswith("query/")}
    products = ("probs_dropped", "query_heads", "key_heads", "value_heads")
    entering = {f"{path}input" for path in kernels} | {f"{path}{role}" for path in blocks for role in products}
    assert {name for name, info in found.items() if info.kind == "input"} == entering
    assert published.count(found, "activation") == 13 + 2 * 22 + 5


def test_short_names_reach_encoder_and_decoder():
    found, spec = FAMILY.sites(CONFIG), quant.asymmetric(8)

    def reached(kind, name):
        rules = policy(**{f"{kind}s" if kind == "weight" else "activations": {name: spec}})
        check_policy(rules, found)
        return {site for site, info in found.items() if info.kind == kind and rules.spec(kind, site) is not None}

    assert reached("activation", "s1") == {f"decoder/layer_1/{kind}_attention/scores" for kind in ("self", "cross")}
    assert reached("activation", "y0") == {f"{part}coder/layer_0/ffn/residual" for part in ("en", "de")}
    assert reached("activation", "C") == {"generator/output"}
    assert reached("weight", "wC") == {"generator/kernel"}
    assert len(reached("weight", "MHA")) == 4 * 5 and len(reached("weight", "FFN")) == 2 * 3
    assert len(reached("weight", "Et")) == 2


def test_initial_values():
    """Xavier-uniform matrices, biases within 1/sqrt(in) and all different, norms at 1 and 0."""
    made = jax.jit(EncoderDecoder(CONFIG).init)(jax.random.key(1), SOURCE, TARGET)
    found = traverse_util.flatten_dict(made["params"], sep="/")
    biases = set()
    for path, value in found.items():
        if path.endswith(("norm/scale", "norm/bias")):
            np.testing.assert_array_equal(value, float(path.endswith("scale")))
            continue
        inputs, outputs = (found[path.replace("bias", "kernel")] if path.endswith("bias") else value).shape
        bound = inputs**-0.5 if path.endswith("bias") else (6 / (inputs + outputs)) ** 0.5
        assert 0.6 * bound < np.max(np.abs(value)) <= bound, path
        if path.endswith("bias"):
            biases.add(tuple(np.asarray(value)))
    assert len(biases) == sum(path.endswith("bias") and "norm" not in path for path in found)


@pytest.mark.parametrize("tied", ["target", "all"])
def test_tables_that_the_generator_shares_begin_as_wide_as_positions(tied):
    config = dataclasses.replace(SMALL, source_vocab_size=500, target_vocab_size=500, hidden_size=64, tied=tied)
    found = EncoderDecoder(config).init(jax.random.key(0), SOURCE, TARGET)["params"]
    for side in ("encoder",) if tied == "all" else ("encoder", "decoder"):
        table = np.asarray(found[side]["embeddings"]["word"]["table"])
        np.testing.assert_allclose(table.std() * 64**0.5, 1, rtol=0.02)  # in the sum, beside sines of 0.7


def test_training_draws_dropout():
    @jax.jit
    def train(key):
        model, rngs = EncoderDecoder(SMALL), {"dropout": key}
        return model.apply({"params": params(SMALL)}, SOURCE, TARGET, deterministic=False, rngs=rngs).logits

    once, again = (train(jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(once, again) and np.all(np.isfinite(once))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tied": "source"}, "'none', 'target', 'all'"),
        ({"scores": "d"}, "'sqrt', '25d'"),
        ({"tied": "all", "source_vocab_size": 12}, "joint vocabulary, not 12 source and 13 target"),
        ({"num_heads": 3}, "3 heads do not divide the width 16"),
        ({"hidden_size": 15, "num_heads": 3}, "odd"),
        ({"decoder_layers": 0}, "decoder_layers must be a positive number"),
        ({"target_vocab_size": "all"}, "'all'"),
        ({"hidden_act": "relo"}, "'relu'"),
    ],
)
def test_configurations_that_cannot_be(change, named):
    with pytest.raises(UserError, match=named):
        dataclasses.replace(CONFIG, **change)
