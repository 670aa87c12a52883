"""Optimizers over flat trees of named arrays (`params/encoder/.../kernel`, `ranges/.../scale`)."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
import optax

from qtx.errors import UserError, near_misses
from qtx.quant.policy import matches

# Biases, norms and ranges are never decayed: a decayed range parameter shrinks its grid.
NO_DECAY = ("**/bias", "**/norm/scale", "ranges/**")
Schedule = Literal["linear", "cosine", "constant", "inverse_sqrt"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay.

    Attributes:
      learning_rate: peak.
      range_learning_rate: peak for learned ranges; None: the same as for weights.
      rate_factors: pairs of a pattern over parameter names and a factor on their learning rate, such as
        `('classifier/**', 10.0)` for a fresh head; the last pair that matches counts.
      warmup: share of the steps with a linearly rising rate.
      warmup_steps: their number; overrides `warmup` if positive.
      schedule: what follows: linear decay to zero, cosine decay to zero, or constant. `'inverse_sqrt'` is the schedule of
        Vaswani et al. 2017 (section 5.3): in step t, counted from 1, `min(t / warm, sqrt(warm / t))` of the peak. Theirs is
        the peak `1 / sqrt(width * warm)`.
      weight_decay: decoupled; not for biases, norms and ranges.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, after bias correction.
      max_grad_norm: clips the global norm; 0: off.
    """

    learning_rate: float = 5e-5
    range_learning_rate: float | None = None
    rate_factors: tuple[tuple[str, float], ...] = ()
    warmup: float = 0.1
    warmup_steps: int = 0
    schedule: Schedule = "linear"
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in get_args(Schedule):
            raise UserError(f"unknown schedule {self.schedule!r}{near_misses(self.schedule, get_args(Schedule))}")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate must be positive, not {self.learning_rate}")
        for pair in self.rate_factors:
            if len(pair) != 2 or not isinstance(pair[0], str) or pair[1] <= 0:
                raise UserError(f"rate_factors: {pair!r} is not a pair of a pattern and a positive factor")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup {self.warmup} is a share of the steps: it must lie in [0, 1); see warmup_steps")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps {self.warmup_steps} is negative; 0 means by `warmup`")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule over a phase of `steps` steps, with peak 1; it is a function of the steps taken before."""
    warm = config.warmup_steps or round(config.warmup * steps)
    if config.schedule == "inverse_sqrt":
        warm = max(warm, 1)
        return lambda taken: jnp.minimum((taken + 1) / warm, jnp.sqrt(warm / (taken + 1)))
    rest = max(steps - warm, 1)
    after = {
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warm), after], [warm]) if warm else after


def rate_factor(config: OptimizerConfig, name: str) -> float:
    """Returns the factor on the learning rate of one array, `params/...` or `ranges/...`."""
    if name.startswith("ranges/"):
        return 1.0 if config.range_learning_rate is None else config.range_learning_rate / config.learning_rate
    path = name.removeprefix("params/")
    return next((factor for pattern, factor in reversed(config.rate_factors) if matches(pattern, path)), 1.0)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer for a phase of `steps` steps over a flat dict of arrays by name."""
    schedule = learning_rate(config, steps)

    def decayed(tree):
        return {name: not any(matches(pattern, name) for pattern in NO_DECAY) for name in tree}

    def scaled(updates, _):
        return {name: update * rate_factor(config, name) for name, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm > 0 else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_schedule(lambda step: -config.learning_rate * schedule(step)),
        optax.stateless(scaled),
    )
