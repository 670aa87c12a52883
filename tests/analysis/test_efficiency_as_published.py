"""The figures that BitTransGNN's authors drew."""

import pytest

from qtx.analysis.efficiency_as_published import Encoder, encoder_of, gcn_bytes, gcn_operations, gcn_parameters
from qtx.errors import UserError
from qtx.nn import BertConfig

BASE, ROBERTA, LARGE = Encoder(), Encoder(roberta=True), Encoder(large=True)


@pytest.mark.parametrize(
    ("encoder", "bits", "embedding_bits", "million"),
    [
        (BASE, 32, 32, 437.990),
        (BASE, 2.32, 2.32, 31.897),
        (BASE, 1, 32, 106.199),
        (ROBERTA, 1.58, 1.58, 24.767),
        (LARGE, 4, 4, 180.528),
    ],
)
def test_bytes(encoder, bits, embedding_bits, million):
    assert encoder.bytes(bits, embedding_bits) / 1e6 == pytest.approx(million, abs=0.0005)


def test_a_gcn_counts_eight_times():
    assert gcn_parameters(768, 256, 20) == 202_004
    assert (BASE.bytes(1, 1) + gcn_bytes(768, 256, 20)) / 1e6 == pytest.approx(20.300, abs=0.0005)


@pytest.mark.parametrize(
    ("bits", "dtype", "millijoule"),
    [(32, "float32", 18.892), (1, "float32", 8.791), (1, "int32", 1.131), (1, "int8", 0.1765), (2, "int8", 0.2526)],
)
def test_energy_of_a_sequence(bits, dtype, millijoule):
    found = 1e3 * BASE.operations(bits).energy(dtype)
    assert found == pytest.approx(millijoule, rel=5e-4)
    assert BASE.operations(bits).times(2).energy(dtype) == pytest.approx(2e-3 * found)


def test_a_width_between_costs_what_the_one_below_it_costs():
    assert BASE.operations(1.58) == BASE.operations(1)
    assert BASE.operations(2.32) == BASE.operations(2)
    with pytest.raises(UserError, match="8 bits"):
        gcn_operations(10, 20, 8, 4, 2, bits=8)


def test_encoders_with_published_figures():
    assert encoder_of("bert", BertConfig()) == BASE and encoder_of("roberta", BertConfig()) == ROBERTA
    assert encoder_of("bert", BertConfig(hidden_size=1024, num_layers=24, num_heads=16)) == LARGE
    for family, layers in (("albert", 12), ("bert", 6)):
        with pytest.raises(UserError, match="rule='corrected'"):
            encoder_of(family, BertConfig(num_layers=layers))
