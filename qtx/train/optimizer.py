"""Optimizers over flat trees of named arrays (`params/encoder/.../kernel`, `ranges/.../scale`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from qtx.errors import UserError, near_misses
from qtx.quant.exact import divide
from qtx.quant.policy import matches

# Biases, norms and ranges are never decayed: a decayed range parameter shrinks its grid.
NO_DECAY = ("**/bias", "**/norm/scale", "ranges/**")
Schedule = Literal["linear", "cosine", "constant", "inverse_sqrt", "hard_restarts", "warm_restarts", "milestones"]
Name = Literal["adamw", "bert_adam", "muon"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with warm-up and decay.

    Attributes:
      name: `'adamw'`; `'bert_adam'`, the one that BERT's first release on PyTorch had (see `bert_adam`); or `'muon'`, whose
        updates of kernels are orthogonal matrices (see `muon`), and Adam's for all else.
      learning_rate: peak.
      range_learning_rate: peak for learned ranges; None: the same as for weights.
      rate_factors: pairs of a pattern over parameter names and a factor on their learning rate, such as
        `('classifier/**', 10.0)` for a fresh head; the last pair that matches counts.
      warmup: share of the steps with a linearly rising rate.
      warmup_steps: their number; overrides `warmup` if positive.
      schedule: what follows: linear decay to zero, cosine decay to zero, or constant; `'hard_restarts'`: a cosine decay that
        starts `cycles` times, `'warm_restarts'`: the same, with a warm-up before each. `'inverse_sqrt'` is the schedule of
        Vaswani et al. 2017 (section 5.3): in step t, counted from 1, `min(t / warm, sqrt(warm / t))` of the peak. Theirs is
        the peak `1 / sqrt(width * warm)`. `'milestones'`: constant, times `milestone_factor` from each of `milestones` on.
      cycles: of the cosine: 0.5 is one decay to zero, 1 comes back; with restarts: how many decays, at least 1.
      milestones: shares of the epochs of the phase, each rounded down to a whole epoch.
      milestone_factor: on the rate, from each milestone on.
      weight_decay: decoupled; not for biases, norms and ranges.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, after bias correction if there is one; `'bert_adam'` was published with 1e-6.
      max_grad_norm: clips the global norm (`'bert_adam'`: the norm of each array on its own); 0: off.
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
    name: Name = "adamw"
    cycles: float = 0.5
    milestones: tuple[float, ...] = (0.5,)
    milestone_factor: float = 0.1

    def __post_init__(self):
        if self.name not in get_args(Name):
            raise UserError(f"unknown optimizer {self.name!r}{near_misses(self.name, get_args(Name))}")
        if self.schedule not in get_args(Schedule):
            raise UserError(f"unknown schedule {self.schedule!r}{near_misses(self.schedule, get_args(Schedule))}")
        if self.cycles <= 0 or (self.schedule.endswith("restarts") and self.cycles < 1):
            raise UserError(
                f"cycles {self.cycles}: the cosine takes a positive number, schedules with restarts at least 1"
            )
        if self.cycles != 0.5 and self.schedule not in ("cosine", "hard_restarts", "warm_restarts"):
            raise UserError(f"cycles {self.cycles} has no effect on schedule {self.schedule!r}; leave it at 0.5")
        if any(not 0 < share < 1 for share in self.milestones) or self.milestone_factor <= 0:
            raise UserError(
                f"milestones {self.milestones} are shares of the epochs, in (0, 1), and milestone_factor is positive, "
                f"not {self.milestone_factor}"
            )
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate must be positive, not {self.learning_rate}")
        for pair in self.rate_factors:
            if len(pair) != 2 or not isinstance(pair[0], str) or pair[1] <= 0:
                raise UserError(f"rate_factors: {pair!r} is not a pair of a pattern and a positive factor")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup {self.warmup} is a share of the steps: it must lie in [0, 1); see warmup_steps")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps {self.warmup_steps} is negative; 0 means by `warmup`")


def learning_rate(config: OptimizerConfig, steps: int, batches_per_epoch: int = 1) -> optax.Schedule:
    """Returns the schedule over a phase of `steps` steps, with peak 1; it is a function of the steps taken before.

    An epoch is `batches_per_epoch` steps; milestones look at it. Past the end `'adamw'` stays where it is; `'bert_adam'` goes
    on, as published: a cosine rises again. Its warm-up may end between two steps.
    """
    published = config.name == "bert_adam"
    warm = config.warmup_steps or (config.warmup * steps if published else round(config.warmup * steps))
    if config.schedule == "inverse_sqrt":
        warm = max(warm, 1)
        return lambda taken: jnp.minimum((taken + 1) / warm, jnp.sqrt(warm / (taken + 1)))

    # The least float above a whole epoch must not become the epoch before: 0.29 of 100 is 28.999...
    epochs = [math.floor(share * steps / batches_per_epoch + 1e-9) for share in config.milestones]

    def multiplier(taken):
        count = taken = jnp.asarray(taken, float)
        if published:  # in shares of the phase, as its formulas are: at a restart a rounding decides between 0 and 1
            taken, length = divide(taken, float(steps)), 1.0
            rise = config.warmup_steps / steps or config.warmup
        else:
            taken, length, rise = jnp.minimum(taken, steps), float(steps), float(warm)
        if config.schedule == "warm_restarts":
            taken, rise = jnp.mod(taken * config.cycles, length), rise * config.cycles
        decayed = divide(taken - rise, max(length - rise, length / steps))
        after = {
            "constant": lambda: jnp.ones_like(taken),
            "milestones": lambda: (
                config.milestone_factor ** sum(count >= epoch * batches_per_epoch for epoch in epochs)
            ),
            "linear": lambda: jnp.maximum(1 - decayed, 0),
            "cosine": lambda: _half_cosine(2 * config.cycles * decayed),
            "hard_restarts": lambda: _half_cosine(jnp.mod(config.cycles * decayed, 1)),
            "warm_restarts": lambda: _half_cosine(decayed),
        }[config.schedule]()
        return jnp.where(taken < rise, divide(taken, max(rise, 1e-9)), after)

    return multiplier


def _half_cosine(x: jax.Array) -> jax.Array:
    """Falls from 1 at 0 to 0 at 1, and rises again."""
    return 0.5 * (1 + jnp.cos(jnp.pi * x))


def rate_factor(config: OptimizerConfig, name: str) -> float:
    """Returns the factor on the learning rate of one array, `params/...` or `ranges/...`."""
    if name.startswith("ranges/"):
        return 1.0 if config.range_learning_rate is None else config.range_learning_rate / config.learning_rate
    path = name.removeprefix("params/")
    return next((factor for pattern, factor in reversed(config.rate_factors) if matches(pattern, path)), 1.0)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to an array, `params/...` or `ranges/...`."""
    return not any(matches(pattern, name) for pattern in NO_DECAY)


class BertAdamState(NamedTuple):
    """Of each array: the updates that it has had (int32), and its first and second moment."""

    counts: dict[str, jax.Array]
    mu: dict[str, jax.Array]
    nu: dict[str, jax.Array]


def bert_adam(config: OptimizerConfig, steps: int, batches_per_epoch: int = 1) -> optax.GradientTransformation:
    """Returns Adam as in BERT's first release on PyTorch, for which every array is a world of its own.

    Each has its norm clipped, its step counter and therefore its place in the schedule. The moments are not corrected for
    their start at zero, and the first update has rate 0 where there is a warm-up. An array whose gradient is zero in all its
    elements is not reached by the loss: it is skipped, without decay, and neither its moments nor its counter move. (The
    release skips what has no gradient at all; a compiled program has zeros there.)

    Args:
      config: whose `name` is `'bert_adam'`.
      steps: where the schedule ends, in updates of an array.
      batches_per_epoch: see `learning_rate`.
    """
    schedule = learning_rate(config, steps, batches_per_epoch)

    def init(trained):
        # Arrays of their own: a train step that donates its state cannot donate one of them twice.
        mu, nu = ({name: jnp.zeros_like(value) for name, value in trained.items()} for _ in range(2))
        return BertAdamState({name: jnp.zeros((), jnp.int32) for name in trained}, mu, nu)

    def updated(name, gradient, value, count, mu, nu):
        square = jnp.sum(jnp.square(gradient))
        # NaN is reached, and what float32 cannot square, below 1e-19, is not: a second look at every element would double the
        # time of an update on CPU.
        reached = square != 0
        if config.max_grad_norm > 0:
            norm = jnp.sqrt(square)
            gradient = gradient * jnp.minimum(1, config.max_grad_norm / (norm + 1e-6))
        new_mu = config.b1 * mu + (1 - config.b1) * gradient
        new_nu = config.b2 * nu + (1 - config.b2) * jnp.square(gradient)
        direction = new_mu / (jnp.sqrt(new_nu) + config.eps)
        if is_decayed(name):
            direction = direction + config.weight_decay * value
        rate = (config.learning_rate * rate_factor(config, name) * schedule(count)).astype(value.dtype)
        new = (-rate * direction, count + 1, new_mu, new_nu)
        old = (jnp.zeros_like(value), count, mu, nu)
        return tuple(jnp.where(reached, *pair) for pair in zip(new, old, strict=True))

    def update(gradients, state, trained=None):
        assert trained is not None, "decay needs the parameters"
        found = {
            name: updated(name, gradient, trained[name], *(field[name] for field in state))
            for name, gradient in gradients.items()
        }
        updates, *fields = ({name: values[i] for name, values in found.items()} for i in range(4))
        return updates, BertAdamState(*fields)

    return optax.GradientTransformation(init, update)


def is_matrix(name: str, value: jax.Array) -> bool:
    """Whether `'muon'` updates an array by an orthogonal matrix: kernels do, tables, biases, norms and ranges do not."""
    return value.ndim == 2 and name.endswith("/kernel")


def muon(momentum: float = 0.95, rms: float = 0.2) -> optax.GradientTransformation:
    """Returns Muon's direction for a flat dict of kernels `[in, out]`.

    The momentum `U S V^T` of a kernel becomes `U V^T`, about, so all of its directions move alike. Times
    `rms sqrt(max(in, out))`, elements move by about `rms` of the learning rate, as they do under Adam, whose rates and decay
    can therefore be kept. Jordan 2024 (https://kellerjordan.github.io/posts/muon); the factor is equation 4 of Liu et al.
    2025, "Muon is Scalable for LLM Training" (https://arxiv.org/abs/2502.16982).

    Args:
      momentum: decay of the moment, with Nesterov's look ahead.
      rms: root mean square of an update's elements.
    """

    def directions(momenta, _):
        leaves, treedef = jax.tree.flatten(momenta)  # of kernels alone: others are masked
        found: dict[int, jax.Array] = {}
        # Those of a shape go together: fewer operations to compile and to start.
        for shape in sorted({leaf.shape for leaf in leaves}):
            at = [i for i, leaf in enumerate(leaves) if leaf.shape == shape]
            stack = rms * max(shape) ** 0.5 * orthogonal(jnp.stack([leaves[i] for i in at]))
            found |= dict(zip(at, stack, strict=True))
        return jax.tree.unflatten(treedef, [found[i] for i in range(len(leaves))])

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(directions))


def orthogonal(matrices: jax.Array) -> jax.Array:
    """Returns about `U V^T` of each matrix `U S V^T`, `[..., rows, columns]`; of a zero, zero.

    Five steps of an iteration of Newton and Schulz's kind, with the coefficients of Jordan 2024: singular values
    over 0.3% of the norm end between 0.68 and 1.21 instead of at 1, for the sake of speed.
    """
    turned = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if turned else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if turned else x


def make_optimizer(config: OptimizerConfig, steps: int, batches_per_epoch: int = 1) -> optax.GradientTransformation:
    """Returns the optimizer for a phase of `steps` steps over a flat dict of arrays by name; see `learning_rate`."""
    if config.name == "bert_adam":
        return bert_adam(config, steps, batches_per_epoch)
    schedule = learning_rate(config, steps, batches_per_epoch)

    def scaled(updates, _):
        return {name: update * rate_factor(config, name) for name, update in updates.items()}

    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        direction = optax.partition(
            {"matrix": muon(), "other": direction},
            lambda tree: {name: "matrix" if is_matrix(name, value) else "other" for name, value in tree.items()},
        )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm > 0 else optax.identity(),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: {name: is_decayed(name) for name in tree}),
        optax.scale_by_schedule(lambda step: -config.learning_rate * schedule(step)),
        optax.stateless(scaled),
    )
