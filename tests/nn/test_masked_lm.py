"""The head of masked language models: its sites, and the table that it shares with the embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from qtx import list_sites, policy, symmetric
from qtx.nn.masked_lm import BertMaskedLM
from tests.nn import tiny

TABLE = "encoder/embeddings/word/table"
ARGS = tuple(map(jnp.asarray, tiny.inputs()))


PLAIN = BertMaskedLM(tiny.ONE_LAYER)


def test_sites():
    params = tiny.random_params(PLAIN)
    sites = list_sites(PLAIN, {"params": params}, *ARGS)
    weights = {name for name, info in sites.items() if info.kind == "weight"}
    parameters = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert weights == {name for name in parameters if not name.endswith("/bias")} and "decoder/bias" in parameters
    assert {name for name in sites if not name.startswith("encoder/")} == {
        "transform/dense/kernel",
        "transform/dense/input",
        "transform/dense/output",
        "transform/norm/scale",
        "transform/norm/output",
        "decoder/input",
        "decoder/output",
    }


def test_the_table_is_quantized_for_both_uses():
    params = tiny.random_params(PLAIN)
    rounding = symmetric(3, range="dynamic")
    quantized = BertMaskedLM(tiny.ONE_LAYER, policy=policy(weights={TABLE: rounding}))
    table = params["encoder"]["embeddings"]["word"]["table"]
    step = jnp.abs(table).max() / 3
    on_grid = jnp.clip(jnp.round(table / step), -4, 3) * step
    frozen = jax.tree.map(lambda leaf: on_grid if leaf is table else leaf, params)
    got = quantized.apply({"params": params}, *ARGS).logits
    assert jnp.abs(got - PLAIN.apply({"params": params}, *ARGS).logits).max() > 0.01
    np.testing.assert_allclose(got, PLAIN.apply({"params": frozen}, *ARGS).logits, atol=1e-4)
