"""The head of masked language models: its sites, and the table that it shares with the embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from qtx import list_sites, policy, symmetric
from qtx.nn.masked_lm import BertMaskedLM
from tests.nn import tiny

TABLE = "encoder/embeddings/word/table"
ARGS = tuple(map(jnp.asarray, tiny.inputs()))


def made():
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(0).standard_normal(leaf.shape), jnp.float32) * 0.3,
        jax.eval_shape(BertMaskedLM(tiny.ONE_LAYER).init, jax.random.key(0), *ARGS)["params"],
    )


def test_sites():
    params = made()
    sites = list_sites(BertMaskedLM(tiny.ONE_LAYER), {"params": params}, *ARGS)
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
    params = made()
    plain = BertMaskedLM(tiny.ONE_LAYER)
    rounding = symmetric(3, range="dynamic")
    quantized = BertMaskedLM(tiny.ONE_LAYER, policy=policy(weights={TABLE: rounding}))
    table = params["encoder"]["embeddings"]["word"]["table"]
    step = jnp.abs(table).max() / 3
    on_grid = jnp.clip(jnp.round(table / step), -4, 3) * step
    frozen = jax.tree.map(lambda leaf: on_grid if leaf is table else leaf, params)
    got = quantized.apply({"params": params}, *ARGS).logits
    assert jnp.abs(got - plain.apply({"params": params}, *ARGS).logits).max() > 0.01
    np.testing.assert_allclose(got, plain.apply({"params": frozen}, *ARGS).logits, atol=1e-4)
