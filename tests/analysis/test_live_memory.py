"""Live sets counted by hand, ratios by width against the published ones, and what XLA says of the same programs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from qtx import quant
from qtx.analysis import memory
from qtx.analysis.live_memory import (
    at_width,
    live_bytes,
    live_table,
    peak,
    product_memory,
    tensor_memory,
    tensors,
    widths_table,
)
from qtx.methods.agnews_study import input_policy
from qtx.methods.patterns import pattern_policy
from qtx.models import get_family
from qtx.models.checkpoints import abstract_params
from qtx.nn import BertConfig, Dense, list_sites, policy, site
from qtx.nn.text_classifier import TextClassifierConfig
from qtx.quant.policy import Policy

BERT = get_family("bert")
# T D = 8 x 12 values, H T^2 = 2 x 64, T F = 8 x 32: attention peaks at its scores, the FFN above that, at its residual's side.
TINY = BertConfig(
    vocab_size=11, hidden_size=12, num_layers=2, num_heads=2, intermediate_size=32, max_positions=8, num_labels=3
)
X, S, F = 4 * 8 * 12, 4 * 2 * 64, 4 * 8 * 32


def of_bert(config=TINY, batch=1, tokens=8):
    params, ids = abstract_params(BERT, config), jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return tensors(BERT.module(config=config), params, ids, ids, ids)


def test_live_sets_of_a_layer_by_hand():
    found = of_bert()
    live = dict(zip((each.name for each in found), live_bytes(found, tensor_memory(None, found)), strict=True))
    layer = "encoder/layer_1"
    assert {name.removeprefix(f"{layer}/"): size for name, size in live.items() if name.startswith(layer)} == {
        "attention/query/output": 2 * X,  # and the stream, which waits for its sum
        "attention/key/output": 3 * X,
        "attention/value/output": 4 * X,
        "attention/scores": 4 * X + S,
        "attention/probs": 2 * X + 2 * S,  # the stream and the values
        "attention/context": 3 * X + S,
        "attention/out/output": 3 * X,
        "attention/residual": 3 * X,
        "attention/norm/output": 2 * X,
        "ffn/up/output": X + F,
        "ffn/down/output": 2 * X + F,
        "ffn/residual": 3 * X,
        "ffn/norm/output": 2 * X,
    }
    assert live["encoder/embeddings/sum_token_type"] == X and live["encoder/embeddings/norm/output"] == 2 * X
    assert live["pooler/dense/input"] == X + 4 * 12 and live["classifier/output"] == 4 * (12 + 3)
    assert peak(found, tensor_memory(None, found)) == (4 * X + S, "encoder/layer_0/attention/scores")


def test_a_tensor_is_the_same_under_all_its_names():
    names = {each.name: each for each in of_bert()}
    assert "encoder/layer_0/attention/query/input" not in names, "the output of the embeddings' norm"
    assert "encoder/layer_0/attention/query_heads" not in names, "a view of query/output"
    stream = names["encoder/embeddings/norm/output"]
    readers = {passed[-1] for passed in stream.reads}
    assert readers == {
        *(("input", f"encoder/layer_0/attention/{name}/input") for name in ("query", "key", "value")),
        ("activation", "encoder/embeddings/norm/output"),  # the residual sum
    }


def test_bits_are_those_that_the_readers_need():
    found = of_bert()

    def bits(rules):
        return {item.name: item.bits for item in tensor_memory(rules, found)}

    inputs = bits(input_policy(quant.asymmetric(4)))
    four = {
        name.removeprefix("encoder/layer_0/") for name, size in inputs.items() if size == 4 and "layer_1" not in name
    }
    assert four == {"attention/context", "ffn/up/output", "pooler/dense/input"}, "others are in a residual sum, too"
    assert set(bits(policy(activations=quant.asymmetric(8))).values()) == {8}, "the pooler's part of a tensor included"
    products = {item.name: item.bits for item in product_memory(input_policy(quant.asymmetric(4)), found)}
    assert (
        products["encoder/layer_0/attention/query/input"] == 4
        and products["encoder/layer_0/attention/probs_dropped"] == 32
    )
    assert len(products) == 2 * (6 + 3 + 1) + 2
    outputs = product_memory(policy(activations={"**": quant.asymmetric(8), "x": None}), found)
    assert {item.name.removeprefix("encoder/layer_") for item in outputs if item.bits == 32} == {
        "0/ffn/up/input",
        "1/ffn/up/input",
    }
    some = bits(policy(activations={"z": quant.asymmetric(8)}, inputs={"**/query/input": quant.asymmetric(4)}))
    assert some["encoder/layer_0/ffn/norm/output"] == 8, "4 bits do for the query alone"
    both = bits(policy(activations={"c": quant.asymmetric(8)}, inputs={"**/out/input": quant.ternary()}))
    assert both["encoder/layer_0/attention/context"] == pytest.approx(1.585, abs=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_peaks_shrink_by_the_width(bits):
    found = of_bert()
    full = peak(found, tensor_memory(None, found))[0]
    rules = policy(activations=quant.asymmetric(8))
    assert peak(found, at_width(tensor_memory(rules, found), bits))[0] == full * bits // 32
    kept = tensor_memory(policy(activations={"**": quant.asymmetric(8), "s": None}), found)
    # Scores stay: 4 X and S where all have a width, now it is the probabilities that stand beside them.
    assert peak(found, at_width(kept, bits))[0] == S + bits * max(4 * X, 2 * X + S) // 32


@pytest.mark.parametrize(("bits", "published"), [(8, 0.25), (4, 0.125), (2, 0.0625), (1, 1 / 32)])
def test_published_ratios_are_without_embeddings(bits, published):
    """Of the AG_NEWS study, which gives the last one as 0.03."""
    family, config = get_family("qtx_text_classifier"), TextClassifierConfig(vocab_size=30522)
    params, sites = abstract_params(family, config), family.sites(config)
    args = family.example_inputs(config)
    found = tensors(family.module(config=config), params, *args)
    rules = pattern_policy("ALL", quant.symmetric(8))
    items = memory.weight_memory(rules, sites, params), found, tensor_memory(rules, found)
    row, last = widths_table((bits,), *items).rows
    _, weights, ratio, plain, embeddings, alive, every = row
    assert ratio == pytest.approx(published, abs=0.005) and plain == pytest.approx(published, abs=0.002)
    full = memory.totals(item for item in items[0] if "embeddings" not in item.name)["float32"] / 2**20
    assert weights == pytest.approx(ratio * full) and embeddings == 4 * 512 * (30522 + config.position_rows) / 2**20
    assert every == alive * bits / 32, "the policy quantizes no activation"
    assert last[0] == "policy" and last[2] == pytest.approx(0.25, abs=0.005)


class Residual(nn.Module):
    """Of one's own: a site before anything else, a layer within another program, a sum."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x):
        x = site(self, "stream", x)
        unused = site(self, "unused", jnp.tanh(x))
        del unused
        y = nn.jit(Dense)(6, jax.nn.relu, policy=self.policy, name="up")(x)
        return site(self, "sum", x + Dense(4, policy=self.policy, name="down")(y))


def test_a_module_of_ones_own():
    x = jnp.ones((5, 4))
    params = Residual().init(jax.random.key(0), x)["params"]
    found = tensors(Residual(policy(activations=quant.asymmetric(8))), params, x)
    assert [each.name for each in found] == ["stream", "up/output", "down/output", "sum"], (
        "what is not used is not there"
    )
    assert [each.dies for each in found] == [3, 2, 3, 3]
    items = tensor_memory(None, found)
    assert live_bytes(found, items) == [80, 80 + 120, 80 + 120 + 80, 80 + 80 + 80]
    table = live_table((32, 8), found, items)
    row = dict(zip(table.columns, table.rows[2], strict=True))
    assert row["site"] == "down/output" and row["alive until"] == "sum" and row["live at 32 bits"] == 280


@pytest.mark.parametrize(("batch", "rules"), [(1, None), (4, policy(quant.symmetric(8), quant.asymmetric(8)))])
def test_arguments_are_exactly_those_of_the_compiler(batch, rules):
    params, ids = abstract_params(BERT, TINY), jax.ShapeDtypeStruct((batch, 8), jnp.int32)
    model = BERT.module(config=TINY, policy=rules)
    forward = memory.model_memory(model, params, ids, ids, ids)["forward"]
    assert forward["arguments"] == memory.argument_bytes(model, params, ids, ids, ids)
    sites = list_sites(model, {"params": params}, ids, ids, ids)
    parameters = memory.weight_memory(rules, sites, params)
    inputs = 3 * 4 * batch * 8
    if rules is None:
        assert forward["arguments"] == memory.totals(parameters)["float32"] + inputs
        # What lies between the sites is reserved, too; and the tests' compiler hardly fuses.
        found = of_bert(batch=batch)
        alive = peak(found, tensor_memory(None, found))[0]
        assert 1 < forward["temporary"] / alive < 4
    else:
        assert forward["arguments"] > memory.totals(parameters)["float32"] + inputs
    assert forward["in all"] == forward["arguments"] + forward["temporary"] + forward["output"]
    assert forward["peak"] >= forward["arguments"] + forward["output"]


def test_widths_stand_beside_the_compiler():
    found = of_bert()
    parameters = memory.weight_memory(None, BERT.sites(TINY), abstract_params(BERT, TINY))
    sizes = {"arguments": 2**20, "temporary": 2**21, "in all": 2**22}
    programs = {"full precision": {"forward": sizes}, "quantized": {"forward": sizes | {"temporary": 2**23}}}
    rows = widths_table((32, 8, 4, 2, 1), parameters, found, tensor_memory(None, found), programs).rows
    assert [row[0] for row in rows] == [32, 8, 4, 2, 1, "policy"]
    assert rows[0][-3:] == [1, 2, 4] and rows[-1][-3:] == [1, 8, 4] and rows[1][-3:] == [None] * 3
