"""A BERT small enough to run uncompiled, with random biases and norms so that each one matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.nn import BertClassifier, BertConfig

CONFIG = BertConfig(
    vocab_size=50, hidden_size=12, num_layers=2, num_heads=2, intermediate_size=24, max_positions=16, num_labels=3
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1)


def shapes(model):
    """Parameters as shapes."""
    ids = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids)["params"]


@functools.cache
def params(config=CONFIG):
    """Random parameters, the same on every call."""
    return random_params(BertClassifier(config))


def random_params(model):
    """Random parameters of any model with BERT's arguments; nothing is compiled."""
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(shapes(model), sep="/")
    made = {}
    for path, leaf in flat.items():
        value = rng.standard_normal(leaf.shape).astype(np.float32) * 0.3
        made[path] = jnp.asarray(value + 1 if path.endswith("scale") else value)
    return traverse_util.unflatten_dict(made, sep="/")


def inputs(seed=0, lengths=(6, 4, 2), tokens=6):
    """Ids, mask and token types `[B, T]`; padding holds id 0."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(tokens) < np.array(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(1, 50, mask.shape).astype(np.int32) * mask
    types = (np.arange(tokens) >= 3).astype(np.int32) * mask
    return ids, mask, types
