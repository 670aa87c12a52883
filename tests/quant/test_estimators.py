"""Range estimation: what batches, masks and broken data do to a range."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.quant import search
from qtx.quant.spec import MinMax, Search, Spec

# Small searches compile fast; the symmetric scheme has no shifts.
ESTIMATORS = {
    "current": MinMax("current"),
    "all": MinMax("all"),
    "running": MinMax("running"),
    "percentile": MinMax(percentile=5.0),
    "percentile lower": MinMax(percentile=5.0, ends="lower"),
    "mse grid": Search("mse", "grid", candidates=12, relative_margin=True),
    "mse brent": Search("mse", "brent", relative_margin=True),
    "cross entropy": Search("cross_entropy", "grid", candidates=12, relative_margin=True),
}
MINMAX = [name for name, how in ESTIMATORS.items() if isinstance(how, MinMax)]
SEARCHES = [name for name in ESTIMATORS if name not in MINMAX]
SCHEMES = {name: quant.symmetric if name in SEARCHES else quant.asymmetric for name in ESTIMATORS}
observe = jax.jit(quant.observe, static_argnums=0)


def ends_of(spec, *batches, where=None, group=None):
    state = None
    for x in batches:
        state = observe(spec, state, x, where, group)
    return tuple(np.asarray(end) for end in quant.estimated_range(spec, state))


def batch(seed=0, shape=(3, 4, 6)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.array(
        [1, 2, 3, 1, 5, 9], np.float32
    )


MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)


def damaged(x, value=77.0):
    """Other content where the mask is off; large enough to move any range."""
    return np.where(MASK[..., None], x, np.float32(value) * np.sign(x + 0.1))


def same_loss(spec, x, got, want):
    """Two candidates can be equally good; their error on the data is what has to agree."""
    by_row = quant.rows.to_rows(jnp.asarray(x), spec.granularity)
    losses = [
        search.row_losses(spec, by_row, None, *(jnp.ravel(jnp.asarray(end)) for end in ends)) for ends in (got, want)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("kind", ["tensor", "embedding", "groups"])
def test_masked_is_unmasked_on_the_rest(name, kind):
    how = ESTIMATORS[name]
    if name == "cross entropy" and kind != "tensor":
        pytest.skip("the cross-entropy search is per tensor only")
    granularity = {"tensor": quant.per_tensor(), "embedding": quant.per_embedding(), "groups": quant.per_group(3)}[kind]
    spec = SCHEMES[name](3, granularity, estimator=how)
    x = batch()
    got = ends_of(spec, damaged(x), where=MASK[..., None])
    want = ends_of(spec, x[MASK])
    if isinstance(how, MinMax):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    else:
        same_loss(spec, x[MASK], got, want)
        assert np.all(np.abs(got) < 77)


def test_shifted_search_with_a_mask():
    spec, x = quant.asymmetric(3, estimator=ESTIMATORS["mse grid"]), batch()
    same_loss(spec, x[MASK], ends_of(spec, damaged(x), where=MASK[..., None]), ends_of(spec, x[MASK]))


@pytest.mark.parametrize("name", ["current", "running", "percentile", "mse grid"])
def test_padding_counts_where_it_is_included(name):
    how = dataclasses.replace(ESTIMATORS[name], padding="include")
    spec, x = SCHEMES[name](3, estimator=how), damaged(batch())
    np.testing.assert_array_equal(ends_of(spec, x, where=MASK[..., None]), ends_of(spec, x))
    assert ends_of(spec, x)[1] > 30


def test_permuted_groups_with_a_mask():
    group = jnp.array([2, 0, 1, 0, 2, 1])
    spec = quant.asymmetric(4, quant.per_group(3, permute=True))
    x = batch()
    got = ends_of(spec, damaged(x), where=MASK[..., None], group=group)
    kept = x[MASK]
    for k in range(3):
        part = kept[:, np.asarray(group) == k]
        assert (got[0][k], got[1][k]) == (part.min(), part.max())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_left_counts_as_zeros(name):
    spec = SCHEMES[name](3, estimator=ESTIMATORS[name])
    x, nothing = batch(), np.zeros((3, 4, 1), bool)
    low, high = ends_of(spec, x, where=nothing)
    assert np.all(np.isfinite(low)) and np.all(np.isfinite(high))
    if name in MINMAX:
        assert (low, high) == (0, 0)
    else:
        assert abs(low) < 1e-6 and abs(high) < 1e-6
    assert np.all(np.isfinite(quant.fake_quant(spec, x, quant.qparams(spec, low, high))))


@pytest.mark.parametrize("name", MINMAX)
def test_rows_without_any_element_are_zeros_and_leave_the_others_alone(name):
    spec = quant.asymmetric(4, quant.per_position(), estimator=ESTIMATORS[name])
    x, where = batch(), MASK[..., None].copy()
    where[:, 3] = False
    low, high = ends_of(spec, x, where=where)
    assert low[3] == high[3] == 0
    np.testing.assert_allclose(low[:1], ends_of(spec, x)[0][:1], rtol=1e-5)  # position 0 counts in every row
    assert np.all(low[:3] < 0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_in_the_data_poisons_the_range(name, masked):
    spec = SCHEMES[name](3, estimator=ESTIMATORS[name])
    x = batch()
    x[1, 0, 2] = np.nan
    low, high = ends_of(spec, x, where=MASK[..., None] if masked else None)
    assert np.isnan(low) or np.isnan(high)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_padding_may_hold_anything(name, value):
    spec = SCHEMES[name](3, estimator=ESTIMATORS[name])
    x = batch()
    got = ends_of(spec, damaged(x, value), where=MASK[..., None])
    np.testing.assert_array_equal(got, ends_of(spec, damaged(x), where=MASK[..., None]))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_in_a_later_batch_is_not_hidden(name):
    spec = SCHEMES[name](3, estimator=ESTIMATORS[name])
    broken = batch(1)
    broken[0, 0, 0] = np.nan
    assert not np.all(np.isfinite(ends_of(spec, batch(), broken)))


def test_over_batches():
    batches = [batch(seed) for seed in range(3)]
    lows, highs = [b.min() for b in batches], [b.max() for b in batches]

    def ends(how):
        return ends_of(quant.asymmetric(8, estimator=how), *batches)

    assert ends(MinMax("current")) == (lows[-1], highs[-1])
    assert ends(MinMax("all")) == (min(lows), max(highs))
    for momentum in (0.0, 0.5, 0.9):
        low, high = np.float64(lows[0]), np.float64(highs[0])
        for i in (1, 2):
            low, high = (1 - momentum) * lows[i] + momentum * low, (1 - momentum) * highs[i] + momentum * high
        np.testing.assert_allclose(ends(MinMax("running", momentum)), (low, high), rtol=1e-6)


def test_order_of_batches():
    a, b, c = (batch(seed) for seed in range(3))
    running = quant.asymmetric(8, estimator=MinMax("running"))
    assert ends_of(running, a, b, c) != ends_of(running, c, b, a)
    for name in ("all", "mse grid"):
        spec = quant.asymmetric(3, estimator=ESTIMATORS[name])
        if name == "all":
            assert ends_of(spec, a, b, c) == ends_of(spec, c, b, a)
        # The extent of a search is that of the first batch; the other two commute.
        np.testing.assert_allclose(ends_of(spec, a, b, c), ends_of(spec, a, c, b), rtol=1e-6)


def test_running_average_per_row():
    spec = quant.asymmetric(8, quant.per_embedding(), estimator=MinMax("running", 0.75))
    a, b = batch(0), batch(1)
    low, high = ends_of(spec, a, b)
    np.testing.assert_allclose(low, 0.25 * b.min((0, 1)) + 0.75 * a.min((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(high, 0.25 * b.max((0, 1)) + 0.75 * a.max((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("percentile", [0.1, 5.0, 25.0])
def test_percentile_of_both_ends_or_the_lower(percentile):
    x = batch()
    p = float(np.float32(percentile))
    both = ends_of(quant.asymmetric(8, estimator=MinMax(percentile=percentile)), x)
    np.testing.assert_allclose(both, np.percentile(x.astype(np.float64), [p, 100 - p]), rtol=1e-4)
    lower = ends_of(quant.asymmetric(8, estimator=MinMax(percentile=percentile, ends="lower")), x)
    assert lower[0] == both[0] and lower[1] == x.max() > both[1]
    rows = ends_of(quant.asymmetric(8, quant.per_embedding(), estimator=MinMax(percentile=percentile)), x)
    want = np.percentile(x.reshape(12, 6).astype(np.float64), [p, 100 - p], axis=0)
    np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-5)


def test_percentile_over_batches():
    a, b = batch(0), batch(1)
    how = MinMax("all", percentile=10.0)
    each = np.percentile(np.stack([a, b]).reshape(2, -1).astype(np.float64), [10, 90], axis=1)
    low, high = ends_of(quant.asymmetric(8, estimator=how), a, b)
    np.testing.assert_allclose((low, high), (each[0].min(), each[1].max()), rtol=1e-4)


@pytest.mark.parametrize("granularity", [quant.per_tensor(), quant.per_channel(0), quant.Granularity((0, 1))])
def test_one_range_is_a_scalar_and_rows_are_vectors(granularity):
    spec = Spec(8, "asymmetric", granularity)
    low, high = ends_of(spec, batch())
    want = {None: (), 0: (3,), (0, 1): (12,)}[granularity.axis]
    assert low.shape == high.shape == want
    assert quant.estimate(spec, batch()).scale.shape == want


def test_sixteen_bit_input_is_estimated_in_float32():
    x = jnp.asarray(batch(), jnp.bfloat16)
    spec = quant.asymmetric(8)
    assert quant.estimate(spec, x).scale.dtype == jnp.float32
    assert ends_of(spec, x) == ends_of(spec, x.astype(jnp.float32))


def test_mean_of_the_extremes_of_batches():
    batches = [batch(seed) * (seed + 1) for seed in range(4)]
    low, high = ends_of(quant.asymmetric(8, estimator=MinMax("mean")), *batches)
    np.testing.assert_allclose(low, np.mean([x.min() for x in batches]), rtol=1e-6)
    np.testing.assert_allclose(high, np.mean([x.max() for x in batches]), rtol=1e-6)


def test_mean_and_deviations():
    x = batch()
    spec = quant.asymmetric(8, quant.per_embedding(), estimator=quant.estimator("lsq_plus"))
    low, high = ends_of(spec, damaged(x), where=MASK[..., None])
    mean, deviation = x[MASK].mean(0), x[MASK].std(0, ddof=1)
    np.testing.assert_allclose(low, mean - 3 * deviation, rtol=1e-5)
    np.testing.assert_allclose(high, mean + 3 * deviation, rtol=1e-5)


def test_pruned_tokens_do_not_widen_the_range():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 10, 6)).astype(np.float32)
    x[0, 3, 2], x[1, 7, 1] = 50, -40
    low, high = ends_of(quant.asymmetric(8, estimator=MinMax("mean", token_quantile=0.9)), x)
    assert -1 <= low < -0.9 and 0.9 < high <= 1
    low, high = ends_of(quant.asymmetric(8, estimator=MinMax("mean")), x)
    assert (low, high) == (-40, 50)


def test_mean_of_the_ranges_of_least_error():
    spec = quant.symmetric(4, estimator=quant.estimator("mean_mse_brent"))
    batches = [batch(seed) * (seed + 1) for seed in range(2)]
    each = [ends_of(spec, x) for x in batches]
    np.testing.assert_allclose(ends_of(spec, *batches), np.mean(each, 0), rtol=1e-6)
    assert abs(each[0][0]) < abs(batches[0]).max()


def test_a_sample_stands_for_all_elements():
    x = np.random.default_rng(0).standard_normal((40, 30, 48)).astype(np.float32)
    x[..., 5] *= 8  # a channel that a sample with a common factor would see too often or never
    whole = dataclasses.replace(quant.symmetric(4), estimator=Search("mse", "grid", candidates=40, margin=0.0))
    part = dataclasses.replace(whole, estimator=dataclasses.replace(whole.estimator, sample=4000))
    np.testing.assert_allclose(ends_of(part, x), ends_of(whole, x), rtol=0.1)
    where = np.ones((40, 30, 1), bool)
    where[:, 20:] = False
    np.testing.assert_allclose(ends_of(part, np.where(where, x, 1e9), where=where), ends_of(whole, x[:, :20]), rtol=0.1)
