"""Rows: every granularity is a partition of the tensor."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx import quant
from qtx.errors import UserError
from qtx.quant import rows
from qtx.quant.spec import Granularity

SHAPE = (2, 4, 6)
X = np.arange(48, dtype=np.float32).reshape(SHAPE)

GRANULARITIES = st.one_of(
    st.just(quant.per_tensor()),
    st.integers(-3, 2).map(Granularity),
    st.sampled_from([(0, 1), (0, 2), (1, 2), (-3, -1), (0, 1, 2)]).map(Granularity),
    st.sampled_from([(0, 1), (0, 2), (1, 1), (1, 2), (1, 4), (2, 3), (-1, 6), (-1, 2), (-2, 2)]).map(
        lambda pair: Granularity(pair[0], groups=pair[1])
    ),
)


@settings(max_examples=60, deadline=None)
@given(granularity=GRANULARITIES, data=st.data())
def test_rows_partition_and_expand_leads_back(granularity, data):
    group = None
    if granularity.groups is not None and data.draw(st.booleans()):
        size = SHAPE[granularity.axis]
        members = np.repeat(np.arange(granularity.groups), size // granularity.groups)
        group = jnp.asarray(data.draw(st.permutations(list(members))), jnp.int32)
    by_row = np.asarray(rows.to_rows(jnp.asarray(X), granularity, group))
    count = rows.row_count(granularity, SHAPE)
    assert by_row.shape[0] == (1 if count is None else count)
    # Every element is in exactly one row.
    np.testing.assert_array_equal(np.sort(by_row.ravel()), X.ravel())
    # Spreading the row numbers marks every element with the row it is in.
    values = jnp.float32(0) if count is None else jnp.arange(count, dtype=jnp.float32)
    spread = np.broadcast_to(rows.expand(values, granularity, SHAPE, group), SHAPE)
    for i, row in enumerate(by_row):
        np.testing.assert_array_equal(np.sort(row.ravel()), np.sort(X[spread == i]))
    # The mean runs over the same elements.
    want = np.zeros(SHAPE)
    for i in range(by_row.shape[0]):
        want[spread == i] = X[spread == i].mean()
    if group is None:
        np.testing.assert_allclose(np.broadcast_to(rows.mean(jnp.asarray(X), granularity), SHAPE), want, rtol=1e-6)


def test_to_rows_keeps_the_order_of_the_other_axes():
    x = jnp.asarray(X)
    np.testing.assert_array_equal(rows.to_rows(x, Granularity(-1)), np.moveaxis(X, -1, 0))
    np.testing.assert_array_equal(rows.to_rows(x, Granularity((0, 1))), X.reshape(8, 6))
    np.testing.assert_array_equal(rows.to_rows(x, quant.per_tensor())[0], X)
    np.testing.assert_array_equal(rows.to_rows(x, quant.per_group(3))[1], np.moveaxis(X, -1, 0)[2:4])


def test_mean_of_a_selection():
    where = jnp.asarray(X % 2 == 0)
    np.testing.assert_allclose(rows.mean(jnp.asarray(X), quant.per_tensor(), where), 23)
    got = rows.mean(jnp.asarray(X), Granularity(-1), where)
    np.testing.assert_allclose(np.ravel(got), [18 + 3, 0, 20 + 3, 0, 22 + 3, 0])  # odd columns: nothing selected


@settings(max_examples=40, deadline=None)
@given(
    ranges=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, 9.0]), min_size=12, max_size=12),
    k=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_groups_by_range(ranges, k):
    group = np.asarray(rows.groups_by_range(jnp.asarray(ranges, jnp.float32), k))
    assert np.all(np.bincount(group, minlength=k) == 12 // k)
    order = np.argsort(ranges, kind="stable")
    np.testing.assert_array_equal(group[order], np.arange(12) // (12 // k))


def test_the_widest_channels_share_the_last_group():
    np.testing.assert_array_equal(
        rows.groups_by_range(jnp.array([9.0, 1.0, 5.0, 1.0, 9.5, 5.0]), 3), [2, 0, 1, 0, 2, 1]
    )


def test_extremes():
    low, high = rows.extremes(jnp.asarray(X), -1)
    np.testing.assert_array_equal(low, X.min((0, 1)))
    np.testing.assert_array_equal(high, X.max((0, 1)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rows.to_rows(jnp.zeros((2, 6)), quant.per_group(4)), "4 groups do not divide the width 6"),
        (lambda: rows.row_count(quant.per_group(5), (3, 12)), "choose a divisor of 12"),
        (lambda: rows.groups_by_range(jnp.zeros(6), 4), "4 groups do not divide the width 6"),
        (lambda: rows.to_rows(jnp.zeros((2, 6)), Granularity(2)), "axis 2 does not exist in a tensor with 2 axes"),
        (lambda: rows.to_rows(jnp.zeros((2, 6)), Granularity(-3)), "axis -3 does not exist"),
        (lambda: rows.to_rows(jnp.zeros((2, 6)), quant.per_channel()), "'channel' is symbolic"),
        (lambda: rows.to_rows(jnp.zeros((2, 6)), quant.per_token()), "'token' is symbolic"),
    ],
)
def test_errors(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)
