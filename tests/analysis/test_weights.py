"""Statistics and histograms of the weights, by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image

from qtx import quant
from qtx.analysis import weights
from qtx.models import get_family
from qtx.models.checkpoints import abstract_params
from qtx.nn import BertConfig, list_sites, policy

CONFIG = BertConfig(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=6, num_labels=3
)
BERT = get_family("bert")
SHAPES = abstract_params(BERT, CONFIG)
IDS = jax.ShapeDtypeStruct((1, 4), jnp.int32)
SITES = list_sites(BERT.module(config=CONFIG), {"params": SHAPES}, IDS, IDS, IDS)


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(np.float32), SHAPES)


def by_first(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_statistics_of_every_part(params):
    found = weights.collect(params, SITES)
    assert set(found) == {"embeddings", "attention", "ffn", "pooler", "classifier"}
    rows = by_first(weights.parts_table(found))
    assert list(rows) == list(found)  # nothing is quantized
    kernels = [params["encoder"][f"layer_{i}"]["ffn"][name]["kernel"] for i in (0, 1) for name in ("up", "down")]
    values = np.concatenate([kernel.ravel() for kernel in kernels]).astype(np.float64)
    ffn = rows["ffn"]
    assert ffn["values"] == ffn["distinct"] == 2 * 2 * 8 * 12 and ffn["zeros"] == 0
    assert [ffn[name] for name in ("mean", "std", "min", "max")] == pytest.approx(
        [values.mean(), values.std(), values.min(), values.max()], rel=1e-6
    )
    assert rows["embeddings"]["values"] == (11 + 6 + 2) * 8 and rows["classifier"]["values"] == 8 * 3


def test_quantized_weights_beside_those_in_full_precision(params):
    rules = policy(weights={"FFN": quant.ternary(), "**/query/kernel": quant.symmetric(4)})
    found = weights.collect(params, SITES, rules)
    parts, tensors = by_first(weights.parts_table(found)), by_first(weights.tensors_table(found))
    assert {name for name in parts if "," in name} == {"ffn, quantized", "attention, quantized"}
    up = tensors["encoder/layer_1/ffn/up/kernel, quantized"]
    assert up["distinct"] == 3 and up["max"] == -up["min"] and 0.1 < up["zeros"] < 0.7
    assert 7 <= tensors["encoder/layer_0/attention/query/kernel, quantized"]["distinct"] <= 15
    assert "encoder/layer_0/attention/key/kernel, quantized" not in tensors
    assert len([name for name in tensors if "," not in name]) == len(SHAPES_OF_MATRICES)
    # A part that is quantized in part has all its weights in both rows.
    assert parts["attention, quantized"]["values"] == parts["attention"]["values"] == 2 * 4 * 64
    assert parts["attention, quantized"]["distinct"] <= 2 * 3 * 64 + 2 * 15 < parts["attention"]["distinct"]


SHAPES_OF_MATRICES = [leaf for leaf in jax.tree.leaves(SHAPES) if len(leaf.shape) > 1]


def test_histograms(params, tmp_path, monkeypatch):
    drawn, save = [], weights.save_figure
    monkeypatch.setattr(weights, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    found = weights.collect(params, SITES, policy(weights={"FFN": quant.ternary()}))
    weights.plot(found, tmp_path / "weights.png", bins=20)
    assert image.imread(tmp_path / "weights.png").ndim == 3
    panels = {axes.get_title("left").split(" ")[0]: axes for axes in drawn[0].axes if axes.get_visible()}
    assert set(panels) == set(found)
    full, quantized = (patch.get_data() for patch in panels["ffn"].patches)
    assert full.values.sum() == pytest.approx(1) and quantized.values.sum() == pytest.approx(1)
    assert list(full.edges) == list(quantized.edges) and len(full.values) == 20
    assert 3 <= np.count_nonzero(quantized.values) <= 12 < np.count_nonzero(full.values)  # four tensors share a zero
    assert len(panels["pooler"].patches) == 1
    same = {"pooler": [weights.Weights("pooler/kernel", np.zeros(5, np.float32))]}
    weights.plot(same, tmp_path / "same.png")
    (only,) = drawn[1].axes[0].patches
    assert only.get_data().values.max() == 1
