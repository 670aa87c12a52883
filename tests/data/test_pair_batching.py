"""What must hold for every plan and batch of sentence pairs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx.data.batching import in_order
from qtx.data.pair_batching import (
    PairBatches,
    bucket_shapes,
    evaluation_batches,
    interleaved_key,
    published_epoch,
    shifted,
    token_batches,
    training_pools,
)
from qtx.data.pair_tokenizer import BOS, EOS, PAD, EncodedPairs, Rows
from qtx.errors import UserError


def make_pairs(lengths) -> EncodedPairs:
    """Pair i, of (source, target) tokens without markers, holds 1000 * i + 4, 1000 * i + 5, … on either side."""
    rows = [
        [[1000 * i + 4 + k for k in range(n)] for i, n in enumerate(side)] for side in np.reshape(lengths, (-1, 2)).T
    ]
    cut = np.zeros(len(rows[0]), bool)
    return EncodedPairs(Rows.of(rows[0]), Rows.of(rows[1]).between_markers(), 0, 0, cut)


def make_batches(lengths, budget=60, count=4, **options) -> PairBatches:
    pairs = make_pairs(lengths)
    return PairBatches(pairs, budget, bucket_shapes(pairs, count), **options)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def first_steps(batches, epochs=1):
    return [batches[i] for i in range(epochs * batches.batches_per_epoch)]


LENGTHS = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=50)
some_lengths = np.random.default_rng(0).integers(1, 26, (60, 2))
PLANS = pytest.mark.parametrize("plan", ["buckets", "published"])


# ------------------------------------------------------------------------------------------- invariants


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(60, 200), st.integers(0, 5), st.booleans(), st.sampled_from([1, 2]), st.data())
def test_an_epoch_holds_every_pair_once_at_full_content(lengths, budget, seed, shuffle, multiple, data):
    plan = data.draw(st.sampled_from(["buckets", "published"]))
    batches = make_batches(lengths, budget, seed=seed, shuffle=shuffle, plan=plan, rows_multiple=multiple, epochs=1)
    assert len(batches) == batches.batches_per_epoch
    steps = first_steps(batches)
    index = np.concatenate([batch["index"] for batch in steps])
    assert sorted(index[index >= 0].tolist()) == list(range(len(lengths)))
    used = 0
    for batch in steps:
        shape = batch["source_ids"].shape[1], batch["target_ids"].shape[1]
        rows = batches.rows[batches.shapes.index(shape)]
        used += rows * sum(shape)
        assert rows % multiple == 0 and rows % batches.batch_size == 0
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "source_ids": ((rows, shape[0]), np.int32),
            "target_ids": ((rows, shape[1]), np.int32),
            "labels": ((rows, shape[1]), np.int32),
            "weights": ((rows,), np.float32),
            "index": ((rows,), np.int32),
        }
        if plan == "buckets":
            assert rows * max(shape) <= budget < (rows + multiple) * max(shape)
        for row, pair in enumerate(batch["index"]):
            source, target, labels = (batch[key][row] for key in ("source_ids", "target_ids", "labels"))
            if pair < 0:
                assert batch["weights"][row] == 0 and {*source, *target, *labels} == {PAD}
                continue
            s, t = lengths[pair]
            words = [1000 * pair + 4 + k for k in range(max(s, t))]
            assert batch["weights"][row] == 1
            assert source.tolist() == words[:s] + [PAD] * (shape[0] - s)
            assert labels.tolist() == [*words[:t], EOS] + [PAD] * (shape[1] - t - 1)
            assert target.tolist() == ([BOS, *words[:t], EOS] + [PAD] * shape[1])[: shape[1]]
            if plan == "buckets":
                fitting = [k for k, (a, b) in enumerate(batches.shapes) if a >= s and b >= t + 1]
                assert batches.shapes[fitting[0]] == shape
    real = sum(s + t + 1 for s, t in lengths)
    assert batches.padding_share == pytest.approx(1 - real / used)


def test_epochs_have_the_same_number_of_batches_in_another_order():
    batches = make_batches(some_lengths, seed=3)
    n = batches.batches_per_epoch
    epochs = [[batches[e * n + i]["index"] for i in range(n)] for e in range(3)]
    flat = [np.concatenate(epoch) for epoch in epochs]
    for epoch in flat:
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(60))
    assert not np.array_equal(flat[0], flat[1]) and not np.array_equal(flat[1], flat[2])
    assert_same(make_batches(some_lengths, seed=3)[2 * n], batches[2 * n])
    assert any(
        a["index"].tolist() != b["index"].tolist()
        for a, b in zip(first_steps(batches), first_steps(make_batches(some_lengths, seed=4)), strict=True)
    )


@PLANS
def test_without_shuffling_every_epoch_is_the_same(plan):
    batches = make_batches(some_lengths, shuffle=False, plan=plan)
    n = batches.batches_per_epoch
    for i in range(n):
        assert_same(batches[i], batches[n + i])
    widths = [batch["source_ids"].shape[1] for batch in first_steps(batches)]
    assert widths == sorted(widths) or plan == "published", "the published key is no measure of size"


def test_published_epochs_follow_each_other():
    lengths = np.random.default_rng(1).integers(1, 26, (1000, 2))
    batches = make_batches(lengths, 60, seed=7, plan="published")
    published = [published_epoch(*lengths.T, 60, (7, epoch)) for epoch in range(4)]
    assert len({len(epoch) for epoch in published}) > 1, "the case that needs care does not occur"
    stream = [batch.tolist() for epoch in published for batch in epoch]
    steps = len(stream) - len(published[-1])
    fresh = make_batches(lengths, 60, seed=7, plan="published")
    for found in ([batches[i] for i in range(steps)], [fresh[i] for i in reversed(range(steps))][::-1]):
        assert [batch["index"][batch["weights"] > 0].tolist() for batch in found] == stream[:steps]


# ---------------------------------------------------------------------------------------- resuming, hosts


@PLANS
def test_a_restored_iterator_goes_on_with_the_identical_batches(plan):
    options = {"seed": 2, "plan": plan}
    stop = 2 * make_batches(some_lengths, **options).batches_per_epoch + 3
    whole = list(itertools.islice(make_batches(some_lengths, **options), stop))
    for step in (1, stop // 2, stop - 2):
        iterator = iter(make_batches(some_lengths, **options))
        for _ in range(step):
            next(iterator)
        fresh = iter(make_batches(some_lengths, **options))
        fresh.set_state(iterator.get_state())
        for expected in whole[step : step + 2]:
            assert_same(next(fresh), expected)


@PLANS
def test_hosts_read_contiguous_rows_of_the_same_batch(plan):
    options = {"budget": 100, "plan": plan, "rows_multiple": 3}
    whole = make_batches(some_lengths, shard_count=1, **options)
    parts = [make_batches(some_lengths, shard_index=i, shard_count=3, **options) for i in range(3)]
    for step in range(whole.batches_per_epoch):
        shards = [part[step] for part in parts]
        assert len({len(shard["index"]) for shard in shards}) == 1
        assert_same({key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}, whole[step])


@PLANS
def test_translations_go_back_into_order(plan):
    batches = make_batches(some_lengths, plan=plan, shuffle=False, epochs=1)
    values, indices = zip(*((batch["index"] * 2, batch["index"]) for batch in batches), strict=True)
    np.testing.assert_array_equal(in_order(values, indices, 60), 2 * np.arange(60))


def test_pairs_of_nothing_are_batches_too():
    batch = make_batches([(0, 0)], epochs=1)[0]
    assert batch["source_ids"].tolist()[0] == [PAD] * 4 and batch["labels"].tolist()[0] == [EOS, PAD, PAD, PAD]


# --------------------------------------------------------------------------------------------------- shapes


def padded_tokens(lengths, shapes):
    return sum(min(sum(shape) for shape in shapes if shape[0] >= s and shape[1] >= t + 1) for s, t in lengths)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 18)), min_size=1, max_size=30), st.integers(1, 3))
def test_bucket_shapes_are_optimal(lengths, count):
    shapes = bucket_shapes(make_pairs(lengths), count)
    assert 1 <= len(shapes) <= count
    assert all(isinstance(size, int) and size % 4 == 0 for shape in shapes for size in shape)
    assert all(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(shapes))
    top = tuple(max(4, -(-n // 4) * 4) for n in (max(s for s, _ in lengths), max(t + 1 for _, t in lengths)))
    assert shapes[-1] == top
    below = [shape for shape in itertools.product(range(4, 21, 4), repeat=2) if shape != top]
    chains = itertools.chain.from_iterable(itertools.combinations(below, size) for size in range(count))
    growing = [
        (*chain, top)
        for chain in chains
        if all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise((*chain, top)))
    ]
    assert padded_tokens(lengths, shapes) == min(padded_tokens(lengths, chain) for chain in growing)


def test_bucket_shapes_of_many_lengths_become_coarser():
    shapes = bucket_shapes(make_pairs([(n, n) for n in range(1, 400)]), 5)
    assert len(shapes) == 5 and all(size % 16 == 0 for shape in shapes for size in shape)
    assert shapes[-1] == (400, 400)


def test_more_shapes_pad_less():
    shares = [make_batches(some_lengths, 2000, count).padding_share for count in (1, 2)]
    padded = [padded_tokens(some_lengths, bucket_shapes(make_pairs(some_lengths), count)) for count in (1, 2, 4, 8)]
    assert padded == sorted(padded, reverse=True) and padded[0] > padded[-1]
    assert all(0 < share < 1 for share in shares)


# ------------------------------------------------------------------------------------------- as published


def test_interleaved_key_by_hand():
    assert interleaved_key(np.array([5, 1, 0, 65535]), np.array([3, 0, 1, 65535])).tolist() == [39, 2, 1, 2**32 - 1]


def test_token_batches_by_hand():
    sources, targets = np.array([3, 5, 2, 9, 1]), np.array([1, 1, 4, 1, 1])
    cut = lambda budget: [batch.tolist() for batch in token_batches(range(5), sources, targets, budget)]  # noqa: E731
    assert cut(10) == [[0, 1], [2], [3], [4]]
    assert cut(17) == [[0, 1], [2], [3], [4]]
    assert cut(18) == [[0, 1, 2], [3, 4]]
    assert cut(45) == [[0, 1, 2, 3, 4]]
    assert cut(1) == [[0], [1], [2], [3], [4]], "an example that exceeds the budget alone is not lost"


@given(LENGTHS, st.integers(30, 200), st.integers(0, 9))
def test_published_batches_keep_to_the_budget(lengths, budget, epoch):
    sources, targets = np.array(lengths).T
    keys = interleaved_key(sources, targets)
    for shuffle in (None, (0, epoch)):
        batches = published_epoch(sources, targets, budget, shuffle)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) * max(sources[batch].max(), targets[batch].max() + 2) <= budget
            assert (np.diff(keys[batch]) <= 0).all()
    assert sum(map(len, evaluation_batches(sources, targets, budget))) == len(lengths)


def test_pools_are_cut_before_they_are_sorted():
    rng = np.random.default_rng(0)
    sources, targets = rng.integers(1, 26, (2, 200))
    order = rng.permutation(200)
    pools = training_pools(order, sources, targets, 60, pool_factor=10)
    assert len(pools) > 3
    members = [sorted(np.concatenate(pool).tolist()) for pool in pools]
    assert members == [sorted(pool.tolist()) for pool in token_batches(order, sources, targets, 600)]


def test_the_shift():
    rows = np.array([[BOS, 4, 5, EOS], [BOS, 6, EOS, PAD]])
    inputs, labels = shifted(rows)
    assert inputs.tolist() == [[BOS, 4, 5], [BOS, 6, EOS]] and labels.tolist() == [[4, 5, EOS], [6, EOS, PAD]]


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token_budget": 0}, r"a batch of 0 tokens \(phases.\*.batch_size\) does not hold .*; use at least 40"),
        ({"token_budget": 39}, r"39 tokens .* does not hold a pair of 40 source and 8 target tokens; use at least 40"),
        ({"token_budget": 79, "rows_multiple": 2}, "8 target tokens for each of 2 devices; use at least 80"),
        ({"token_budget": 79, "shard_count": 2}, "8 target tokens for each of 2 devices; use at least 80"),
        ({"token_budget": 36, "plan": "published"}, "36 tokens .* does not hold the longest pair; use at least 37"),
        ({"plan": "publshed"}, "unknown plan 'publshed'; did you mean 'published'"),
        ({"rows_multiple": 0}, "rows_multiple must be at least 1"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index must be from 0 to 1, got 2"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"shapes": ()}, "shapes must be growing"),
        ({"shapes": ((40, 8), (40, 8))}, "shapes must be growing"),
        ({"shapes": ((8, 40), (40, 8))}, "shapes must be growing"),
        ({"shapes": ((36, 8),)}, r"the longest pair has \(37, 5\) tokens, more than the last shape's \(36, 8\)"),
        ({"shapes": ((40, 4),)}, r"the longest pair has \(37, 5\) tokens"),
        ({"encoded": make_pairs([])}, "no pairs to make batches of"),
    ],
)
def test_errors(options, message):
    pairs = make_pairs([(37, 4), (3, 3)])
    with pytest.raises(UserError, match=message):
        PairBatches(**{"encoded": pairs, "token_budget": 100, "shapes": bucket_shapes(pairs), **options})


def test_shape_errors():
    with pytest.raises(UserError, match="count must be at least 1, got 0"):
        bucket_shapes(make_pairs([(1, 1)]), 0)
    with pytest.raises(UserError, match="no pairs to choose shapes for"):
        bucket_shapes(make_pairs([]))
