"""A tiny student and its batches, for tests of methods with a teacher."""

import jax
import jax.numpy as jnp
import numpy as np

from qtx.train.phase import Forward
from tests.nn import tiny

LENGTHS = (6, 4, 2)  # tokens of the texts of a batch


def other_params(config=tiny.CONFIG):
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(7 * leaf), tiny.params(config))


def batch_of(lengths=LENGTHS, tokens=6, seed=0, labels=(0, 2, 1), weights=None):
    ids, mask, types = tiny.inputs(seed, lengths, tokens)
    weights = np.ones(len(ids), np.float32) if weights is None else np.asarray(weights, np.float32)
    return {
        "input_ids": jnp.asarray(ids),
        "attention_mask": jnp.asarray(mask),
        "token_type_ids": jnp.asarray(types),
        "labels": jnp.asarray(labels),
        "weights": jnp.asarray(weights),
    }


def forward_of(model, params):
    def run(batch, capture=False, **collections):
        args = [batch[name] for name in model.inputs]
        mutable = ["captures"] if capture else []
        outputs, found = model.apply({"params": params, **collections}, *args, mutable=mutable)
        return outputs, found.get("captures", {})

    return Forward(run)
