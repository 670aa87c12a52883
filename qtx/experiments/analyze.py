"""Look into a trained model: which quantizers cost its score, where its outliers are, how its weights are
distributed, what its tensors weigh; and, in `qtx.experiments.analyze_loss`, how its loss looks and how far its layers are off.

`config.analyses` names what is done, `config.analysis` says how. The run directory gets the tables as Markdown and CSV, the
plots and a `report.md` with all of them. A sensitivity that was interrupted goes on after its last variant, the analyses of
the loss after their last model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from qtx.analysis import memory, outliers, sensitivity, weights
from qtx.errors import UserError, near_misses
from qtx.experiments.analyze_features import features
from qtx.experiments.analyze_loss import Part, curvature_part, landscape_part, layer_errors_part
from qtx.experiments.classification import Classification
from qtx.experiments.config import base
from qtx.experiments.efficiency import efficiency
from qtx.experiments.experiment import VALIDATION
from qtx.experiments.run import calibration_options, policy_to_apply
from qtx.experiments.setup import setup
from qtx.files import write_text
from qtx.nn.bert import BertConfig
from qtx.nn.sites import example_inputs
from qtx.quant.policy import Policy
from qtx.train.report import Table, check_config, save_config

_WHY_THEY_DIFFER = (
    "The sites are counted as if all were kept; a compiled program reuses buffers and fuses operations, so that many tensors "
    "never exist. Fake quantization computes in float32 and puts the weights on their grids within the program, so its buffers "
    "are more, not less: on hardware with integer kernels it is the sum of the sites that shrinks."
)


def analyze(config: ConfigDict, workdir: str | Path) -> str:
    """Runs the analyses of a configuration on a trained checkpoint.

    Args:
      config: with `analyses` and `analysis`; see `configs/analyze.py`.
      workdir: run directory.

    Returns:
      The text of `report.md`.

    Raises:
      UserError: on anything that does not fit, before the first analysis starts.
    """
    workdir = Path(workdir)
    if not config.analyses:
        raise UserError(f"no analyses to do; choose from {', '.join(ANALYSES)}")
    for name in config.analyses:
        if name not in ANALYSES:
            raise UserError(f"unknown analysis {name!r}{near_misses(name, ANALYSES)}")
    experiment = setup(config)
    if not isinstance(experiment, Classification):
        raise UserError(f"analyses are of models that classify; task {config.task!r} is translation")
    policy = policy_to_apply(experiment)
    parts = {name: ANALYSES[name](experiment, policy) for name in config.analyses}
    if (workdir / "config.json").is_file():
        check_config(config, workdir, base())
    save_config(config, workdir)
    lines = [f"# {config.model.name} on {experiment.task.name}"]
    for name, part in parts.items():
        lines.append(f"## {name.replace('_', ' ').capitalize()}")
        for block in part(workdir):
            if isinstance(block, Table):
                block.print()
            lines.append(block.markdown().rstrip() if isinstance(block, Table) else block)
    text = "\n\n".join(lines) + "\n"
    write_text(workdir / "report.md", text)
    return text


def _sensitivity(experiment: Classification, policy: Policy) -> Part:
    c = experiment.config.analysis.sensitivity
    options = calibration_options(experiment.config)
    if options.pop("permutation") != "full_precision":
        raise UserError("sensitivity finds permutations in full precision: set calibration.permutation to that")
    groups = sensitivity.make_groups(tuple(c.groups), policy, experiment.sites())
    sensitivity.check(tuple(c.tables), c.calibration)
    batches = experiment.calibration_batches()

    def run(workdir: Path) -> list[str | Table]:
        plain = experiment.logits(experiment.model, experiment.variables, VALIDATION)
        size = sum(float(np.sum(np.square(logits))) for logits in plain.values())

        def evaluate(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, float]:
            logits = experiment.logits(model, variables, VALIDATION)
            off = sum(float(np.sum(np.square(logits[split] - plain[split]))) for split in plain)
            return experiment.metrics(logits) | {"error": (off / max(size, 1e-30)) ** 0.5}

        scores = sensitivity.measure(
            experiment.model.clone(policy=policy),
            experiment.pretrained.params,
            batches,
            groups,
            evaluate,
            tables=tuple(c.tables),
            calibration=c.calibration,
            path=workdir / "sensitivity.jsonl",
            **options,
        )
        found = sensitivity.summary(scores, groups)
        table = found.table()
        table.save(workdir, "sensitivity")
        sensitivity.plot(found, workdir / "sensitivity.png")
        count = len(experiment.encoded["validation"])
        note = (
            f"Scores on {count} examples, one of which is about {1 / count:.4f}; errors of the logits relative to their norm "
            f"in full precision. Calibration: {c.calibration}."
        )
        return [found.culprit, note, table, "![sensitivity](sensitivity.png)"]

    return run


def _outliers(experiment: Classification, policy: Policy) -> Part:
    c = experiment.config.analysis.outliers
    outliers.check(c.k, c.batches)
    sizes = experiment.pretrained.config
    if not isinstance(sizes, BertConfig):
        raise UserError("the analysis 'outliers' tells of the tokens of texts: leave it out for images")
    names = outliers.choose_sites(tuple(c.sites), experiment.sites())
    batches = experiment.calibration_batches(c.batches)

    def run(workdir: Path) -> list[str | Table]:
        found = outliers.collect(
            experiment.model,
            experiment.pretrained.params,
            batches,
            names,
            vocab_size=sizes.vocab_size,
            positions=sizes.max_positions,
            k=c.k,
        )

        def token(number: int) -> str:
            return str(experiment.tokenizer.convert_ids_to_tokens(number))

        tables = {
            "outlier_sites": outliers.sites_table(found, token),
            "outlier_dimensions": outliers.dimensions_table(found),
            "outlier_tokens": outliers.tokens_table(found, token),
        }
        for name, table in tables.items():
            table.save(workdir, name)
        outliers.plot_ranges(found, workdir / "ranges.png", per_row=len(c.sites))
        pictures = ["![range of every dimension](ranges.png)"]
        if len({len(statistics.outliers) for statistics in found.values()}) == 1:
            outliers.plot_counts(found, workdir / "outliers.png")
            pictures.append("![outliers by site and dimension](outliers.png)")
        tokens = int(next(iter(found.values())).tokens)
        note = f"Values beyond {c.k:g} standard deviations of their tensor, over {tokens} tokens of {len(batches)} batches."
        return [note, *tables.values(), *pictures]

    return run


def _weights(experiment: Classification, policy: Policy) -> Part:
    bins = experiment.config.analysis.weights.bins
    weights.check(bins)

    def run(workdir: Path) -> list[str | Table]:
        found = weights.collect(experiment.pretrained.params, experiment.sites(), policy)
        table = weights.parts_table(found)
        table.save(workdir, "weights")
        weights.tensors_table(found).save(workdir, "weights_tensors")
        weights.plot(found, workdir / "weights.png", bins)
        return [table, "By kernel and table: weights_tensors.md.", "![weights](weights.png)"]

    return run


def _memory(experiment: Classification, policy: Policy) -> Part:
    c = experiment.config.analysis.memory
    model_sizes = experiment.pretrained.config
    most = getattr(model_sizes, "max_positions", None)  # images have as many tokens as they have
    if c.batch_size < 1 or (most is not None and not 1 <= c.tokens <= most):
        raise UserError(
            f"analysis.memory: {c.batch_size} x {c.tokens} tokens; give 1 to {most} tokens of at least 1 text"
        )
    tokens = c.tokens if most is not None else model_sizes.tokens  # type: ignore[union-attr]

    def run(workdir: Path) -> list[str | Table]:
        examples = example_inputs(experiment.model, model_sizes, tokens)
        args = [jax.ShapeDtypeStruct((c.batch_size, *each.shape[1:]), each.dtype) for each in examples]
        sites = experiment.sites(*args)
        parameters = memory.weight_memory(policy, sites, experiment.pretrained.params)
        ranges = memory.range_memory(policy, sites)
        activations, inputs = memory.activation_memory(policy, sites), memory.input_memory(policy, sites)
        for name, items in (("memory_weights", parameters + ranges), ("memory_activations", activations + inputs)):
            memory.sites_table(items).save(workdir, name)
        blocks: list[str | Table] = [memory.totals_table(parameters + ranges)]
        blocks[0].save(workdir, "memory")  # type: ignore[union-attr]
        programs = {}
        if c.compiled:
            models = {"full precision": experiment.model, "quantized": experiment.model.clone(policy=policy)}
            programs = {
                name: memory.model_memory(model, experiment.pretrained.params, *args) for name, model in models.items()
            }
        running = memory.run_time_table(model_sizes, c.batch_size, tokens, activations, inputs, programs)
        running.save(workdir, "memory_run")
        blocks += [f"While it runs, {c.batch_size} x {tokens} tokens:", running, _WHY_THEY_DIFFER]
        rows = [[bits, *memory.share(activations, bits)] for bits in sorted({item.bits for item in activations})]
        columns = ["bits of activations", "of values", "of tensors"]
        blocks.append(Table(columns, rows, {"of values": ".1%", "of tensors": ".1%"}))
        blocks.append("By site: memory_weights.md, memory_activations.md.")
        return blocks

    return run


# Each checks its settings and returns what does the work, so that bad input ends a run before anything is computed.
ANALYSES: dict[str, Callable[[Classification, Policy], Part]] = {
    "sensitivity": _sensitivity,
    "outliers": _outliers,
    "weights": _weights,
    "memory": _memory,
    "curvature": curvature_part,
    "landscape": landscape_part,
    "layer_errors": layer_errors_part,
    "efficiency": efficiency,
    "features": features,
}
