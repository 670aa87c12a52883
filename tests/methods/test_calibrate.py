"""Calibration: which ranges, from which data, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import quant
from qtx.errors import UserError
from qtx.methods import calibrate as calibration
from qtx.methods.calibrate import (
    activation_ranges,
    calibrate,
    permutation_groups,
    quantized_weights,
    stored_qparams,
    with_frozen_weights,
)
from qtx.nn import BertClassifier, Dense, list_sites, policy, site
from qtx.quant import Spec, rows
from qtx.quant.policy import Policy
from tests.nn import tiny


class Small(nn.Module):
    """Two linear layers with a site between them."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x, where=None):
        x = Dense(4, policy=self.policy, name="first")(x, where)
        x = site(self, "middle", 2 * x, where=where)
        return Dense(2, policy=self.policy, name="last")(x, where)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {
    "first": {"kernel": random(0, 3, 4), "bias": random(1, 4)},
    "last": {"kernel": random(2, 4, 2), "bias": random(3, 2)},
}
ONE_LAYER = tiny.params(tiny.ONE_LAYER)
BATCHES = [(random(10 + i, 5, 3) * (i + 1),) for i in range(3)]


def ends(params, spec):
    """The range that scale and zero point stand for."""
    return tuple(float(params["scale"]) * (level - float(params["zero_point"])) for level in (0, 2**spec.bits - 1))


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refuse(words, rules, batches=BATCHES, params=PARAMS, **options):
    with pytest.raises(UserError) as error:
        calibrate(Small(rules), params, batches, **options)
    assert words in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


# Which ranges


def test_one_entry_per_quantized_site():
    rules = policy(quant.symmetric(8), {"**": quant.asymmetric(8), "first/*": None})
    ranges = calibrate(Small(rules), PARAMS, BATCHES)
    flat = traverse_util.flatten_dict(ranges, sep="/")
    assert {name.rpartition("/")[0] for name in flat} == {"first/kernel", "last/kernel", "middle", "last/output"}
    assert {name.rpartition("/")[2] for name in flat} == {"scale", "zero_point", "signed", "group"}


@pytest.mark.parametrize("over", ["current", "all", "running"])
def test_statistics_follow_the_order_of_the_batches(over):
    spec = quant.asymmetric(8, estimator=quant.MinMax(over))
    ranges = calibrate(Small(policy(activations={"*iddle": spec})), PARAMS, BATCHES)
    values = [2 * (x @ PARAMS["first"]["kernel"] + PARAMS["first"]["bias"]) for (x,) in BATCHES]
    state = None
    for value in values:
        state = quant.observe(spec, state, value)
    np.testing.assert_allclose(ends(ranges["middle"], spec), quant.estimated_range(spec, state), rtol=1e-5)
    turned = calibrate(Small(policy(activations={"*iddle": spec})), PARAMS, BATCHES[::-1])
    same = float(turned["middle"]["scale"]) == float(ranges["middle"]["scale"])
    assert same == (over == "all")


def test_later_sites_see_quantized_values():
    low_bits = quant.asymmetric(2)
    rules = policy(quant.symmetric(2), low_bits)
    ranges = calibrate(Small(rules), PARAMS, BATCHES[:1])
    x = BATCHES[0][0]

    def on_grid(spec, value):
        return quant.fake_quant(spec, value, quant.estimate(spec, value))

    w = {name: on_grid(quant.symmetric(2), PARAMS[name]["kernel"]) for name in PARAMS}
    x = on_grid(low_bits, x @ w["first"] + PARAMS["first"]["bias"])
    x = on_grid(low_bits, 2 * x) @ w["last"] + PARAMS["last"]["bias"]
    np.testing.assert_allclose(
        ends(ranges["last"]["output"], low_bits), (min(x.min(), 0), x.max()), rtol=1e-4, atol=1e-5
    )


def test_weight_ranges_do_not_depend_on_data():
    rules = policy(quant.symmetric(4, quant.per_channel()), quant.asymmetric(8))
    one, other = (calibrate(Small(rules), PARAMS, [batch]) for batch in BATCHES[:2])
    equal_trees(one["first"]["kernel"], other["first"]["kernel"])
    np.testing.assert_allclose(
        one["first"]["kernel"]["scale"], np.abs(np.asarray(PARAMS["first"]["kernel"])).max(0) / 7, rtol=1e-6
    )


def test_batches_may_have_different_shapes():
    spec = quant.asymmetric(8, estimator=quant.MinMax("all"))
    batches = [(random(0, 2, 3),), (random(1, 7, 3),)]
    ranges = calibrate(Small(policy(activations=spec)), PARAMS, batches)
    both = calibrate(Small(policy(activations=spec)), PARAMS, [(jnp.concatenate([b for (b,) in batches]),)])
    # The first site sees no quantized input; after it the grids of the two runs differ.
    np.testing.assert_allclose(ranges["first"]["output"]["scale"], both["first"]["output"]["scale"], rtol=1e-5)


def test_dynamic_ranges_need_no_calibration():
    dynamic = quant.asymmetric(8, range="dynamic")
    assert calibrate(Small(policy(activations=dynamic)), PARAMS, BATCHES) == {}
    assert calibrate(Small(policy(quant.ternary(), dynamic)), PARAMS, BATCHES) == {}
    mixed = calibrate(Small(policy(quant.symmetric(4), dynamic)), PARAMS, BATCHES)
    assert set(traverse_util.flatten_dict(mixed, sep="/")) == {
        f"{name}/kernel/{field}" for name in PARAMS for field in ("scale", "zero_point", "signed", "group")
    }


def test_learned_ranges_are_calibrated_like_static_ones():
    ranges = [
        calibrate(Small(policy(quant.symmetric(4, range=rule), quant.asymmetric(4, range=rule))), PARAMS, BATCHES)
        for rule in ("static", "learned")
    ]
    equal_trees(*ranges)


# Padding


@pytest.fixture(scope="module")
def padded():
    ids, mask, types = tiny.inputs()
    return [(ids, mask, types), (np.where(mask, ids, 17), mask, np.where(mask, types, 1))]


def test_padding_is_left_out(padded):
    model = BertClassifier(tiny.ONE_LAYER, policy=policy(activations=quant.asymmetric(8)))
    equal_trees(*(calibrate(model, ONE_LAYER, [args]) for args in padded))


def test_padding_counts_when_it_is_included(padded):
    how = quant.MinMax(padding="include")
    rules = policy(activations={name: quant.asymmetric(8, estimator=how) for name in "qsxC"})
    model = BertClassifier(tiny.ONE_LAYER, policy=rules)
    one, other = (traverse_util.flatten_dict(calibrate(model, ONE_LAYER, [args]), sep="/") for args in padded)
    changed = {
        name.rpartition("/")[0] for name in one if name.endswith("scale") and float(one[name]) != float(other[name])
    }
    layer = "encoder/layer_0/attention/"
    assert {layer + "query/output", layer + "scores", layer + "norm/output"} <= changed


def test_a_row_of_padding_changes_nothing():
    """A filler row has a mask of zeros, and its pooled vector and logits do not count either."""
    model = BertClassifier(tiny.ONE_LAYER, policy=policy(activations={n: quant.asymmetric(8) for n in "PCzs"}))
    filled = calibrate(model, ONE_LAYER, [tiny.inputs(lengths=(6, 4, 0))])
    without = calibrate(model, ONE_LAYER, [tuple(v[:2] for v in tiny.inputs(lengths=(6, 4, 0)))])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), filled, without)


# Permuted groups


PERMUTED = quant.asymmetric(8, quant.per_group(2, permute=True))


def widths(batches, quantize=lambda x: x):
    """Maximum minus minimum of every channel of `middle`, over the batches."""
    values = [2 * quantize(x @ PARAMS["first"]["kernel"] + PARAMS["first"]["bias"]) for (x,) in batches]
    return np.max([v.max(0) for v in values], 0) - np.min([v.min(0) for v in values], 0)


def test_permutation_comes_from_the_full_precision_model_over_all_batches():
    rules = policy(activations={"*iddle": PERMUTED, "first/*": quant.asymmetric(2)})
    ranges = calibrate(Small(rules), PARAMS, BATCHES)
    want = rows.groups_by_range(jnp.asarray(widths(BATCHES)), 2)
    np.testing.assert_array_equal(ranges["middle"]["group"], want)
    assert ranges["middle"]["scale"].shape == (2,)
    assert ranges["first"]["output"]["group"] is None
    # The widest channels share the last group, so that is the coarser grid.
    assert float(ranges["middle"]["scale"][1]) > float(ranges["middle"]["scale"][0])


def test_published_permutation_is_that_of_the_last_batch_with_the_others_quantized():
    """Inputs made so that the order over all batches, of the last batch, and of the quantized last batch all differ."""
    params = {"first": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, "last": PARAMS["last"]}
    first = jnp.array([[0.0] * 4, [9.0, 8.0, 0.1, 0.2]])
    last = jnp.array([[0.0] * 4, [0.9, 0.4, 3.0, 0.45]])  # 2 bits: 1, 0, 3, 0
    one_bit = quant.asymmetric(2)
    rules = policy(activations={"*iddle": PERMUTED, "first/*": one_bit})
    sites = list_sites(Small(), {"params": params}, first)
    model, batches = Small(rules), [(first,), (last,)]
    full = permutation_groups(model, params, batches, sites)["middle"]
    np.testing.assert_array_equal(full, rows.groups_by_range(jnp.array([9, 8, 3, 0.45]), 2))
    published = permutation_groups(model, params, batches, sites, published=True)["middle"]
    np.testing.assert_array_equal(published, rows.groups_by_range(jnp.array([1, 0, 3, 0]), 2))
    assert np.any(np.asarray(full) != np.asarray(published))
    ranges = calibrate(model, params, batches, permutation="published")
    np.testing.assert_array_equal(ranges["middle"]["group"], published)


@pytest.fixture(scope="module")
def encoder():
    ngp = quant.asymmetric(8, quant.per_group(3, permute=True))
    return BertClassifier(
        tiny.CONFIG, policy=policy(activations={"y": ngp, "h": ngp, "x": ngp, "P": quant.asymmetric(8)})
    )


def test_shared_permutation(encoder):
    sites = list_sites(encoder, {"params": tiny.params()}, *tiny.inputs())
    own = permutation_groups(encoder, tiny.params(), [tiny.inputs()], sites)
    shared = permutation_groups(encoder, tiny.params(), [tiny.inputs()], sites, share="ffn/down/output")
    own, shared = (traverse_util.flatten_dict(tree, sep="/") for tree in (own, shared))
    assert set(own) == set(shared) and len(own) == 6
    for name, group in shared.items():
        layer = name.partition("/layer_")[2][0]
        np.testing.assert_array_equal(group, own[f"encoder/layer_{layer}/ffn/down/output"])
        assert np.all(np.bincount(np.asarray(group)) == 4)
    assert any(np.any(np.asarray(own[name]) != np.asarray(shared[name])) for name in own)


def test_sharing_needs_a_permuted_source(encoder):
    sites = list_sites(encoder, {"params": tiny.params()}, *tiny.inputs())
    with pytest.raises(UserError, match="is to share the permutation of 'encoder/layer_0/ffn/up/output', which has no"):
        permutation_groups(encoder, tiny.params(), [tiny.inputs()], sites, share="ffn/up/output")


def test_no_permutation_no_pass():
    assert permutation_groups(Small(policy(activations=quant.asymmetric(8))), PARAMS, [], {}) == {}


def test_padding_does_not_decide_the_permutation(padded, encoder):
    sites = list_sites(encoder, {"params": tiny.params()}, *padded[0])
    a, b = (permutation_groups(encoder, tiny.params(), [args], sites) for args in padded)
    equal_trees(a, b)


# Errors


def test_no_batches():
    refuse("at least one", policy(activations=quant.asymmetric(8)), batches=[])


def test_no_policy():
    refuse("needs a model with a policy", None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 2])
def test_broken_data_names_the_site(bad, which):
    batches = list(BATCHES)
    batches[which] = (batches[which][0].at[1, 1].set(bad),)
    refuse(
        "site 'first/output' has no finite range: the calibration data",
        policy(activations=quant.asymmetric(8)),
        batches,
    )


@pytest.mark.parametrize(
    "spec", [quant.symmetric(8), quant.symmetric(8, quant.per_channel()), quant.asymmetric(4)], ids=str
)
def test_broken_weights_name_the_site(spec):
    broken = PARAMS | {"last": PARAMS["last"] | {"kernel": PARAMS["last"]["kernel"].at[1, 1].set(np.nan)}}
    refuse("site 'last/kernel' has no finite range: the weights hold NaN or infinity", policy(spec), params=broken)


def test_policies_that_do_not_fit():
    refuse(
        "3 groups do not divide its width 4", policy(activations={"*iddle": quant.asymmetric(8, quant.per_group(3))})
    )
    refuse("use range='dynamic'", policy(activations={"*iddle": quant.asymmetric(8, quant.per_position())}))
    refuse("matches no site", policy(activations={"**/residual": quant.asymmetric(8)}))
    permuted = quant.symmetric(8, quant.per_group(2, permute=True))
    refuse("permuted groups are for activations", policy(permuted))


# Weights on their grids


@pytest.mark.parametrize(
    "spec",
    [
        quant.symmetric(3),
        quant.asymmetric(4, quant.per_channel()),
        quant.symmetric(4, range="dynamic"),
        quant.ternary(quant.per_channel()),
        quant.binary(),
    ],
    ids=str,
)
def test_quantized_weights_in_the_plain_model_are_the_quantized_model(spec):
    rules = policy({"**": spec, "last/*": None})
    model, x = Small(rules), BATCHES[0][0]
    ranges = calibrate(model, PARAMS, BATCHES)
    sites = list_sites(model, {"params": PARAMS}, x)
    on_grid = quantized_weights(rules, sites, PARAMS, ranges)
    # Compiled apart, a mean of magnitudes is summed in another order.
    np.testing.assert_allclose(
        Small().apply({"params": on_grid}, x),
        model.apply({"params": PARAMS, "ranges": ranges}, x),
        rtol=1e-6,
        atol=1e-6,
    )
    equal_trees(on_grid["last"], PARAMS["last"])
    np.testing.assert_array_equal(on_grid["first"]["bias"], PARAMS["first"]["bias"])
    resolved = spec.at(-1, 2)
    stored = stored_qparams(ranges, "first/kernel")
    assert (stored is None) == (spec.range == "dynamic")
    if stored is not None:
        np.testing.assert_array_equal(
            on_grid["first"]["kernel"], quant.fake_quant(resolved, PARAMS["first"]["kernel"], stored)
        )
    assert np.any(np.asarray(on_grid["first"]["kernel"]) != np.asarray(PARAMS["first"]["kernel"]))


def test_bert_with_everything_on_a_fine_grid_is_the_plain_model():
    model = BertClassifier(
        tiny.ONE_LAYER, policy=policy(quant.symmetric(16, quant.per_channel()), quant.asymmetric(16))
    )
    args = tiny.inputs()
    ranges = calibrate(model, ONE_LAYER, [args])
    got = jax.jit(model.apply)({"params": ONE_LAYER, "ranges": ranges}, *args).logits
    want = BertClassifier(tiny.ONE_LAYER).apply({"params": ONE_LAYER}, *args).logits
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert np.any(np.asarray(got) != np.asarray(want))


def test_activation_ranges_are_calibrated_without_a_new_program():
    """With other switches the same program serves; without anything to observe the ranges stay as they are."""
    rules = policy(activations=quant.asymmetric(8))
    model, given = Small(rules), {"params": PARAMS, "ranges": {}}
    whole = activation_ranges(model, given, BATCHES)
    jax.tree.map(np.testing.assert_array_equal, whole, calibrate(model, PARAMS, BATCHES))

    def switched(flag):
        switches = {"first": {"output": np.bool_(flag)}, "middle": np.bool_(flag)}
        return activation_ranges(model, given | {"switches": switches}, BATCHES)

    on = switched(True)
    before = calibration._observe._cache_size()
    off = switched(False)
    assert calibration._observe._cache_size() == before
    assert float(on["last"]["output"]["scale"]) != float(off["last"]["output"]["scale"])
    assert activation_ranges(Small(policy(quant.ternary())), given, BATCHES) == {}


def test_weights_rounded_at_random_can_be_drawn_once():
    rounded = Spec(2, "symmetric", range="dynamic", rounding="stochastic")
    encoder = BertClassifier(tiny.CONFIG, policy=policy(weights={"**/kernel": rounded}))
    sites = list_sites(encoder, {"params": tiny.params()}, *tiny.inputs())

    def kernel(key):
        model, params = with_frozen_weights(encoder, sites, tiny.params(), {}, key)
        assert model.policy is None
        return np.asarray(params["encoder"]["layer_0"]["ffn"]["up"]["kernel"])

    nearest, drawn = kernel(None), np.stack([kernel(jax.random.key(seed)) for seed in range(40)])
    np.testing.assert_array_equal(drawn[0], kernel(jax.random.key(0)))
    assert len(np.unique(nearest)) <= 4 and (drawn[0] != drawn[1]).any()
    weight = np.asarray(tiny.params()["encoder"]["layer_0"]["ffn"]["up"]["kernel"])
    # Draws have the right mean, rounding to nearest has not.
    off = np.abs(drawn.mean(0) - weight).mean()
    assert off < 0.5 * np.abs(nearest - weight).mean()
