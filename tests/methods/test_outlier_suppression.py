import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import models
from qtx.errors import UserError
from qtx.methods import norm_migration
from qtx.methods import outlier_suppression as os
from qtx.methods.calibrate import calibrate, with_frozen_weights
from qtx.models import load
from qtx.nn.sites import list_sites
from qtx.quant import estimators
from tests.nn import tiny

FAMILIES = {
    "bert": {},
    "roberta": dict(pad_token_id=1),
    "distilbert": {},
    "squeezebert": dict(q_groups=2, k_groups=1, v_groups=4, intermediate_groups=2, output_groups=1),
    "albert": dict(embedding_size=8, num_groups=2),
}
SIZES = dict(vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, max_positions=16)


@functools.cache
def made(name):
    """Family, sizes and random parameters, with gains of both signs."""
    family = models.get_family(name)
    config = type(family.config_from_hf({}))(**SIZES | FAMILIES[name])
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(family.module(config=config).init, jax.random.key(0), *family.example_inputs())["params"]
    return family, config, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) * 0.5, shapes)


def close_in_float64(family, before, after, params, moved, **limits):
    """Logits and the last hidden state of two models, without padding."""
    ids, mask, types = tiny.inputs()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):

        def outputs(config, params):
            model = family.module(config=config, dtype=jnp.float64)
            found = model.apply({"params": jax.tree.map(jnp.asarray, params)}, ids, mask, types)
            return np.asarray(found.logits), np.asarray(found.hidden_states[-1])[mask > 0]

        for one, other in zip(outputs(before, params), outputs(after, moved), strict=True):
            assert one.dtype == np.float64 and np.abs(one).max() > 1e-3
            np.testing.assert_allclose(other, one, **limits)


@pytest.mark.parametrize("name", FAMILIES)
def test_migration_keeps_the_function(name):
    family, config, params = made(name)
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        moved, sizes = norm_migration.migrate(params, config, norm_migration.gains(params, config))
        norms = [link.norm for link in norm_migration.links(config)]
        scales, shifts = ({norm: rng.uniform(*ends, 16) for norm in norms} for ends in ((1, 5), (-3, 3)))
        twice, sizes = norm_migration.migrate(moved, sizes, scales, shifts)
    assert sizes == dataclasses.replace(config, shortcuts=True)
    close_in_float64(family, config, sizes, params, moved, rtol=1e-9, atol=1e-11)
    close_in_float64(family, config, sizes, params, twice, rtol=1e-9, atol=1e-11)
    for norm in norms:
        found = norm_migration.at(moved, norm)
        np.testing.assert_allclose(found["scale"], 1)
        with np.errstate(divide="ignore"):
            before = norm_migration.at(params, norm)
            np.testing.assert_allclose(found["bias"], before["bias"] / before["scale"])


def test_gains_of_zero_stay_where_they_are():
    family, config, params = made("bert")
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    norm = "encoder/layer_1/attention/norm"
    flat[f"{norm}/scale"] = flat[f"{norm}/scale"] * (np.arange(16) > 2)
    flat[f"{norm}/scale"][3] = 1e-30
    params = traverse_util.unflatten_dict(flat, sep="/")
    with jax.enable_x64(True):
        gains = norm_migration.gains(params, config)
        moved, sizes = norm_migration.migrate(jax.tree.map(jnp.asarray, params), config, gains)
    np.testing.assert_array_equal(gains[norm][:4], 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    close_in_float64(family, config, sizes, params, moved, rtol=1e-9, atol=1e-11)


def test_a_model_that_migrated_is_saved_and_loaded(tmp_path):
    for name in ("bert", "albert"):
        family, config, params = made(name)
        params = jax.tree.map(jnp.float32, params)
        moved, sizes = norm_migration.migrate(params, config, norm_migration.gains(params, config))
        models.save(tmp_path / name, family, sizes, moved)
        back = load(str(tmp_path / name))
        assert back.config == sizes
        jax.tree.map(np.testing.assert_array_equal, back.params, moved)


def test_what_cannot_migrate():
    for name in ("mobilebert", "qtx_text_classifier"):
        with pytest.raises(UserError, match=r"cannot migrate.*Bert.*os\+_as_published"):
            norm_migration.links(type(models.get_family(name).config_from_hf({}))())
    _, config, params = made("bert")
    with pytest.raises(UserError, match="'encoder/layer_2/ffn/norm' cannot migrate"):
        norm_migration.migrate(params, config, {"encoder/layer_2/ffn/norm": np.ones(16)})


def test_thresholds_fall_from_the_widest_value_to_one():
    found = norm_migration.thresholds(np.array([-80.0, -1]), np.array([3.0, 70]))
    assert found[0] == 80 and 1 <= found[-1] < 1.6 and len(found) in (140, 141)
    np.testing.assert_allclose(np.diff(found), -79 / 140, rtol=1e-4)
    assert len(norm_migration.thresholds(np.array([-3.0]), np.array([9.0]))) in (100, 101)
    np.testing.assert_array_equal(norm_migration.thresholds(np.array([-0.3]), np.array([0.9])), 1)


def test_quantiles_that_are_tried():
    # 16 x 128 tokens: the step is capped; more tokens make it finer.
    assert os.quantiles(6, 16 * 128)[:3] == pytest.approx([1, 0.99, 0.98]) and len(os.quantiles(6, 16 * 128)) == 30
    assert len(os.quantiles(4, 16 * 128)) == 90 and len(os.quantiles(8, 16 * 128)) == 10
    assert os.quantiles(4, 200 * 128)[1] == pytest.approx(1 - 0.0016)


@functools.cache
def planted():
    """A model whose second norm has a channel of outliers in its gain, with batches and masks.

    The weights that read the channel are small, so the outliers do little but widen ranges.
    """
    family, config, params = made("bert")
    config = dataclasses.replace(config, num_layers=1)
    flat = {name: np.float32(value) for name, value in traverse_util.flatten_dict(params, sep="/").items()}
    flat = {name: value for name, value in flat.items() if "layer_1" not in name and "layer_2" not in name}
    for norm in ("encoder/embeddings/norm", "encoder/layer_0/attention/norm"):
        flat[f"{norm}/scale"] = np.abs(flat[f"{norm}/scale"]) + 0.2
        flat[f"{norm}/scale"][3] *= 200
    for reader in ("attention/query", "attention/key", "attention/value", "ffn/up"):
        flat[f"encoder/layer_0/{reader}/kernel"][3] /= 200
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat, sep="/"))
    batches = [tiny.inputs(seed, (6, 5, 3, 6)) for seed in range(3)]
    return family.module(config=config), params, batches


def sites_of(model, params, batches):
    return list_sites(model, {"params": params}, *batches[0])


def targets(model, params, batches):
    """Batches in one array for each argument, and the logits of the float model."""
    stacked = tuple(jnp.stack([jnp.asarray(args[i]) for args in batches]) for i in range(3))
    return stacked, os._logits(model.clone(policy=None), params, stacked)


def without_migration(model, params, batches, options):
    """Error of the logits, as `suppress` measures it, with the same policy on the model as it is."""
    policy = os.suppression_policy(options, model.config.num_layers)
    model = model.clone(policy=policy)
    ranges = calibrate(model, params, batches)
    runnable, frozen = with_frozen_weights(model, sites_of(model, params, batches), params, ranges)
    stacked, wanted = targets(model, params, batches)
    return float(os.logits_error(runnable, {"params": frozen, "ranges": ranges}, stacked, wanted))


def test_shift_and_scale_win_back_what_outliers_cost():
    model, params, batches = planted()
    options = os.OutlierSuppression("os+", 8)
    found = os.suppress(model, params, batches, options)
    assert found.model.config.shortcuts and found.table.rows[0][0] == "calibrated"
    assert found.table.rows[0][1] < 0.5 * without_migration(model, params, batches, options)
    scale = found.params["encoder"]["layer_0"]["attention"]["shortcut"]["scale"]
    assert np.argmax(scale) == 3 and scale[3] > 2 and np.min(scale) == 1


def test_clipped_tokens_lower_the_error_and_steps_learn():
    model, params, batches = planted()
    found = os.suppress(model, params, batches, os.OutlierSuppression("os", 4, epochs=0))
    (_, plain), (_, clipped) = found.table.rows
    assert clipped < plain
    # From ranges that cut off three quarters, learning leads back.
    runnable, frozen = with_frozen_weights(found.model, sites_of(model, params, batches), found.params, found.ranges)
    activations = {
        path: value for path, value in traverse_util.flatten_dict(found.ranges).items() if "kernel" not in path
    }
    narrow = {path: value / 4 if path[-1] == "scale" else value for path, value in activations.items()}
    stacked, wanted = targets(model, params, batches)
    options = os.OutlierSuppression("os", 4, learning_rate=1e-2, epochs=30)
    narrow = traverse_util.unflatten_dict(narrow)
    learned = os.learn_ranges(runnable, frozen, narrow, stacked, wanted, options)
    errors = [
        os.logits_error(runnable, {"params": frozen, "ranges": each}, stacked, wanted) for each in (narrow, learned)
    ]
    assert errors[1] < 0.7 * errors[0]
    specs = [
        found.model.policy.spec("activation", f"encoder/layer_0/attention/{name}") for name in ("context", "probs")
    ]
    assert specs[0].estimator.token_quantile < 1 == specs[1].estimator.token_quantile
    assert specs[0].range == "learned" and specs[0].range_gradient == "lsq"


def test_as_published_nothing_migrates_and_weights_are_on_two_grids():
    model, params, batches = planted()
    found = os.suppress(model, params, batches, os.OutlierSuppression("os+_as_published", 8))
    assert not found.model.config.shortcuts
    kernel = found.params["pooler"]["dense"]["kernel"]
    assert len(np.unique(kernel)) <= 256 and not np.array_equal(kernel, params["pooler"]["dense"]["kernel"])


def test_sites_of_the_policy():
    policy = os.suppression_policy(os.OutlierSuppression("os+", 6), 3)
    family, config, _ = made("bert")
    sites = family.sites(config)
    kept = {name for name, info in sites.items() if policy.spec(info.kind, name) is None and info.kind != "input"}
    roles = {name.replace("layer_0", "*").replace("layer_1", "*").replace("layer_2", "*") for name in kept}
    assert {name for name in kept if name.endswith("ffn/norm/output")} == {"encoder/layer_2/ffn/norm/output"}
    assert "classifier/output" in roles and "encoder/*/attention/scores" in roles
    assert not any(name.endswith(("kernel", "table", "context", "probs", "up/output")) for name in kept)
    quantized = {name for name, info in sites.items() if info.kind == "input" and policy.spec("input", name)}
    assert quantized == {"pooler/dense/input", "classifier/input"}
    assert policy.spec("weight", "classifier/kernel").estimator == os.MinMax()
    four = os.suppression_policy(os.OutlierSuppression("os", 4), 3)
    assert four.spec("weight", "classifier/kernel").estimator == os.SEARCHED


def test_a_token_without_elements_that_count_is_no_token():
    x = np.array([[[1.0, -2], [3, 4]], [[100, -100], [-7, 5]]], np.float32)
    where = np.array([[True, True], [False, True]])[..., None]
    low, high = estimators.token_extremes(x, where)
    np.testing.assert_array_equal(low, [-2, 3, np.nan, -7])
    np.testing.assert_array_equal(estimators.pruned_range(low, high, 1.0), [-7, 5])
    np.testing.assert_array_equal(estimators.pruned_range(low, high, 0.5), [-2, 4])
