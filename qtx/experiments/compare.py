"""Fine-tune once, quantize in several ways, one table: the quickstart and the results tables.

Every row of `config.rows` has a name and the fields in which its `quant` section differs from the default. Several seeds
or tasks are a sweep with the entry `compare` (`qtx.experiments.sweep`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from qtx import data
from qtx.errors import UserError
from qtx.experiments.classification import Classification, load_dataset
from qtx.experiments.config import changed
from qtx.experiments.experiment import VALIDATION, family_and_sizes
from qtx.experiments.from_config import policy_from, rounding_from, suppression_from
from qtx.experiments.run import (
    check_quantization,
    check_suppression,
    post_training_quantization,
    save_quantized,
    train,
)
from qtx.files import write_text
from qtx.methods.layer_rounding import AdaRound
from qtx.methods.outlier_suppression import OutlierSuppression
from qtx.quant.policy import Policy
from qtx.train import metrics
from qtx.train.plots import plot_accuracy_against_size
from qtx.train.report import Table, save_config


def baseline(config: ConfigDict, workdir: str | Path | None = None) -> dict[str, float]:
    """Returns the metrics of TF-IDF with logistic or ridge regression, as an experiment names them.

    Args:
      config: for its task and data.
      workdir: receives `result.json`, if given.
    """
    dataset = load_dataset(config)
    values: dict[str, float] = {}
    for split, prefix in (("validation", ""), ("test", "test_")):
        if split in dataset.splits:
            found = metrics.compute(
                dataset.task.metrics, tfidf_predictions(dataset, split), dataset.splits[split].labels
            )
            values |= {prefix + name: value for name, value in found.items()}
            if not prefix:
                values["score"] = metrics.score(found)
    if workdir:
        save_config(config, workdir)
        write_text(Path(workdir) / "result.json", json.dumps(values, indent=2))
    return values


def tfidf_predictions(dataset: data.Dataset, split: str = "validation") -> Any:
    """Returns predictions for a split from TF-IDF of words with logistic or ridge regression.

    The penalty is a tenth of the usual one, which is too much for many classes: on Ohsumed 0.65 of the test data are right
    instead of 0.55.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    texts = {
        name: [" ".join(parts) for parts in zip(*split.texts, strict=True)] for name, split in dataset.splits.items()
    }
    head = Ridge() if dataset.task.is_regression else LogisticRegression(C=10, max_iter=1000)
    pipeline = make_pipeline(TfidfVectorizer(), head)
    return pipeline.fit(texts["train"], dataset.splits["train"].labels).predict(texts[split])


@dataclasses.dataclass
class Row:
    """One line of the table: bits as text, score and drop as fractions, bytes of all weights as stored."""

    method: str
    weight_bits: str
    activation_bits: str
    score: float
    drop: float
    weight_bytes: int | None
    seconds: float


def bits_of(policy: Policy | None, kind: str) -> str:
    """Returns the bit widths of a policy's rules for weights or activations: `8`, `8/16`, `1.58`."""
    rules = () if policy is None else policy.weights if kind == "weight" else policy.activations
    found = {f"{rule.spec.storage_bits:.3g}" for rule in rules if rule.spec is not None}
    return "/".join(sorted(found, key=float)) or "32"


def row_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the `quant` section of every row by name; raises a `UserError` on a field that does not exist."""
    sections = {}
    for row in config.rows:
        changes = dict(row)
        name = changes.pop("name", None)
        if not name or name in sections:
            raise UserError(f"every row needs a name of its own, not {name!r}")
        sections[name] = changed(config.quant, changes, f"row {name!r} of `quant`")
    return sections


def compare(config: ConfigDict, workdir: str | Path) -> list[Row]:
    """Fine-tunes, quantizes by every row, and writes `table.md`, `table.csv`, `accuracy_size.png` and the models.

    Args:
      config: with `rows`; see `configs/quickstart.py`.
      workdir: run directory.

    Returns:
      The lines of the table.

    Raises:
      UserError: on anything that does not fit, before training starts.
    """
    workdir = Path(workdir)
    console = Console(stderr=True)
    sections = row_sections(config)
    num_layers = family_and_sizes(config.model)[1].num_layers
    methods: dict[str, tuple[Policy, AdaRound | None, OutlierSuppression | None]] = {}
    for name, section in sections.items():
        policy = policy_from(section, num_layers)
        if policy is None:
            raise UserError(f"row {name!r} keeps everything in full precision; change its bits")
        suppression = suppression_from(section, config.outlier_suppression)
        methods[name] = policy, rounding_from(section, config.adaround), suppression

    clock = time.perf_counter()
    experiment = Classification.make(config)
    for policy, rounding, suppression in methods.values():
        check_quantization(policy, rounding, experiment.sites())
        check_suppression(suppression, experiment.pretrained.config)
    trained = train(experiment, workdir)
    full = trained["metrics"][config.recipe[-1]]["score"]
    params = trained["params"]
    full_seconds = time.perf_counter() - clock
    rows = [_baseline(experiment, full)]
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    rows.append(Row("full precision", "32", "32", full, 0.0, size, full_seconds))

    batches = experiment.calibration_batches()
    for name, (policy, rounding, suppression) in methods.items():
        clock = time.perf_counter()
        quantized = post_training_quantization(experiment, params, policy, batches, rounding, suppression)
        score = experiment.evaluate(quantized.model, quantized.variables, VALIDATION)["score"]
        family, sizes, policy = experiment.pretrained.family, quantized.config, quantized.policy
        directory = workdir / "quantized" / re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
        kept = experiment.tokenizer, experiment.labels
        size = save_quantized(directory, family, sizes, policy, quantized.params, quantized.ranges, *kept)
        experiment.save_beside(directory)
        bits = bits_of(policy, "weight"), bits_of(policy, "activation")
        rows.append(Row(name, *bits, score, full - score, size, time.perf_counter() - clock))
        console.print(f"{name}: {score:.4f} ({full - score:+.4f} lost, {rows[-1].seconds:.0f} s)", highlight=False)
    report(rows, workdir, experiment)
    return rows


def _baseline(experiment: Classification, full: float) -> Row:
    clock = time.perf_counter()
    predictions = tfidf_predictions(experiment.dataset)
    values = metrics.compute(experiment.task.metrics, predictions, experiment.dataset.splits["validation"].labels)
    score = metrics.score(values)
    return Row("TF-IDF baseline", "-", "-", score, full - score, None, time.perf_counter() - clock)


def report(rows: list[Row], workdir: Path, experiment: Classification) -> None:
    """Prints the table and writes it with its plot into the run directory."""
    name = "+".join(experiment.task.metrics)
    table = Table(
        ["method", "weight bits", "activation bits", name, "drop", "MiB of weights", "seconds"],
        [
            [
                r.method,
                r.weight_bits,
                r.activation_bits,
                r.score,
                r.drop,
                r.weight_bytes and r.weight_bytes / 2**20,
                r.seconds,
            ]
            for r in rows
        ],
        formats={name: ".4f", "drop": ".4f", "MiB of weights": ".2f", "seconds": ".1f"},
        title=f"{experiment.task.name}, {experiment.config.model.name}, seed {experiment.config.seed}",
    )
    table.print()
    table.save(workdir, "table")
    points = [(r.method, r.weight_bytes, r.score) for r in rows if r.weight_bytes]
    plot_accuracy_against_size(points, workdir / "accuracy_size.png", (rows[0].method, rows[0].score), ylabel=name)
    found = {"metric": name, "rows": [dataclasses.asdict(row) for row in rows]}
    write_text(workdir / "rows.json", json.dumps(found, indent=2))
