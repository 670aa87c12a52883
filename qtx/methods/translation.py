"""Training and using a translator: the loss with smoothed labels, and translating any number of sentences.

Smoothed labels are those of Szegedy et al. 2016 (section 7) as Vaswani et al. 2017 use them: of every target word a share of
the probability goes to all other words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtx.data.batching import bucket_lengths, in_order, plan_epoch
from qtx.data.pair_tokenizer import Rows
from qtx.errors import UserError
from qtx.files import whole_file
from qtx.nn.decoding import translate
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from qtx.train.phase import Batch, Forward
from qtx.train.sharding import replicate, shard_batch, shard_tree

Divisor = Literal["tokens", "rows"]


def smoothed_kl(logits: jax.Array, labels: jax.Array, smoothing: float, pad: int) -> jax.Array:
    """Kullback-Leibler divergence of the predicted words from the smoothed labels, word by word.

        sum_v q(v) (log q(v) - log p(v)),   q(label) = 1 - smoothing,   q(pad) = 0,   q(v) = smoothing / (V - 2) else

    Args:
      logits: `[..., V]`, not normalised.
      labels: int `[...]`; `pad` where there is no word.
      smoothing: in [0, 1).
      pad: the id of padding.

    Returns:
      `[...]` float32, 0 where there is no word.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    share = smoothing / (logits.shape[-1] - 2)
    entropy = sum(q * math.log(q) for q in (1 - smoothing, smoothing) if q) - smoothing * math.log(logits.shape[-1] - 2)
    # q is a function of the index, which fuses into the sum and its gradient; a gather of the label has a scatter behind it.
    words = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    q = jnp.where(words == labels[..., None], 1 - smoothing, jnp.where(words == pad, 0.0, share))
    cross = jax.nn.logsumexp(logits, -1) - jnp.sum(q * logits, -1)
    return jnp.where(labels == pad, 0.0, entropy + cross)


@dataclasses.dataclass(frozen=True)
class TranslationLoss:
    """The objective of a phase that trains a translator (`qtx.train.phase.Phase.objective`).

    Attributes:
      smoothing: of the labels, in [0, 1).
      divisor: what the sum over a batch is divided by. `'tokens'`: target words. `'rows'`: sentences times the longest
        target in the batch, as published, so that the step depends on the padding.
      pad: the id of padding.

    Raises:
      UserError: on a value out of range.
    """

    smoothing: float = 0.1
    divisor: Divisor = "tokens"
    pad: int = 1

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise UserError(f"label_smoothing {self.smoothing} is a probability: it must lie in [0, 1)")
        if self.divisor not in get_args(Divisor):
            choices = ", ".join(map(repr, get_args(Divisor)))
            raise UserError(f"unknown divisor {self.divisor!r} of the loss; choose from {choices}")

    def __call__(self, forward: Forward, batch: Batch, constants: Any = None) -> tuple[jax.Array, jax.Array]:
        """Returns the sum of the losses and what it is to be divided by."""
        del constants
        labels = batch["labels"]
        losses = smoothed_kl(forward(batch)[0].logits, labels, self.smoothing, self.pad)
        words = jnp.sum(labels != self.pad, -1)
        divisor = jnp.sum(words) if self.divisor == "tokens" else jnp.sum(batch["weights"]) * jnp.max(words)
        return jnp.sum(losses), divisor.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How sentences are translated.

    Attributes:
      beam: hypotheses of each sentence; 1: greedy search.
      length_penalty: exponent of the length factor, see `qtx.nn.decoding`.
      limit: tokens of a translation.
      batch_size: sentences that are decoded together at most.
      buckets: source lengths that are compiled at most.

    Raises:
      UserError: on a value out of range.
    """

    beam: int = 5
    length_penalty: float = 0.6
    limit: int = 100
    batch_size: int = 64
    buckets: int = 4

    def __post_init__(self):
        for name in ("beam", "limit", "batch_size", "buckets"):
            if getattr(self, name) < 1:
                raise UserError(f"decoding: {name} must be at least 1, got {getattr(self, name)}")
        if not self.length_penalty >= 0:
            raise UserError(f"decoding: length_penalty must not be negative, got {self.length_penalty}")


def check_positions(sizes: EncoderDecoderConfig, lengths: Mapping[str, int]) -> None:
    """Raises a `UserError` if a number of tokens, by its name, exceeds the positions of a model."""
    for name, length in lengths.items():
        if length > sizes.max_positions:
            raise UserError(f"{name} {length} exceeds the model's {sizes.max_positions} positions")


def batch_rows(sentences: int, batch_size: int, parts: int = 1) -> int:
    """Returns the rows of a batch: not many more than there are sentences, as an empty row costs what any other does.

    Args:
      sentences: how many there are, at least 1.
      batch_size: the most rows.
      parts: devices that share a batch; the rows are a multiple of it if `batch_size` is.

    Returns:
      A power of two, so that few numbers of rows are compiled, or the next multiple of `parts`.
    """
    enough = 1 << (sentences - 1).bit_length()
    return min(batch_size, -(-enough // parts) * parts)


def translate_all(
    model: nn.Module,
    variables: Mapping[str, Any],
    source: Rows,
    decoding: Decoding,
    mesh: Mesh,
    rounding_seed: int | None = None,
    told: Callable[[int], None] | None = None,
    kept: Path | None = None,
) -> np.ndarray:
    """Translates sentences, those of like length together, and returns the results in the order of the sentences.

    Sentences that one batch holds are padded to one length: to compile another takes longer than to translate them.

    Args:
      model: an encoder-decoder; with a policy for weights it quantizes them in every step, see
        `qtx.methods.calibrate.with_frozen_weights`.
      variables: what it is applied to.
      source: N rows of source ids; a row may be empty.
      decoding: how.
      mesh: where to compute.
      rounding_seed: of random rounding, drawn anew for every token; None: nothing is drawn.
      told: called with the number of sentences that are done, after each batch.
      kept: directory where the result of every batch is kept; one that is there is taken from there. It is for these
        arguments alone, and stays. None: nothing is kept.

    Returns:
      [N, limit + 1] int32: begin token, translation, end token, padding. Of an empty row the begin token alone.
    """
    if not len(source):
        return np.zeros((0, decoding.limit + 1), np.int32)
    pad = model.config.pad_token_id  # type: ignore[attr-defined]
    longest = max(int(source.lengths.max()), 1)
    buckets = 1 if len(source) <= decoding.batch_size else decoding.buckets
    lengths = bucket_lengths(source.lengths, -(-longest // 8) * 8, buckets)
    rows = batch_rows(len(source), decoding.batch_size, mesh.shape["data"])
    plan, numbers = plan_epoch(np.searchsorted(lengths, source.lengths), rows, shuffle=False)
    found, done = [], 0
    with jax.set_mesh(mesh):
        placed = {name: replicate(tree, mesh) for name, tree in variables.items() if name != "params"}
        placed["params"] = shard_tree(variables["params"], mesh)

        def decoded(count: int, index: np.ndarray, length: int) -> np.ndarray:
            ids = np.full((len(index), length), pad, np.int32)
            for row, example in zip(ids, index, strict=True):
                if example >= 0:
                    row[: source.lengths[example]] = source[example]
            key = None if rounding_seed is None else jax.random.fold_in(jax.random.key(rounding_seed), count)
            batch = shard_batch({"source_ids": ids}, mesh)["source_ids"]
            alpha = decoding.length_penalty
            tokens = translate(
                model, placed, batch, beam=decoding.beam, limit=decoding.limit, alpha=alpha, key=key
            ).tokens
            return np.asarray(jax.device_get(tokens))

        for count, (index, number) in enumerate(zip(plan, numbers, strict=True)):
            part = kept and kept / f"{count:06d}.npy"
            if part and part.is_file():
                found.append(np.load(part))
            else:
                found.append(decoded(count, index, lengths[number]))
                if part:
                    with whole_file(part) as temporary, open(temporary, "wb") as file:
                        np.save(file, found[-1])
            done += int(np.sum(index >= 0))
            if told is not None:
                told(done)
    return in_order(found, list(plan), len(source))
