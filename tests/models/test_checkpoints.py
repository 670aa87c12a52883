"""Checkpoints in the Hugging Face layout: what is written, what is read, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from qtx import models
from qtx.errors import UserError
from qtx.models import bert
from qtx.models.checkpoints import read_config, to_hf_tensors
from qtx.nn import BertClassifier, BertConfig
from tests.models.hf import write_checkpoint
from tests.nn import tiny

FAMILY = models.get_family("bert")
HF = {"model_type": "bert", **bert.config_to_hf(tiny.CONFIG)}
D, FF, V, T, TYPES, LABELS = 12, 24, 50, 16, 2, 3


def expected_shapes():
    """Names and shapes of a BertForSequenceClassification, written out."""
    e, shapes = "bert.embeddings.", {}
    for name, rows in {"word_embeddings": V, "position_embeddings": T, "token_type_embeddings": TYPES}.items():
        shapes[f"{e}{name}.weight"] = (rows, D)
    norms = [e + "LayerNorm"]
    dense = {"bert.pooler.dense": (D, D), "classifier": (LABELS, D)}
    for i in range(2):
        layer = f"bert.encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            dense[layer + name] = (D, D)
        dense[layer + "intermediate.dense"] = (FF, D)
        dense[layer + "output.dense"] = (D, FF)
        norms += [layer + "attention.output.LayerNorm", layer + "output.LayerNorm"]
    for name, shape in dense.items():
        shapes[name + ".weight"], shapes[name + ".bias"] = shape, (shape[0],)
    for name in norms:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (D,)
    return shapes


def tensors():
    return to_hf_tensors(FAMILY, tiny.CONFIG, tiny.params())


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    models.save(tmp_path / "made" / "here", FAMILY, tiny.CONFIG, tiny.params())
    return tmp_path / "made" / "here"


# Writing and reading


def test_round_trip_bit_for_bit(saved):
    found = models.load(str(saved))
    equal_trees(found.params, tiny.params())
    assert found.config == tiny.CONFIG and found.fresh == () and found.directory == saved and found.family is FAMILY
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_own_fields_survive(tmp_path):
    config = dataclasses.replace(tiny.CONFIG, pooling="mean", logit_range=(0.0, 5.0), hidden_act="relu", pad_token_id=3)
    config = dataclasses.replace(config, classifier_dropout=0.25)
    models.save(tmp_path, FAMILY, config, tiny.params())
    assert models.load(str(tmp_path)).config == config


def test_names_and_shapes_are_the_published_ones(saved):
    written = safetensors.numpy.load_file(saved / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == expected_shapes()
    assert all(value.dtype == np.float32 for value in written.values())
    kernel = tiny.params()["encoder"]["layer_1"]["ffn"]["up"]["kernel"]
    np.testing.assert_array_equal(written["bert.encoder.layer.1.intermediate.dense.weight"], np.asarray(kernel).T)
    with safetensors.safe_open(saved / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_transformers_reads_the_configuration(saved):
    import transformers

    hf = transformers.AutoConfig.from_pretrained(saved)
    assert type(hf).__name__ == "BertConfig" and hf.architectures == ["BertForSequenceClassification"]
    for theirs, ours in bert.FIELDS.items():
        assert getattr(hf, theirs) == getattr(tiny.CONFIG, ours), theirs
    assert hf.num_labels == 3
    assert json.loads((saved / "config.json").read_text())["model_type"] == "bert"


def test_regression_is_marked(tmp_path):
    params = dict(tiny.params()) | {"classifier": {"kernel": np.zeros((D, 1)), "bias": np.zeros(1)}}
    models.save(tmp_path, FAMILY, dataclasses.replace(tiny.CONFIG, num_labels=1), params)
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "regression"
    assert models.load(str(tmp_path)).config.num_labels == 1


def test_the_tokenizer_reloads(tmp_path):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    models.save(tmp_path / "out", FAMILY, tiny.CONFIG, tiny.params(), tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("hello world")["input_ids"] == tokenizer("hello world")["input_ids"]
    assert len(again("hello world")["input_ids"]) == 5


def test_writing_over_a_checkpoint_replaces_it(saved):
    params = jax.tree.map(lambda x: x + 1, tiny.params())
    models.save(saved, FAMILY, tiny.CONFIG, params)
    equal_trees(models.load(str(saved)).params, params)


# Other layouts of the same model


def without_head(values):
    return {name: value for name, value in values.items() if name != "classifier.weight" and name != "classifier.bias"}


def test_names_without_the_prefix(tmp_path):
    """A bare encoder, as BertModel saves it: no 'bert.' and no classifier."""
    bare = {name.removeprefix("bert."): value for name, value in without_head(tensors()).items()}
    write_checkpoint(tmp_path, HF, bare)
    found = models.load(str(tmp_path))
    assert found.fresh == ("classifier",)
    for name in ("encoder", "pooler"):
        equal_trees(found.params[name], tiny.params()[name])
    assert found.params["classifier"]["kernel"].shape == (D, LABELS)
    assert 0 < np.abs(found.params["classifier"]["kernel"]).max() < 0.2


def test_gamma_and_beta(tmp_path):
    """Layer norms of checkpoints converted from TensorFlow."""
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors().items()
    }
    assert sum(name.endswith(("gamma", "beta")) for name in old) == 10
    write_checkpoint(tmp_path, HF, old)
    equal_trees(models.load(str(tmp_path)).params, tiny.params())


def test_heads_of_pretraining_and_position_ids_are_left_out(tmp_path):
    more = {
        "cls.predictions.bias": np.zeros(V, np.float32),
        "cls.seq_relationship.weight": np.zeros((2, D), np.float32),
        "bert.embeddings.position_ids": np.arange(T)[None],
    }
    write_checkpoint(tmp_path, HF, tensors() | more)
    equal_trees(models.load(str(tmp_path)).params, tiny.params())


def test_sharded_checkpoints(tmp_path):
    write_checkpoint(tmp_path, HF, {})
    (tmp_path / "model.safetensors").unlink()
    values = tensors()
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(values)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: v for n, v in values.items() if where[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    equal_trees(models.load(str(tmp_path)).params, tiny.params())


def test_half_precision_becomes_float32(tmp_path):
    write_checkpoint(tmp_path, HF, {name: value.astype(np.float16) for name, value in tensors().items()})
    found = models.load(str(tmp_path))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found.params))
    equal_trees(found.params, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), tiny.params()))


def test_fresh_head_and_number_of_labels(tmp_path):
    params = tiny.params(tiny.ONE_LAYER)
    models.save(tmp_path, FAMILY, tiny.ONE_LAYER, params)
    one, other = (models.load(str(tmp_path), num_labels=5, fresh_head=True, seed=seed) for seed in (0, 1))
    assert one.fresh == ("classifier", "pooler/dense") and one.config.num_labels == 5
    equal_trees(one.params["encoder"], params["encoder"])
    assert np.any(np.asarray(one.params["classifier"]["kernel"]) != np.asarray(other.params["classifier"]["kernel"]))
    assert one.params["classifier"]["kernel"].shape == (D, 5)
    assert np.any(
        np.asarray(one.params["pooler"]["dense"]["kernel"]) != np.asarray(params["pooler"]["dense"]["kernel"])
    )


def test_overrides(saved):
    found = models.load(str(saved), hidden_dropout=0.0, pooling="mean")
    assert found.config == dataclasses.replace(tiny.CONFIG, hidden_dropout=0.0, pooling="mean")


def test_loaded_parameters_are_those_of_the_module(saved):
    shapes = tiny.shapes(BertClassifier(tiny.CONFIG))
    loaded = models.load(str(saved)).params
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_configuration_defaults_are_bert_base():
    assert bert.config_from_hf({"model_type": "bert"}) == BertConfig()
    assert bert.config_from_hf(bert.config_to_hf(tiny.CONFIG)) == tiny.CONFIG
    assert bert.config_from_hf({"num_labels": 7}).num_labels == 7


# Errors


def refuse(directory, words, **options):
    with pytest.raises(UserError) as error:
        models.load(str(directory), **options)
    message = str(error.value)
    assert words in message, message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["xlnet", "bort", None])
def test_another_architecture(tmp_path, kind):
    write_checkpoint(tmp_path, HF | {"model_type": kind}, tensors())
    refuse(tmp_path, f"model family {str(kind)!r} is not supported")


def test_a_missing_tensor_is_named(tmp_path):
    values = tensors()
    del values["bert.encoder.layer.1.output.dense.bias"]
    write_checkpoint(tmp_path, HF, values)
    assert "encoder/layer_1/ffn/down" in refuse(tmp_path, "lacks")


def test_an_extra_tensor_is_named(tmp_path):
    name = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    write_checkpoint(tmp_path, HF, tensors() | {name: np.zeros((3, 3), np.float32)})
    refuse(tmp_path, name)


@pytest.mark.parametrize("extra", ["bert.encoder.layer.2.output.dense.weight", "something", "bert.pooler.dense.scale"])
def test_extra_tensors_that_look_familiar(tmp_path, extra):
    write_checkpoint(tmp_path, HF, tensors() | {extra: np.zeros((D, FF), np.float32)})
    refuse(tmp_path, extra)


def test_a_wrong_shape_says_which_and_what(tmp_path):
    values = tensors() | {"bert.embeddings.word_embeddings.weight": np.zeros((49, D), np.float32)}
    write_checkpoint(tmp_path, HF, values)
    refuse(
        tmp_path, "encoder/embeddings/word/table has shape (49, 12), expected (50, 12); its config.json does not fit it"
    )


def test_another_number_of_labels_says_the_remedy(saved):
    refuse(saved, "another task: give a model of this one, or fresh_head=True", num_labels=5)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(saved, keep):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refuse(saved, "is the file truncated?")


def test_the_directory_of_a_run_names_its_models(saved):
    run = saved.parent
    saved.rename(run / "model")
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{run} is the directory of a run; give its model: {run / 'model'}$"):
        models.load(str(run))
    (run / "quantized").mkdir()
    (run / "quantized" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"{run / 'model'} or {run / 'quantized'}"):
        models.locate(str(run))
    (run / "model.safetensors").write_bytes(b"")  # a checkpoint, whatever else lies in its directory
    assert models.locate(str(run)) == run


def test_no_config(saved):
    (saved / "config.json").unlink()
    refuse(saved, "holds no config.json")


def test_broken_config(saved):
    (saved / "config.json").write_text('{"model_type": "be')
    refuse(saved, "is not valid JSON")


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    refuse(saved, "model.safetensors does not exist, nor does pytorch_model.bin")
    (saved / "pytorch_model.bin").write_bytes(b"")
    refuse(saved, "pytorch_model.bin cannot be read")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not supported; did you mean 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is"),
    ],
)
def test_unsupported_configurations(tmp_path, change, words):
    write_checkpoint(tmp_path, HF | change, tensors())
    refuse(tmp_path, words)


def test_unknown_override(saved):
    refuse(saved, "no field 'hidden_droput'; did you mean 'hidden_dropout'", hidden_droput=0.1)


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "a/b/c"])
def test_no_such_directory(name):
    refuse(name, f"no such checkpoint directory: {name}")


def test_read_config(saved):
    assert read_config(saved) == (FAMILY, tiny.CONFIG)


def test_every_tensor_name_is_used_once():
    modules = FAMILY.modules(tiny.CONFIG)
    assert len(modules) == len(set(modules.values()))
    flat = traverse_util.flatten_dict(tiny.params(), sep="/")
    assert len(tensors()) == len(flat)


def test_labels_are_kept(saved, tmp_path):
    assert models.read_labels(saved) == ()
    models.save(tmp_path, FAMILY, tiny.CONFIG, tiny.params(), labels=("no", "yes", "perhaps"))
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
    assert hf["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    assert models.read_labels(tmp_path) == ("no", "yes", "perhaps")
    equal_trees(models.load(str(tmp_path)).params, tiny.params())
    del hf["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(hf | {"num_labels": 3}))
    assert models.read_labels(tmp_path) == ("no", "yes", "perhaps")


def test_some_layers_are_kept(saved):
    whole = models.load(str(saved))
    found = models.keep_layers(whole, (1,))
    assert found.config == dataclasses.replace(whole.config, num_layers=1)
    encoder = whole.params["encoder"]
    equal_trees(found.params["encoder"], {"embeddings": encoder["embeddings"], "layer_0": encoder["layer_1"]})
    equal_trees(found.params["classifier"], whole.params["classifier"])
    for layers in ((1, 0), (0, 0), (2,), (-1,)):
        with pytest.raises(UserError, match="from 0 to 1, rising"):
            models.keep_layers(whole, layers)
