"""Operations and energy against counts by hand, and statistics of measurements."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from qtx import asymmetric, binary, loss_aware, policy, symmetric, ternary
from qtx.analysis import efficiency
from qtx.analysis.efficiency import Graph, Product, energy, macs, operations, power, products, summary
from qtx.errors import UserError
from qtx.methods.bit_transformer import bit_policy
from qtx.models import get_family
from qtx.nn import BertClassifier, list_sites
from tests.nn import tiny

B, T, D, H, F, C = 3, 6, 12, 2, 24, 3
LINEAR = B * T * (4 * D * D + 2 * D * F) + B * (D * D + D * C)
ATTENTION = B * T * T * D  # of each of its products
OUTPUTS = B * T * (4 * D + F + D) + B * (D + C)


@pytest.fixture(scope="module")
def sites():
    model, ids = BertClassifier(tiny.ONE_LAYER), jax.ShapeDtypeStruct((B, T), jnp.int32)
    return list_sites(model, {"params": tiny.shapes(model)}, ids, ids, ids)


def counts(found):
    return {dtype: tuple(numbers) for dtype, numbers in operations(found).items()}


def test_full_precision_multiplies_and_adds_every_term_once(sites):
    found = products(None, sites)
    assert macs(found) == {"linear": LINEAR, "scores": ATTENTION, "context": ATTENTION}
    assert len(found) == 8 + 2
    n = LINEAR + 2 * ATTENTION
    assert counts(found) == {"float32": (n, n), "int32": (0, 0), "int8": (0, 0)}
    assert energy(operations(found)) == pytest.approx(n * (0.38e-12 + 1.31e-12))
    assert energy(operations(found), "45nm") == pytest.approx(n * (0.9e-12 + 3.7e-12))
    assert sum(product.bit_multiplications for product in found) == n * 32 * 32


def test_integers_multiply_at_8_bits_add_at_32_and_are_rescaled(sites):
    found = products(policy(symmetric(8), asymmetric(8)), sites)
    n, scores = LINEAR + 2 * ATTENTION, B * H * T * T
    rescaled = OUTPUTS + scores + B * T * D
    assert counts(found) == {"float32": (0, rescaled), "int32": (n, 0), "int8": (0, n)}


@pytest.mark.parametrize(("spec", "additions"), [(binary(), 1), (ternary(), 1), (symmetric(2), 2), (loss_aware(2), 1)])
def test_few_levels_need_additions_alone(sites, spec, additions):
    rules = policy(weights={"**": spec})
    found = counts(products(rules, sites))
    assert found["float32"] == (additions * LINEAR + 2 * ATTENTION, OUTPUTS + 2 * ATTENTION)
    assert found["int8"] == found["int32"] == (0, 0)


def test_more_levels_with_full_precision_inputs_are_no_cheaper_than_full_precision(sites):
    assert counts(products(policy(symmetric(4), None), sites)) == counts(products(None, sites))


def test_bits_of_inputs_are_those_of_their_own_grid(sites):
    rules = policy(inputs={"**": symmetric(8)})
    linear = [product for product in products(rules, sites) if product.kind == "linear"]
    assert {product.input_bits for product in linear} == {8}


@pytest.mark.parametrize(("attention", "bits"), [(True, 8), (False, 32)])
def test_queries_keys_and_values_are_as_wide_as_their_heads(sites, attention, bits):
    found = products(bit_policy(3, attention=attention), sites)
    operands = {p.kind: (p.weight_bits, p.input_bits) for p in found if p.kind != "linear"}
    assert operands == {"scores": (bits, bits), "context": (32, bits)}
    assert (counts(found)["int8"][1] == ATTENTION) == attention, "of scores; probabilities are in float32"


def test_an_activation_in_full_precision_keeps_the_unknown_inputs_there(sites):
    rules = policy(symmetric(8), activations={"**": asymmetric(8), "encoder/layer_0/ffn/residual": None})
    linear = [product for product in products(rules, sites) if product.kind == "linear"]
    assert {product.input_bits for product in linear} == {32}
    assert {p.input_bits for p in products(rules, sites) if p.kind == "scores"} == {8}, "query and key are known"


def test_layers_that_share_weights_count_each_time_they_run():
    family = get_family("albert")
    config = dataclasses.replace(
        family.config_from_hf({}), hidden_size=8, embedding_size=4, num_layers=3, num_heads=2, intermediate_size=16
    )
    names = [product.name for product in products(None, family.sites(config))]
    assert sum(name.endswith("ffn/up") for name in names) == 3


def test_graph_by_hand():
    n, e, d, h, c = 5, 13, 4, 3, 2
    graph = Graph(n, e, d, h, c)
    assert graph.parameters == (d * h + h) + (h * c + c)
    dense, sparse = n * d * h + n * h * c, e * (h + c)
    found = graph.products()
    assert macs(found) == {"linear": dense, "sparse": sparse}
    assert counts(found)["float32"] == (dense + sparse, dense + sparse)
    # A GCN of signs with 8-bit inputs: its neighbours are summed in float32 all the same.
    quantized = counts(graph.products(1, 8))
    assert quantized == {"float32": (sparse, sparse + n * h + n * c), "int32": (dense, 0), "int8": (0, 0)}
    assert graph.bytes() == {"weights": 4 * graph.parameters, "adjacency": 8 * e + 4 * (n + 1), "features": 0}
    assert graph.bytes(1, bias=False, documents=2)["weights"] == (d * h + h * c) / 8 + 4 * (h + c)
    assert graph.bytes(documents=2)["features"] == 2 * d * 4
    with pytest.raises(UserError, match="0 entries"):
        Graph(5, 0)


def test_every_width_has_its_number_of_additions():
    found = [efficiency.additions_per_weight(bits) for bits in (1, math.log2(3), 1.58, 2, 2.32, math.log2(5), 3, 32)]
    assert found == [1, 1, 1, 2, 2, 2, None, None]


def test_energies_are_of_the_data_type_of_each_operation():
    product = Product("x", "linear", macs=1000, outputs=10, weight_bits=1, input_bits=8)
    assert energy(operations([product])) == pytest.approx(1000 * 0.03e-12 + 10 * 1.31e-12)
    with pytest.raises(UserError, match="int8"):
        efficiency.energy_per_operation("int4")
    with pytest.raises(UserError, match="7nm"):
        efficiency.energy_per_operation("int8", "5nm")


def test_statistics():
    assert summary([1.0, 3.0]) == (2.0, 1.1, 2.9, 2.0, pytest.approx(2**0.5), 2)
    assert summary([2.0]) == (2, 2, 2, 2, 0, 1)
    with pytest.raises(UserError, match="no measurements"):
        summary([])


def test_power_is_integrated_between_uneven_samples():
    assert power([0, 1, 3], [10, 20, 40]) == (15 + 60, 25, 40)
    for times in ([0.0], [0.0, 0.0], [1.0, 0.0]):
        with pytest.raises(UserError, match="rising times"):
            power(times, [1.0] * len(times))
