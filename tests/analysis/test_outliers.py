"""Streaming statistics against float64 over all values at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx.analysis import outliers
from qtx.analysis.outliers import Statistics, choose_sites, collect
from qtx.errors import UserError
from qtx.nn import BertClassifier, list_sites, policy
from qtx.quant import asymmetric
from tests.nn import tiny

MODEL = BertClassifier(tiny.ONE_LAYER)
PARAMS = tiny.params(tiny.ONE_LAYER)
SITES = list_sites(MODEL, {"params": PARAMS}, *tiny.inputs())
BATCHES = [tiny.inputs(seed, lengths) for seed, lengths in ((0, (6, 4, 2)), (1, (3, 5, 6)), (2, (2, 2, 0)))]
NAMES = choose_sites(("h", "y"), SITES)


@pytest.fixture(scope="module")
def found():
    return collect(MODEL, PARAMS, BATCHES, NAMES, vocab_size=50, positions=16, k=2.0)


@pytest.fixture(scope="module")
def values():
    """Per batch: values, mask and ids."""
    capture = jax.jit(lambda args: MODEL.apply({"params": PARAMS}, *args, mutable=["captures"])[1]["captures"])
    flat = [traverse_util.flatten_dict(capture(args), sep="/") for args in BATCHES]
    return {
        name: [(np.asarray(f[name], np.float64), m > 0, i) for f, (i, m, _) in zip(flat, BATCHES, strict=True)]
        for name in NAMES
    }


def test_moments_and_extremes_are_those_of_all_tokens_without_padding(found, values):
    assert list(found) == ["encoder/layer_0/ffn/down/output", "encoder/layer_0/ffn/residual"]
    for name, s in found.items():
        x = np.concatenate([x[mask] for x, mask, _ in values[name]])
        assert float(s.tokens) == len(x) == 30
        for got, want in ((s.low, x.min(0)), (s.high, x.max(0)), (s.mean, x.mean(0)), (s.std, x.std(0))):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_outliers_are_counted_by_dimension_token_and_position(found, values):
    for name, s in found.items():
        by_dimension, by_token, by_position = np.zeros(12, int), np.zeros(50, int), np.zeros(16, int)
        for x, mask, ids in values[name]:
            inside = x[mask]
            beyond = (np.abs(x - inside.mean()) > 2 * inside.std()) & mask[..., None]
            for b, t, d in np.argwhere(beyond):
                by_dimension[d] += 1
                by_token[ids[b, t]] += 1
                by_position[t] += 1
        assert by_dimension.sum() > 5
        for got, want in ((s.outliers, by_dimension), (s.by_token, by_token), (s.by_position, by_position)):
            np.testing.assert_array_equal(got, want)


def test_a_large_mean_costs_no_digits():
    """Variances at the stated bound for values of 1000 +- 1e-1, where sums of squares in float32 would be noise."""
    rng = np.random.default_rng(0)
    x = (1000 + 0.1 * rng.standard_normal((20, 8, 16, 4))).astype(np.float32)
    total, include = None, jax.jit(lambda total, *batch: outliers._include(total, *batch, 6.0, 1, 16))
    ids, where = jnp.zeros((8, 16), jnp.int32), jnp.ones((8, 16), bool)
    for batch in x:
        total = include(total, jnp.asarray(batch), where, ids)
    want = x.astype(np.float64).reshape(-1, 4).var(0)
    bound = (3 * 8 * 16 + 8 * 20) * 2.0**-24
    assert np.all(np.abs(np.asarray(total.squares) / float(total.tokens) / want - 1) <= bound)
    naive = np.mean(x.reshape(-1, 4) ** 2, 0) - np.mean(x.reshape(-1, 4), 0) ** 2
    assert np.any(np.abs(naive / want - 1) > bound)


def test_the_policy_does_not_matter(found):
    model = MODEL.clone(policy=policy(activations=asymmetric(2)))
    again = collect(model, PARAMS, BATCHES, NAMES, vocab_size=50, positions=16, k=2.0)
    jax.tree.map(np.testing.assert_array_equal, again, found)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("s",), "'s'\\) is not \\[batch"),
        (("P",), "not \\[batch"),
        (("y7",), "'y7' matches no"),
        ((), "no activations"),
    ],
)
def test_sites_that_are_refused(names, words):
    with pytest.raises(UserError, match=words):
        choose_sites(names, SITES)


@pytest.mark.parametrize(
    ("k", "count", "words"), [(0, 1, "above 0"), (-1, 1, "-1"), (float("nan"), 1, "nan"), (6, 0, "0 batches")]
)
def test_arguments_that_are_refused(k, count, words):
    with pytest.raises(UserError, match=words):
        collect(MODEL, PARAMS, BATCHES[:count], NAMES, vocab_size=50, positions=16, k=k)


def made(by_dimension, token, position):
    """Statistics with given outliers, all at one token and position."""
    count = np.array(by_dimension, np.int32)
    width, total = len(count), int(count.sum())
    at = [np.zeros(n, np.int32) for n in (5, 4)]
    at[0][token], at[1][position] = total, total
    low, high = -1.0 * count - 1, 1.0 * count
    return Statistics(np.float32(10), low, high, np.zeros(width), np.zeros(width), np.full(width, 10.0), count, *at)


def test_tables_and_plots(tmp_path):
    found = {
        "encoder/layer_0/ffn/down/output": made([0, 3, 1], 2, 1),
        "encoder/layer_1/ffn/residual": made([0, 0, 9], 4, 3),
        "encoder/layer_2/ffn/residual": made([0, 0, 0], 0, 0),
    }
    texts = ["[PAD]", "[CLS]", "the", "a", "[SEP]"]
    rows = {row[0]: row for row in outliers.sites_table(found, texts.__getitem__).rows}
    assert rows["h0"][1:6] == [-4.0, 3.0, 1.0, 4, 4 / 30] and rows["h0"][6:] == [1, 0.75, "the", 1.0, 1, 1.0]
    assert rows["y1"][8] == "[SEP]" and rows["y2"][6:] == [None] * 6
    dimensions = outliers.dimensions_table(found, 2).rows
    assert [row[:4] for row in dimensions] == [["y1", 2, 9, 1.0], ["h0", 1, 3, 0.75]]
    assert dimensions[0][4:] == [-10.0, 9.0, 0.0, 1.0]
    tokens = outliers.tokens_table(found, texts.__getitem__).rows
    assert [row[0] for row in tokens] == ["[SEP]", "the"] and tokens[0][2] == pytest.approx(9 / 13)
    for plot, given in ((outliers.plot_ranges, found), (outliers.plot_counts, found)):
        plot(given, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    outliers.plot_counts({"y": made([0, 0], 0, 0)}, tmp_path / "none.png")
    assert outliers.tokens_table({"y": made([0, 0], 0, 0)}, texts.__getitem__).rows == []
    with pytest.raises(UserError, match="do not share dimensions"):
        outliers.plot_counts(found | {"encoder/layer_0/ffn/up/output": made([1], 0, 0)}, tmp_path / "no.png")
