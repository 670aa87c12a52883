import jax
import jax.numpy as jnp
import pytest

from qtx.nn import BertClassifier, BertConfig, list_sites, policy
from qtx.nn.describe import FULL, Row, describe
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qtx.quant import asymmetric, per_channel, symmetric

CONFIG = BertConfig(40, 16, 12, 2, 32, 16)
IDS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
INPUTS = (IDS, IDS, IDS)


@pytest.fixture(scope="module")
def variables():
    return jax.eval_shape(BertClassifier(CONFIG).init, jax.random.key(0), *INPUTS)


def described(variables, **rules):
    return describe(BertClassifier(CONFIG, policy=policy(**rules)), variables, *INPUTS)


def test_every_site_and_parameter_has_one_row(variables):
    description = described(variables, weights=symmetric(8), activations=asymmetric(8))
    names = [row.name for row in description.rows]
    params = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert len(names) == len(set(names))
    assert set(names) == set(list_sites(BertClassifier(CONFIG), variables, *INPUTS)) | params


def test_summary_counts(variables):
    assert described(variables, weights=symmetric(8), activations=asymmetric(8)).summary == (
        "quantized: 161 of 161 activations, 102 of 102 weights, 0 of 122 inputs; 99 other parameters in full precision"
    )
    assert (
        "160 of 161 activations, 1 of 102"
        in described(variables, weights={"Et": symmetric(2)}, activations={"**": asymmetric(8), "C": None}).summary
    )


def test_treatments_and_reasons(variables):
    rows = {
        row.name: row
        for row in described(
            variables,
            weights={"**/kernel": symmetric(4, per_channel()), "wC": None},
            activations={"**": asymmetric(8), "y": asymmetric(16), "y3": asymmetric(4)},
        ).rows
    }

    def said(name):
        return rows[name].treatment, rows[name].reason

    layer = "encoder/layer_3/"
    assert rows[layer + "ffn/up/kernel"] == Row(
        layer + "ffn/up/kernel", "weight", (16, 32), "4-bit symmetric, per channel, static", "rule '**/kernel'"
    )
    assert said("classifier/kernel") == (FULL, "rule 'wC' (classifier/kernel) keeps it in full precision")
    assert said("encoder/embeddings/word/table") == (FULL, "no rule matches")
    assert said(layer + "ffn/residual")[1] == f"rule 'y3' ({layer}ffn/residual)"
    assert said("encoder/layer_4/ffn/residual")[1] == "rule 'y' (encoder/layer_*/ffn/residual)"
    assert said(layer + "ffn/up/input") == (FULL, "no rules for inputs")
    assert said(layer + "ffn/up/bias") == (FULL, "added in full precision after the product (bias)")
    assert said(layer + "ffn/norm/bias") == (FULL, "added in full precision after the normalisation (shift)")


def test_rows_follow_the_data(variables):
    names = [row.name for row in described(variables, weights=symmetric(8)).rows]
    expected = [
        "encoder/embeddings/word/table",
        "encoder/layer_0/attention/query/kernel",
        "encoder/layer_0/attention/scores",
        "encoder/layer_0/attention/residual",
        "encoder/layer_2/ffn/norm/output",
        "encoder/layer_10/attention/query/kernel",
        "pooler/dense/kernel",
        "pooler/dense/bias",
        "classifier/output",
    ]
    assert sorted(expected, key=names.index) == expected


def test_text_merges_layers_that_are_alike(variables):
    text = str(
        described(variables, weights=symmetric(8), activations={"**": asymmetric(8), "y2": None, "y4": asymmetric(16)})
    )
    lines = text.splitlines()
    found = [line.split() for line in lines if line.split(" ")[0].endswith("ffn/residual")]
    assert [line[0] for line in found] == [
        "encoder/layer_{0..1,3,5..11}/ffn/residual",
        "encoder/layer_2/ffn/residual",
        "encoder/layer_4/ffn/residual",
    ]
    assert sum("inputs of products" in line for line in lines) == 1 and "122 inputs" in text
    assert len(lines) < 60
    column = lines[0].index("kind")
    assert all(line[column - 2 : column] == "  " for line in lines[:-2])


def test_rules_written_for_each_layer_merge_too(variables):
    lines = str(described(variables, activations={f"y{i}": asymmetric(8) for i in range(12)})).splitlines()
    merged = [line for line in lines if line.startswith("encoder/layer_{0..11}/ffn/residual")]
    assert len(merged) == 1
    assert merged[0].endswith("rule 'y{0..11}' (encoder/layer_{0..11}/ffn/residual)")


def test_a_model_without_policy(variables):
    description = describe(BertClassifier(CONFIG), variables, *INPUTS)
    assert all(row.treatment == FULL for row in description.rows)
    assert description.rows[0].reason == "the model has no policy"


def test_a_product_whose_matrix_is_a_table_has_its_bias():
    sizes = dict(hidden_size=4, num_layers=1, decoder_layers=1, num_heads=1, intermediate_size=4)
    model, ids = EncoderDecoder(EncoderDecoderConfig(9, 9, **sizes, tied="target")), jnp.ones((1, 3), jnp.int32)
    found = describe(model, model.init(jax.random.key(0), ids, ids), ids, ids)
    reasons = {row.name: row.reason for row in found.rows if row.kind == "parameter"}
    assert "after the product" in reasons["generator/bias"] == reasons["decoder/layer_0/ffn/up/bias"]
