"""AdaRound on whole models: order, inputs, both solvers, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import quant
from qtx.errors import UserError
from qtx.methods import adaround as module
from qtx.methods.adaround import adaround
from qtx.methods.calibrate import calibrate, quantized_weights
from qtx.methods.layer_rounding import AdaRound, search_scale, temperature
from qtx.methods.layer_walk import make_stages, trace
from qtx.nn import BertClassifier, Dense, list_sites, policy
from qtx.quant.policy import Policy
from tests.nn import tiny

PARAMS = tiny.params()
WEIGHTS = {"**": quant.symmetric(4), "**/norm/scale": None}
MODEL = BertClassifier(tiny.CONFIG, policy=policy(WEIGHTS, quant.asymmetric(8)))
BATCHES = [tiny.inputs(seed, lengths=(6, 5, 3, 6)) for seed in range(3)]


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


class Twice(nn.Module):
    """One layer that is called twice, and one after it."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x, where=None):
        shared = Dense(3, policy=self.policy, name="shared")
        return Dense(2, policy=self.policy, name="last")(nn.tanh(shared(nn.tanh(shared(x, where)), where)), where)


class Grouped(nn.Module):
    """One layer in two groups."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x, where=None):
        return Dense(6, groups=2, policy=self.policy, name="layer")(x, where)


@pytest.fixture(scope="module")
def rounded():
    return adaround(MODEL, PARAMS, BATCHES)


def test_every_kernel_is_on_its_grid_beside_its_weight_and_no_worse(rounded):
    before, after = flat(PARAMS), flat(rounded.params)
    kernels = [name for name in before if name.endswith("kernel")]
    assert sorted(r.name for r in rounded.layers) == sorted(kernels)
    for name in before:
        if name not in kernels:
            np.testing.assert_array_equal(before[name], after[name])
    sites = list_sites(MODEL, {"params": PARAMS}, *BATCHES[0])
    again = flat(quantized_weights(MODEL.policy, sites, rounded.params, rounded.ranges))
    ranges = flat(rounded.ranges)
    for report in rounded.layers:
        np.testing.assert_array_equal(again[report.name], after[report.name])
        steps = (after[report.name] - before[report.name]) / ranges[f"{report.name}/scale"]
        assert np.all(np.abs(steps) < 1 + 1e-4) and np.any(np.abs(steps) > 0.5)
        assert report.rounded <= report.nearest and report.solver == "descent"
    assert np.mean([r.rounded / r.nearest for r in rounded.layers]) < 0.8
    assert rounded.table().columns[0] == "weight"


def test_model_is_closer_to_full_precision_than_with_nearest_rounding(rounded):
    def distance(params, ranges):
        frozen = quantized_weights(MODEL.policy, list_sites(MODEL, {"params": PARAMS}, *BATCHES[0]), params, ranges)
        bare = MODEL.clone(policy=None)
        apart = [bare.apply({"params": frozen}, *b).logits - bare.apply({"params": PARAMS}, *b).logits for b in BATCHES]
        return float(np.sqrt(np.mean(np.square(apart))))

    nearest = calibrate(MODEL, PARAMS, BATCHES)
    assert distance(rounded.params, rounded.ranges) < 0.8 * distance(PARAMS, nearest)


def test_activations_are_calibrated_afterwards_with_the_ranges_of_the_rounding(rounded):
    ranges = calibrate(MODEL, rounded.params, BATCHES[:1], weights=rounded.ranges)
    for name, value in flat(rounded.ranges).items():
        if value is not None:
            np.testing.assert_array_equal(flat(ranges)[name], value)
    assert np.all(np.isfinite(MODEL.apply({"params": rounded.params, "ranges": ranges}, *BATCHES[0]).logits))


def test_padding_does_not_count(rounded):
    changed = []
    for ids, mask, types in BATCHES:
        changed.append((np.where(mask > 0, ids, 7), mask, types))
    other = adaround(MODEL, PARAMS, changed)
    for name, value in flat(other.params).items():
        np.testing.assert_array_equal(value, flat(rounded.params)[name])


def test_running_one_block_at_a_time_is_running_the_model(rounded, monkeypatch):
    """The blocks before a layer are replaced by their stored output: the same, but for the rounding of sums."""
    monkeypatch.setattr(module, "make_stages", lambda calls, alike: make_stages(calls, alike=False))
    other = adaround(MODEL, PARAMS, BATCHES)
    assert [r.name for r in other.layers] == [r.name for r in rounded.layers]
    np.testing.assert_allclose([r.rounded for r in other.layers], [r.rounded for r in rounded.layers], rtol=1e-3)


def test_layers_see_what_was_rounded_before_them():
    alone = adaround(MODEL, PARAMS, BATCHES, AdaRound(layers=("encoder/layer_1/**/kernel",), inputs="full_precision"))
    both = adaround(MODEL, PARAMS, BATCHES, AdaRound(inputs="full_precision"))
    for name, value in flat(alone.params).items():
        if "layer_1" in name:  # full-precision inputs: what happens before makes no difference
            np.testing.assert_array_equal(value, flat(both.params)[name])
    quantized = adaround(MODEL, PARAMS, BATCHES, AdaRound(layers=("encoder/layer_1/**/kernel",)))
    assert [r.nearest for r in quantized.layers] != [r.nearest for r in alone.layers]


def test_a_layer_called_twice_is_rounded_on_all_its_inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((40, 3)), jnp.float32)
    model = Twice(policy({"**": quant.symmetric(3)}))
    params = model.clone(policy=None).init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), jnp.float32), params)
    stages = make_stages(trace(model.clone(policy=None), params, (x,), {"shared", "last"})[0])
    assert [(s.once, len(s.calls)) for s in stages] == [(False, 1), (True, 1)]
    found = adaround(model, params, [(x,)], AdaRound(inputs="full_precision"))
    w, bias = params["shared"]["kernel"], params["shared"]["bias"]
    inputs = jnp.concatenate([x, jnp.tanh(x @ w + bias)])
    change = found.params["shared"]["kernel"] - w
    np.testing.assert_allclose(found.layers[0].rounded, jnp.mean(jnp.square(inputs @ change)), rtol=1e-3)


RELAXATION = AdaRound(
    solver="relaxation", iterations=200, learning_rate=0.02, layers=("encoder/layer_0/ffn/**/kernel",)
)


def test_relaxation_lowers_the_error_behind_the_activation_function():
    found = adaround(MODEL, PARAMS, BATCHES, RELAXATION)
    assert [r.name for r in found.layers] == [f"encoder/layer_0/ffn/{n}/kernel" for n in ("up", "down")]
    for report in found.layers:
        assert report.rounded < 0.9 * report.nearest and report.solver == "relaxation"
    sites = list_sites(MODEL, {"params": PARAMS}, *BATCHES[0])
    again = quantized_weights(MODEL.policy, sites, found.params, found.ranges)
    for report in found.layers:
        np.testing.assert_array_equal(flat(again)[report.name], flat(found.params)[report.name])


def test_relaxation_takes_any_weight():
    import dataclasses

    options = dataclasses.replace(
        RELAXATION, layers=("encoder/embeddings/word/table", "**/norm/scale"), iterations=20, dtype="float64"
    )
    model = MODEL.clone(policy=policy({"**": quant.symmetric(4)}))
    found = adaround(model, PARAMS, BATCHES[:1], options)
    assert found.layers[0].name == "encoder/embeddings/word/table" and len(found.layers) == 6
    assert all(np.isfinite(r.rounded) for r in found.layers)
    assert all(v.dtype == jnp.float32 for v in flat(found.params).values())


def test_descent_leaves_other_weights_nearest():
    options = AdaRound(layers=("encoder/embeddings/word/table",))
    found = adaround(MODEL, PARAMS, BATCHES[:1], options)
    assert found.layers[0].solver == "nearest" and found.layers[0].rounded == found.layers[0].nearest


@pytest.mark.parametrize("granularity", [quant.per_tensor(), quant.per_channel(-1)], ids=str)
def test_searched_scale_is_the_best_of_eighty(granularity):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((12, 4)) * [1, 2, 3, 4], jnp.float32)
    spec = quant.symmetric(3, granularity)

    def error(q):
        found = jnp.sum(jnp.square(q - w), 0)
        return found if granularity.axis is not None else jnp.sum(found)[None]

    found = search_scale(spec, w, error)
    largest = np.abs(w).max(0 if granularity.axis is not None else None)
    tried = [
        quant.fake_quant(spec, w, quant.qparams(spec, -(1 - 0.01 * i) * largest, (1 - 0.01 * i) * largest))
        for i in range(80)
    ]
    best = np.min([np.asarray(error(q)) for q in tried], 0)
    np.testing.assert_allclose(error(quant.fake_quant(spec, w, found)), best, rtol=1e-5)
    one = search_scale(spec, w, error, "tensor")
    assert len(np.unique(one.scale)) == 1 and one.scale.shape == found.scale.shape


@pytest.mark.parametrize("init", ["mse", "mse_out", "mse_out_asym"])
@pytest.mark.parametrize("solver", ["descent", "relaxation"])
def test_searched_grids_serve_both_solvers(init, solver):
    options = AdaRound(solver=solver, init=init, layers=("pooler/dense/kernel",), iterations=30, learning_rate=0.02)
    model = MODEL.clone(policy=policy({"**": quant.symmetric(4, quant.per_channel())}))
    found = adaround(model, PARAMS, BATCHES[:2], options)
    scale = found.ranges["pooler"]["dense"]["kernel"]["scale"]
    assert scale.shape == (12,) and len(np.unique(scale)) > 1
    assert np.isfinite(found.layers[0].rounded)


def test_temperature_holds_until_the_decay_starts():
    options = AdaRound(iterations=100, warmup=0.2, decay_start=0.5, decay="linear", annealing=(10.0, 2.0))
    got = temperature(options, np.array([1, 20, 59, 60, 80, 100]))
    np.testing.assert_allclose(got, [10, 10, 10, 10, 6, 2])


REFUSED = {
    "solver": (dict(solver="magic"), "unknown solver 'magic'"),
    "mode": (dict(mode="learned_sigmod"), "did you mean 'learned_sigmoid'"),
    "decay": (dict(decay="cosin"), "did you mean 'cosine'"),
    "iterations": (dict(iterations=0), "iterations is 0"),
    "warmup": (dict(warmup=1.5), "warmup 1.5"),
    "layers": (dict(layers=("**/kernl",)), "layers '**/kernl' matches no weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(name):
    options, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        adaround(MODEL, PARAMS, BATCHES, AdaRound(**options))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_refused_models():
    def refuse(words, rules, batches=BATCHES):
        with pytest.raises(UserError, match=words):
            adaround(MODEL.clone(policy=rules), PARAMS, batches)

    refuse("policy quantizes weights", None)
    refuse("no batches", MODEL.policy, [])
    refuse("needs a uniform grid", policy({"**": quant.ternary()}))
    refuse("static range", policy({"**": quant.symmetric(4, range="dynamic")}))
    refuse("full precision", policy({"Et": quant.symmetric(4)}))


@pytest.mark.parametrize("granularity", [quant.per_tensor(), quant.per_channel()], ids=str)
def test_groups_of_a_grouped_layer_are_rounded_on_their_own_inputs(granularity):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8)), jnp.float32)
    model = Grouped(policy({"**": quant.symmetric(3, granularity)}))
    params = {"kernel": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32), "bias": jnp.ones(6)}
    found = adaround(model, {"layer": params}, [(x,)])
    change = {"layer": params | {"kernel": found.params["layer"]["kernel"] - params["kernel"], "bias": jnp.zeros(6)}}
    apart = model.clone(policy=None).apply({"params": change}, x)
    np.testing.assert_allclose(found.layers[0].rounded, jnp.mean(jnp.square(apart)), rtol=1e-3)
    assert found.layers[0].rounded < 0.9 * found.layers[0].nearest
