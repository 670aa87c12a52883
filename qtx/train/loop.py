"""The one training loop: a recipe is a list of phases, and every phase is compiled into one step.

    variables = fit(recipe, batches, variables, mesh, workdir)

Fine-tuning is one phase; latent quantization two; distillation is a phase whose objective looks at a teacher. A run is a
function of (recipe, seed, data): the random key of a step is `fold_in(key(seed), step)`, the batch of a step follows from
the seed and the step, and what evaluations decide from their history, which is part of every checkpoint. So a run that
was killed resumes from its last checkpoint to the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtx.data.batching import Batches, in_order
from qtx.errors import UserError
from qtx.train.checkpoint import Checkpoints
from qtx.train.evaluation import Evaluation, Record
from qtx.train.logging import MetricsLog, Progress, progress
from qtx.train.optimizer import make_optimizer
from qtx.train.phase import Batch, Phase, Span, TrainState, check_phase, inputs, make_state, make_step, scheduled
from qtx.train.sharding import replicate, shard_batch, shard_tree


@dataclasses.dataclass(frozen=True)
class Saving:
    """How often a run is written down.

    Attributes:
      checkpoint_every: steps between checkpoints besides those at evaluations and at the end of each phase; 0: no others.
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
    after_phase: Callable[[Phase, Mapping[str, Any], int, Sequence[Record]], None] | None = None,
) -> dict[str, Any]:
    """Runs a recipe, or what is left of it if the run directory holds a checkpoint.

    Args:
      recipe: the phases, in order.
      batches: endless training batches (`epochs=None`); each phase goes on where the one before stopped.
      variables: initial `params` (and `ranges`, if the first phase does not prepare its own).
      mesh: where to compute.
      workdir: run directory: `checkpoints/`, `best/`, `metrics.jsonl` and `tensorboard/` are written here.
      seed: of dropout and random rounding.
      saving: how often to write.
      after_phase: called with each finished phase, its variables, the number of steps taken and the history of its
        evaluations.

    Returns:
      The final `params` and `ranges`, with the `schedule` that they were trained with and the memory (`Phase.memory`) if the
      last phase has them.

    Raises:
      UserError: on a phase without steps, a pattern that matches no parameter, batches that do not divide, a checkpoint of
        another run, or a loss that is not finite.
    """
    if not recipe:
        raise UserError("the recipe has no phases; give it at least one")
    lengths = [phase.length(batches.batches_per_epoch) for phase in recipe]
    for phase, length in zip(recipe, lengths, strict=True):
        check_phase(phase, variables["params"])
        if length < 1:
            raise UserError(f"phase {phase.name!r} has no steps; give it epochs or steps above zero")
        if phase.update_ranges and phase.accumulate > 1:
            raise UserError(
                f"phase {phase.name!r}: ranges cannot be re-estimated while a batch is accumulated from parts"
            )
        if phase.memory is not None and phase.accumulate > 1:
            raise UserError(f"phase {phase.name!r}: a memory cannot be written while a batch is accumulated from parts")
        if batches.batch_size % phase.accumulate:
            raise UserError(f"batch size {batches.batch_size} cannot be worked off in {phase.accumulate} equal parts")
    workdir = Path(workdir)
    current: dict[str, Any] = {
        "params": shard_tree(variables["params"], mesh),
        "ranges": replicate(variables.get("ranges", {}), mesh),
    }
    example = batches[0]
    # Steps donate their state; what the caller gave stays the caller's, even if placing it needed no copy.
    current = jax.tree.map(jnp.copy, current)
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir / "checkpoints") as checkpoints,
        Checkpoints(workdir / "best") as best,
        MetricsLog(workdir) as log,
    ):
        run = _Run(mesh, seed, saving, checkpoints, best, log)
        resumed = checkpoints.latest_step() or 0
        meta: dict[str, Any] = checkpoints.meta(resumed) if resumed else {"phase": 0, "start": 0}
        # A phase may have stopped before its planned end: only the checkpoint knows where its own one began.
        first, start = meta["phase"], meta["start"]
        if first >= len(recipe) or resumed > start + lengths[first]:
            raise UserError(
                f"{workdir} holds a checkpoint of step {resumed}, which this recipe does not reach in its phase "
                f"{first + 1}; use another workdir"
            )
        for number in range(first, len(recipe)):
            phase, span = recipe[number], Span(number, start, lengths[number], batches.batches_per_epoch)
            optimizer = make_optimizer(phase.optimizer, span.length, span.batches_per_epoch)
            if phase.prepare is not None:
                ranges = phase.prepare(phase.model, current["params"])
                current = current | {"ranges": replicate(ranges, mesh)}
            state = replicate_missing(make_state(phase, current, optimizer, start, example), mesh)
            if phase.update_ranges:
                state = state.replace(observers=_observers(phase, span, state, example))
            constants = replicate(phase.constants, mesh)
            state = _refreshed(phase, state, constants, mesh)
            iterator = iter(batches)
            iterator.set_state({"next_index": start})
            history: list[Record] = []
            if number == first:
                if resumed:
                    state, meta = checkpoints.restore(state)
                    iterator.set_state(meta["data"])
                    history = meta["evaluations"]
                    _tell(f"{workdir} goes on from step {resumed}")
                log.rewind(resumed)
                best.rewind(resumed)
            state = _run_phase(run, phase, span, state, constants, optimizer, iterator, history)
            start = chosen = int(state.step)
            current = state.variables()
            if phase.evaluation is not None and phase.evaluation.keep_best:
                chosen = phase.evaluation.best(history)["step"]
                current, _ = best.restore(current, chosen)
            current |= scheduled(phase, span, chosen - 1)  # as the last step behind these variables saw it
            if after_phase is not None:
                after_phase(phase, current, start, history)
    return current


def _tell(what: str) -> None:
    """Prints a line on standard error, where progress is shown, too; the first host speaks for all."""
    if jax.process_index() == 0:
        print(what, file=sys.stderr, flush=True)


def replicate_missing(state: TrainState, mesh: Mesh) -> TrainState:
    """Moves the arrays of a state that live on one device alone (counters, say) to the whole mesh."""

    def place(x):
        return x if isinstance(x.sharding, jax.sharding.NamedSharding) else replicate(x, mesh)

    return jax.tree.map(place, state)


def _time_to_refresh(phase: Phase, taken: int, span: Span, over: bool, due: frozenset[int]) -> str:
    """Returns when the memory is made again at this step: as the phase says at the end of an epoch, else `'never'`."""
    if over or taken % span.batches_per_epoch == 0 or (phase.refresh == "before" and taken in due):
        return phase.refresh
    return "never"


def _refreshed(phase: Phase, state: TrainState, constants: Any, mesh: Mesh) -> TrainState:
    """Returns a state whose memory was made from its variables."""
    if phase.memory is None:
        return state
    return state.replace(memory=replicate(phase.memory(phase.model, state.variables(), constants), mesh))


def _observers(phase: Phase, span: Span, state: TrainState, example: Batch) -> dict[str, Any]:
    """Estimators start from the calibrated ranges' own data: one observation of the first batch."""
    variables = state.variables() | scheduled(phase, span, span.start)

    @jax.jit
    def observe(variables: Mapping[str, Any], args: tuple[Any, ...]) -> Any:
        return phase.model.apply(variables, *args, mutable=["ranges", "observers"])[1].get("observers", {})

    return observe(variables, inputs(phase.model, example))


@dataclasses.dataclass(frozen=True)
class _Run:
    """What the phases of a run share."""

    mesh: Mesh
    seed: int
    saving: Saving
    checkpoints: Checkpoints
    best: Checkpoints
    log: MetricsLog


def _run_phase(
    run: _Run,
    phase: Phase,
    span: Span,
    state: TrainState,
    constants: Any,
    optimizer,
    iterator,
    history: list[Record],
) -> TrainState:
    """Takes the steps that are left of a phase; its evaluations are added to `history`."""

    def train_step(state: TrainState, batch: Batch, constants: Any, seed: jax.Array):
        return make_step(phase, optimizer, seed, span)(state, batch, constants)

    # The seed is an argument, so that runs which differ in it alone share their compiled programs.
    step_fn, seed = jax.jit(train_step, donate_argnums=0), replicate(np.uint32(run.seed % 2**32), run.mesh)
    evaluation, saving, name = phase.evaluation, run.saving, phase.name
    due = evaluation.steps(span.length, span.batches_per_epoch) if evaluation else frozenset()
    step = int(state.step)
    over = step == span.end or (evaluation is not None and evaluation.is_over(history))
    pending: list[tuple[int, dict[str, jax.Array]]] = []
    examples, since = 0, time.perf_counter()
    if not over:
        _tell(f"{name}: compiling the train step")
    with progress(span.end, name, start=step) as bar:
        while not over:
            batch = next(iterator)
            examples += int(batch["weights"].sum())
            state, measured = step_fn(state, shard_batch(batch, run.mesh), constants, seed)
            step += 1
            pending.append((step, measured))
            over, is_best, evaluated = step == span.end, False, step - span.start in due
            refreshes = _time_to_refresh(phase, step - span.start, span, over, due)
            if refreshes == "before":
                state = _refreshed(phase, state, constants, run.mesh)
            if evaluation is not None and evaluated:
                jax.block_until_ready(measured)
                began = time.perf_counter()
                _evaluate(run, phase, evaluation, span, state, step, history, bar)
                is_best = evaluation.keep_best and evaluation.best(history) is history[-1]
                over = over or evaluation.is_over(history)
                since += time.perf_counter() - began  # is no training time
            if over or step % saving.log_every == 0:
                values = jax.device_get(pending)
                means = {key: float(np.mean([m[key] for _, m in values])) for key in values[0][1]}
                loss = means["loss"]
                if not math.isfinite(loss):
                    raise UserError(f"phase {name!r}: the loss is {loss} around step {step}; lower the learning rate")
                rate = examples / max(time.perf_counter() - since, 1e-9)
                run.log.write(step, means | {"examples_per_second": rate}, prefix=f"{name}/")
                bar.update(step, loss=loss, examples_per_second=rate)
                pending, examples, since = [], 0, time.perf_counter()
            if is_best:
                run.best.save(step, state.variables(), {})
                run.best.wait()  # no checkpoint speaks of a best model that is not on disk
            if refreshes == "after":
                state = _refreshed(phase, state, constants, run.mesh)
            if over or evaluated or (saving.checkpoint_every and step % saving.checkpoint_every == 0):
                meta = {"phase": span.number, "start": span.start, "data": iterator.get_state()}
                run.checkpoints.save(step, state, meta | {"evaluations": list(history)})
    run.checkpoints.wait()
    return state


def _evaluate(
    run: _Run,
    phase: Phase,
    evaluation: Evaluation,
    span: Span,
    state: TrainState,
    step: int,
    history: list[Record],
    bar: Progress,
) -> None:
    """Evaluates the model as the last step left it, and adds the result to the history and the log."""
    values = evaluation.measure(phase, state.variables() | scheduled(phase, span, step - 1))
    found = {"epoch": (step - span.start) / span.batches_per_epoch, **values}
    history.append({"step": step, **found})
    run.log.write(step, found, prefix=f"{phase.name}/eval/")
    bar.update(step, **{evaluation.metric: values[evaluation.metric]})


@partial(jax.jit, static_argnums=(0, 1))
def _outputs(
    model: nn.Module, output: str, variables: Mapping[str, Any], batch: Batch, key: jax.Array | None, number: int
) -> tuple[jax.Array, jax.Array]:
    rngs = None if key is None else {"rounding": jax.random.fold_in(key, number)}
    outputs: Any = model.apply(variables, *inputs(model, batch), rngs=rngs)
    # Whole on every device: each host can read all of them.
    return jax.lax.with_sharding_constraint((getattr(outputs, output), batch["index"]), jax.P())


def predict(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Batches,
    mesh: Mesh,
    rounding_seed: int | None = None,
    output: str = "logits",
) -> np.ndarray:
    """Returns the logits `[N, C]`, or another of the model's outputs, of all examples in their order.

    Args:
      model: with the policy that `variables['ranges']` belong to.
      variables: `params`, `ranges` and whatever else sites read, such as `switches`.
      batches: one epoch, not shuffled.
      mesh: where to compute.
      rounding_seed: of random rounding, which draws anew for every batch; None: nothing is drawn.
      output: which one: `'logits'`, or `'pooled'` `[N, D]`.
    """
    with jax.set_mesh(mesh):
        placed = {name: replicate(tree, mesh) for name, tree in variables.items() if name != "params"}
        placed["params"] = shard_tree(variables["params"], mesh)
        key = None if rounding_seed is None else replicate(jax.random.key(rounding_seed, impl="rbg"), mesh)
        found = [
            _outputs(model, output, placed, shard_batch(batch, mesh), key, number)
            for number, batch in enumerate(batches)
        ]
    values, indices = zip(*jax.device_get(found), strict=True)
    return in_order(values, indices, len(batches.encoded))
