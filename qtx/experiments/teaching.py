"""Phases with a teacher, from a configuration."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, cast, get_args

from ml_collections import ConfigDict

from qtx import models
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import Classification
from qtx.experiments.config import base, phases_of
from qtx.experiments.experiment import Experiment
from qtx.experiments.from_config import parse_overrides
from qtx.export.packed import WEIGHTS_FILE
from qtx.methods.distillation import (
    LOSS_SETS,
    LOSSES,
    READ_BY,
    LayerRule,
    Pairs,
    Teacher,
    check_losses,
    distillation_phase,
)
from qtx.methods.teacher_intervention import Interventions, intervention_phase, published_collections
from qtx.train.phase import Phase, task_loss

_SHOWN = 4  # labels in an error
_ROUNDED = 1e-9  # of a step: what a product of floats may lie above a whole number


def losses_of(text: str, field: str) -> dict[str, float]:
    """Reads a set of losses by name, or losses with their weights, such as `'logits=1, scores=0.5'`.

    Raises:
      UserError: on a set or a loss that does not exist, or a weight that is no number.
    """
    if text in LOSS_SETS:
        return dict(LOSS_SETS[text])
    if "=" not in text:
        known = (*LOSS_SETS, *(f"{name}=1" for name in LOSSES))
        raise UserError(f"{field}: unknown set of losses {text!r}{near_misses(text, known)}")
    found = {}
    for name, value in parse_overrides(text, field).items():
        try:
            found[name] = float(str(value))
        except ValueError:
            raise UserError(f"{field}: the weight of {name!r} is {value!r}, which is no number") from None
    return found


def layers_of(text: str) -> LayerRule | Pairs:
    """Reads `teacher.layers`: a rule as it is, or pairs of layers (student, teacher), such as `'0-1, 1-3'`.

    Raises:
      UserError: on anything else.
    """
    rules = get_args(LayerRule)
    if text in rules:
        return cast(LayerRule, text)
    pairs = [re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise UserError(
            f"teacher.layers: {text!r} is no rule{near_misses(text, rules)}; or give pairs of the student's and the teacher's "
            "layers, from 0, such as '0-1, 1-3'"
        )
    return tuple((int(pair[1]), int(pair[2])) for pair in pairs if pair)


def taught(phase: Phase, section: ConfigDict, experiment: Experiment, trained_before: bool) -> Phase:
    """Returns a phase that learns from the teacher that a configuration names; without `losses` from the labels, as it did.

    A published student keeps the gradient off its padding row either way (`published_collections`).

    Args:
      phase: the student's.
      section: of the phase.
      experiment: the run that the phase belongs to.
      trained_before: whether an earlier phase of the run changes the model in full precision.

    Raises:
      UserError: on anything that does not exist, or does not fit the student.
    """
    collections: dict[str, Any] = {}
    if experiment.config.quant.student == "published":
        collections = published_collections(phase.model.policy, experiment.pretrained.config)  # type: ignore[attr-defined]
    if not section.losses:
        if not collections or phase.objective is not task_loss:
            return phase
        return dataclasses.replace(phase, objective=functools.partial(task_loss, **collections))
    if not isinstance(experiment, Classification):
        raise UserError(f"phase {phase.name!r}: distillation is for tasks with labels, not {experiment.config.task!r}")
    losses = losses_of(section.losses, f"phases.{phase.name}.losses")
    c = experiment.config.teacher
    if experiment.task.is_regression and c.temperature != 1:
        raise UserError(
            f"teacher.temperature is {c.temperature}, but task {experiment.config.task!r} has one output, which is compared by "
            "squared error; leave it at 1.0"
        )
    options: dict[str, Any] = dict(
        layers=layers_of(c.layers),
        temperature=c.temperature,
        padding=c.padding,
        relation_heads=c.relation_heads,
        collections=collections,
    )
    teacher = _teacher(phase, experiment, trained_before)
    if section.intervention:
        return intervention_phase(phase, teacher, section.intervention, losses, **options)
    return distillation_phase(phase, teacher, losses, **options)


def check_phases(config: ConfigDict) -> None:
    """Checks what the phases of a recipe say of a teacher and of one another, as far as that takes neither data nor model.

    Raises:
      UserError: on losses or an intervention that do not exist, a teacher that nothing learns from, a field of it that nothing
        reads, a share that is none, or a phase included that is no earlier one.
    """
    wanted: set[str] = set()
    for name, section in phases_of(config):
        if section.losses:
            losses = losses_of(section.losses, f"phases.{name}.losses")
            check_losses(losses)
            wanted |= {loss for loss, weight in losses.items() if weight}
    _check_section(config, wanted)
    before: list[str] = []
    for name, section in phases_of(config):
        if section.intervention and not section.losses:
            raise UserError(
                f"phase {name!r}: an intervention {section.intervention!r} needs a teacher; set its `losses`"
            )
        if section.intervention:
            Interventions.named(section.intervention, ())
        if not 0 < section.share <= 1:
            raise UserError(
                f"phases.{name}.share is {section.share}; give the part of its steps to train, above 0 and up to 1"
            )
        if section.including and section.including not in before:
            raise UserError(f"phase {name!r} includes {section.including!r}, which is no earlier phase of the recipe")
        before.append(name)


def _check_section(config: ConfigDict, wanted: Set[str]) -> None:
    """Raises a `UserError` on a field of `teacher` that makes no difference to the losses of a recipe, or that is missing."""
    for name, default in base().teacher.items():
        value = config.teacher[name]
        if value == default:
            continue
        if not wanted:
            raise UserError(
                f"teacher.{name} is {value!r}, but no phase of the recipe has losses: set phases.{config.recipe[-1]}.losses, "
                f"or leave it at {default!r}"
            )
        if name in READ_BY and not wanted & set(READ_BY[name]):
            raise UserError(
                f"teacher.{name} is {value!r}, which none of the losses {', '.join(sorted(wanted))} reads, but "
                f"{', '.join(READ_BY[name])}; leave it at {default!r}"
            )
    if not wanted:
        return
    layers_of(config.teacher.layers)
    if config.model.layers and not config.teacher.name:
        raise UserError(
            f"model.layers: the student keeps layers {tuple(config.model.layers)} alone: give teacher.name, the teacher of all "
            f"layers (such as {config.model.name!r})"
        )


def _teacher(phase: Phase, experiment: Classification, trained_before: bool) -> Teacher:
    if not experiment.config.teacher.name and (trained_before or experiment.pretrained.fresh):
        raise UserError(
            f"phase {phase.name!r} learns from the model as the run begins, which is not trained then; fine-tune it in a run "
            "of its own and give that as model.name with model.fresh_head=False, or give teacher.name"
        )
    return teacher_of(experiment)


def teacher_of(experiment: Classification) -> Teacher:
    """Returns the teacher that `teacher.name` says, or the model itself in full precision.

    Raises:
      UserError: it is not trained, or its labels or vocabulary are not those of the run.
    """
    name, config = experiment.config.teacher.name, experiment.config
    if not name:
        if experiment.pretrained.directory is not None:
            check_labels(config.model.name, experiment.pretrained.directory, experiment)
        return Teacher(experiment.model, {"params": experiment.pretrained.params})
    directory = models.locate(name)
    if (directory / WEIGHTS_FILE).is_file():
        raise UserError(
            f"teacher.name: {name} is a packed artifact; give a float checkpoint, such as model/ of the run that made it"
        )
    found = models.load(str(directory), None)
    if found.fresh:
        raise UserError(f"teacher.name: {name} has no trained {' and '.join(found.fresh)}; fine-tune it first")
    labels = getattr(found.config, "num_labels", None)
    if labels != experiment.task.num_labels:
        raise UserError(
            f"teacher.name: {name} has {labels} labels, task {config.task!r} has {experiment.task.num_labels}"
        )
    check_labels(name, directory, experiment)
    experiment.check_teacher(name, directory, found.config)
    return Teacher(found.family.module(config=found.config, dtype=experiment.model.dtype), {"params": found.params})


def check_labels(name: str, directory: Path, experiment: Classification) -> None:
    """Raises a `UserError` if a teacher names its classes, and not as the task does and in its order.

    Case counts for nothing, nor does whether words are joined by `_`, `-` or a space.

    Args:
      name: of the teacher, for the error.
      directory: of its checkpoint.
      experiment: for its task.
    """
    theirs, ours = models.read_labels(directory), experiment.labels
    if not theirs or not ours or list(map(_plain, theirs)) == list(map(_plain, ours)):
        return
    others = "in another order" if sorted(map(_plain, theirs)) == sorted(map(_plain, ours)) else "others"
    raise UserError(
        f"teacher {name}: its outputs are {_listed(theirs)}, those of task {experiment.config.task!r} {_listed(ours)} "
        f"({others}); give a teacher of this task, or correct id2label in its config.json"
    )


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", "_", label.casefold())


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:_SHOWN]))
    return f"({shown}, ... {len(labels)} in all)" if len(labels) > _SHOWN else f"({shown})"


def shared_out(phase: Phase, share: float) -> Phase:
    """Returns a phase that trains for a share of its steps, or of its epochs, rounded up to whole steps.

    Args:
      phase: the whole one.
      share: above 0, at most 1.
    """
    if phase.steps > 0:
        return dataclasses.replace(phase, steps=math.ceil(phase.steps * share - _ROUNDED))
    return dataclasses.replace(phase, epochs=phase.epochs * share)


def remaining_steps(phase: Phase, section: ConfigDict, before: list[Phase], experiment: Experiment) -> Phase:
    """Returns a phase with its share of its steps (`share`), without those of the earlier one that it includes (`including`).

    Args:
      phase: as long as both, and as long as a share of 1 is.
      section: of the phase.
      before: earlier phases of the recipe.
      experiment: the run that they belong to.

    Raises:
      UserError: the earlier phase is not shorter.
    """
    phase = shared_out(phase, section.share)
    if not section.including:
        return phase
    earlier = next(each for each in before if each.name == section.including)
    batches_per_epoch = experiment.batches("train", section.batch_size, shuffle=True, epochs=None).batches_per_epoch
    first, whole = earlier.length(batches_per_epoch), phase.length(batches_per_epoch)
    if first >= whole:
        raise UserError(
            f"phase {phase.name!r} has {whole} steps with the {first} of {earlier.name!r} included; shorten that one or give "
            f"{phase.name!r} more epochs, and both the same share"
        )
    return dataclasses.replace(phase, steps=whole - first)
