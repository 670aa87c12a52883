"""The parts of a vision transformer that have a meaning of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.errors import UserError
from qtx.nn.vit import DeitConfig, VitClassifier, VitConfig, normalised, patches

TINY = dict(image_size=8, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, num_labels=3)


def test_patches_are_cut_row_by_row():
    image = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    found = patches(jnp.asarray(image), 2)
    assert found.shape == (2, 9, 12)
    for row in range(3):
        for column in range(3):
            want = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, -1)
            np.testing.assert_array_equal(found[:, 3 * row + column], want)


def test_integers_are_normalised_and_numbers_are_not():
    config = VitConfig(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 1.0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    want = (pixels / 255 - config.image_mean) / config.image_std
    np.testing.assert_allclose(normalised(jnp.asarray(pixels), config), want, atol=1e-6)
    np.testing.assert_array_equal(normalised(jnp.float32(pixels), config), np.float32(pixels))


def init(config):
    """Returns a model and random variables, made without a compilation."""
    model, rng = VitClassifier(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *VitClassifier.example_inputs(config))
    return model, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) / 4, shapes)


def test_the_mean_of_two_heads():
    config = DeitConfig(**TINY, distillation_head=True)
    pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    model, variables = init(config)
    found, seen = model.apply(variables, pixels, mutable=["captures"])
    heads = [seen["captures"][name]["output"] for name in ("classifier", "distillation_classifier")]
    np.testing.assert_allclose(found.logits, (heads[0] + heads[1]) / 2, rtol=1e-6)
    params = variables["params"]
    one = DeitConfig(**TINY)
    plain = VitClassifier(one).apply({"params": {k: params[k] for k in ("encoder", "classifier")}}, pixels)
    np.testing.assert_allclose(plain.logits, heads[0], rtol=1e-6)


def test_pooling_and_dropout():
    config = VitConfig(**TINY, pooling="mean", hidden_dropout=0.5, attention_dropout=0.5, classifier_dropout=0.5)
    pixels = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    model, variables = init(config)
    found, seen = model.apply(variables, pixels, mutable=["captures"])
    np.testing.assert_allclose(found.pooled, seen["captures"]["encoder"]["norm"]["output"].mean(1), atol=1e-6)
    dropped = model.apply(variables, pixels, deterministic=False, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(dropped.logits, found.logits)


def test_images_of_another_shape_are_refused():
    model, variables = init(VitConfig(**TINY))
    with pytest.raises(UserError, match=r"\(8, 8, 1\).*\(8, 8, 3\)"):
        model.apply(variables, np.zeros((1, 8, 8, 1), np.uint8))
