"""Masked language models against the published implementation (golden/families), and their checkpoints."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from qtx import models
from qtx.errors import UserError
from tests.models.hf import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
both = pytest.mark.parametrize("name", ["bert", "roberta"])


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}_masked_lm.npz") as file:
        return dict(file)


def state(name):
    return {key.removeprefix("state/"): value for key, value in golden(name).items() if key.startswith("state/")}


def written(directory, name, tensors):
    write_checkpoint(directory, json.loads(str(golden(name)["config"])), tensors)
    return str(directory)


@both
def test_it_is_the_published_model(name, tmp_path):
    found, want = models.load_masked_lm(written(tmp_path, name, state(name))), golden(name)
    args = tuple(want[key] for key in ("input_ids", "attention_mask", "token_type_ids"))
    with jax.disable_jit():
        model = found.family.module(config=found.config)
        out = model.apply({"params": found.params}, *args)
        some = model.apply({"params": found.params}, *args, np.array([[2, 0]] * 4))
    real = want["attention_mask"] > 0
    np.testing.assert_allclose(out.hidden_states[-1][real], want["hidden"][real], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.logits[real], want["logits"][real], atol=3e-5, rtol=0)
    np.testing.assert_allclose(some.logits, out.logits[:, [2, 0]], atol=3e-5, rtol=0)
    assert np.ptp(want["logits"][real], axis=0).min() > 0.1


@both
def test_checkpoints_go_there_and_back(name, tmp_path):
    found = models.load_masked_lm(written(tmp_path / "theirs", name, state(name)))
    models.save(tmp_path / "ours", found.family, found.config, found.params)
    again = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert again.keys() == state(name).keys()
    for key, value in state(name).items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    hf = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert hf["architectures"] == json.loads(str(golden(name)["config"]))["architectures"]
    jax.tree.map(np.testing.assert_array_equal, models.load_masked_lm(str(tmp_path / "ours")).params, found.params)


def test_older_names_and_other_heads_do_not_matter(tmp_path):
    tensors = state("bert")
    want = models.load_masked_lm(written(tmp_path / "new", "bert", tensors)).params
    table = tensors["bert.embeddings.word_embeddings.weight"]
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in tensors.items()}
    old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
    old |= {"cls.predictions.decoder.weight": table, "cls.seq_relationship.bias": np.zeros(2, np.float32)}
    old["bert.pooler.dense.bias"] = np.zeros(32, np.float32)
    jax.tree.map(
        np.testing.assert_array_equal, models.load_masked_lm(written(tmp_path / "old", "bert", old)).params, want
    )


def test_heads_that_are_missing_or_not_tied(tmp_path):
    tensors = state("bert")
    bare = {key: value for key, value in tensors.items() if not key.startswith("cls.")}
    with pytest.raises(UserError, match="no trained masked-LM head .*give a checkpoint of BertForMaskedLM"):
        models.load_masked_lm(written(tmp_path / "bare", "bert", bare))
    untied = tensors | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"] + 1}
    with pytest.raises(UserError, match="decoder.weight is not the table of word embeddings"):
        models.load_masked_lm(written(tmp_path / "untied", "bert", untied))
    (tmp_path / "albert").mkdir()
    (tmp_path / "albert" / "config.json").write_text(json.dumps({"model_type": "albert"}))
    with pytest.raises(UserError, match="no masked-LM head for albert; .*: bert, roberta"):
        models.load_masked_lm(str(tmp_path / "albert"))
