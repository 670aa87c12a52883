"""Text classifiers on disk, made from nothing, and started from a BERT checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from qtx import models
from qtx.errors import UserError
from qtx.models.checkpoints import abstract_params, from_hf_tensors, to_hf_tensors
from qtx.models.text_classifier import started_modules
from qtx.nn.text_classifier import TextClassifierConfig
from tests.nn import tiny

FAMILY = models.get_family("qtx_text_classifier")
SIZES = dict(vocab_size=50, hidden_size=12, num_heads=2, intermediate_size=20, classifier_size=8, max_positions=10)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def made():
    return models.create("text_classifier", num_labels=3, seed=1, **SIZES)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of three layers, 16 positions and the width of `SIZES`."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=3)
    directory = tmp_path_factory.mktemp("bert")
    models.save(directory, models.get_family("bert"), config, tiny.params(config))
    return str(directory)


def test_defaults_are_the_published_sizes():
    family, config = models.architecture("text_classifier")
    assert family is FAMILY and config == TextClassifierConfig()
    counts = [leaf.size for leaf in jax.tree.leaves(abstract_params(family, config))]
    assert sum(counts) == 20_624_388


def test_made_from_a_seed(made):
    assert made.config.num_labels == 3 and made.config.num_layers == 2 and made.directory is None
    assert made.fresh == ("classifier", "encoder")
    again, other = (models.create("text_classifier", 3, seed, **SIZES) for seed in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    kernel = "encoder/layer_1/attention/key/kernel"
    assert not np.array_equal(flat(other.params)[kernel], flat(made.params)[kernel])


def test_checkpoints_go_there_and_back(made, tmp_path):
    config = dataclasses.replace(
        made.config, mask="published", embedding="twice", classifier_relu=False, hidden_dropout=0.3
    )
    models.save(tmp_path, made.family, config, made.params)
    again = models.load(str(tmp_path))
    assert again.config == config and again.family is FAMILY and again.fresh == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert written["sublayer_ffn.1.ffn.w_1.weight"].shape == (20, 12) and len(written) == len(flat(made.params))
    headless = models.load(str(tmp_path), num_labels=5, fresh_head=True, seed=3)
    assert set(headless.fresh) == {"classifier/hidden", "classifier/out"}
    assert headless.params["classifier"]["out"]["kernel"].shape == (8, 5)


def test_states_of_the_published_code_are_read(made):
    """Its norms have other names for their parameters, and its sinusoids are no parameter here."""
    tensors = to_hf_tensors(FAMILY, made.config, made.params)
    old = {
        name.replace("layernorm.weight", "layernorm.a_2").replace("layernorm.bias", "layernorm.b_2"): value
        for name, value in tensors.items()
    }
    found, extra = from_hf_tensors(FAMILY, made.config, old | {"input_encodings.pe": np.zeros((1, 10, 12))})
    assert extra == [] and old.keys() != tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, found, flat(made.params))


def test_the_tokenizer_reloads_beside_a_family_that_transformers_does_not_know(made, tmp_path):
    from qtx.data import load_tokenizer
    from tests.models.hf import make_tokenizer

    models.save(tmp_path, made.family, made.config, made.params, make_tokenizer("bert", ["film", "good"]))
    assert load_tokenizer(tmp_path)("good film")["input_ids"] == [2, 6, 5, 3]


def test_embeddings_and_attention_come_from_bert(made, bert):
    started = models.create("text_classifier", 3, 1, bert, **SIZES)
    theirs, ours, fresh = flat(models.load(bert).params), flat(started.params), flat(made.params)
    modules = started_modules(started.config)
    assert len(modules) == 2 + 2 * 5
    for path, value in ours.items():
        given = path.rpartition("/")[0] in modules
        assert given == ("ffn" not in path and not path.startswith("classifier")), path
        np.testing.assert_array_equal(value, theirs[path][: len(value)] if given else fresh[path], err_msg=path)
    assert started.fresh == ("classifier", "encoder")
    assert ours["encoder/embeddings/position/table"].shape == (10, 12)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 16}, "has hidden_size 12, the model that is to start from it has 16"),
        ({"vocab_size": 60}, "vocab_size 50"),
        ({"num_heads": 3}, "num_heads 2"),
        ({"num_layers": 4}, "has 3 layers, the model that is to start from it has 4"),
        ({"max_positions": 17}, "has 16 positions"),
    ],
)
def test_sizes_that_cannot_start_from_a_bert(bert, change, named):
    with pytest.raises(UserError, match=named):
        models.architecture("text_classifier", bert, **SIZES | change)


def test_it_starts_from_bert_alone(made, tmp_path):
    models.save(tmp_path, made.family, made.config, made.params)
    with pytest.raises(UserError, match="can start from a bert checkpoint alone"):
        models.architecture("text_classifier", str(tmp_path), **SIZES)


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'text_classifier'"):
        models.architecture("text_clasifier")
    with pytest.raises(UserError, match="has no field 'num_layer'; did you mean 'num_layers'"):
        models.create("text_classifier", num_layer=1)
