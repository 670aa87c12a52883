"""Training a translator: the loss with smoothed labels.

Szegedy et al. 2016 (section 7) as Vaswani et al. 2017 use it: of every target word a share of the probability goes to all
other words.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from qtx.errors import UserError
from qtx.train.phase import Batch, Forward

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
    # All words by one sum: q, which is as large as the logits, is never made.
    label = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    others = jnp.sum(logits, -1) - logits[..., pad] - label
    cross = jax.nn.logsumexp(logits, -1) - (1 - smoothing) * label - share * others
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
