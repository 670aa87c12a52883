"""The analyses that compare versions of a trained model: curvature and landscape of the loss, errors of layers.

Versions are the checkpoint in full precision, the same with the policy of `quant`, and further checkpoints with that policy.
Static ranges are calibrated, and stay as they are while a landscape moves the weights; dynamic ones, such as those of
ternary students, follow. What was found for a version stands in a file of its own (`landscape_quantized.json`), and an
interrupted run goes on after it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx import models
from qtx.analysis import curvature, landscape, layer_errors
from qtx.analysis.losses import mean_loss, of_some, stack, task_loss
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import Classification
from qtx.experiments.run import calibration_options
from qtx.experiments.teaching import layers_of, teacher_of
from qtx.files import write_text
from qtx.methods.calibrate import calibrate
from qtx.methods.distillation import Teacher
from qtx.methods.teacher_intervention import published_collections
from qtx.quant.policy import Policy
from qtx.train.report import Table

Part = Callable[[Path], list["str | Table"]]  # writes its files and returns what the report says

FULL, QUANTIZED = "full_precision", "quantized"


class Version(NamedTuple):
    """One of the models that are compared.

    Attributes:
      name: for tables and plots.
      model: with its policy.
      params: nested.
    """

    name: str
    model: nn.Module
    params: Any


def versions(experiment: Classification, policy: Policy) -> list[Version]:
    """Returns the models that `analysis.models` and `analysis.also` name.

    Raises:
      UserError: an unknown or repeated name, a checkpoint of other sizes, or parameters that are not finite.
    """
    c, mine = experiment.config.analysis, experiment.pretrained
    quantized = experiment.model.clone(policy=policy)
    known = {FULL: experiment.model, QUANTIZED: quantized}
    found = []
    for name in c.models:
        if name not in known:
            raise UserError(f"analysis.models: unknown version {name!r}{near_misses(name, known)}")
        found.append(Version(name.replace("_", " "), known[name], mine.params))
    for entry in c.also:
        if isinstance(entry, str) or len(entry) != 2:
            raise UserError(f"analysis.also: {entry!r} is no pair; give (name, directory)")
        name, directory = entry
        theirs = models.load(str(models.locate(directory)), None)
        if theirs.fresh:
            raise UserError(
                f"analysis.also: {directory} has no trained {' and '.join(theirs.fresh)}; fine-tune it first"
            )
        if jax.tree.map(jnp.shape, theirs.params) != jax.tree.map(jnp.shape, mine.params):
            raise UserError(f"analysis.also: {directory} and {experiment.config.model.name} are not of the same sizes")
        found.append(Version(str(name), quantized, theirs.params))
    if not found:
        raise UserError(f"no models to analyze; choose analysis.models from {', '.join(known)}")
    names = [_stem("of", version) for version in found]  # of files
    if repeated := [version.name for version in found if names.count(_stem("of", version)) > 1]:
        raise UserError(f"analysis: two models are called {repeated[0]!r}; give each a name of its own")
    for version in found:
        check_finite(version)
    return found


def check_finite(version: Version) -> None:
    """Raises a `UserError` that names a parameter that is not finite."""
    for name, value in traverse_util.flatten_dict(jax.device_get(version.params), sep="/").items():
        if not np.isfinite(value).all():
            raise UserError(f"{version.name}: {name} holds NaN or infinity: check the checkpoint")


def collections(experiment: Classification, version: Version) -> dict[str, Any]:
    """Returns what a version needs besides its parameters: calibrated ranges."""
    if version.model.policy is None:  # type: ignore[attr-defined]
        return {}
    batches, options = experiment.calibration_batches(), calibration_options(experiment.config)
    found: dict[str, Any] = {"ranges": calibrate(version.model, version.params, batches, **options)}
    if experiment.config.quant.student == "published":
        found |= published_collections(version.model.policy, experiment.pretrained.config)  # type: ignore[attr-defined]
    return found


def chosen_batches(experiment: Classification, section: Any, field: str) -> list[Mapping[str, np.ndarray]]:
    """Returns the batches that a section asks for: whole ones of one shape, drawn with the seed.

    Raises:
      UserError: there is no such split, or it has fewer examples.
    """
    if section.split not in experiment.encoded:
        raise UserError(f"{field}.split: no split {section.split!r}{near_misses(section.split, experiment.encoded)}")
    count, size, have = section.batches, section.batch_size, len(experiment.encoded[section.split])
    if min(count, size) < 1 or count * size > have:
        raise UserError(
            f"{field}: {count} batches of {size} examples; {section.split} has {have}, and one is the least"
        )
    return list(experiment.first_batches(count, size, section.split))


def loss_of(experiment: Classification, version: Version, batches: Any, norms: float) -> tuple[Any, float]:
    """Returns a version's loss, and its value at the parameters; raises a `UserError` if that is not finite."""
    loss = task_loss(version.model, collections(experiment, version), norms)
    value = float(mean_loss(loss, version.params, batches))
    if not math.isfinite(value):
        raise UserError(f"{version.name}: the loss is {value}; look at the checkpoint and at the grids of `quant`")
    return loss, value


_NULL = np.array(None, object)
Results = dict[str, dict[str, np.ndarray]]  # arrays by name, by version


def _measured(
    workdir: Path, analysis: str, found: Sequence[Version], measure: Callable[[Version], Mapping[str, Any]]
) -> Results:
    """Returns what `measure` says of every version; what stands in its file is read and not measured again."""
    results: Results = {}
    for version in found:
        path = workdir / f"{_stem(analysis, version)}.json"
        if not path.is_file():
            print(f"{analysis}: {version.name}", flush=True)
            arrays = {name: np.asarray(value, np.float64) for name, value in measure(version).items()}
            # JSON has no word for what is not finite: null there, NaN here.
            plain = {name: np.where(np.isfinite(x), x, _NULL).tolist() for name, x in arrays.items()}
            write_text(path, json.dumps(plain) + "\n")
        plain = json.loads(path.read_text(encoding="utf-8"))
        results[version.name] = {name: np.asarray(value, np.float64) for name, value in plain.items()}
    return results


def _stem(analysis: str, version: Version) -> str:
    return f"{analysis}_{re.sub(r'[^A-Za-z0-9]+', '_', version.name).strip('_')}"


def curvature_part(experiment: Classification, policy: Policy) -> Part:
    """Top eigenvalues, trace by part of the model and spectral density of the Hessian."""
    c = experiment.config.analysis.curvature
    found = versions(experiment, policy)
    batches = stack(chosen_batches(experiment, c, "analysis.curvature"))
    _check_curvature(c)
    _, chosen = of_some(lambda params, batch: jnp.zeros(()), found[0].params, tuple(c.params))
    names, sizes = list(chosen), [int(np.size(value)) for value in chosen.values()]
    if max(c.eigenvalues, c.steps) > sum(sizes):
        raise UserError(
            f"analysis.curvature: {sum(sizes)} parameters have no more eigenvalues; lower eigenvalues or steps"
        )

    def measure(version: Version) -> dict[str, Any]:
        whole, value = loss_of(experiment, version, batches, c.norms)
        loss, params = of_some(whole, version.params, tuple(c.params))
        keys = jax.random.split(jax.random.key(experiment.config.seed), 3)
        made: dict[str, Any] = {"loss": value}
        if c.eigenvalues:
            options = dict(iterations=c.iterations, tolerance=c.tolerance)
            made["eigenvalues"] = curvature.top_eigenvalues_by_batch(
                loss, params, batches, keys[0], c.eigenvalues, **options
            )
        if c.samples:
            made["trace"] = curvature.trace(loss, params, batches, keys[1], c.samples, tolerance=c.tolerance).samples
        if c.steps:
            density = curvature.density(loss, params, batches, keys[2], c.steps, runs=c.runs)
            made |= {"density_values": density.values, "density_weights": density.weights}
        return made

    def run(workdir: Path) -> list[str | Table]:
        results = _measured(workdir, "curvature", found, measure)
        note = (
            f"Of {sum(sizes):,d} parameters, on {c.batches} batches of {c.batch_size} examples ({c.split}). With quantized "
            "weights it is the derivative of the straight-through gradient, which need not be symmetric."
        )
        blocks: list[str | Table] = [note]

        def show(table: Table, name: str) -> None:
            table.save(workdir, name)
            blocks.append(table)

        show(curvature.summary_table(results), "curvature")
        if c.eigenvalues:
            pooled = {name: values["eigenvalues"] for name, values in results.items()}
            curvature.eigenvalues_table(pooled).save(workdir, "eigenvalues")
            curvature.plot_eigenvalues(pooled, workdir / "eigenvalues.png")
            blocks.append("All eigenvalues, batch by batch: eigenvalues.md.\n\n![top eigenvalues](eigenvalues.png)")
        if c.samples:
            traces = {name: curvature.Trace(values["trace"]) for name, values in results.items()}
            show(curvature.traces_table(traces, names, sizes), "trace")
            curvature.plot_traces(traces, names, workdir / "trace.png")
            blocks.append("![trace by part](trace.png)")
        if c.steps:
            densities = {
                name: curvature.Density(values["density_values"], values["density_weights"])
                for name, values in results.items()
            }
            curvature.plot_densities(densities, workdir / "density.png")
            blocks.append("![spectral density](density.png)")
        return blocks

    return run


def _check_curvature(c: Any) -> None:
    if not (c.eigenvalues or c.samples or c.steps):
        raise UserError("analysis.curvature: nothing to find; set eigenvalues, samples or steps above 0")
    for name in ("eigenvalues", "samples", "steps"):
        if c[name] < 0:
            raise UserError(f"analysis.curvature.{name} is {c[name]}; 0 leaves it out")
    for name in ("iterations", "runs"):
        if c[name] < 1:
            raise UserError(f"analysis.curvature.{name} is {c[name]}; give at least 1")
    if not 0 <= c.tolerance < math.inf:
        raise UserError(f"analysis.curvature.tolerance is {c.tolerance}; give 0 or more, such as 0.001")


def landscape_part(experiment: Classification, policy: Policy) -> Part:
    """The loss along one random direction, or two, with the norms of the weights."""
    c = experiment.config.analysis.landscape
    found = versions(experiment, policy)
    batches = stack(chosen_batches(experiment, c, "analysis.landscape"))
    if c.directions not in (1, 2):
        raise UserError(f"analysis.landscape.directions is {c.directions}; give 1 for a curve or 2 for contours")
    if not 0 < c.reach < math.inf or c.points < 2:
        raise UserError(f"analysis.landscape: {c.points} points up to {c.reach}; give 2 or more, and a reach above 0")
    landscape.check_directions(found[0].params, tuple(c.still), c.shared_norms)
    axes = (np.linspace(-c.reach, c.reach, c.points),) * c.directions
    landscape.check(c.directions, axes, c.together)

    def measure(version: Version) -> dict[str, Any]:
        loss, value = loss_of(experiment, version, batches, c.norms)
        key = jax.random.key(experiment.config.seed)  # the same draw for every version
        directions = landscape.directions(key, version.params, c.directions, still=tuple(c.still), norms=c.shared_norms)
        losses = landscape.evaluate(loss, version.params, batches, directions, axes, together=c.together).losses
        return {"loss": value, "losses": losses}

    def run(workdir: Path) -> list[str | Table]:
        results = _measured(workdir, "landscape", found, measure)
        surfaces = {name: landscape.Landscape(axes, values["losses"]) for name, values in results.items()}
        table = landscape.summary_table(surfaces, {name: float(values["loss"]) for name, values in results.items()})
        table.save(workdir, "landscape")
        for version in found:
            surfaces[version.name].table().save(workdir, _stem("landscape_points", version))
        (landscape.plot_curves if c.directions == 1 else landscape.plot_contours)(surfaces, workdir / "landscape.png")
        note = (
            f"The mean loss over {c.batches} batches of {c.batch_size} examples ({c.split}), {c.points} points an axis."
        )
        return [note, table, "Point by point: landscape_points_*.md.", "![loss](landscape.png)"]

    return run


def layer_errors_part(experiment: Classification, policy: Policy) -> Part:
    """Mean squared errors of every layer against the teacher, or against the model itself in full precision."""
    c, rules = experiment.config.analysis.layer_errors, experiment.config.teacher
    teacher = teacher_of(experiment)
    check_finite(Version("the teacher", teacher.model, teacher.variables["params"]))
    # Against itself in full precision a model has no errors.
    found = [each for each in versions(experiment, policy) if rules.name or each.model.policy is not None]  # type: ignore[attr-defined]
    if not found:
        raise UserError(
            "layer errors of a model against itself are zero: add 'quantized' to analysis.models, or teacher.name"
        )
    batches = chosen_batches(experiment, c, "analysis.layer_errors")
    quantities = tuple(c.quantities) or layer_errors.usual_quantities(teacher.model)
    options: Any = dict(quantities=quantities, layers=layers_of(rules.layers), padding=rules.padding)
    for version in found:
        layer_errors.check(version.model, teacher.model, **options)

    def measure(version: Version) -> dict[str, Any]:
        student = Teacher(version.model, {"params": version.params, **collections(experiment, version)})
        made = layer_errors.layer_errors(student, teacher, batches, **options)
        for quantity, errors in made.items():
            if not np.isfinite(errors).all():
                raise UserError(f"{version.name}: {quantity} is not finite; look at the checkpoint and at `quant`")
        return made

    def run(workdir: Path) -> list[str | Table]:
        results = _measured(workdir, "layer_errors", found, measure)
        table = layer_errors.table(results)
        table.save(workdir, "layer_errors")
        layer_errors.plot(results, workdir / "layer_errors.png")
        against = rules.name or f"{experiment.config.model.name} in full precision"
        note = f"Mean squared errors against {against}, on {c.batches} batches of {c.batch_size} examples ({c.split})."
        return [note, table, "![errors by layer](layer_errors.png)"]

    return run
