"""What differs from BERT: positions, and dropout before the pooler. Values are compared in tests/models/test_families.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import models
from qtx.nn.roberta import Embeddings, RobertaClassifier, RobertaConfig
from tests.nn import tiny

CONFIG = RobertaConfig(
    vocab_size=50, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=24, max_positions=6, type_vocab_size=1
)


@pytest.mark.parametrize("padding", [1, 3])
def test_positions_count_tokens_and_skip_padding(padding):
    ids = jnp.array([[0, 7, 8, 2], [0, 9, padding, padding], [padding, 9, 8, padding], [padding] * 4])
    config = dataclasses.replace(CONFIG, pad_token_id=padding)
    found = np.asarray(Embeddings(config).positions(ids)) - padding
    np.testing.assert_array_equal(found, [[1, 2, 3, 4], [1, 2, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]])


def test_the_longest_sequence_uses_the_last_row():
    assert CONFIG.position_rows == 8
    ids = jnp.full((1, CONFIG.max_positions), 5)
    assert int(Embeddings(CONFIG).positions(ids).max()) == CONFIG.position_rows - 1
    base = models.get_family("roberta").config_from_hf({"max_position_embeddings": 514})
    assert (base.max_positions, base.position_rows) == (512, 514)
    assert models.get_family("roberta").config_to_hf(base)["max_position_embeddings"] == 514


def test_the_head_drops_its_input_too():
    params = RobertaClassifier(CONFIG).init(jax.random.key(0), *tiny.inputs())["params"]
    config = dataclasses.replace(CONFIG, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.5)

    def apply(rate, **options):
        model = RobertaClassifier(dataclasses.replace(config, classifier_dropout=rate))
        return model.apply({"params": params}, *tiny.inputs(), **options)

    training = dict(deterministic=False, rngs={"dropout": jax.random.key(0)})
    dropped, plain = apply(0.5, **training), apply(0.5)
    np.testing.assert_array_equal(dropped.hidden_states[-1], plain.hidden_states[-1])
    assert np.all(np.any(np.asarray(dropped.pooled != plain.pooled), axis=1))
    np.testing.assert_array_equal(apply(0.0, **training).logits, plain.logits)
    assert np.any(apply(0.5, **training | {"rngs": {"dropout": jax.random.key(1)}}).logits != dropped.logits)
