"""What is trained, and how: a phase, its state, and the one compiled step that it consists of.

A phase says which policy the model has, what is minimised, what is trained and how. How far it has come is the scalar
`progress` in the variable collection `schedule`, for quantizers that depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.nn.sites import list_sites
from qtx.quant.exact import divide
from qtx.quant.policy import Policy, matches
from qtx.train.evaluation import Evaluation
from qtx.train.optimizer import OptimizerConfig
from qtx.train.partition import is_trained

Batch = Mapping[str, Any]  # named arrays, see qtx.data.batching
Objective = Callable[["Forward", Batch, Any], tuple[Any, ...]]
Schedule = Literal["none", "epoch", "step"]
Refresh = Literal["before", "after", "never"]

_ROUNDING, _CHOICES = 1, 2  # what makes the keys of rounding and of an objective's choices others than that of dropout


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model within a train step, as its objective sees it: `outputs, captures = forward(batch)`.

    Attributes:
      run: `(batch, capture=False, **collections) -> (outputs, captures)`: applies the model, with dropout and further
        variable collections; `captures` is empty without `capture`, see `qtx.nn.sites`.
      taken: int32 scalar, steps of the phase before this one.
      length: of the phase, in steps; 0 where it is not known.
      key: for random choices of the objective that hold for the whole step, also where a batch is worked off in parts.
    """

    run: Callable[..., tuple[Any, dict[str, Any]]]
    taken: Any = 0
    length: int = 0
    key: jax.Array | None = None

    def __call__(self, batch: Batch, capture: bool = False, **collections: Any) -> tuple[Any, dict[str, Any]]:
        return self.run(batch, capture, **collections)


def inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns a model's positional arguments from a batch: the arrays that its class names in `inputs`."""
    return tuple(batch[name] for name in model.inputs)  # type: ignore[attr-defined]


def label_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns `[B]`: cross-entropy of `[B, C]` logits with int labels `[B]`, or squared error for one output."""
    if logits.shape[-1] == 1:
        return jnp.square(logits[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def task_loss(forward: Forward, batch: Batch, constants: Any = None, **collections: Any) -> tuple[Any, ...]:
    """The objective of plain training: sums of weighted losses and of weights, and of what is right where there are classes.

    With `functools.partial` the model gets further variable collections, as some students have them.
    """
    del constants
    logits, labels, weights = forward(batch, **collections)[0].logits, batch["labels"], batch["weights"]
    loss, weight = jnp.sum(label_losses(logits, labels) * weights), jnp.sum(weights)
    if logits.shape[-1] == 1:
        return loss, weight
    return loss, weight, {}, {"accuracy": jnp.sum((jnp.argmax(logits, -1) == labels) * weights)}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
      name: for logs and errors.
      model: module with the phase's policy.
      optimizer: its settings.
      epochs: how often the data are seen; fractions are fine.
      steps: overrides `epochs` if positive.
      objective: what is minimised: `(forward, batch, constants) -> (loss sum, weight sum)`; see `Forward`. A third part of
        the result, a dict of sums such as those of single losses, is measured and logged as `loss_NAME`, a fourth as `NAME`.
      constants: arrays for the objective, such as a teacher's parameters.
      trainable: patterns over names of parameters, such as `gcn/**`; what matches none is frozen. Learned ranges are always
        trained.
      prepare: makes the `ranges` collection at the start of the phase from the model and its parameters (calibration);
        None keeps the ranges of the phase before.
      update_ranges: re-estimate static ranges during training.
      accumulate: a batch is worked off in so many equal parts.
      evaluation: of the model while it trains; None: nothing is evaluated before the end of the phase.
      schedule: the unit in which `schedule/progress` rises from 0 towards 1 over the phase; `none`: there is none.
      memory: makes collections that the model reads, and writes as it trains, from the model, its variables and the phase's
        constants: features of all documents, for one. They are made at the start of the phase and again after every epoch,
        and are part of its state. None: there are none.
      refresh: whether they are made again `'before'` the evaluation at the end of an epoch, or `'after'` it; `'never'`: not.

    Raises:
      UserError: an unknown schedule or time of refreshing.
    """

    name: str
    model: nn.Module
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: float = 1.0
    steps: int = 0
    objective: Objective = task_loss
    constants: Any = None
    trainable: tuple[str, ...] = ("**",)
    prepare: Callable[[nn.Module, Any], dict[str, Any]] | None = None
    update_ranges: bool = False
    accumulate: int = 1
    evaluation: Evaluation | None = None
    schedule: Schedule = "none"
    memory: Callable[[nn.Module, Mapping[str, Any], Any], dict[str, Any]] | None = None
    refresh: Refresh = "before"

    def __post_init__(self):
        if self.refresh not in get_args(Refresh):
            hint = near_misses(self.refresh, get_args(Refresh))
            raise UserError(f"phase {self.name!r}: unknown time of refreshing {self.refresh!r}{hint}")
        if self.schedule not in get_args(Schedule):
            hint = near_misses(self.schedule, get_args(Schedule))
            raise UserError(f"phase {self.name!r}: unknown schedule {self.schedule!r}{hint}")

    def length(self, batches_per_epoch: int) -> int:
        """Returns the number of steps."""
        return self.steps or math.ceil(self.epochs * batches_per_epoch)


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a phase lies in a run.

    Attributes:
      number: of the phase in the recipe, from 0.
      start: steps taken before it.
      length: its steps, if nothing stops it earlier.
      batches_per_epoch: steps in which all data are seen once.
    """

    number: int
    start: int
    length: int
    batches_per_epoch: int

    @property
    def end(self) -> int:
        """The step after which the phase is over."""
        return self.start + self.length


def scheduled(phase: Phase, span: Span | None, step: Any) -> dict[str, Any]:
    """Returns what is added to the variables: `{"schedule": {"progress": p}}`, or nothing in a phase without a schedule.

    Args:
      phase: whose schedule it is.
      span: where the phase lies; may be None without a schedule.
      step: the steps that the run had taken before this one; an int or a traced int32 scalar.

    Returns:
      p is a float32 scalar in [0, 1): the share of the phase's steps that are over, or of its epochs (finished ones, of
      as many as the phase begins).
    """
    if phase.schedule == "none":
        return {}
    if span is None:
        raise ValueError(f"phase {phase.name!r} has a schedule: say where it lies in the run (span)")
    done, whole = step - span.start, span.length
    if phase.schedule == "epoch":
        done, whole = done // span.batches_per_epoch, math.ceil(whole / span.batches_per_epoch)
    return {"schedule": {"progress": divide(jnp.float32(done), float(whole))}}


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes.

    Attributes:
      step: int32 scalar, steps taken in the whole run.
      trained: flat dict of trained arrays, by `params/...` or `ranges/...` name.
      frozen: flat dict of the others.
      observers: state of the range estimators while ranges are re-estimated; else empty.
      opt_state: of the optimizer over `trained`.
      memory: collections of the phase's own, see `Phase.memory`; else empty.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    frozen: dict[str, Any]
    observers: dict[str, Any]
    opt_state: Any
    memory: dict[str, Any] = flax.struct.field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """Returns the nested `params` and `ranges` collections, and those of the memory."""
        nested = traverse_util.unflatten_dict(self.trained | self.frozen, sep="/")
        return {"params": nested["params"], "ranges": nested.get("ranges", {}), **self.memory}


def make_state(
    phase: Phase, variables: Mapping[str, Any], optimizer: optax.GradientTransformation, step: int, example: Batch
) -> TrainState:
    """Splits the variables of a phase into what is trained and what is not."""
    sites = list_sites(phase.model, variables, *inputs(phase.model, example))
    flat = {
        f"{collection}/{name}": value
        for collection in ("params", "ranges")
        for name, value in traverse_util.flatten_dict(variables.get(collection, {}), sep="/").items()
    }
    policy: Policy | None = phase.model.policy  # type: ignore[attr-defined]

    def chosen(name: str) -> bool:
        collection, _, path = name.partition("/")
        return collection != "params" or any(matches(pattern, path) for pattern in phase.trainable)

    trained = {name: v for name, v in flat.items() if chosen(name) and is_trained(policy, sites, name, v)}
    frozen = {name: value for name, value in flat.items() if name not in trained}
    return TrainState(jnp.int32(step), trained, frozen, {}, optimizer.init(trained))


def check_phase(phase: Phase, params: Mapping[str, Any]) -> None:
    """Raises a `UserError` if a pattern of a phase, of `trainable` or of `rate_factors`, matches no parameter."""
    names = traverse_util.flatten_dict(params, sep="/")
    factors = [pattern for pattern, _ in phase.optimizer.rate_factors]
    for field, patterns in (("trainable", phase.trainable), ("rate_factors", factors)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                example = next(iter(names))
                raise UserError(f"phase {phase.name!r}: {field} {pattern!r} matches no parameter, such as {example!r}")


def make_step(
    phase: Phase, optimizer: optax.GradientTransformation, seed: int | jax.Array, span: Span | None = None
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the train step of a phase: `(state, batch, constants) -> (state, measurements)`, to be compiled.

    Args:
      phase: what is trained, and how.
      optimizer: over the trained arrays.
      seed: of dropout and of random rounding (the random streams `dropout` and `rounding`); it may be traced.
      span: where the phase lies in the run; a phase with a schedule needs it.
    """

    def total_loss(trained, state: TrainState, batch: Batch, constants, key, choices):
        variables = state.replace(trained=trained).variables() | scheduled(phase, span, state.step)
        rngs = {"dropout": key, "rounding": jax.random.fold_in(key, _ROUNDING)}
        updated: dict[str, Any] = {}

        def run(batch: Batch, capture: bool = False, **collections: Any):
            mutable = ["captures"] * capture + ["ranges", "observers"] * phase.update_ranges + [*state.memory]
            given = variables | collections | ({"observers": state.observers} if phase.update_ranges else {})
            outputs, changed = phase.model.apply(
                given, *inputs(phase.model, batch), deterministic=False, rngs=rngs, mutable=mutable
            )
            updated.update({name: value for name, value in changed.items() if name != "captures"})
            return outputs, changed.get("captures", {})

        taken, length = (state.step, 0) if span is None else (state.step - span.start, span.length)
        loss, weight, *parts = phase.objective(Forward(run, taken, length, choices), batch, constants)
        names = ("loss_{}", "{}")
        sums = {
            form.format(name): part for form, some in zip(names, parts, strict=False) for name, part in some.items()
        }
        return loss, (weight, sums, updated)

    def sums(state: TrainState, batch: Batch, constants, key, choices):
        gradient = jax.value_and_grad(total_loss, has_aux=True)
        (loss, (weight, parts, updated)), grads = gradient(state.trained, state, batch, constants, key, choices)
        return (loss, weight, parts, grads), updated

    def train_step(state: TrainState, batch: Batch, constants: Any):
        # The generator of the hardware: half the compile time of the default, and fast on accelerators.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        choices = jax.random.fold_in(key, _CHOICES)
        if phase.accumulate == 1:
            (loss, weight, parts, grads), updated = sums(state, batch, constants, key, choices)
        else:
            cut = {k: v.reshape(phase.accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
            pieces = (cut, jax.random.split(key, phase.accumulate))

            def one(piece):
                return sums(state, piece[0], constants, piece[1], choices)[0]

            def add(total, piece):
                return jax.tree.map(jnp.add, total, one(piece)), None

            shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (loss, weight, parts, grads), _ = jax.lax.scan(add, zeros, pieces)
            updated = {}
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        frozen = state.frozen
        if "ranges" in updated:
            fresh = traverse_util.flatten_dict(updated["ranges"], sep="/")
            frozen = {name: fresh.get(name.removeprefix("ranges/"), value) for name, value in frozen.items()}
        new = state.replace(
            step=state.step + 1,
            trained=trained,
            frozen=frozen,
            observers=updated.get("observers", state.observers),
            opt_state=opt_state,
            memory={name: updated.get(name, value) for name, value in state.memory.items()},
        )
        means = {name: value / weight for name, value in {"loss": loss, **parts}.items()}
        return new, means | {"grad_norm": optax.tree.norm(grads)}

    return train_step
