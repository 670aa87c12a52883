"""ViT and DeiT against the published implementation (golden/families/vit.npz), and their checkpoints."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qtx import asymmetric, models, policy, symmetric
from qtx.errors import UserError
from qtx.export.packed import load_quantized, save_quantized
from qtx.models.vit import PREPROCESSOR_FILE, Preprocessor
from qtx.nn import check_policy
from qtx.nn.vit import DeitConfig, VitConfig
from tests.models.hf import write_checkpoint

NAMES = ("vit", "vit_grey", "deit", "deit_teacher")
every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def golden(name):
    with np.load(Path(__file__).parent.parent / "golden" / "families" / "vit.npz") as file:
        return {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}


def config_json(name):
    return json.loads(str(golden(name)["config"]))


def state(name):
    return {key.removeprefix("state/"): value for key, value in golden(name).items() if key.startswith("state/")}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a model, written as a checkpoint."""

    @functools.cache
    def loaded(name):
        directory = tmp_path_factory.mktemp(name)
        write_checkpoint(directory, config_json(name), state(name))
        return models.load(str(directory))

    return loaded


@every_model
def test_it_is_the_published_model(load, name):
    found, want = load(name), golden(name)
    out = found.family.module(config=found.config).apply({"params": found.params}, want["pixels"])
    assert found.fresh == () and found.family.name == name.partition("_")[0]
    np.testing.assert_allclose(np.stack(out.hidden_states[:-1]), want["hidden_states"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.logits, want["logits"], atol=1e-5, rtol=0)
    assert len(out.hidden_states) == found.config.num_layers + 1
    assert np.ptp(want["logits"], axis=0).min() > 0.1, "every logit depends on the image"


@every_model
def test_checkpoints_go_there_and_back(load, name, tmp_path):
    found = load(name)
    models.save(tmp_path, found.family, found.config, found.params, Preprocessor(found.config))
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert written.keys() == state(name).keys()
    for key, value in state(name).items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    again = models.load(str(tmp_path))
    assert again.config == found.config
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@every_model
def test_transformers_reads_the_configuration(load, name, tmp_path):
    import transformers

    found, theirs = load(name), config_json(name)
    models.save(tmp_path, found.family, found.config, found.params)
    hf = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    hf["id2label"] = {str(number): label for number, label in hf["id2label"].items()}
    kept = theirs.keys() - {"dtype", "_name_or_path", "transformers_version"}
    assert {key: hf[key] for key in kept} == {key: theirs[key] for key in kept}


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_defaults_are_those_of_transformers(name):
    import transformers

    family = models.get_family(name)
    theirs = {k: v for k, v in transformers.AutoConfig.for_model(name).to_dict().items() if k != "architectures"}
    assert family.config_from_hf({}) == family.config_from_hf(theirs)


def test_the_preprocessor_of_a_checkpoint_counts(load, tmp_path):
    write_checkpoint(tmp_path, config_json("vit") | {"image_size": [12, 12]}, state("vit"))
    values = {"do_rescale": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps(values))
    found = models.load(str(tmp_path))
    assert found.config == dataclasses.replace(
        load("vit").config, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
    model = found.family.module(config=found.config)
    by_hand = (pixels / 255 - values["image_mean"]) / values["image_std"]
    want = model.apply({"params": found.params}, jnp.float32(by_hand)).logits
    np.testing.assert_allclose(model.apply({"params": found.params}, pixels).logits, want, atol=2e-5)
    for key in ("do_normalize", "do_rescale"):
        (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps({**values, key: False}))
        if key == "do_normalize":
            _, config = models.read_config(tmp_path)
            assert config.image_mean == (0.0,) * 3 and config.image_std == (1.0,) * 3
        else:
            with pytest.raises(UserError, match="rescaled by 1/255"):
                models.read_config(tmp_path)


def test_encoders_without_a_head_get_a_fresh_one(load, tmp_path):
    bare = {k.removeprefix("deit."): v for k, v in state("deit_teacher").items() if k.startswith("deit.")}
    other = {"pooler.dense.weight": np.zeros((16, 16), np.float32)}
    write_checkpoint(tmp_path, config_json("deit_teacher"), bare | other)
    found = models.load(str(tmp_path), num_labels=7)
    assert found.fresh == ("classifier", "distillation_classifier")
    assert found.params["distillation_classifier"]["kernel"].shape == (16, 7)
    jax.tree.map(np.testing.assert_array_equal, found.params["encoder"], load("deit_teacher").params["encoder"])


def test_every_tensor_is_a_site(load):
    for name, extra in (("vit", 0), ("deit", 1), ("deit_teacher", 2)):
        found = load(name)
        sites = found.family.sites(found.config)
        kinds = {kind: [site for site, info in sites.items() if info.kind == kind] for kind in ("weight", "activation")}
        layers = found.config.num_layers
        parameters = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(found.params)}
        assert set(kinds["weight"]) == {path for path in parameters if not path.endswith("/bias")}
        assert len(kinds["weight"]) == 8 * layers + 5 + extra  # patch, cls, position, norm, classifier
        assert len(kinds["activation"]) == 13 * layers + 4 + (name == "deit_teacher")
        for short in "eqkvspcguxihyzLC":
            check_policy(policy(activations={short: asymmetric(8)}), sites)
        for short in ("wC", "MHA", "FFN", "QK", "Es"):
            check_policy(policy(weights={short: symmetric(8)}), sites)


def test_packed_and_loaded(load, tmp_path):
    found, pixels = load("deit_teacher"), golden("deit_teacher")["pixels"]
    rules = policy({"wC": symmetric(4, range="dynamic")}, {"C": asymmetric(8, range="dynamic")})
    model = found.family.module(config=found.config, policy=rules)
    save_quantized(tmp_path, found.family, found.config, rules, found.params, {}, Preprocessor(found.config))
    loaded = load_quantized(tmp_path)
    assert loaded.config == found.config and loaded.original == rules
    assert json.loads((tmp_path / PREPROCESSOR_FILE).read_text())["size"] == {"height": 8, "width": 8}
    want = model.apply({"params": found.params}, pixels).logits
    np.testing.assert_allclose(loaded.model.apply(loaded.variables, pixels).logits, want, atol=1e-5)
    assert np.abs(want - golden("deit_teacher")["logits"]).max() > 1e-2, "4 bits show"


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (VitConfig, {"patch_size": 15}, "patches of 15 pixels do not divide images of 224"),
        (VitConfig, {"num_heads": 5}, "5 heads do not divide the width 768"),
        (VitConfig, {"image_size": 0}, "image_size must be a positive number"),
        (VitConfig, {"hidden_act": "gel"}, "'gelu'"),
        (VitConfig, {"pooling": "max"}, "'cls', 'mean'"),
        (VitConfig, {"image_mean": (0.1, 0.2)}, "image_mean has 2 values for 3 channels"),
        (VitConfig, {"image_std": (0.0,)}, "above 0"),
        (DeitConfig, {"distillation_head": True, "pooling": "mean"}, "each head sees its own token"),
    ],
)
def test_fields_out_of_range(kind, fields, named):
    with pytest.raises(UserError, match=named):
        kind(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"image_size": [12, 16]}, "only squares"), ({"qkv_bias": False}, "qkv_bias"), ({"hidden_act": "mish"}, "mish")],
)
def test_configurations_that_are_not_supported(fields, named):
    with pytest.raises(UserError, match=named):
        models.get_family("vit").config_from_hf(config_json("vit") | fields)


def test_from_nothing():
    sizes = dict(image_size=8, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    found = models.create("vit", num_labels=4, seed=1, **sizes)
    assert found.config == VitConfig(**sizes, num_labels=4) and found.directory is None
    assert found.params["encoder"]["embeddings"]["position"]["table"].shape == (5, 16)
    with pytest.raises(UserError, match="does not start from a checkpoint|can start from"):
        models.create("vit", start="all-MiniLM-L6-v2", **sizes)
