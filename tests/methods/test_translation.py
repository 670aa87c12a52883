"""The loss with smoothed labels against its definition, and translating many sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx.data.pair_tokenizer import Rows
from qtx.errors import UserError
from qtx.methods import translation
from qtx.methods.translation import Decoding, TranslationLoss, batch_rows, smoothed_kl, translate_all
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qtx.train.sharding import make_mesh

PAD = 1


def by_definition(logits, labels, smoothing):
    """The divergence in float64, with the distribution written out."""
    logits = np.asarray(logits, np.float64)
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    q = np.full(logits.shape, smoothing / (logits.shape[-1] - 2))
    q[..., PAD] = 0
    np.put_along_axis(q, labels[..., None], 1 - smoothing, -1)
    terms = np.where(q > 0, q * (np.log(np.maximum(q, 1e-300)) - log_p), 0)
    return np.where(labels == PAD, 0, terms.sum(-1))


@given(st.integers(0, 10), st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([1.0, 30.0]))
def test_the_loss_is_its_definition(seed, smoothing, spread):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, 4, 7)) * spread).astype(np.float32)
    labels = rng.integers(0, 7, (3, 4))
    with jax.disable_jit():
        found = smoothed_kl(jnp.asarray(logits), jnp.asarray(labels), smoothing, PAD)
    np.testing.assert_allclose(found, by_definition(logits, labels, smoothing), rtol=1e-4, atol=1e-4)


def test_labels_of_their_own_distribution_cost_nothing():
    q = np.full(6, 0.2 / 4)
    q[3], q[PAD] = 0.8, 1e-30
    found = smoothed_kl(jnp.log(q)[None], jnp.array([3]), 0.2, PAD)
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_divisors():
    labels = jnp.array([[4, 5, 3], [4, 3, PAD], [PAD, PAD, PAD]])
    batch = {"labels": labels, "weights": jnp.array([1.0, 1.0, 0.0])}
    logits = jax.random.normal(jax.random.key(0), (3, 3, 8))

    def forward(batch):
        return type("Outputs", (), {"logits": logits}), {}

    total, words = TranslationLoss(0.1)(forward, batch)
    assert words == 5 and total == pytest.approx(float(smoothed_kl(logits, labels, 0.1, PAD).sum()))
    # Two sentences times the longest of three; the filler row does not count.
    assert TranslationLoss(0.1, "rows")(forward, batch)[1] == 6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TranslationLoss(1.0), "label_smoothing 1.0"),
        (lambda: TranslationLoss(0.1, "batch"), "'tokens', 'rows'"),
        (lambda: Decoding(beam=0), "beam must be at least 1"),
        (lambda: Decoding(length_penalty=-1.0), "length_penalty must not be negative"),
    ],
)
def test_values_out_of_range(make, said):
    with pytest.raises(UserError, match=said):
        make()


CONFIG = EncoderDecoderConfig(
    source_vocab_size=9,
    target_vocab_size=8,
    hidden_size=8,
    num_heads=2,
    num_layers=1,
    decoder_layers=1,
    intermediate_size=8,
    max_positions=32,
)


def test_sentences_come_back_in_their_order_whatever_shares_their_batch():
    model = EncoderDecoder(CONFIG)
    ids = jnp.zeros((1, 4), jnp.int32)
    variables = {"params": model.init(jax.random.key(0), ids, ids)["params"]}
    rng = np.random.default_rng(0)
    rows = [list(rng.integers(2, 9, length)) for length in (3, 9, 0, 1, 12, 3, 7)]
    source, mesh, done = Rows.of(rows), make_mesh(), []
    options = Decoding(beam=2, limit=5, batch_size=3, buckets=2)
    found = translate_all(model, variables, source, options, mesh, told=done.append)
    assert found.shape == (7, 6) and done[-1] == 7 and done == sorted(done)
    assert list(found[2]) == [2, 1, 1, 1, 1, 1]  # nothing to translate
    for number in (1, 5):
        alone = translate_all(model, variables, Rows.of([rows[number]]), options, mesh)
        np.testing.assert_array_equal(alone[0], found[number])
    assert translate_all(model, variables, Rows.of([]), options, mesh).shape == (0, 6)


@pytest.mark.parametrize(
    ("sentences", "batch_size", "parts", "rows"),
    [(1, 64, 1, 1), (5, 64, 1, 8), (64, 64, 1, 64), (65, 64, 1, 64), (3, 3, 1, 3), (1, 64, 8, 8), (5, 60, 6, 12)],
)
def test_rows_of_a_batch(sentences, batch_size, parts, rows):
    assert batch_rows(sentences, batch_size, parts) == rows


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ((5,), [(1, 8)]),
        ((1, 9, 17, 25, 3), [(8, 32)]),  # what one batch holds is compiled for one length
        ((1, 9, 1, 9, 1, 9, 1, 9, 1), [(8, 8), (8, 16)]),
    ],
)
def test_few_sentences_make_a_small_batch(monkeypatch, lengths, shapes):
    seen = []

    def pretend(model, variables, ids, *, limit, **options):
        seen.append(ids.shape)
        return type("Decoded", (), {"tokens": np.zeros((len(ids), limit + 1), np.int32)})

    monkeypatch.setattr(translation, "translate", pretend)
    source = Rows.of([[4] * length for length in lengths])
    translate_all(EncoderDecoder(CONFIG), {"params": {}}, source, Decoding(batch_size=8, limit=3), make_mesh())
    assert seen == shapes
