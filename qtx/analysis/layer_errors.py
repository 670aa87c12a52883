"""How far a student is from its teacher, layer by layer.

    found = layer_errors(Teacher(student, variables), teacher, batches)
    plot({"TernaryBERT": found}, "layer_errors.png")

Mean squared errors of captured sites, as in Kim et al. 2023, figures 2 (b) and 4 (b). Quantities and masks are those of the
losses of `qtx.methods.distillation`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.distillation import (
    LAYER_SITES,
    Distillation,
    LayerRule,
    Padding,
    Pairs,
    Side,
    Teacher,
    check_teacher,
    layer_pairs,
    layer_site,
    squared_error,
)
from qtx.train.logging import progress
from qtx.train.phase import Batch, inputs
from qtx.train.plots import INK, RUN_COLORS, new_figure, save_figure
from qtx.train.report import Table

QUANTITIES = ("hidden_states", "scores", "maps", "context", "self_output", "attention_output")


def usual_quantities(model: nn.Module) -> tuple[str, ...]:
    """Returns what figures 2 (b) and 4 (b) show, and the projection before it; of a model whose norms stand before their
    sub-layers without `attention_output`, which it does not have."""
    behind = () if model.norm_first else ("attention_output",)  # type: ignore[attr-defined]
    return ("self_output", *behind, "hidden_states")


def layer_errors(
    student: Teacher,
    teacher: Teacher,
    batches: Sequence[Batch],
    quantities: Sequence[str] = ("attention_output", "hidden_states"),
    layers: LayerRule | Sequence[tuple[int, int]] = "same",
    padding: Padding = "ignore",
) -> dict[str, np.ndarray]:
    """Measures the mean squared error between student and teacher at every layer.

    Args:
      student: module with its policy, and variables.
      teacher: likewise.
      batches: with the arrays that the models are called with, and `weights` `[B]`. Each shape compiles once.
      quantities: of `QUANTITIES`; `hidden_states` are the outputs of the layers.
      layers: which layer is compared with which, see `qtx.methods.distillation.layer_pairs`.
      padding: `'published'`: it counts as tokens do.

    Returns:
      `[pairs of layers]` by quantity: the mean over examples of the mean over each one's tokens and features.

    Raises:
      UserError: no batch, an unknown quantity, or models that do not fit each other.
    """
    if len(batches) == 0:
        raise UserError("errors of layers got no batches; give at least one")
    pairs = check(student.model, teacher.model, quantities, layers, padding)
    total = None
    with progress(len(batches), "errors of layers") as bar:
        for done, batch in enumerate(batches, 1):
            models = student.model, teacher.model
            one = _add(*models, tuple(quantities), pairs, padding, student.variables, teacher.variables, dict(batch))
            total = one if total is None else jax.tree.map(jnp.add, total, one)
            bar.update(done)
    assert total is not None
    sums, weight = jax.device_get(total)
    return {name: sums[name] / weight for name in quantities}


def check(
    student: nn.Module,
    teacher: nn.Module,
    quantities: Sequence[str],
    layers: LayerRule | Sequence[tuple[int, int]] = "same",
    padding: Padding = "ignore",
) -> Pairs:
    """Returns the pairs of layers that `layer_errors` compares; arguments and errors are its."""
    if not quantities:
        raise UserError(f"no quantities of layers to compare; choose from {', '.join(QUANTITIES)}")
    for name in quantities:
        if name not in QUANTITIES:
            raise UserError(f"unknown quantity {name!r} of layers{near_misses(name, QUANTITIES)}")
    counts = [model.config.num_layers for model in (student, teacher)]  # type: ignore[attr-defined]
    pairs = layer_pairs(layers, *counts)
    check_teacher(Distillation(student, teacher, dict.fromkeys(quantities, 1.0), pairs, padding=padding))
    return pairs


@partial(jax.jit, static_argnums=range(5))
def _add(student, teacher, quantities, pairs, padding, student_variables, teacher_variables, batch):
    """One batch: weighted sums `[pairs]` by quantity, and the sum of the weights."""

    def run(model, variables):
        outputs, found = model.apply(variables, *inputs(model, batch), mutable=["captures", "masks"])
        captures, masks = (traverse_util.flatten_dict(found.get(n, {}), sep="/") for n in ("captures", "masks"))
        return Side(model, outputs, captures), masks

    (ours, _), (theirs, masks) = run(student, student_variables), run(teacher, teacher_variables)

    def error(quantity, s, t):
        if quantity == "hidden_states":
            values, role = (
                (ours.outputs.hidden_states[s + 1], theirs.outputs.hidden_states[t + 1]),
                "attention/value/output",
            )
        else:
            role = LAYER_SITES[quantity]
            values = ours.at(s, role), theirs.at(t, role)
        where = None if padding == "published" else masks.get(layer_site(t, role))
        return jnp.sum(squared_error(*values, where) * batch["weights"])

    sums = {name: jnp.stack([error(name, s, t) for s, t in pairs]) for name in quantities}
    return sums, jnp.sum(batch["weights"])


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a row for each model and layer, with a column for each quantity.

    Args:
      found: from `layer_errors`, by model.
    """
    quantities = list(dict.fromkeys(name for errors in found.values() for name in errors))
    rows = []
    for model, errors in found.items():
        for layer in range(max(map(len, errors.values()))):
            rows.append([model, layer, *(float(errors[q][layer]) if q in errors else None for q in quantities)])
    return Table(["model", "layer", *quantities], rows, dict.fromkeys(quantities, ".4g"))


def plot(found: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the errors over the layers, one panel for each quantity and one line for each model.

    Args:
      found: from `layer_errors`, by model.
      path: of the PNG.
    """
    quantities = list(dict.fromkeys(name for errors in found.values() for name in errors))
    figure, grid = new_figure(5 * len(quantities), 3.8, columns=len(quantities))
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        for color, (name, errors) in zip(RUN_COLORS * len(found), found.items(), strict=False):
            if quantity in errors:
                values = np.asarray(errors[quantity])
                axes.plot(np.arange(len(values)), values, "o-", color=color, markersize=4, linewidth=1.2, label=name)
        axes.set_title(quantity.replace("_", " "), fontsize=9, color=INK, loc="left")
        axes.locator_params(axis="x", integer=True)
        highest = max((float(np.max(errors[quantity])) for errors in found.values() if quantity in errors), default=0.0)
        # From zero, and with room above: errors that are all but the same would lie on the frame.
        axes.set_ylim(0, 1.05 * highest if highest > 0 and np.isfinite(highest) else None)
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("layer of the student", fontsize=9, color=INK)
    figure.supylabel("mean squared error", fontsize=9, color=INK)
    save_figure(figure, path)
