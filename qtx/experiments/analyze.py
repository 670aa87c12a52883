"""Look into a trained model: which quantizers cost its score, where its outliers are, how its weights are
distributed, what its tensors weigh; and, in `qtx.experiments.analyze_loss`, how its loss looks and how far its layers are off.

`config.analyses` names what is done, `config.analysis` says how. The run directory gets the tables as Markdown and CSV, the
plots and a `report.md` with all of them. A sensitivity that was interrupted goes on after its last variant, the analyses of
the loss after their last model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from qtx.analysis import live_memory, memory, outliers, sensitivity, weights
from qtx.errors import UserError, near_misses
from qtx.experiments.analyze_features import features
from qtx.experiments.analyze_loss import Part, curvature_part, landscape_part, layer_errors_part
from qtx.experiments.classification import Classification
from qtx.experiments.config import analysis, defaults_of
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
    "The first row counts tensors as if all were kept, the second those that are alive at the same time, without what lies "
    "between two sites. XLA's temporary buffers hold that, too, but it may write one tensor over another. Fake quantization "
    "computes in float32 and puts the weights on their grids within the program, so its buffers are more, not less: with "
    "integer kernels it is the peak that shrinks."
)
_AT_EACH_WIDTH = (
    "At each width, by the sites: all that the policy puts on a grid has so many bits. `of float32` is without embeddings and "
    "ranges, `plain` with biases at the bits of their layer; `with every site`: were all activations on grids."
)
DEFAULT_ANALYSES = ("weights", "memory")  # those that need no choice of sites, and no evaluation


def with_analyses(config: ConfigDict, analyses: tuple[str, ...] = DEFAULT_ANALYSES) -> ConfigDict:
    """Returns a configuration with the sections that analyses need: itself, or a copy if it lacks them.

    An experiment that trains says nothing of analyses, and gives the model a fresh head; the copy takes the head as it is.

    Args:
      config: of any experiment.
      analyses: of the copy.
    """
    if "analyses" in config and "analysis" in config:
        return config
    found = copy.deepcopy(config)
    with found.unlocked():
        if "analyses" not in found:
            found.analyses, found.model.fresh_head = analyses, False
        if "analysis" not in found:
            found.analysis = analysis()
    return found


def analyze(config: ConfigDict, workdir: str | Path) -> str:
    """Runs the analyses of a configuration on a trained checkpoint.

    Args:
      config: with `analyses` and `analysis`, see `configs/analyze.py`; of any other experiment, the weights and memory.
      workdir: run directory.

    Returns:
      The text of `report.md`.

    Raises:
      UserError: on anything that does not fit, before the first analysis starts.
    """
    workdir = Path(workdir)
    if "analyses" not in config:
        print(
            f"the config names no analyses: {' and '.join(DEFAULT_ANALYSES)} are done; "
            "--config=configs/analyze.py:FILE.py:SETTING has fields for others"
        )
    config = with_analyses(config)
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
        check_config(config, workdir, with_analyses(defaults_of(config)))
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
    widths = tuple(c.bits)
    if not widths or not all(isinstance(bits, int) and (1 <= bits <= 16 or bits == 32) for bits in widths):
        raise UserError(f"analysis.memory.bits is {widths}; give widths of 1 to 16 bits, or 32")

    def run(workdir: Path) -> list[str | Table]:
        examples = example_inputs(experiment.model, model_sizes, tokens)
        args = [jax.ShapeDtypeStruct((c.batch_size, *each.shape[1:]), each.dtype) for each in examples]
        params = experiment.pretrained.params
        models = {"full precision": experiment.model, "quantized": experiment.model.clone(policy=policy)}
        sites, tensors = experiment.sites(*args), live_memory.tensors(experiment.model, params, *args)
        parameters, ranges = memory.weight_memory(policy, sites, params), memory.range_memory(policy, sites)
        items, inputs = live_memory.tensor_memory(policy, tensors), memory.input_memory(policy, sites)
        programs = {}
        if c.compiled:
            programs = {name: memory.model_memory(model, params, *args) for name, model in models.items()}
        plain, quantized = (live_memory.peak(tensors, of) for of in (live_memory.tensor_memory(None, tensors), items))
        full_arguments, arguments = (memory.argument_bytes(model, params, *args) for model in models.values())
        tables = {
            "memory": memory.totals_table(parameters + ranges),
            "memory_widths": live_memory.widths_table(widths, parameters, tensors, items, programs),
            "memory_run": memory.run_time_table(
                model_sizes,
                c.batch_size,
                tokens,
                items,
                inputs,
                programs,
                peaks=(plain[0], quantized[0]),
                arguments=(full_arguments, arguments),
            ),
            "memory_bits": _bits_table(items, live_memory.product_memory(policy, tensors)),
            # For the files alone.
            "memory_weights": memory.sites_table(parameters + ranges),
            "memory_activations": memory.sites_table(items + inputs),
            "memory_live": live_memory.live_table(widths, tensors, items),
        }
        for name, table in tables.items():
            table.save(workdir, name)
        return [
            tables["memory"],
            _AT_EACH_WIDTH,
            tables["memory_widths"],
            f"With the policy the peak is at {quantized[1]}; if it hardly falls with the bits, tensors without a grid make it.",
            f"While it runs, {c.batch_size} x {tokens} tokens, most at {plain[1]} (quantized: {quantized[1]}):",
            tables["memory_run"],
            _WHY_THEY_DIFFER,
            tables["memory_bits"],
            "By site: memory_weights.md, memory_activations.md; what is alive at each, at each width: memory_live.csv.",
        ]

    return run


def _bits_table(activations: Iterable[memory.Item], inputs: Iterable[memory.Item]) -> Table:
    """Returns which part of the activations, and of what enters products, has how many bits."""
    rows = []
    for name, items in (("tensors", tuple(activations)), ("inputs of products", tuple(inputs))):
        rows += [[name, bits, *memory.share(items, bits)] for bits in sorted({item.bits for item in items})]
    return Table(["what", "bits", "of values", "of tensors"], rows, {"of values": ".1%", "of tensors": ".1%"})


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
