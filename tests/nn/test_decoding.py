"""Greedy and beam search against plain loops over one sentence at a time, on tables instead of models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx.errors import UserError
from qtx.nn.decoding import MARKERS, Decoded, Markers, beam_search, greedy, length_factors, translate
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

BOS, EOS, PAD = 2, 3, 1


def step_of(logits):
    """The step function of tables `[B, P, V, V]`: logits of the next token by sentence, position and newest token.

    Its cache is the history of each hypothesis, and its answer is NaN unless that history fits the newest token: a cache
    that does not follow its hypothesis shows.
    """
    logits = jnp.asarray(logits, jnp.float32)
    batch, positions, vocabulary, _ = logits.shape

    def step(cache, tokens, position):
        history = cache["history"].at[:, :, position].set(tokens)
        steps = jnp.arange(positions)
        weights = jnp.where(steps <= position, (steps + 1) ** 2, 0)
        digest = cache["digest"]["sum"] + (position + 1) ** 2 * tokens
        follows = jnp.sum(history * weights, -1) == digest
        found = jax.vmap(lambda table, tokens: table[position, tokens])(logits, tokens)
        return jnp.where(follows[..., None], found, jnp.nan), {"history": history, "digest": {"sum": digest}}

    def cache(beam):
        return {
            "history": jnp.zeros((batch, beam, positions), jnp.int32),
            "digest": {"sum": jnp.zeros((batch, beam), jnp.int32)},
        }

    return step, cache


@functools.partial(jax.jit, static_argnames=("beam", "limit", "alpha", "markers"))
def run_beam(logits, real, beam, limit, alpha=0.6, markers=MARKERS):
    step, cache = step_of(logits)
    return beam_search(step, cache(beam), real, beam, limit, alpha=alpha, markers=markers)


@functools.partial(jax.jit, static_argnames=("limit", "alpha", "markers"))
def run_greedy(logits, real, limit, alpha=0.6, markers=MARKERS):
    step, cache = step_of(logits)
    return greedy(step, cache(1), real, limit, alpha=alpha, markers=markers)


def log_softmax(logits):
    """In float32, as a model gives it; `[..., V]`."""
    shifted = logits.astype(np.float32) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.sum(np.exp(shifted), -1, keepdims=True))).astype(np.float32)


def of_table(logits):
    """Log probabilities `[V]` of the next token by prefix, from one table `[P, V, V]`."""
    log_probs = log_softmax(np.asarray(logits))
    return lambda tokens: log_probs[len(tokens) - 1, tokens[-1]]


def plain_beam(log_probs, beam, limit, alpha):
    """Beam search as its definition reads: lists of Python floats, every pair sorted."""
    alive, finished = [([BOS], 0.0)], []

    def normalised(hypothesis):
        tokens, total = hypothesis
        return total / ((5 + len(tokens) - 1) / 6) ** alpha

    for _ in range(limit):
        pairs = []
        for tokens, total in alive:
            for token, value in enumerate(log_probs(tokens)):
                pairs.append((tokens + [token], total + float(value)))
        pairs.sort(key=lambda pair: -pair[1])  # stable: equals stay in their order
        alive = []
        for tokens, total in pairs[: 2 * beam]:
            (finished if tokens[-1] == EOS else alive).append((tokens, total))
            if len(alive) == beam:
                break
        if len(finished) >= beam or not alive:
            break
    best = max(finished or alive, key=normalised)  # the first of equals
    return *best, normalised(best)


def plain_greedy(logits, limit):
    tokens, total = [BOS], 0.0
    for position in range(limit):
        row = log_softmax(np.asarray(logits))[position, tokens[-1]]
        tokens.append(int(np.argmax(row)))
        total += float(row[tokens[-1]])
        if tokens[-1] == EOS:
            break
    return tokens, total


def check(found: Decoded, row: int, tokens, total, score=None):
    """Row `row` of what was found is that hypothesis."""
    width = found.tokens.shape[1]
    assert found.tokens[row].tolist() == tokens + [PAD] * (width - len(tokens))
    assert found.lengths[row] == len(tokens)
    np.testing.assert_allclose(found.log_probs[row], total, rtol=1e-5, atol=1e-5)
    if score is not None:
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-5, atol=1e-5)


def tables(seed, batch=3, positions=7, vocabulary=6, spread=2.0, end=0.0):
    """Random tables; `end` is added to the logits of the end token."""
    logits = spread * np.random.default_rng(seed).standard_normal((batch, positions, vocabulary, vocabulary))
    logits[..., EOS] += end
    return logits.astype(np.float32)


def everyone(logits):
    return jnp.ones(len(logits), bool)


@given(
    st.integers(0, 10_000),
    st.sampled_from([(2, 0.0), (3, 1.5), (4, 0.6)]),
    st.sampled_from([-4.0, 0.0, 2.0]),
    st.sampled_from([0.3, 3.0]),
)
def test_beam_search_is_its_definition(seed, setting, end, spread):
    beam, alpha = setting
    logits = tables(seed, end=end, spread=spread)
    found = run_beam(logits, everyone(logits), beam, 7, alpha)
    for row, table in enumerate(logits):
        check(found, row, *plain_beam(of_table(table), beam, 7, alpha))


@given(st.integers(0, 10_000), st.sampled_from([-4.0, 0.0, 2.0]))
def test_greedy_and_a_beam_of_one_are_the_same(seed, end):
    logits = tables(seed, end=end)
    first, second = run_greedy(logits, everyone(logits), 7), run_beam(logits, everyone(logits), 1, 7)
    for row, table in enumerate(logits):
        check(first, row, *plain_greedy(table, 7))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_allclose(first.scores, second.scores, rtol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([2, 3]))
def test_equals_keep_their_order(seed, beam):
    # Whole logits of few values, the same sum of exponentials everywhere: sums of equal length tie often and exactly.
    rng = np.random.default_rng(seed)
    row = np.array([0, 0, 1, 1, 2, 2], np.float32)
    logits = np.stack([rng.permutation(row) for _ in range(2 * 5 * 6)]).reshape(2, 5, 6, 6)
    found = run_beam(logits, everyone(logits), beam, 5, 0.0)
    for i, table in enumerate(logits):
        want = _in_float32(table, beam, 5)
        assert found.tokens[i].tolist()[: len(want)] == want and int(found.lengths[i]) == len(want)


def _in_float32(table, beam, limit):
    """`plain_beam` with alpha 0 whose sums are float32: what ties in float64 by chance of rounding does not matter here."""
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(table)))
    alive, finished = [([BOS], np.float32(0))], []
    for position in range(limit):
        pairs = [
            (tokens + [token], np.float32(total + value))
            for tokens, total in alive
            for token, value in enumerate(log_probs[position, tokens[-1]])
        ]
        pairs.sort(key=lambda pair: -pair[1])
        alive = []
        for pair in pairs[: 2 * beam]:
            (finished if pair[0][-1] == EOS else alive).append(pair)
            if len(alive) == beam:
                break
        if len(finished) >= beam:
            break
    return max(finished or alive, key=lambda pair: pair[1])[0]


def test_flat_tables_tie_everywhere():
    logits = np.zeros((2, 4, 6, 6), np.float32)
    for beam in (3, 5):
        found = run_beam(logits, everyone(logits), beam, 4)
        check(found, 0, *plain_beam(of_table(logits[0]), beam, 4, 0.6))
    assert run_greedy(logits, everyone(logits), 4).tokens[0].tolist() == [BOS, 0, 0, 0, 0]


def test_the_end_token_at_once():
    logits = tables(0)
    logits[:, 0, :, EOS] = 30.0
    for found in (run_greedy(logits, everyone(logits), 7), run_beam(logits, everyone(logits), 4, 7)):
        for row in range(3):
            check(found, row, [BOS, EOS], 0.0, 0.0)
    assert run_greedy(logits, everyone(logits), 7).steps == 1


def test_the_limit_without_an_end():
    logits = tables(1, end=-100.0)
    found = run_beam(logits, everyone(logits), 3, 7)
    assert (found.lengths == 8).all() and not (found.tokens == EOS).any() and found.steps == 7
    for row, table in enumerate(logits):
        check(found, row, *plain_beam(of_table(table), 3, 7, 0.6))
    assert (run_greedy(logits, everyone(logits), 7).lengths == 8).all()


def test_an_end_at_the_limit_counts():
    logits = tables(2, end=-100.0)
    logits[:, 6, :, EOS] = 30.0
    found = run_beam(logits, everyone(logits), 3, 7)
    assert (found.tokens[:, -1] == EOS).all()
    for row, table in enumerate(logits):
        check(found, row, *plain_beam(of_table(table), 3, 7, 0.6))


@pytest.mark.parametrize("beam", [1, 4, 9])
@pytest.mark.parametrize("vocabulary", [4, 5])
def test_a_beam_larger_than_the_vocabulary(beam, vocabulary):
    logits = tables(3, vocabulary=vocabulary)
    found = run_beam(logits, everyone(logits), beam, 7)
    for row, table in enumerate(logits):
        check(found, row, *plain_beam(of_table(table), beam, 7, 0.6))


def test_a_vocabulary_of_end_tokens_alone():
    logits = jnp.zeros((2, 3, 1, 1))
    found = run_beam(logits, everyone(logits), 3, 3, markers=Markers(0, 0, 0))
    assert found.lengths.tolist() == [2, 2] and found.steps == 1


def test_rows_stop_at_different_times_and_do_not_touch_each_other():
    logits = tables(4, batch=6, end=-30.0)
    for row, stop in enumerate((0, 1, 2, 4, 6)):
        logits[row, stop, :, EOS] = 30.0
    together = run_beam(logits, everyone(logits), 3, 7)
    assert together.lengths.tolist()[:5] == [2, 3, 4, 6, 8] and together.steps == 7
    simple = run_greedy(logits, everyone(logits), 7)
    for row, table in enumerate(logits):
        check(together, row, *plain_beam(of_table(table), 3, 7, 0.6))
        check(simple, row, *plain_greedy(table, 7))


def test_filler_rows_keep_nobody_waiting():
    logits = tables(5, batch=3, end=-100.0)
    logits[0, 1, :, EOS] = 60.0
    real = jnp.array([True, False, False])
    for found in (run_greedy(logits, real, 7), run_beam(logits, real, 2, 7)):
        assert found.lengths.tolist() == [3, 1, 1] and found.steps < 7
        assert found.tokens[1].tolist() == [BOS] + [PAD] * 7
        assert found.log_probs[1] == found.scores[1] == 0
    nobody = run_beam(logits, jnp.zeros(3, bool), 2, 7)
    assert nobody.steps == 0 and (nobody.lengths == 1).all()


def test_tokens_of_probability_zero_come_last():
    logits = tables(6)
    logits[..., 4:] = -np.inf
    logits[0, :, :, EOS] = -np.inf
    for beam in (2, 4):  # 4: so few tokens are possible that others have to be taken
        found = run_beam(logits, everyone(logits), beam, 7)
        assert not np.isnan(found.scores).any() and np.isfinite(found.scores[1:]).all()
        for row, table in enumerate(logits):
            check(found, row, *plain_beam(of_table(table), beam, 7, 0.6))


def test_a_sentence_stops_when_nothing_better_can_come():
    # The end token at once has almost all the probability: three more finished hypotheses would take to the limit.
    logits = np.full((1, 9, 6, 6), 0.0, np.float32)
    logits[..., EOS] = -20.0
    logits[:, 0, :, EOS] = 60.0
    found = run_beam(logits, everyone(logits), 4, 9)
    assert found.steps == 1
    check(found, 0, *plain_beam(of_table(logits[0]), 4, 9, 0.6))


def test_padding_and_begin_tokens_can_be_generated():
    logits = tables(7, end=-100.0)
    logits[:, 0, :, PAD] = logits[:, 1, :, BOS] = 30.0
    for found in (run_greedy(logits, everyone(logits), 7), run_beam(logits, everyone(logits), 2, 7)):
        assert found.tokens[0, :3].tolist() == [BOS, PAD, BOS] and found.lengths[0] == 8


def test_long_sums_stay_close_to_float64():
    logits = tables(8, batch=2, positions=200, vocabulary=40, spread=1.0, end=-100.0)
    found = run_beam(logits, everyone(logits), 4, 200)
    for row, table in enumerate(logits):
        tokens, total, score = plain_beam(of_table(table), 4, 200, 0.6)
        assert found.tokens[row].tolist() == tokens
        np.testing.assert_allclose(found.log_probs[row], total, rtol=1e-6)
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-6)


def test_length_factors():
    np.testing.assert_allclose(length_factors(7, 0.6)[[1, 7]], [1.0, 2**0.6], rtol=1e-6)
    np.testing.assert_array_equal(length_factors(3, 0.0), 1.0)


@pytest.mark.parametrize(("beam", "limit", "named"), [(0, 5, "beam 0"), (-2, 5, "beam -2"), (2, 0, "limit 0")])
def test_settings_that_make_no_search(beam, limit, named):
    step, cache = step_of(tables(0))
    with pytest.raises(UserError, match=named):
        beam_search(step, cache(2), jnp.ones(3, bool), beam, limit)
    if limit < 1:
        with pytest.raises(UserError, match=named):
            greedy(step, cache(1), jnp.ones(3, bool), limit)


def test_one_program_for_all_batches_of_a_shape():
    before = run_beam._cache_size()
    for seed in (20, 21, 22):
        logits = tables(seed, batch=2, positions=5)
        run_beam(logits, everyone(logits), 2, 5, 0.7)
    assert run_beam._cache_size() == before + 1


@pytest.fixture(scope="module")
def translator():
    config = EncoderDecoderConfig(
        source_vocab_size=11,
        target_vocab_size=9,
        hidden_size=16,
        num_layers=1,
        decoder_layers=1,
        num_heads=2,
        intermediate_size=16,
        max_positions=8,
    )
    model, source = EncoderDecoder(config), jnp.array([[5, 6, 7, 8], [9, 4, PAD, PAD], [PAD] * 4], jnp.int32)
    params = jax.jit(model.init)(jax.random.key(3), source, source)["params"]
    params["generator"]["kernel"] *= 4  # clear decisions
    return model, {"params": params}, source


@pytest.mark.parametrize("beam", [1, 3])
def test_translations_are_those_of_whole_forward_passes(translator, beam):
    model, variables, source = translator
    found = translate(model, variables, source, beam=beam, limit=6)

    forward = jax.jit(lambda ids, prefix: jax.nn.log_softmax(model.apply(variables, ids, prefix).logits))
    for row in range(2):

        def log_probs(tokens, ids=source[row : row + 1]):
            prefix = jnp.array([tokens + [PAD] * (6 - len(tokens))], jnp.int32)
            return np.asarray(forward(ids, prefix))[0, len(tokens) - 1]

        check(found, row, *plain_beam(log_probs, beam, 6, 0.6))
    assert found.tokens[2].tolist() == [BOS] + [PAD] * 6


def test_translation_beyond_the_positions_of_the_model(translator):
    with pytest.raises(UserError, match="up to 9 tokens: the model has 8 positions"):
        translate(*translator, beam=2, limit=9)
