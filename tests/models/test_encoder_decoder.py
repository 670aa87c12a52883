"""Encoder-decoders on disk, made from nothing, packed."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from qtx import models, quant
from qtx.analysis import memory
from qtx.errors import UserError
from qtx.export.packed import load_quantized, save_quantized
from qtx.methods.calibrate import quantized_weights, weight_ranges
from qtx.models.checkpoints import abstract_params, from_hf_tensors, to_hf_tensors
from qtx.nn import policy
from qtx.nn.describe import describe
from qtx.nn.encoder_decoder import EncoderDecoderConfig

FAMILY = models.get_family("qtx_encoder_decoder")
SIZES = dict(
    source_vocab_size=9,
    target_vocab_size=11,
    hidden_size=8,
    num_layers=1,
    decoder_layers=2,
    num_heads=2,
    intermediate_size=12,
    max_positions=10,
)


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def made():
    return models.create("encoder_decoder", seed=1, **SIZES)


def test_defaults_are_the_published_sizes():
    family, config = models.architecture("encoder_decoder", source_vocab_size=20_000, target_vocab_size=25_000)
    assert family is FAMILY and config == EncoderDecoderConfig(20_000, 25_000)
    counts = memory.parameter_counts(abstract_params(family, config))
    assert sum(counts.values()) == 80_005_544
    assert counts["embeddings"] == 512 * 45_000 and counts["generator"] == 513 * 25_000
    assert counts["cross_attention"] == counts["self_attention"] == counts["attention"]


def test_made_from_a_seed(made):
    assert made.directory is None and made.fresh == ("decoder", "encoder", "generator")
    again, other = (models.create("encoder_decoder", None, seed, **SIZES) for seed in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    kernel = "decoder/layer_1/cross_attention/key/kernel"
    assert not np.array_equal(flat(other.params)[kernel], flat(made.params)[kernel])


@pytest.mark.parametrize("tied", ["none", "target", "all"])
def test_checkpoints_go_there_and_back(tied, tmp_path):
    sizes = SIZES | {"source_vocab_size": 11, "tied": tied, "scores": "25d", "hidden_dropout": 0.3}
    config = models.architecture("encoder_decoder", **sizes)[1]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), abstract_params(FAMILY, config))
    models.save(tmp_path, FAMILY, config, params)
    again = models.load(str(tmp_path))
    assert again.config == config and again.family is FAMILY and again.fresh == ()
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_states_of_the_published_code_are_read(made, tmp_path):
    """Query, key and value are 0, 1 and 2 of a list, kernels are transposed, sinusoids are no parameter here."""
    tensors = to_hf_tensors(FAMILY, made.config, made.params)
    layer = made.params["decoder"]["layer_1"]
    for number, name in enumerate(("query", "key", "value")):
        for theirs, ours in (("trg", "self_attention"), ("src", "cross_attention")):
            stem = f"decoder.decoder_layers.1.{theirs}_multi_headed_attention.qkv_nets.{number}"
            np.testing.assert_array_equal(tensors[f"{stem}.weight"].T, layer[ours][name]["kernel"])
    assert tensors["encoder.encoder_layers.0.pointwise_net.linear1.weight"].shape == (12, 8)
    assert tensors["decoder.decoder_layers.0.sublayers.2.norm.weight"].shape == (8,)
    tables = {f"{side}_pos_embedding.positional_encodings_table": np.zeros((10, 8)) for side in ("src", "trg")}
    found, extra = from_hf_tensors(FAMILY, made.config, tensors | tables)
    assert extra == [] and len(tensors) == len(flat(made.params))
    jax.tree.map(np.testing.assert_array_equal, found, flat(made.params))


def test_a_missing_or_foreign_tensor_is_named(made, tmp_path):
    models.save(tmp_path, made.family, made.config, made.params)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    short = {name: value for name, value in tensors.items() if name != "decoder.norm.weight"}
    safetensors.numpy.save_file(short, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="'decoder/norm'"):
        models.load(str(tmp_path))
    more = tensors | {"decoder.decoder_layers.2.sublayers.0.norm.bias": np.zeros(8, np.float32)}
    safetensors.numpy.save_file(more, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="decoder_layers.2"):
        models.load(str(tmp_path))


def test_it_has_no_labels_and_starts_from_no_checkpoint(made, tmp_path):
    with pytest.raises(UserError, match="no field 'num_labels'"):
        models.create("encoder_decoder", 2, **SIZES)
    models.save(tmp_path, made.family, made.config, made.params)
    with pytest.raises(UserError, match="no field 'num_labels'"):
        models.load(str(tmp_path), num_labels=2)
    with pytest.raises(UserError, match="does not start from a checkpoint"):
        models.create("encoder_decoder", start=str(tmp_path), **SIZES)


def test_packed(made, tmp_path):
    rules, sites = policy(quant.symmetric(4, quant.per_channel())), FAMILY.sites(made.config)
    ranges = weight_ranges(rules, sites, made.params)
    size = save_quantized(tmp_path, FAMILY, made.config, rules, made.params, ranges)
    packed = load_quantized(tmp_path)
    assert packed.config == made.config and packed.family is FAMILY
    wanted = quantized_weights(rules, sites, made.params, ranges)
    jax.tree.map(np.testing.assert_array_equal, packed.params, wanted)
    assert size == memory.totals(memory.weight_memory(rules, sites, made.params))["stored"]


def test_memory_and_description(made):
    rules = policy(quant.symmetric(8), quant.asymmetric(8))
    model, args = FAMILY.module(config=made.config, policy=rules), FAMILY.example_inputs()
    text = str(describe(model, {"params": made.params}, *args))
    assert "decoder/layer_{0..1}/cross_attention/scores" in text and "generator/kernel" in text
    activations = memory.activation_memory(rules, FAMILY.sites(made.config))
    table = memory.run_time_table(made.config, 1, 8, activations)
    assert [row[0] for row in table.rows] == ["activations"], "the published counter knows encoders alone"
