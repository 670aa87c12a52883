"""Theory beside measurement: what a quantized model should cost, by its operations and bits, and what it does cost here.

The theory assumes hardware that adds where weights are -1, 0 and 1 and multiplies integers at their width. What is measured
is fake quantization in float32: its latency says what it costs to simulate such hardware. The bytes of the file are real.

Of a model with a graph, the encoder is measured; what the graph adds is theory alone.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qtx.analysis import efficiency as theory
from qtx.analysis import efficiency_as_published as published
from qtx.analysis import memory
from qtx.analysis.tradeoffs import plot_costs
from qtx.data.text_graph import TextGraph, load_graph
from qtx.errors import UserError, near_misses, warn
from qtx.experiments.classification import Classification
from qtx.experiments.from_config import rounding_from
from qtx.experiments.graph import GRAPH_FILE
from qtx.experiments.graph_classification import GraphClassification
from qtx.experiments.graph_part import graph_config_from, part_of
from qtx.experiments.measuring import environment, measure
from qtx.experiments.run import post_training_quantization
from qtx.export.packed import WEIGHTS_FILE, save_quantized
from qtx.export.packed_file import packable
from qtx.nn.bert import BertConfig
from qtx.nn.sites import SiteInfo, names_by_kind
from qtx.nn.text_graph import GraphConfig, TextGraphClassifier
from qtx.quant.policy import Policy
from qtx.train.report import Table

RULES = ("corrected", "as_published")
MODELS = ("full precision", "quantized")
_KERNEL, _INPUT = "gcn/layer_0/kernel", "gcn/layer_0/input"  # both layers are quantized alike
COLUMNS = ("from", "figure", "unit", *MODELS, "smaller by")

Row = list[Any]


def efficiency(experiment: Classification, policy: Policy) -> Callable[[Path], list[str | Table]]:
    """Checks the section `analysis.efficiency` and returns what fills a run directory and the report.

    Args:
      experiment: of a trained checkpoint in full precision.
      policy: what is quantized, and how.

    Raises:
      UserError: a setting that does not exist or does not fit the model.
    """
    c = _settings(experiment, policy)
    experiment = experiment.alone()
    policy = policy.matching(names_by_kind(experiment.sites()))
    sizes = experiment.pretrained.config
    if not isinstance(sizes, BertConfig):
        raise UserError("analyses 'efficiency' counts the work of encoders of texts; leave it out")
    most = sizes.max_positions
    if c.rule not in RULES:
        raise UserError(f"unknown analysis.efficiency.rule {c.rule!r}{near_misses(c.rule, RULES)}")
    if min(c.batch_size, c.repeats, c.sequences) < 1 or not 1 <= c.tokens <= most:
        raise UserError(
            f"analysis.efficiency: {c.repeats} passes of {c.batch_size} x {c.tokens} tokens for {c.sequences} texts; give at "
            f"least 1 of each, and at most {most} tokens"
        )
    args = [jax.ShapeDtypeStruct((c.batch_size, c.tokens), jnp.int32)] * len(experiment.pretrained.family.inputs)
    sites = experiment.sites(*args)
    costs = {
        name: (_corrected if c.rule == "corrected" else _as_published)(experiment, of, sites, c)
        for name, of in zip(MODELS, (None, policy), strict=True)
    }
    batches = experiment.calibration_batches()
    rounding = rounding_from(experiment.config.quant, experiment.config.adaround)

    def run(workdir: Path) -> list[str | Table]:
        params = experiment.pretrained.params
        quantized = post_training_quantization(experiment, params, policy, batches, rounding)
        keys = dict.fromkeys(key for name in MODELS for key in costs[name])
        found = [["theory", *key, *(costs[name].get(key, 0.0) for name in MODELS)] for key in keys]
        rows = [row for row in found if any(row[3:])]
        if packable(policy):
            rows.append(["measured", "weights, in their file", "MiB", *_file_sizes(experiment, quantized, workdir)])
        rows += _latency(experiment, quantized, c)
        return _blocks(rows, c, workdir)

    return run


def _settings(experiment: Classification, policy: Policy) -> ConfigDict:
    """Returns the section with the sizes of the model's graph, where none are given and it has one, and its texts."""
    c = copy.deepcopy(experiment.config.analysis.efficiency)
    if c.graph.nodes and not c.sequences:
        raise UserError(
            "analysis.efficiency.graph.nodes is given: give the documents among them as analysis.efficiency.sequences, too"
        )
    if not c.graph.nodes and (found := _graph_of(experiment, policy)) is not None:
        graph, convolution, its_policy = found
        entries = graph.normalised.nnz if c.rule == "corrected" else graph.raw.nnz
        specs = its_policy.spec("weight", _KERNEL), its_policy.spec("input", _INPUT)
        widths = [32.0 if spec is None else float(spec.storage_bits) for spec in specs]
        c.graph.update(nodes=graph.n_nodes, entries=entries, hidden=convolution.hidden_size)
        c.graph.update(bits=widths[0], input_bits=widths[1])
        c.sequences = c.sequences or graph.n_documents
    c.sequences = c.sequences or 1
    return c


def _graph_of(experiment: Classification, policy: Policy) -> tuple[TextGraph, GraphConfig, Policy] | None:
    """Returns the graph of a model, its convolution and what that is quantized by; None if there is no graph."""
    if isinstance(experiment, GraphClassification):
        if not isinstance(experiment.model, TextGraphClassifier):
            return None  # a student, which is an encoder alone
        found = experiment.graph, graph_config_from(experiment.config.bittransgnn), policy
    else:
        directory = experiment.pretrained.directory
        if directory is None or (part := part_of(directory)) is None:
            return None
        path = directory.parent / GRAPH_FILE
        if not path.is_file():
            warn(f"{directory} was trained with a graph, but there is no {path}: the figures are of the encoder alone")
            return None
        found = load_graph(path), part.config, part.policy
    if found[1].num_layers != 2:
        warn(
            f"a graph convolution of {found[1].num_layers} layers is not counted: the figures are of the encoder alone"
        )
        return None
    return found


def _corrected(
    experiment: Classification, policy: Policy | None, sites: Mapping[str, SiteInfo], c: ConfigDict
) -> dict[tuple[str, str], float]:
    """Returns figures by name and unit, from the sites of the model itself."""
    items = memory.weight_memory(policy, sites, experiment.pretrained.params) + memory.range_memory(policy, sites)
    found = theory.products(policy, sites)
    bytes_of = memory.totals(items)
    figures = {
        ("weights, at their bits", "MiB"): bytes_of["biases at 32"] / 2**20,
        ("weights, with scales", "MiB"): bytes_of["stored"] / 2**20,
    }
    figures |= {(f"MACs, {kind}", "10^6 a text"): n / c.batch_size / 1e6 for kind, n in theory.macs(found).items()}
    bit_products = sum(product.bit_multiplications for product in found)
    figures["bit multiplications", "10^9 a text"] = bit_products / c.batch_size / 1e9
    counts = theory.operations(found)
    for dtype, numbers in counts.items():
        for name, number in zip(("additions", "multiplications"), numbers, strict=True):
            figures[f"{name}, {dtype}", "10^6 a text"] = number / c.batch_size / 1e6
    joule = theory.energy(counts, c.process) / c.batch_size * c.sequences
    figures[f"energy, {c.process}", "mJ"] = 1e3 * joule
    if c.graph.nodes:
        sizes = experiment.pretrained.config
        assert isinstance(sizes, BertConfig)  # only classifiers come here
        graph = theory.Graph(c.graph.nodes, c.graph.entries, sizes.hidden_size, c.graph.hidden, sizes.num_labels)
        bits = (32, 32) if policy is None else (c.graph.bits, c.graph.input_bits)
        of_graph = theory.energy(theory.operations(graph.products(*bits)), c.process) * c.graph.passes
        figures[f"energy with the graph, {c.process}", "mJ"] = 1e3 * (joule + of_graph)
        for part, size in graph.bytes(bits[0], bias=bits[0] == 32, documents=c.sequences).items():
            figures[f"graph, {part}", "MiB"] = size / 2**20
    return figures


def _as_published(
    experiment: Classification, policy: Policy | None, sites: Mapping[str, SiteInfo], c: ConfigDict
) -> dict[tuple[str, str], float]:
    """Returns figures by name and unit, by the formulas of BitTransGNN; operations of integers are those of int8."""
    sizes = experiment.pretrained.config
    assert isinstance(sizes, BertConfig)  # only classifiers come here
    encoder = published.encoder_of(experiment.pretrained.family.name, sizes)
    bits, table_bits = (_common_bits(policy, sites, role) for role in ("kernel", "table"))
    found = encoder.operations(bits).times(c.sequences)
    dtype = "float32" if policy is None or not (policy.activations or policy.inputs) else "int8"
    figures = {
        ("weights, as published", "MiB"): encoder.bytes(bits, table_bits) / 2**20,
        ("additions, as published", "10^6 a text"): found.additions / c.sequences / 1e6,
        ("multiplications, as published", "10^6 a text"): found.multiplications / c.sequences / 1e6,
        (f"energy, {c.process}, as published", "mJ"): 1e3 * found.energy(dtype, c.process),
    }
    if c.graph.nodes:
        graph_bits = 32 if policy is None else c.graph.bits
        sizes_of_graph = encoder.width, c.graph.hidden, sizes.num_labels
        of_graph = published.gcn_operations(c.graph.nodes, c.graph.entries, *sizes_of_graph, graph_bits, c.graph.passes)
        joule = found.energy(dtype, c.process) + of_graph.energy(dtype, c.process)
        figures[f"energy with the graph, {c.process}, as published", "mJ"] = 1e3 * joule
        figures["graph, as published", "MiB"] = published.gcn_bytes(*sizes_of_graph, graph_bits) / 2**20
    return figures


def _common_bits(policy: Policy | None, sites: Mapping[str, SiteInfo], role: str) -> float:
    names = [name for name in sites if name.endswith(f"/{role}")]
    specs = [None if policy is None else policy.spec("weight", name) for name in names]
    found = {32 if spec is None else round(spec.storage_bits, 2) for spec in specs}
    if len(found) > 1:
        raise UserError(
            f"published figures have one width for each {role}, not {sorted(found)} bits: use rule='corrected'"
        )
    return found.pop()


def _file_sizes(experiment: Classification, quantized: Any, workdir: Path) -> tuple[float | None, float]:
    """Writes the packed model, and returns the MiB of the checkpoint, if it is one file, and of the packed file."""
    directory, pretrained = workdir / "quantized", experiment.pretrained
    sizes = pretrained.family, pretrained.config
    save_quantized(directory, *sizes, quantized.policy, quantized.params, quantized.ranges, experiment.tokenizer)
    size = (directory / WEIGHTS_FILE).stat().st_size / 2**20
    if not experiment.config.save_models:
        shutil.rmtree(directory)  # written to be counted
    checkpoint = None if pretrained.directory is None else pretrained.directory / "model.safetensors"
    return checkpoint.stat().st_size / 2**20 if checkpoint and checkpoint.is_file() else None, size


def _latency(experiment: Classification, quantized: Any, c: ConfigDict) -> list[Row]:
    """Measures both models in turn: seconds of wall time from the call to the logits, weights on their grids already."""
    shape = c.batch_size, c.tokens
    ones, zeros = jnp.ones(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
    args = tuple(zeros if name == "token_type_ids" else ones for name in experiment.pretrained.family.inputs)

    def program(model: nn.Module, variables: Mapping[str, Any]) -> Callable[[], jax.Array]:
        def logits(variables: Any, args: Any) -> jax.Array:
            return model.apply(variables, *args).logits  # type: ignore[union-attr]

        compiled = jax.jit(logits)
        return lambda: compiled(variables, args)

    full = program(experiment.model, experiment.variables)
    found = measure(full, program(quantized.model, quantized.variables), c.repeats, time.perf_counter)
    of_full, of_quantized = theory.summary(found.a)._asdict(), theory.summary(found.b)._asdict()
    names = {"median": "median", "p5": "5th percentile", "p95": "95th percentile", "mean": "mean", "std": "deviation"}
    return [
        ["measured", f"latency, {text}", "ms a batch", 1e3 * of_full[name], 1e3 * of_quantized[name]]
        for name, text in names.items()
    ]


def _blocks(rows: list[Row], c: Any, workdir: Path) -> list[str | Table]:
    rows = [[*row, row[3] / row[4] if row[3] and row[4] else None] for row in rows]
    table = Table(COLUMNS, rows, dict.fromkeys(MODELS, ".4g") | {"smaller by": ".3g"})
    table.save(workdir, "efficiency")
    shown = ("weights", "energy", "latency, median", "bit")
    bars = {row[1]: (row[3], row[4]) for row in rows if row[1].startswith(shown) and row[3] and row[4]}
    plot_costs(bars, workdir / "efficiency.png", MODELS)
    machine = ", ".join(f"{name} {value}" for name, value in environment().items() if name != "clock")
    tokens = c.tokens if c.rule == "corrected" else published.TOKENS
    note = (
        f"Theory ({c.rule}): {tokens} tokens a text, {c.sequences} for energy; operations of matrix products, on hardware "
        "that has them at their width. "
        f"Measured: {c.repeats} passes of {c.batch_size} x {c.tokens} tokens, wall time; quantization is simulated in float32, "
        f"so latency does not show what integer kernels would save. {machine}."
    )
    return [note, table, "![costs](efficiency.png)"]
