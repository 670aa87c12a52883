"""The entries of config-file experiments: train, quantize, evaluate.

Each takes a configuration and a run directory, and leaves there what explains the run: `config.json`, `metrics.jsonl`,
TensorBoard files, checkpoints, the models and `report.md`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from qtx import models
from qtx.data.parallel import FURTHER_TESTS
from qtx.errors import UserError, near_misses
from qtx.experiments.config import defaults_of, field_of, phases_of
from qtx.experiments.experiment import LABELLED, VALIDATION, Experiment, family_and_sizes, from_nothing
from qtx.experiments.from_config import (
    check_student,
    evaluation_from,
    optimizer_from,
    policy_from,
    rounding_from,
    suppression_from,
)
from qtx.experiments.graph_classification import graph_policy
from qtx.experiments.setup import setup, sites_of
from qtx.experiments.teaching import check_phases, remaining_steps, taught
from qtx.export.packed import load_quantized, save_quantized
from qtx.files import write_text
from qtx.methods.adaround import adaround, layers_to_round
from qtx.methods.bit_transformer import without_linear_bias
from qtx.methods.calibrate import calibrate, with_frozen_weights
from qtx.methods.layer_rounding import AdaRound
from qtx.methods.norm_migration import links
from qtx.methods.outlier_suppression import OutlierSuppression, suppress
from qtx.methods.qat import known_ranges, qat_phase
from qtx.nn.describe import describe
from qtx.nn.sites import SiteInfo, check_policy
from qtx.quant.policy import Policy, matches
from qtx.train.evaluation import Record
from qtx.train.logging import read_metrics
from qtx.train.loop import Saving, fit
from qtx.train.phase import Phase
from qtx.train.report import Table, check_config, save_config, training_curves


def calibration_options(config: ConfigDict) -> dict[str, Any]:
    """Returns the options of `qtx.methods.calibrate.calibrate` that a configuration sets."""
    c = config.calibration
    return {"share_permutation": c.share_permutation or None, "permutation": c.permutation}


def check_recipe(config: ConfigDict) -> None:
    """Checks the phases of a recipe as far as that takes neither data nor model, so that it can be done first.

    Raises:
      UserError: on anything that does not exist, or does not go together.
    """
    sections = phases_of(config)
    if not sections:
        raise UserError("the recipe has no phases: name some, or give this configuration to launch/quantize.py")
    for name, section in sections:
        optimizer_from(section.optimizer)
        evaluation_from(name, section, lambda phase, variables: {})
    for field, default in (("replaced_layers", ""), ("bit.linear_bias", True)):
        value = field_of(config.quant, field)
        if value != default and sections and not sections[0][1].quantized:
            raise UserError(
                f"quant.{field} is {value!r}, but the recipe begins with {sections[0][0]!r}, in full precision, whose "
                f"layers the quantized ones go on from; leave it at {default!r}"
            )
    check_phases(config)
    sizes = {section.batch_size for _, section in sections}
    if len(sizes) > 1:
        raise UserError(
            f"the phases of a recipe share one stream of batches: give them one batch_size, not {sorted(sizes)}"
        )


def check_run(config: ConfigDict, entry: str = "train", model: ConfigDict | None = None) -> None:
    """Finds what would fail in the end, a recipe, a policy or a model that cannot be, before data and weights are read.

    Args:
      config: of the run.
      entry: what it will do; of `evaluate` and `compare` only the model is checked.
      model: the section `model` of the run that it begins with, if it does.

    Raises:
      UserError: on anything that does not exist, or does not go together.
    """
    if entry == "train":
        check_recipe(config)
    family, sizes = family_and_sizes(model or config.model)
    phases = [name for name, section in phases_of(config) if section.quantized] if entry == "train" else []
    if not phases and entry != "quantize":
        return
    policy = required_policy(config, sizes.num_layers, *phases[:1])
    _check_fit(config, entry, policy, sites_of(config, family, sizes), sizes)


def _check_fit(
    config: ConfigDict, entry: str, policy: Policy, sites: Mapping[str, SiteInfo], sizes: models.ModelConfig
) -> None:
    """Raises a `UserError` if what `quant` says does not fit a model, for `train` or for `quantize`."""
    check_student(config.quant, sites)
    if entry == "train":
        check_policy(policy, sites)
        return
    check_quantization(policy, rounding_from(config.quant, config.adaround), sites)
    check_suppression(suppression_from(config.quant, config.outlier_suppression), sizes)


def required_policy(config: ConfigDict, num_layers: int, phase: str = "") -> Policy:
    """Returns the policy of `quant`, for the module that a run trains.

    Raises:
      UserError: it keeps everything in full precision; says which phase is to be quantized.
    """
    policy = policy_from(config.quant, num_layers)
    if policy is None:
        needs = f"phase {phase!r} is quantized, but " if phase else ""
        raise UserError(
            f"{needs}`quant` keeps everything in full precision; set weight_bits or activation_bits below 32"
        )
    return graph_policy(config, policy)


def make_recipe(experiment: Experiment) -> tuple[list[Phase], Policy | None]:
    """Returns the phases that a configuration names, and the policy that the last one trains with."""
    config = experiment.config
    check_recipe(config)
    if config.evaluate_test and "test" not in experiment.encoded:
        raise UserError(f"evaluate_test is on, but task {config.task!r} has no labelled test split")
    splits = (*VALIDATION, "test") if config.evaluate_test else VALIDATION

    def evaluate(phase: Phase, variables: Mapping[str, Any]) -> dict[str, float]:
        return experiment.evaluate(phase.model, variables, splits, quick=True)

    recipe: list[Phase] = []
    policy: Policy | None = None
    known = experiment.metric_names(splits)
    for name, section in phases_of(config):
        if known and section.metric not in known:
            near = near_misses(section.metric, known)
            raise UserError(
                f"phases.{name}.metric: evaluations of {config.task} while training give no {section.metric!r}{near}"
            )
        options: dict[str, Any] = dict(
            epochs=section.epochs,
            steps=section.steps,
            trainable=tuple(section.trainable),
            accumulate=section.accumulate,
            evaluation=evaluation_from(name, section, evaluate),
        )
        options |= experiment.training()
        optimizer = optimizer_from(section.optimizer)
        quantized_before = policy is not None
        if section.quantized:
            policy = required_policy(config, experiment.pretrained.config.num_layers, name)
            _check_fit(config, "train", policy, experiment.sites(), experiment.pretrained.config)
            if not config.quant.bit.linear_bias:
                options["trainable"] = _trained_without_biases(experiment, policy, options["trainable"])
            phase = qat_phase(
                name,
                experiment.model,
                policy,
                experiment.calibration_batches(),
                optimizer,
                section.ranges,
                calibration_options(config),
                section.weight_ranges,
                **options,
            )
            if config.calibration.ranges:
                sites = experiment.sites()
                found = _packed_ranges(config.calibration.ranges, policy, sites)
                phase = dataclasses.replace(phase, prepare=known_ranges(found, sites))
            if quantized_before:  # on with the ranges of the phase before
                phase = dataclasses.replace(phase, prepare=None)
        else:
            policy = None
            phase = Phase(name, experiment.model, optimizer, **options)
        phase = taught(phase, section, experiment, any(each.model.policy is None for each in recipe))
        recipe.append(remaining_steps(phase, section, recipe, experiment))
    return recipe, policy


def _packed_ranges(name: str, policy: Policy, sites: Mapping[str, SiteInfo]) -> dict[str, Any]:
    """Returns the ranges of activations of a packed model, for a policy that has the same grids there.

    Raises:
      UserError: there is no such model, its grids are others, or the policy has no ranges of activations.
    """
    packed = load_quantized(models.locate(name))
    needed = 0
    for site, info in sites.items():
        specs = [each.spec(info.kind, site) for each in (policy, packed.original)]
        wanted, there = (None if spec is None else (spec.bits, spec.scheme, spec.granularity) for spec in specs)
        if info.kind == "weight" or wanted is None or specs[0].range == "dynamic":  # type: ignore[union-attr]
            continue
        needed += 1
        if wanted != there or specs[1].range == "dynamic":  # type: ignore[union-attr]
            raise UserError(
                f"calibration.ranges: {name} has no range for the grid of {site}; set the fields of `quant` that it was "
                "quantized with"
            )
    if not needed:
        raise UserError(f"calibration.ranges is {name!r}, but `quant` has no ranges of activations that are stored")
    return packed.ranges


def _trained_without_biases(experiment: Experiment, policy: Policy, patterns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of parameters that match a pattern, without the biases of quantized layers."""
    _, names = without_linear_bias(experiment.variables["params"], policy)
    return tuple(name for name in names if any(matches(pattern, name) for pattern in patterns))


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Runs the recipe of a configuration and evaluates after every phase.

    A run that was interrupted goes on from its last checkpoint when it is called again with the same directory. The curves
    of all phases are left in `curves.csv` and `curves.png`.

    Args:
      config: see `qtx.experiments.config`.
      workdir: run directory, created if needed.

    Returns:
      `{'params', 'ranges', 'metrics', 'experiment'}`; the metrics are by phase. Those of a phase that is evaluated while it
      trains include what `qtx.train.evaluation.Evaluation.summary` says.

    Raises:
      UserError: on anything that does not fit, before training starts.
    """
    check_run(config)
    return train(setup(config), workdir)


def train(experiment: Experiment, workdir: str | Path) -> dict[str, Any]:
    """`train_and_evaluate` for an experiment that is set up."""
    workdir, config = Path(workdir), experiment.config
    if experiment.model.policy is not None:  # type: ignore[attr-defined]
        raise UserError(
            f"{config.model.name} is a packed artifact, whose weights are not trained; give a float checkpoint"
        )
    recipe, policy = make_recipe(experiment)
    first = config.phases[config.recipe[0]]
    batches = experiment.batches("train", first.batch_size, shuffle=True, epochs=None, seed=config.seed)
    if (workdir / "checkpoints").is_dir() and (workdir / "config.json").is_file():
        check_config(config, workdir, defaults_of(config))
    save_config(config, workdir)
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def after(phase: Phase, variables: Mapping[str, Any], step: int, history: Sequence[Record]) -> None:
        nonlocal clock
        found[phase.name] = experiment.evaluate(phase.model, variables)
        if phase.evaluation is not None:
            found[phase.name] |= phase.evaluation.summary(history, batches.batches_per_epoch)
        seconds[phase.name] = time.perf_counter() - clock
        clock = time.perf_counter()
        write_text(workdir / f"result_{phase.name}.json", json.dumps(found[phase.name] | {"step": step}, indent=2))

    initial = experiment.variables
    if policy is not None and not config.quant.bit.linear_bias:
        initial = {**initial, "params": without_linear_bias(initial["params"], policy)[0]}
    variables = fit(
        recipe,
        batches,
        initial,
        experiment.mesh,
        workdir,
        config.seed,
        Saving(config.checkpoint_every, config.log_every),
        after,
    )
    if config.save_models:
        experiment.save(workdir, recipe[-1].model, policy, variables)
    if jax.process_index() == 0:  # which has the log
        from qtx.train.plots import plot_curves  # takes a second to import

        curves = training_curves(read_metrics(workdir), [phase.name for phase in recipe], batches.batches_per_epoch)
        write_text(workdir / "curves.csv", curves.csv())
        plot_curves(curves, workdir / "curves.png")
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [[phase, *(values.get(name) for name in names), seconds[phase]] for phase, values in found.items()]
    table = Table(["phase", *names, "seconds"], rows, title=experiment.measured)
    table.print()
    table.save(workdir, "report")
    return {**variables, "metrics": found, "experiment": experiment}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A model after post-training quantization.

    Attributes:
      model: module to run: its policy covers the activations; with `quant.published_evaluation`, which draws weights in every
        call, all that is quantized.
      variables: `params` with the weights on their grids (float as long as `model` quantizes them), and `ranges`.
      config: its sizes; those of the float model, unless norms migrated.
      policy: the whole policy.
      params: the float parameters, rounded by AdaRound if that is on, migrated by outlier suppression; with
        `quant.evaluation_rounding='drawn'` the draw, so that it is what an artifact holds.
      ranges: of weights and activations.
      tables: what AdaRound or outlier suppression did, by name.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: models.ModelConfig
    policy: Policy
    params: Any
    ranges: dict[str, Any]
    tables: dict[str, Table]


def post_training_quantization(
    experiment: Experiment,
    params: Any,
    policy: Policy,
    batches,
    rounding: AdaRound | None = None,
    suppression: OutlierSuppression | None = None,
) -> Quantized:
    """Calibrates a trained model and puts its weights on their grids once and for all.

    Args:
      experiment: for the module and its sites.
      params: trained parameters.
      policy: what is quantized, and how.
      batches: argument tuples for calibration.
      rounding: how the weights are rounded before activations are calibrated; None: to nearest.
      suppression: how outliers are moved out of the activations first, with a policy of its own; None: they stay.
    """
    sites, config = experiment.sites(), experiment.pretrained.config
    tables: dict[str, Table] = {}
    if suppression is not None:
        found = suppress(experiment.model, params, batches, suppression)
        runnable, frozen = with_frozen_weights(found.model, sites, found.params, found.ranges)
        config, policy = found.model.config, found.model.policy  # type: ignore[attr-defined]
        tables["suppression"] = found.table
        variables = {"params": frozen, "ranges": found.ranges}
        return Quantized(runnable, variables, config, policy, found.params, found.ranges, tables)
    model = experiment.model.clone(policy=policy)
    rounded = None if rounding is None else adaround(model, params, experiment.rounding_batches(), rounding)
    weights = None
    if rounded is not None:
        params, weights = rounded.params, rounded.ranges
    ranges = calibrate(model, params, batches, weights=weights, **calibration_options(experiment.config))
    if rounded is not None:
        tables["rounding"] = rounded.table()
    quant = experiment.config.quant
    key = jax.random.key(experiment.config.seed) if quant.evaluation_rounding == "drawn" else None
    runnable, frozen = with_frozen_weights(model, sites, params, ranges, key)
    variables = {"params": frozen, "ranges": ranges}
    if quant.published_evaluation:
        runnable, variables = model, {"params": params, "ranges": ranges}
    return Quantized(runnable, variables, config, policy, params if key is None else frozen, ranges, tables)


def quantize(config: ConfigDict, workdir: str | Path, compare: bool = True) -> dict[str, Any]:
    """Quantizes a trained checkpoint without training: calibrate, quantize, validate.

    Args:
      config: `model.name` is the trained checkpoint; `quant` and `calibration` say how.
      workdir: receives `quantized/` (the packed artifact) and, after outlier suppression, `model/` (the float model whose
        outliers moved), unless `save_models` is off; `sites.txt` and the report.
      compare: evaluate the checkpoint in full precision, too. A sweep has that score from the run that trained it.

    Returns:
      `{'full_precision', 'quantized', 'weight_bytes'}`; the first is empty without `compare`.

    Raises:
      UserError: on anything that does not fit; a checkpoint without a trained head, for one.
    """
    require_checkpoint(config)
    check_run(config, "quantize")
    workdir = Path(workdir)
    experiment = setup(config)
    experiment.check_packable()
    policy = policy_to_apply(experiment)
    rounding = rounding_from(config.quant, config.adaround)
    suppression = suppression_from(config.quant, config.outlier_suppression)
    batches = experiment.calibration_batches()
    save_config(config, workdir)
    params = experiment.pretrained.params
    before = experiment.evaluate(experiment.model, {"params": params}) if compare else {}
    if not config.quant.bit.linear_bias:
        params, _ = without_linear_bias(params, policy)
    quantized = post_training_quantization(experiment, params, policy, batches, rounding, suppression)
    after = experiment.evaluate(quantized.model, quantized.variables)
    family, sizes, policy = experiment.pretrained.family, quantized.config, quantized.policy
    directory = workdir / "quantized"
    kept = experiment.tokenizer, experiment.labels
    size = save_quantized(directory, family, sizes, policy, quantized.params, quantized.ranges, *kept)
    experiment.save_beside(directory)
    if not config.save_models:
        shutil.rmtree(directory)  # written to be counted
    elif suppression is not None:
        models.save(workdir / "model", family, sizes, quantized.params, experiment.tokenizer, experiment.labels)
        experiment.save_beside(workdir / "model")
    for name, table in quantized.tables.items():
        table.print()
        table.save(workdir, name)
    listing = describe(experiment.model.clone(policy=policy), {"params": params}, *batches[0])
    write_text(workdir / "sites.txt", f"{listing}\n")
    full = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = [["full precision", *before.values(), full / 2**20]] if compare else []
    rows.append(["quantized", *after.values(), size / 2**20])
    table = Table(["model", *after, "MiB of weights"], rows, title=experiment.measured)
    table.print()
    table.save(workdir, "report")
    result = {"full_precision": before, "quantized": after, "weight_bytes": size}
    write_text(workdir / "result.json", json.dumps(result, indent=2))
    return result


def evaluate(config: ConfigDict, workdir: str | Path | None = None) -> dict[str, float]:
    """Evaluates a trained checkpoint or a packed artifact (`model.name`) on the task's validation data.

    A labelled test split is evaluated, too, and of a corpus of sentence pairs every further test; see `Experiment.evaluate`.

    Args:
      config: see `qtx.experiments.config`.
      workdir: receives `result.json`, if given.
    """
    require_checkpoint(config)
    experiment = setup(config)
    require_trained(experiment)
    values = experiment.evaluate(experiment.model, experiment.variables, (*LABELLED, *FURTHER_TESTS))
    score_table(config.model.name, values, experiment.measured).print()
    if workdir:
        save_config(config, workdir)
        write_text(Path(workdir) / "result.json", json.dumps(values, indent=2))
    return values


def score_table(name: str, values: Mapping[str, float], title: str = "") -> Table:
    """Returns the scores of a model as a table: side by side, or one below the other where a terminal is too narrow."""
    if len(values) > 8:
        return Table(["metric", name], [[metric, value] for metric, value in values.items()], title=title)
    return Table(["model", *values], [[name, *values.values()]], title=title)


def policy_to_apply(experiment: Experiment) -> Policy:
    """Returns the policy of `quant` for a trained checkpoint in full precision, or raises a `UserError`."""
    config = experiment.config
    require_trained(experiment)
    if experiment.model.policy is not None:  # type: ignore[attr-defined]
        raise UserError(f"{config.model.name} is quantized already; give the full-precision checkpoint")
    if config.calibration.ranges:
        raise UserError("calibration.ranges is what training begins with, and nothing is trained here; leave it empty")
    policy = required_policy(config, experiment.pretrained.config.num_layers)
    _check_fit(config, "quantize", policy, experiment.sites(), experiment.pretrained.config)
    return policy


def check_suppression(suppression: OutlierSuppression | None, sizes: models.ModelConfig) -> None:
    """Raises a `UserError` if the norms of a model are to migrate and cannot."""
    if suppression is not None and suppression.migrates:
        links(sizes)


def check_quantization(policy: Policy, rounding: AdaRound | None, sites: Mapping[str, SiteInfo]) -> None:
    """Raises a `UserError` if a policy, or AdaRound with its patterns, does not fit the sites of a model."""
    check_policy(policy, sites)
    if rounding is not None:
        layers_to_round(rounding, policy, [name for name, info in sites.items() if info.kind == "weight"])


def require_checkpoint(config: ConfigDict) -> None:
    """Raises a `UserError` if the section `model` names an architecture, which has nothing trained."""
    if from_nothing(config.model):
        raise UserError(
            f"model.name {config.model.name!r} is a model from nothing; give the directory of a trained one: "
            "--config.model.name=RUN/model"
        )


def require_trained(experiment: Experiment) -> None:
    """Raises a `UserError` if parts of the head were initialised instead of loaded."""
    if experiment.pretrained.fresh:
        raise UserError(
            f"{experiment.config.model.name} has no trained {' and '.join(experiment.pretrained.fresh)}; fine-tune it first "
            "(launch/train.py) and give the run's model directory, with model.fresh_head=False"
        )
