"""What must hold for every epoch plan, batch and restored position."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx.data.batching import Batches, bucket_lengths, in_order, plan_epoch
from qtx.data.tokenize import Encoded
from qtx.errors import UserError

CLS, PAD = 101, 7


def make_encoded(lengths, labels=np.int32) -> Encoded:
    """Example i holds the ids CLS, 1000 * i + 1, 1000 * i + 2, …; its label is i."""
    lengths = np.asarray(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = [np.concatenate([[CLS], 1000 * i + np.arange(1, n)]) for i, n in enumerate(lengths)]
    types = [(np.arange(n) >= n // 2) for n in lengths]
    return Encoded(
        np.concatenate(ids).astype(np.int32),
        np.concatenate(types).astype(np.int32),
        offsets,
        np.arange(len(lengths)).astype(labels),
    )


def make_batches(lengths, batch_size=4, buckets=(8, 16, 40), **options) -> Batches:
    return Batches(make_encoded(lengths), batch_size, buckets, pad_id=PAD, **options)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
some_lengths = np.random.default_rng(0).integers(1, 41, 50)


# ------------------------------------------------------------------------------------------- invariants


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_every_epoch_holds_every_example_once_at_full_content(lengths, batch_size, seed, shuffle):
    batches = make_batches(lengths, batch_size, seed=seed, shuffle=shuffle, epochs=2)
    assert len(batches) == 2 * batches.batches_per_epoch
    encoded = batches.encoded
    for epoch in range(2):
        steps = [batches[epoch * batches.batches_per_epoch + i] for i in range(batches.batches_per_epoch)]
        index = np.concatenate([batch["index"] for batch in steps])
        assert sorted(index[index >= 0].tolist()) == list(range(len(lengths)))
        for batch in steps:
            width = batch["input_ids"].shape[1]
            assert width in batches.buckets
            for key in ("input_ids", "attention_mask", "token_type_ids"):
                assert batch[key].shape == (batch_size, width) and batch[key].dtype == np.int32
            for row, example in enumerate(batch["index"]):
                if example < 0:
                    assert batch["weights"][row] == 0 and batch["attention_mask"][row].sum() == 0
                    assert batch["input_ids"][row].tolist() == [PAD] * width
                    assert batch["labels"][row] == 0 and not batch["token_type_ids"][row].any()
                    continue
                n = lengths[example]
                span = slice(*encoded.offsets[example : example + 2])
                assert width == min(bucket for bucket in batches.buckets if bucket >= n)
                assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (width - n)
                assert batch["input_ids"][row].tolist() == encoded.ids[span].tolist() + [PAD] * (width - n)
                assert batch["token_type_ids"][row, :n].tolist() == encoded.token_type_ids[span].tolist()
                assert not batch["token_type_ids"][row, n:].any()
                assert batch["weights"][row] == 1 and batch["labels"][row] == example
        assert sum(batch["weights"].sum() for batch in steps) == len(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3), st.integers(0, 9))
def test_plans_are_pure_and_of_constant_size(buckets, batch_size, seed, epoch):
    buckets = np.array(buckets)
    rows, numbers = plan_epoch(buckets, batch_size, seed, epoch)
    again, numbers_again = plan_epoch(buckets, batch_size, seed, epoch)
    np.testing.assert_array_equal(rows, again)
    np.testing.assert_array_equal(numbers, numbers_again)
    assert rows.shape == plan_epoch(buckets, batch_size, seed + 1, epoch + 1)[0].shape
    for row, number in zip(rows, numbers, strict=True):
        assert (row >= 0).any() and (buckets[row[row >= 0]] == number).all()


def test_shuffling_depends_on_seed_and_epoch():
    buckets = np.repeat([0, 1], 40)
    plans = [plan_epoch(buckets, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(not np.array_equal(a[0], b[0]) for a, b in itertools.combinations(plans, 2))
    assert np.any(np.diff(plans[0][1]) < 0), "the order of the batches must be shuffled too"


def test_batches_are_shuffled_anew_every_epoch():
    batches = make_batches(some_lengths)
    n = batches.batches_per_epoch
    first, second = (np.concatenate([batches[start + i]["index"] for i in range(n)]) for start in (0, n))
    assert not np.array_equal(first, second)


def test_without_shuffling_every_epoch_is_the_same_and_sorted():
    batches = make_batches(some_lengths, shuffle=False, seed=5)
    n = batches.batches_per_epoch
    widths = [batches[i]["input_ids"].shape[1] for i in range(n)]
    assert widths == sorted(widths)
    for i in range(n):
        assert_same(batches[i], batches[n + i])
    index = np.concatenate([batches[i]["index"] for i in range(n)])
    bucket = batches.bucket_of[index[index >= 0]]
    order = np.lexsort((index[index >= 0], bucket))
    np.testing.assert_array_equal(order, np.arange(len(order)))


def test_float_labels_stay_float():
    batches = Batches(make_encoded([3, 4, 5], np.float32), 2, (8,))
    assert batches[0]["labels"].dtype == np.float32


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_restored_iterator_goes_on_with_the_identical_batches(prefetch):
    stop = 2 * make_batches(some_lengths).batches_per_epoch + 3
    whole = list(itertools.islice(make_batches(some_lengths, seed=2).dataset(prefetch), stop))
    for step in (0, 1, stop // 2, stop - 3):
        iterator = iter(make_batches(some_lengths, seed=2).dataset(prefetch))
        for _ in range(step):
            next(iterator)
        state = iterator.get_state()
        fresh = iter(make_batches(some_lengths, seed=2))
        fresh.set_state(state)
        for expected in whole[step : step + 3]:
            assert_same(next(fresh), expected)


def test_epochs_end_the_run_and_none_does_not():
    batches = make_batches(some_lengths, epochs=2)
    assert len(list(batches)) == 2 * batches.batches_per_epoch
    with pytest.raises(IndexError):
        batches[len(batches)]
    endless = make_batches(some_lengths)
    far = 10**9 * endless.batches_per_epoch
    assert_same(endless[far], make_batches(some_lengths)[far])


def test_iterators_of_one_object_do_not_disturb_each_other():
    batches = make_batches(some_lengths)
    n = batches.batches_per_epoch
    first, second = iter(batches), iter(batches)
    second.set_state({"next_index": n})
    for i in range(n):
        assert_same(next(first), make_batches(some_lengths)[i])
        assert_same(next(second), make_batches(some_lengths)[n + i])


# ------------------------------------------------------------------------------------ hosts and evaluation


def test_hosts_read_contiguous_rows_of_the_same_batch():
    whole = make_batches(some_lengths, batch_size=6)
    parts = [make_batches(some_lengths, batch_size=6, shard_index=i, shard_count=3) for i in range(3)]
    for step in range(2 * whole.batches_per_epoch):
        shards = [part[step] for part in parts]
        joined = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}
        assert_same(joined, whole[step])
        assert all(len(shard["index"]) == 2 for shard in shards)


@pytest.mark.parametrize("shuffle", [False, True])
def test_predictions_go_back_into_order(shuffle):
    batches = make_batches(some_lengths, batch_size=7, shuffle=shuffle, epochs=1)
    outputs = [(batch["labels"][:, None] * [1.0, 2.0], batch["index"]) for batch in batches]
    values = in_order(*zip(*outputs, strict=True), len(some_lengths))
    np.testing.assert_array_equal(values, np.arange(len(some_lengths))[:, None] * [1.0, 2.0])
    with pytest.raises(ValueError, match="exactly once"):
        in_order([np.arange(3)], [np.arange(3)], 4)
    with pytest.raises(ValueError, match="exactly once"):
        in_order(*zip(*outputs, *outputs, strict=True), len(some_lengths))


# ------------------------------------------------------------------------------------------ bucket lengths


def padded_tokens(lengths, buckets):
    return sum(min(bucket for bucket in buckets if bucket >= n) for n in lengths)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 61), min_size=1, max_size=40), st.integers(1, 5), st.integers(61, 80))
def test_bucket_lengths_are_optimal(lengths, count, max_length):
    buckets = bucket_lengths(np.array(lengths), max_length, count)
    assert 1 <= len(buckets) <= count and list(buckets) == sorted(set(buckets))
    assert max(lengths) <= buckets[-1] <= max_length
    assert all(isinstance(bucket, int) and (bucket % 8 == 0 or bucket == max_length) for bucket in buckets)
    top = min(-(-max(lengths) // 8) * 8, max_length)
    lower = range(8, top, 8)
    best = min(
        padded_tokens(lengths, (*chosen, top))
        for size in range(min(count - 1, len(lower)) + 1)
        for chosen in itertools.combinations(lower, size)
    )
    assert padded_tokens(lengths, buckets) == best


def test_bucket_lengths_by_hand():
    assert bucket_lengths(np.array([3, 8, 9, 60]), 64, 3) == (8, 16, 64)
    assert bucket_lengths(np.array([5, 5]), 128, 4) == (8,)
    assert bucket_lengths(np.array([99]), 100, 4) == (100,)
    assert bucket_lengths(np.array([5, 5]), 128, 4, padding="max") == (128,)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.array([5]), 0), "max_length must be at least 1, got 0"),
        ((np.array([5]), 8, 0), "count must be at least 1, got 0"),
        ((np.array([5]), 8, 1, "longest"), "unknown padding 'longest'"),
        ((np.array([], int), 8), "no examples"),
        ((np.array([5, 9]), 8), "an example has 9 tokens, more than max_length 8"),
    ],
)
def test_bucket_length_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        bucket_lengths(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 6, "shard_count": 4}, "batch_size 6 does not divide by 4 hosts; use 8"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index must be from 0 to 1, got 2"),
        ({"shard_count": 0}, "shard_count must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"buckets": ()}, "buckets must be increasing"),
        ({"buckets": (16, 8)}, "buckets must be increasing"),
        ({"buckets": (8, 16)}, "an example has 40 tokens, more than the last bucket's 16"),
    ],
)
def test_batches_errors(options, message):
    with pytest.raises(UserError, match=message):
        make_batches([40, 3], **options)


def test_no_examples_is_an_error():
    empty = np.zeros(0, np.int32)
    with pytest.raises(UserError, match="no examples"):
        Batches(Encoded(empty, empty, np.zeros(1, np.int64), empty), 4, (8,))
