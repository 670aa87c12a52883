"""Bytes by convention against the published figures, and against real files."""

import jax
import jax.numpy as jnp
import pytest

from qtx import quant
from qtx.analysis.memory import (
    abstract_ranges,
    activation_elements,
    activation_memory,
    input_memory,
    model_memory,
    parameter_counts,
    program_memory,
    range_memory,
    run_time_table,
    share,
    sites_table,
    totals,
    totals_table,
    weight_memory,
)
from qtx.methods.agnews_study import input_policy
from qtx.methods.calibrate import calibrate
from qtx.methods.efficient_quantization import policy_of
from qtx.models import get_family
from qtx.models.checkpoints import abstract_params
from qtx.nn import BertConfig, list_sites, policy

BERT = get_family("bert")
CONFIG = BertConfig()
PARAMS = abstract_params(BERT, CONFIG)


def sites(batch=1, tokens=128):
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return list_sites(BERT.module(config=CONFIG), {"params": PARAMS}, ids, ids, ids)


SITES = sites()


@pytest.mark.parametrize(
    ("bits", "table", "plain", "kept"), [(6, 6, 5.33, 5.31), (4, 4, 8.00, 7.95), (4, 2, 8.96, 8.89), (8, 8, 4, 3.99)]
)
def test_published_factors_of_bert_base(bits, table, plain, kept):
    rules = policy(weights={"**": quant.symmetric(bits), "Et": quant.symmetric(table)})
    found = totals(weight_memory(rules, SITES, PARAMS))
    # The published count of 109.48 M is without the classifier, whose 1538 parameters change no digit here.
    assert found["float32"] / 4 == 109_482_240 + 1538
    assert found["float32"] / found["plain"] == pytest.approx(plain, abs=0.005)
    assert found["float32"] / found["biases at 32"] == pytest.approx(kept, abs=0.005)
    assert found["biases at 32"] < found["stored"] < 1.001 * found["biases at 32"]


def test_full_precision_is_float32_however_it_is_counted():
    assert len(set(totals(weight_memory(None, SITES, PARAMS)).values())) == 1


def test_ternary_counts_as_log2_of_3_and_is_stored_in_eight_fifths():
    items = {item.name: item for item in weight_memory(policy(weights={"Et": quant.ternary()}), SITES, PARAMS)}
    table = items["encoder/embeddings/word/table"]
    assert table.count * table.bits / 8 == pytest.approx(table.count * 1.58496 / 8, rel=1e-5)
    assert table.payload == -(-table.count // 5) and table.scales == 4


def test_scales_zero_points_and_indices():
    rules = policy(
        quant.asymmetric(8, quant.per_channel()),
        {"y": quant.asymmetric(8, quant.per_group(6, permute=True)), "z": quant.asymmetric(8)},
    )
    weights = {item.name: item for item in weight_memory(rules, SITES, PARAMS)}
    kernel = weights["encoder/layer_0/ffn/up/kernel"]
    assert (kernel.payload, kernel.scales, kernel.zero_points) == (768 * 3072, 4 * 3072, 3072)
    ranges = {item.name: item for item in range_memory(rules, SITES)}
    assert len(ranges) == 24
    y, z = ranges["encoder/layer_3/ffn/residual"], ranges["encoder/layer_3/ffn/norm/output"]
    assert (y.scales, y.zero_points, y.indices) == (24, 25, 4 * 768)
    assert z.stored == 9 and z.count == 0


def mixed():
    names = {name: 16 for name in ("x", "h", "y", "P", "C")}
    return policy_of(quant.symmetric(8), quant.asymmetric(8), names, 12)


def test_share_of_16_bit_activations_in_mixed_precision():
    """36 of 161 tensors (x, h, y) are the paper's 22 %; with P and C 38; of the values it is a sixth at 128 tokens."""
    values, tensors = share(activation_memory(mixed(), SITES), 16)
    assert tensors == 38 / 161 and (38 - 2) / 161 == pytest.approx(0.2236, abs=1e-4)
    per_layer = 10 * 768 * 128 + 3072 * 128 + 2 * 12 * 128 * 128
    every = 12 * per_layer + 3 * 768 * 128 + 768 + 2
    assert values == (12 * 3 * 768 * 128 + 768 + 2) / every
    assert values == pytest.approx(0.1644, abs=1e-4)


def test_activation_bytes_follow_batch_length_and_bits():
    one = {item.name: item for item in activation_memory(mixed(), SITES)}
    assert one["encoder/layer_0/ffn/residual"].payload == 2 * 128 * 768
    assert one["encoder/layer_0/attention/context"].payload == 128 * 768
    two = {item.name: item for item in activation_memory(None, sites(batch=2, tokens=64))}
    assert two["encoder/layer_0/attention/scores"].payload == 4 * 2 * 12 * 64 * 64
    assert len(one) == 161


def test_tables():
    items = weight_memory(policy(weights=quant.symmetric(4)), SITES, PARAMS)
    rows = {row[0]: row for row in sites_table(items).rows}
    assert rows["encoder/layer_*/ffn/up/kernel"][1:6] == [12, 12 * 768 * 3072, 4, 12 * 768 * 3072 // 2, 48]
    assert sum(row[2] for row in rows.values()) == totals(items)["float32"] / 4
    assert [row[0] for row in totals_table(items).rows] == ["float32", "plain", "biases at 32", "stored"]


def test_parameters_by_part():
    found = parameter_counts(PARAMS)
    assert found["embeddings"] == (30522 + 512 + 2 + 2) * 768 and found["classifier"] == 2 * 769
    assert found["attention"] == 12 * (4 * 768 * 769 + 2 * 768) and found["pooler"] == 768 * 769
    assert sum(found.values()) == 109_482_240 + 1538 and len(found) == 5


def test_activations_as_the_ag_news_study_counts_them():
    config = BertConfig(hidden_size=512, num_heads=8, num_layers=2, num_labels=4)
    assert activation_elements(config, 1, 512) == 6_816_260
    assert activation_elements(config, 32, 512, embeddings=False) == 192_954_496
    short = BertConfig(hidden_size=6, num_heads=2, num_layers=1, num_labels=3)
    assert activation_elements(short, 2, 5) == 2 * (90 + (50 + 90) + 30 + 6 + 3)


def test_inputs_count_where_they_are_quantized():
    assert input_memory(mixed(), SITES) == ()
    found = {item.name: item for item in input_memory(input_policy(quant.asymmetric(8)), SITES)}
    assert found["encoder/layer_3/ffn/down/input"].payload == 128 * 3072
    assert {name.rpartition("/")[2] for name in found} == {"input"}
    layers = {name for name in found if name.startswith("encoder/layer_0/")}
    assert len(layers) == 6


def rows_of(table):
    return {row[0]: row[1:3] for row in table.rows}


def test_run_time_by_every_count():
    sites_, config = sites(batch=2, tokens=64), CONFIG
    elements = activation_elements(config, 2, 64) / 2**20
    plain = rows_of(run_time_table(config, 2, 64, activation_memory(None, sites_)))
    assert plain["published counter"] == [4 * elements, 4 * elements] and len(plain) == 2
    assert (
        plain["activations"][0]
        == plain["activations"][1]
        == sum(4 * item.count for item in activation_memory(None, sites_)) / 2**20
    )
    rules = input_policy(quant.asymmetric(4))
    programs = {
        "full precision": {"forward": {"temporary": 2**20, "output": 2**21}},
        "quantized": {"forward": {"temporary": 2**22}},
    }
    given = activation_memory(rules, sites_), input_memory(rules, sites_), programs
    found = rows_of(run_time_table(config, 2, 64, *given))
    assert found["published counter"] == [4 * elements, elements / 2]  # 4 bits each
    assert found["inputs of products"][0] == 8 * found["inputs of products"][1] > 0
    assert found["activations"] == plain["activations"]
    assert found["forward: temporary"] == [1, 4] and found["forward: output"] == [2, None]
    several = rows_of(run_time_table(config, 2, 64, activation_memory(mixed(), sites_)))
    assert several["published counter"][1] is None, "8 and 16 bits are no one number of bits"


TINY = BertConfig(
    vocab_size=11, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=16, max_positions=8, num_labels=3
)


def test_shapes_of_ranges_are_those_of_calibration():
    model = BERT.module(config=TINY)
    ids = jnp.ones((2, 8), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids, ids)["params"]
    rules = policy_of(
        quant.symmetric(8, quant.per_channel()), quant.asymmetric(8), {"y": "ngp3", "h": 16}, TINY.num_layers
    )
    quantized = model.clone(policy=rules)
    found, shapes = calibrate(quantized, params, [(ids, ids, ids)]), abstract_ranges(quantized, params, ids, ids, ids)
    assert jax.tree.structure(found) == jax.tree.structure(shapes)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [leaf.shape for leaf in jax.tree.leaves(shapes)]


@pytest.mark.parametrize("rules", [None, policy(quant.symmetric(8), quant.asymmetric(8))])
def test_what_the_compiler_says(rules):
    params, ids = abstract_params(BERT, TINY), jax.ShapeDtypeStruct((4, 8), jnp.int32)
    found = model_memory(BERT.module(config=TINY, policy=rules), params, ids, ids, ids)
    assert list(found) == ["forward", "forward and backward"]
    one, both = found.values()
    assert one["output"] == 4 * 4 * TINY.num_labels
    gradients = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert gradients < both["output"] < gradients + 4096  # alignment, and a table of pointers
    assert 0 < one["temporary"] < both["temporary"]


@pytest.mark.parametrize("error", [None, NotImplementedError, jax.errors.JaxRuntimeError("UNIMPLEMENTED")])
def test_a_backend_that_cannot_tell(monkeypatch, error):
    def analysis(self):
        if error is not None:
            raise error

    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", analysis)
    silent = program_memory(lambda x: x + 1, jnp.ones(3))
    assert silent == {}
    programs = {"full precision": {"forward": silent}, "quantized": {"forward": silent}}
    assert len(run_time_table(TINY, 1, 8, activation_memory(None, SITES), (), programs).rows) == 2
