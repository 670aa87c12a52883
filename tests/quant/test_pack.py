import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qtx.errors import UserError
from qtx.quant.pack import pack, pack_trits, packed_size, trits_size, unpack, unpack_trits

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=11)


@st.composite
def packable(draw):
    bits = draw(st.integers(1, 16))
    minimum = draw(st.sampled_from([0, -(2 ** (bits - 1)), -1, 7]))
    elements = st.integers(minimum, minimum + 2**bits - 1)
    return bits, minimum, draw(hnp.arrays(np.int32, draw(SHAPES), elements=elements))


@settings(max_examples=300, deadline=None)
@given(packable())
def test_bits_round_trip(case):
    bits, minimum, values = case
    data = pack(values, bits, minimum)
    assert data.dtype == np.uint8 and data.shape == (packed_size(values.size, bits),)
    back = unpack(data, bits, minimum, values.shape)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, values)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int8, SHAPES, elements=st.integers(-1, 1)))
def test_trits_round_trip(codes):
    data = pack_trits(codes)
    assert data.shape == (trits_size(codes.size),)
    np.testing.assert_array_equal(unpack_trits(data, codes.shape), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_layout_is_a_little_endian_bit_stream(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 21)
    stream = sum(int(value) << (i * bits) for i, value in enumerate(values))
    expected = np.frombuffer(stream.to_bytes(packed_size(21, bits), "little"), np.uint8)
    np.testing.assert_array_equal(pack(values, bits), expected)


def test_known_bytes():
    np.testing.assert_array_equal(pack(np.array([-8, 7, -7]), 4, -8), [0xF0, 0x01])
    np.testing.assert_array_equal(pack_trits(np.array([1, 1, 1, 1, 1, -1])), [242, 0])
    assert trits_size(1000) == 200 and packed_size(1000, 3) == 375 and packed_size(0, 5) == 0


@pytest.mark.parametrize("value", [-9, 8])
def test_values_outside_the_grid(value):
    with pytest.raises(UserError, match="do not fit 4 bits: they hold -8 to 7"):
        pack(np.array([0, value]), 4, -8)


def test_wide_values_are_not_wrapped_into_range():
    with pytest.raises(UserError, match="do not fit"):
        pack(np.array([2**32], np.int64), 8)


def test_other_errors():
    with pytest.raises(UserError, match="-1 to 1"):
        pack_trits(np.array([2]))
    with pytest.raises(UserError, match="not float32; quantize"):
        pack(np.zeros(3, np.float32), 8)
    for bits in (0, 17):
        with pytest.raises(UserError, match="1 to 16"):
            pack(np.zeros(3, int), bits)
        with pytest.raises(UserError, match="1 to 16"):
            unpack(np.zeros(3, np.uint8), bits, 0, (3,))
    with pytest.raises(UserError, match="takes 3 bytes"):
        unpack(np.zeros(2, np.uint8), 3, 0, (8,))
    with pytest.raises(UserError, match="takes 2 bytes"):
        unpack_trits(np.zeros(1, np.uint8), (6,))
    with pytest.raises(UserError, match="byte 243"):
        unpack_trits(np.array([243], np.uint8), (5,))
