"""The loss of a model as a function of its parameters, which curvature and landscape look at.

    loss = task_loss(model, {"ranges": ranges}, norms=0.01)
    batches = stack(batches)
    mean_loss(loss, params, batches)

A loss is called with parameters and one batch and returns a scalar. A plain function will do; arrays that it needs besides
are better bound with `jax.tree_util.Partial` than closed over: they are arguments of the compiled program then, not
constants in it, and other values cost no compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.tree_util import Partial

from qtx.errors import UserError, near_misses
from qtx.quant.policy import matches
from qtx.train.phase import Batch, inputs, label_losses

Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class _TaskLoss:
    """See `task_loss`. Equal for equal fields, so that two of them share a compiled program."""

    model: Any
    norms: float

    def __call__(self, collections: Mapping[str, Any], params: Any, batch: Batch) -> jax.Array:
        logits = self.model.apply({**collections, "params": params}, *inputs(self.model, batch)).logits
        losses = jnp.sum(label_losses(logits, batch["labels"]) * batch["weights"]) / jnp.sum(batch["weights"])
        return losses + self.norms * sum_of_norms(params) if self.norms else losses


def task_loss(model: Any, collections: Mapping[str, Any] | None = None, norms: float = 0.0) -> Partial:
    """Returns the loss of a classifier with labels, without dropout: `(params, batch) -> scalar`.

    Args:
      model: a module with its policy, or a stand-in with `inputs` and `apply`, as
        `qtx.methods.teacher_intervention.WithTeacher` is.
      collections: further variables, such as `ranges`.
      norms: coefficient of `sum_of_norms`; 0.01 in the published analysis.
    """
    return Partial(_TaskLoss(model, norms), collections or {})


def sum_of_norms(params: Any) -> jax.Array:
    """Returns the sum over all tensors of their 2-norms (not squared); a tensor of zeros has no gradient."""

    def norm(x: jax.Array) -> jax.Array:
        squares = jnp.sum(jnp.square(x))
        nonzero = squares > 0
        return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)

    return sum((norm(x) for x in jax.tree.leaves(params)), jnp.zeros(()))


def of_some(loss: Loss, params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Partial, dict[str, jax.Array]]:
    """Returns a loss as a function of some of the parameters, and those, flat by name; the others stay as they are.

    Args:
      loss: `(params, batch) -> scalar`.
      params: nested parameters.
      patterns: of their names.

    Raises:
      UserError: a pattern that matches no parameter, or no pattern.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    if not patterns:
        raise UserError("no patterns of parameters; '**' takes all of them")
    for pattern in patterns:
        if not any(matches(pattern, name) for name in flat):
            raise UserError(f"{pattern!r} matches no parameter{near_misses(pattern, flat)}")
    chosen = {name: x for name, x in sorted(flat.items()) if any(matches(pattern, name) for pattern in patterns)}
    return Partial(_together, loss, {name: x for name, x in flat.items() if name not in chosen}), chosen


def _together(loss: Loss, others: Mapping[str, Any], chosen: Mapping[str, Any], batch: Batch) -> jax.Array:
    return loss(traverse_util.unflatten_dict({**others, **chosen}, sep="/"), batch)


def bound(loss: Loss) -> Partial:
    """Returns a loss in the form that can be an argument of a compiled program."""
    return loss if isinstance(loss, Partial) else Partial(loss)


@jax.jit
def _mean(loss: Partial, params: Any, batches: Any) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches))


def mean_loss(loss: Loss, params: Any, batches: Any) -> jax.Array:
    """Returns the mean of a loss over batches `[N, ...]`, one after the other."""
    return _mean(bound(loss), params, batches)


def stack(batches: Sequence[Batch]) -> dict[str, Any]:
    """Returns batches of equal shapes as arrays `[N, ...]`.

    Raises:
      UserError: there is none, or their shapes differ.
    """
    if len(batches) == 0:
        raise UserError("the loss got no batches; give it at least one")
    first = {name: jnp.shape(value) for name, value in batches[0].items()}
    for number, batch in enumerate(batches):
        found = {name: jnp.shape(value) for name, value in batch.items()}
        if found != first:
            raise UserError(
                f"batch {number} has the shapes {found}, batch 0 {first}: batches must agree; pad all texts to one length"
            )
    return {name: jnp.stack([jnp.asarray(batch[name]) for batch in batches]) for name in first}
