"""The one training loop: a recipe is a list of phases, and every phase is compiled into one step.

    state = fit(recipe, batches, params, workdir=...)

A phase says which policy the model has, what is minimised, what is trained and how. Fine-tuning is one phase; latent
quantization two; distillation is a phase whose objective looks at a teacher. A run is a function of (recipe, seed, data):
the random key of a step is `fold_in(key(seed), step)`, the batch of a step follows from the seed and the step, so a run
that was killed resumes from its last checkpoint to the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from qtx.data.batching import Batches, in_order
from qtx.errors import UserError
from qtx.nn.sites import SiteInfo, list_sites
from qtx.quant.policy import Policy, matches
from qtx.train.checkpoint import Checkpoints
from qtx.train.logging import MetricsLog, progress
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.sharding import replicate, shard_batch, shard_tree

Batch = Mapping[str, Any]  # named arrays, see qtx.data.batching
Forward = Callable[..., tuple[Any, dict[str, Any]]]
Objective = Callable[[Forward, Batch, Any], tuple[jax.Array, jax.Array]]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the model's positional arguments from a batch."""
    return tuple(batch[name] for name in INPUTS)


def task_loss(forward: Forward, batch: Batch, constants: Any = None) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, or squared error for one output; returns the sums of weighted losses and of weights."""
    del constants
    logits = forward(batch)[0].logits
    if logits.shape[-1] == 1:
        losses = jnp.square(logits[:, 0] - batch["labels"])
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Attributes:
      name: for logs and errors.
      model: module with the phase's policy.
      optimizer: its settings.
      epochs: how often the data are seen; fractions are fine.
      steps: overrides `epochs` if positive.
      objective: what is minimised: `(forward, batch, constants) -> (loss sum, weight sum)`; `forward(batch)` runs the
        model and returns its outputs and what was asked to be captured.
      constants: arrays for the objective, such as a teacher's parameters.
      trainable: patterns over `params/...` names; what matches none is frozen. Learned ranges are always trained.
      prepare: makes the `ranges` collection at the start of the phase from the model and its parameters (calibration);
        None keeps the ranges of the phase before.
      update_ranges: re-estimate static ranges during training.
      accumulate: a batch is worked off in so many equal parts.
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


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and writes.

    Attributes:
      step: int32 scalar, steps taken in the whole run.
      trained: flat dict of trained arrays, by `params/...` or `ranges/...` name.
      frozen: flat dict of the others.
      observers: state of the range estimators while ranges are re-estimated; else empty.
      opt_state: of the optimizer over `trained`.
    """

    step: jax.Array
    trained: dict[str, jax.Array]
    frozen: dict[str, Any]
    observers: dict[str, Any]
    opt_state: Any

    def variables(self) -> dict[str, Any]:
        """Returns the nested `params` and `ranges` collections."""
        nested = traverse_util.unflatten_dict(self.trained | self.frozen, sep="/")
        return {"params": nested["params"], "ranges": nested.get("ranges", {})}


def is_trained(phase: Phase, sites: Mapping[str, SiteInfo], name: str, value: Any) -> bool:
    """Whether an array of the state, `params/...` or `ranges/...`, is trained in a phase."""
    collection, _, path = name.partition("/")
    if value is None or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return False
    if collection == "params":
        return any(matches(pattern, path) for pattern in phase.trainable)
    policy: Policy | None = phase.model.policy  # type: ignore[attr-defined]
    site, _, field = path.rpartition("/")
    spec = policy.spec(sites[site].kind, site) if policy is not None and site in sites else None
    if spec is None or spec.range != "learned":
        return False
    return field == "scale" or (field == "zero_point" and spec.has_zero_point)


def make_state(
    phase: Phase, variables: Mapping[str, Any], optimizer: optax.GradientTransformation, step: int, example: Batch
) -> TrainState:
    """Splits the variables of a phase into what is trained and what is not."""
    sites = list_sites(phase.model, variables, *inputs(example))
    flat = {
        f"{collection}/{name}": value
        for collection in ("params", "ranges")
        for name, value in traverse_util.flatten_dict(variables.get(collection, {}), sep="/").items()
    }
    trained = {name: value for name, value in flat.items() if is_trained(phase, sites, name, value)}
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
    phase: Phase, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the train step of a phase: `(state, batch, constants) -> (state, measurements)`, to be compiled."""

    def total_loss(trained, state: TrainState, batch: Batch, constants, key):
        variables = state.replace(trained=trained).variables()
        updated: dict[str, Any] = {}

        def forward(batch: Batch, capture: bool = False, **collections: Any):
            mutable = ["captures"] * capture + ["ranges", "observers"] * phase.update_ranges
            given = variables | collections | ({"observers": state.observers} if phase.update_ranges else {})
            outputs, changed = phase.model.apply(
                given, *inputs(batch), deterministic=False, rngs={"dropout": key}, mutable=mutable
            )
            updated.update({name: changed[name] for name in ("ranges", "observers") if name in changed})
            return outputs, changed.get("captures", {})

        loss, weight = phase.objective(forward, batch, constants)
        return loss, (weight, updated)

    def gradients(state: TrainState, batch: Batch, constants, key):
        return jax.value_and_grad(total_loss, has_aux=True)(state.trained, state, batch, constants, key)

    def train_step(state: TrainState, batch: Batch, constants: Any):
        # The generator of the hardware: half the compile time of the default, and fast on accelerators.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)
        if phase.accumulate == 1:
            (loss, (weight, updated)), grads = gradients(state, batch, constants, key)
        else:
            parts = {k: v.reshape(phase.accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
            keys = jax.random.split(key, phase.accumulate)

            def add(total, part):
                (loss, (weight, _)), grads = gradients(state, part[0], constants, part[1])
                return jax.tree.map(jnp.add, total, (loss, weight, grads)), None

            zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained))
            (loss, weight, grads), _ = jax.lax.scan(add, zeros, (parts, keys))
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
        )
        return new, {"loss": loss / weight, "grad_norm": optax.tree.norm(grads)}

    return train_step


@dataclasses.dataclass(frozen=True)
class Saving:
    """How often a run is written down.

    Attributes:
      checkpoint_every: steps between checkpoints; 0: only at the end of each phase.
      log_every: steps between log entries.
    """

    checkpoint_every: int = 500
    log_every: int = 20


def fit(
    recipe: Sequence[Phase],
    batches: Batches,
    variables: Mapping[str, Any],
    mesh: Mesh,
    workdir: str | Path,
    seed: int = 0,
    saving: Saving = Saving(),
    after_phase: Callable[[Phase, Mapping[str, Any], int], None] | None = None,
) -> dict[str, Any]:
    """Runs a recipe, or what is left of it if the run directory holds a checkpoint.

    Args:
      recipe: the phases, in order.
      batches: endless training batches (`epochs=None`); each phase goes on where the one before stopped.
      variables: initial `params` (and `ranges`, if the first phase does not prepare its own).
      mesh: where to compute.
      workdir: run directory: `checkpoints/`, `metrics.jsonl` and `tensorboard/` are written here.
      seed: of dropout.
      saving: how often to write.
      after_phase: called with each finished phase, its variables and the number of steps taken.

    Returns:
      The final `params` and `ranges`.

    Raises:
      UserError: on a phase without steps, a pattern that matches no parameter, batches that do not divide, a checkpoint of
        another run, or a loss that is not finite.
    """
    if not recipe:
        raise UserError("the recipe has no phases; give it at least one")
    lengths = [phase.steps or math.ceil(phase.epochs * batches.batches_per_epoch) for phase in recipe]
    for phase, length in zip(recipe, lengths, strict=True):
        check_phase(phase, variables["params"])
        if length < 1:
            raise UserError(f"phase {phase.name!r} has no steps; give it epochs or steps above zero")
        if phase.update_ranges and phase.accumulate > 1:
            raise UserError(
                f"phase {phase.name!r}: ranges cannot be re-estimated while a batch is accumulated from parts"
            )
        if batches.batch_size % phase.accumulate:
            raise UserError(f"batch size {batches.batch_size} cannot be worked off in {phase.accumulate} equal parts")
    ends = np.cumsum(lengths)
    workdir = Path(workdir)
    variables = {
        "params": shard_tree(variables["params"], mesh),
        "ranges": replicate(variables.get("ranges", {}), mesh),
    }
    example = batches[0]
    # Steps donate their state; what the caller gave stays the caller's, even if placing it needed no copy.
    variables = jax.tree.map(jnp.copy, variables)
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints") as checkpoints, MetricsLog(workdir) as log:
        resumed = checkpoints.latest_step()
        position = int(np.searchsorted(ends, resumed, side="left")) if resumed is not None else 0
        if resumed is not None and position >= len(recipe):
            raise UserError(
                f"{workdir} holds a checkpoint of step {resumed}, the recipe ends at {ends[-1]}; use another workdir"
            )
        for number in range(position, len(recipe)):
            phase, end = recipe[number], int(ends[number])
            start = end - lengths[number]
            optimizer = make_optimizer(phase.optimizer, lengths[number])
            if phase.prepare is not None:
                ranges = phase.prepare(phase.model, variables["params"])
                variables = {**variables, "ranges": replicate(ranges, mesh)}
            state = replicate_missing(make_state(phase, variables, optimizer, start, example), mesh)
            if phase.update_ranges:
                state = state.replace(observers=_observers(phase, state, example))
            iterator = iter(batches)
            iterator.set_state({"next_index": start})
            if resumed is not None and number == position:
                state, meta = checkpoints.restore(state)
                iterator.set_state(meta["data"])
                log.rewind(resumed)
            state = _run_phase(phase, state, optimizer, iterator, end, seed, mesh, saving, checkpoints, log, number)
            variables = state.variables()
            if after_phase is not None:
                after_phase(phase, variables, end)
    return dict(variables)


def replicate_missing(state: TrainState, mesh: Mesh) -> TrainState:
    """Moves the arrays of a state that live on one device alone (counters, say) to the whole mesh."""

    def place(x):
        return x if isinstance(x.sharding, jax.sharding.NamedSharding) else replicate(x, mesh)

    return jax.tree.map(place, state)


def _observers(phase: Phase, state: TrainState, example: Batch) -> dict[str, Any]:
    """Estimators start from the calibrated ranges' own data: one observation of the first batch."""
    _, changed = phase.model.apply(state.variables(), *inputs(example), mutable=["ranges", "observers"])
    return changed["observers"]


def _run_phase(phase, state, optimizer, iterator, end, seed, mesh, saving, checkpoints, log, number) -> TrainState:
    step_fn = jax.jit(make_step(phase, optimizer, seed), donate_argnums=0)
    constants = replicate(phase.constants, mesh)
    step = int(state.step)
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    examples, since = 0, time.perf_counter()

    def save(at: int) -> None:
        checkpoints.save(at, state, {"phase": number, "data": iterator.get_state()})

    with progress(end, phase.name, start=step) as bar:
        while step < end:
            batch = next(iterator)
            examples += int(batch["weights"].sum())
            state, measured = step_fn(state, shard_batch(batch, mesh), constants)
            step += 1
            pending.append((step, measured))
            if step % saving.log_every == 0 or step == end:
                values = jax.device_get(pending)
                loss = float(np.mean([m["loss"] for _, m in values]))
                if not math.isfinite(loss):
                    raise UserError(
                        f"phase {phase.name!r}: the loss is {loss} around step {step}; lower the learning rate"
                    )
                rate = examples / max(time.perf_counter() - since, 1e-9)
                norm = float(np.mean([m["grad_norm"] for _, m in values]))
                log.write(step, {"loss": loss, "grad_norm": norm, "examples_per_second": rate}, prefix=f"{phase.name}/")
                bar.update(step, loss=loss, examples_per_second=rate)
                pending, examples, since = [], 0, time.perf_counter()
            if step == end or (saving.checkpoint_every and step % saving.checkpoint_every == 0):
                save(step)
    checkpoints.wait()
    return state


@partial(jax.jit, static_argnums=0)
def _logits(model: nn.Module, variables: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
    outputs: Any = model.apply(variables, *inputs(batch))
    # Whole on every device: each host can read all of them.
    return jax.lax.with_sharding_constraint((outputs.logits, batch["index"]), jax.P())


def predict(model: nn.Module, variables: Mapping[str, Any], batches: Batches, mesh: Mesh) -> np.ndarray:
    """Returns the logits `[N, C]` of all examples in their order.

    Args:
      model: with the policy that `variables['ranges']` belong to.
      variables: `params`, `ranges` and whatever else sites read, such as `switches`.
      batches: one epoch, not shuffled.
      mesh: where to compute.
    """
    with jax.set_mesh(mesh):
        placed = {name: replicate(tree, mesh) for name, tree in variables.items() if name != "params"}
        placed["params"] = shard_tree(variables["params"], mesh)
        found = [_logits(model, placed, shard_batch(batch, mesh)) for batch in batches]
    logits, indices = zip(*jax.device_get(found), strict=True)
    return in_order(logits, indices, len(batches.encoded))
