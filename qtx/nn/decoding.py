"""Greedy and beam search over any step function, as one compiled loop.

A step function scores the next token of every hypothesis:

    step(cache, tokens [B, K] int32, position int32 []) -> (logits [B, K, V], cache)

`tokens` are the hypotheses' tokens at `position` (the begin token at 0), the logits are for `position + 1`, and every leaf of
the cache is `[B, K, ...]`. `B` sentences, `K` hypotheses of each (the beam), `V` tokens in the vocabulary. Shapes are
static: a search of at most `limit` tokens is one `lax.while_loop`, which ends when every sentence has stopped.

Nothing is suppressed: padding, begin and unknown tokens can be generated.

The length rule is that of Wu et al. (2016, section 7, without the coverage term): the sum of log probabilities is divided by
((5 + L) / 6)^alpha, where L counts the generated tokens, the end token among them and the begin token not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qtx.errors import UserError

Cache = Any
Step = Callable[[Cache, jax.Array, jax.Array], tuple[jax.Array, Cache]]

NO_HYPOTHESIS = -jnp.inf
"""Sum of a place in the beam that holds no hypothesis."""

IMPOSSIBLE = float(np.finfo(np.float32).min)
"""Sum of a hypothesis of probability 0: behind all others, and still before `NO_HYPOTHESIS`."""


class Markers(NamedTuple):
    """The ids with a meaning: begin, end and padding."""

    bos: int = 2
    eos: int = 3
    pad: int = 1


MARKERS = Markers()
"""The ids of the published vocabularies."""


class Decoded(NamedTuple):
    """What a search found for each sentence.

    Attributes:
      tokens: `[B, limit + 1]` int32: the begin token, the generated ones up to the first end token, then padding.
      lengths: `[B]` int32: tokens before the padding, begin and end included. A generated padding token counts.
      log_probs: `[B]` float32: sum of the log probabilities of the generated tokens.
      scores: `[B]` float32: `log_probs` over the length factor.
      steps: `[]` int32: how many tokens were generated before all sentences had stopped.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    scores: jax.Array
    steps: jax.Array


def length_factors(limit: int, alpha: float) -> np.ndarray:
    """Returns the divisors of sums over 0 to `limit` generated tokens, `[limit + 1]` float32."""
    return (((5 + np.arange(limit + 1)) / 6) ** alpha).astype(np.float32)


def greedy(
    step: Step,
    cache: Cache,
    real: jax.Array,
    limit: int,
    *,
    alpha: float = 0.6,
    markers: Markers = MARKERS,
) -> Decoded:
    """Takes the most probable token at each position, the lowest of equals.

    Args:
      step: see the module; called with K = 1.
      cache: for position 0; leaves `[B, 1, ...]`.
      real: bool `[B]`: rows to decode. The others, which fill up a batch, come back with the begin token alone and keep
        nobody waiting.
      limit: tokens generated at most, at least 1.
      alpha: exponent of the length factor; it changes the scores alone.
      markers: begin, end and padding ids.

    Raises:
      UserError: `limit` below 1.
    """
    _check(limit)
    batch = real.shape[0]

    def body(state):
        position, tokens, lengths, sums, open_, cache = state
        logits, cache = step(cache, lax.dynamic_index_in_dim(tokens, position, 1), position)
        logits = logits[:, 0].astype(jnp.float32)
        greatest, token = (x[:, 0] for x in _best(logits, 1))
        sums += jnp.where(open_, -_log_sum(logits, greatest), 0)
        tokens = tokens.at[:, position + 1].set(jnp.where(open_, token, markers.pad))
        return position + 1, tokens, lengths + open_, sums, open_ & (token != markers.eos), cache

    start = (
        jnp.int32(0),
        _begin((batch,), limit, markers),
        jnp.ones(batch, jnp.int32),
        jnp.zeros(batch, jnp.float32),
        jnp.asarray(real, bool),
        cache,
    )
    steps, tokens, lengths, sums, _, _ = lax.while_loop(lambda s: (s[0] < limit) & jnp.any(s[4]), body, start)
    return Decoded(tokens, lengths, sums, sums / jnp.asarray(length_factors(limit, alpha))[lengths - 1], steps)


class BeamState(NamedTuple):
    """A beam search between two tokens. Hypotheses are in descending order of their sums.

    Attributes:
      position: `[]` int32: where the newest tokens are.
      tokens: `[B, K, limit + 1]` int32.
      sums: `[B, K]` float32: log probabilities; `NO_HYPOTHESIS` where there is none.
      finished: `[B]` int32: number of finished hypotheses.
      best: the best finished hypothesis by its score, the first of equals; its score is -inf while there is none.
      open: `[B]` bool: sentences that have not stopped.
      cache: leaves `[B, K, ...]`.
    """

    position: jax.Array
    tokens: jax.Array
    sums: jax.Array
    finished: jax.Array
    best: Decoded
    open: jax.Array
    cache: Cache


def beam_search(
    step: Step,
    cache: Cache,
    real: jax.Array,
    beam: int,
    limit: int,
    *,
    alpha: float = 0.6,
    markers: Markers = MARKERS,
) -> Decoded:
    """Keeps the `beam` best hypotheses of each sentence, and answers with the best finished one.

    At each position the pairs (hypothesis, token) are ranked by their sums of log probabilities; equals keep their order. Of
    the best 2 `beam` pairs, from the first on, those that end with the end token are finished and the others go on, until
    `beam` of them do. A sentence stops when `beam` of its hypotheses have finished or at the limit. The answer is the
    finished hypothesis of the best score (sum over length factor), or the best unfinished one if none has finished.
    A sentence also stops when no hypothesis can reach the best score any more: sums only fall and the length factor is
    bounded, so that does not change the answer. A beam of 1 is greedy search.

    Args:
      step: see the module.
      cache: for position 0; leaves `[B, beam, ...]`.
      real: bool `[B]`: as in `greedy`.
      beam: hypotheses of each sentence, at least 1.
      limit: tokens generated at most, at least 1.
      alpha: exponent of the length factor.
      markers: begin, end and padding ids.

    Raises:
      UserError: `beam` or `limit` below 1.
    """
    state = begin_beam(cache, real, beam, limit, markers)
    body = functools.partial(beam_step, step, alpha=alpha, markers=markers)
    return end_beam(lax.while_loop(lambda s: (s.position < limit) & jnp.any(s.open), body, state), alpha)


def begin_beam(cache: Cache, real: jax.Array, beam: int, limit: int, markers: Markers = MARKERS) -> BeamState:
    """Returns the state before the first token: one hypothesis, the begin token. Arguments as in `beam_search`."""
    _check(limit, beam)
    batch = real.shape[0]
    nothing = jnp.zeros(batch, jnp.float32)
    return BeamState(
        position=jnp.int32(0),
        tokens=_begin((batch, beam), limit, markers),
        sums=jnp.full((batch, beam), NO_HYPOTHESIS).at[:, 0].set(0.0),
        finished=jnp.zeros(batch, jnp.int32),
        best=Decoded(
            tokens=_begin((batch,), limit, markers),
            lengths=jnp.ones(batch, jnp.int32),
            log_probs=nothing,
            scores=jnp.full(batch, -jnp.inf),
            steps=jnp.int32(0),
        ),
        open=jnp.asarray(real, bool),
        cache=cache,
    )


def beam_step(step: Step, state: BeamState, *, alpha: float, markers: Markers = MARKERS) -> BeamState:
    """Returns the state one token later. Arguments as in `beam_search`."""
    batch, beam, width = state.tokens.shape
    factors = length_factors(width - 1, alpha)
    newest = lax.dynamic_index_in_dim(state.tokens, state.position, 2, keepdims=False)
    logits, cache = step(state.cache, newest, state.position)
    position = state.position + 1

    # The best tokens of each hypothesis are enough, and ranking logits first needs no log probability of all the others.
    logits = logits.astype(jnp.float32)
    top, tokens = _best(logits, min(2 * beam, logits.shape[-1]))
    count = tokens.shape[-1]
    log_probs = (top - top[..., :1]) - _log_sum(logits, top[..., 0])[..., None]
    before = state.sums[..., None]
    sums = jnp.where(before == NO_HYPOTHESIS, NO_HYPOTHESIS, jnp.maximum(before + log_probs, IMPOSSIBLE))
    sums, pairs = lax.top_k(sums.reshape(batch, -1), min(2 * beam, beam * count))
    parents, tokens = pairs // count, _take(tokens.reshape(batch, -1), pairs)

    exists = sums > NO_HYPOTHESIS
    goes_on = exists & (tokens != markers.eos)
    ahead = jnp.cumsum(goes_on, -1) - goes_on
    ends = exists & (tokens == markers.eos) & (ahead < beam)

    # All that end now have one length: the first has the best score of them.
    first = jnp.argmax(ends, -1)[:, None]
    end_sum = _take(sums, first)[:, 0]
    score = jnp.where(end_sum > IMPOSSIBLE, end_sum / jnp.asarray(factors)[position], IMPOSSIBLE)
    better = state.open & jnp.any(ends, -1) & (score > state.best.scores)
    ended = _take(state.tokens, _take(parents, first))[:, 0].at[:, position].set(markers.eos)
    best = Decoded(
        tokens=jnp.where(better[:, None], ended, state.best.tokens),
        lengths=jnp.where(better, position + 1, state.best.lengths),
        log_probs=jnp.where(better, end_sum, state.best.log_probs),
        scores=jnp.where(better, score, state.best.scores),
        steps=position,
    )
    finished = state.finished + jnp.where(state.open, jnp.sum(ends, -1), 0)

    places = lax.top_k(goes_on.astype(jnp.float32), beam)[1]  # the first `beam` that go on, in their order
    parents, tokens = _take(parents, places), _take(tokens, places)
    sums = jnp.where(_take(goes_on, places), _take(sums, places), NO_HYPOTHESIS)
    reachable = sums[:, 0] / factors.max()
    return BeamState(
        position=position,
        tokens=_take(state.tokens, parents).at[:, :, position].set(tokens),
        sums=sums,
        finished=finished,
        best=best,
        open=state.open & (finished < beam) & (best.scores < reachable),
        cache=jax.tree.map(lambda leaf: _take(leaf, parents), cache),
    )


def end_beam(state: BeamState, alpha: float) -> Decoded:
    """Returns the answers: the best finished hypotheses, or the best at the limit where none has finished."""
    limit = state.tokens.shape[-1] - 1
    unfinished = state.open & (state.finished == 0)
    lengths = jnp.where(unfinished, limit + 1, state.best.lengths)
    log_probs = jnp.where(unfinished, state.sums[:, 0], state.best.log_probs)
    log_probs = jnp.where(log_probs > IMPOSSIBLE, log_probs, -jnp.inf)
    return Decoded(
        tokens=jnp.where(unfinished[:, None], state.tokens[:, 0], state.best.tokens),
        lengths=lengths,
        log_probs=log_probs,
        scores=log_probs / jnp.asarray(length_factors(limit, alpha))[lengths - 1],
        steps=state.position,
    )


def _check(limit: int, beam: int = 1) -> None:
    for name, value in (("beam", beam), ("limit", limit)):
        if value < 1:
            raise UserError(f"decoding with {name} {value}: it must be at least 1")


def _begin(shape: tuple[int, ...], limit: int, markers: Markers) -> jax.Array:
    """The begin token, then padding: `[*shape, limit + 1]` int32."""
    return jnp.full((*shape, limit + 1), markers.pad, jnp.int32).at[..., 0].set(markers.bos)


def _best(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The greatest logits and their tokens, the lowest of equals first: `[..., V]` -> `[..., count]` twice.

    Also for one of them: on CPU, `argmax` takes three times as long. The barrier is there because a slice of the result that
    XLA merges with the operation would make it a sort of the whole vocabulary.
    """
    return lax.optimization_barrier(tuple(lax.top_k(logits, count)))


def _log_sum(logits: jax.Array, greatest: jax.Array) -> jax.Array:
    """Log of the sum of exp(logits - greatest): minus the log probability of the greatest. `[..., V]`, `[...]` -> `[...]`."""
    return jnp.log(jnp.sum(jnp.exp(logits - greatest[..., None]), -1))


def _take(x: jax.Array, indices: jax.Array) -> jax.Array:
    """`[B, M, ...]` at `[B, N]` indices of its second axis: `[B, N, ...]`."""
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *[1] * (x.ndim - 2)), 1, mode="promise_in_bounds")


@functools.partial(jax.jit, static_argnames=("model", "beam", "limit", "alpha"))
def translate(
    model: nn.Module,
    variables: Mapping[str, Any],
    source_ids: jax.Array,
    *,
    beam: int,
    limit: int,
    alpha: float = 0.6,
    key: jax.Array | None = None,
) -> Decoded:
    """Translates a batch: compiled once for each shape of it, model, beam and limit.

    Args:
      model: `EncoderDecoder`.
      variables: its parameters, and ranges if it is quantized.
      source_ids: `[B, S]` int; rows of padding alone come back with the begin token alone.
      beam: 1 for greedy search.
      limit: tokens generated at most.
      alpha: exponent of the length factor.
      key: of stochastic rounding, which draws anew for every token, as published; None: rounding is to nearest.

    Raises:
      UserError: `beam` or `limit` below 1, or a limit beyond the model's positions.
    """
    _check(limit, beam)
    config = model.config
    if limit > config.max_positions:
        raise UserError(f"decoding of up to {limit} tokens: the model has {config.max_positions} positions")
    markers = Markers(config.bos_token_id, config.eos_token_id, config.pad_token_id)
    real = jnp.any(source_ids != config.pad_token_id, -1)
    start = None if key is None else {"rounding": key}
    memory = model.apply(variables, source_ids, method="start", rngs=start)
    cache = model.apply(variables, source_ids.shape[0], beam, limit, method="empty_cache")

    def step(cache: Cache, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
        rngs = None if key is None else {"rounding": jax.random.fold_in(key, position)}
        return model.apply(variables, memory, cache, tokens, position, method="step", rngs=rngs)

    if beam == 1:
        return greedy(step, cache, real, limit, alpha=alpha, markers=markers)
    return beam_search(step, cache, real, beam, limit, alpha=alpha, markers=markers)
