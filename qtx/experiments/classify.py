"""Classifying new texts with a trained model: lines in, as many labels out, in their order.

A BitTransGNN attaches new documents to its graph by their own words and neighbours (`qtx.data.text_graph.attach`); the graph is
not built again, and its nodes do not change. So what is said of a text depends on no other new one.

The encoder reads a text as it read those of its data set: cleaned as they were (`qtx.data.cleaning.Cleaning`), or as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtx import data, models
from qtx.data.batching import Batches, bucket_lengths
from qtx.data.cleaning import Cleaning
from qtx.data.corpus import new_documents
from qtx.data.reading import read_text, standard_input
from qtx.data.text_graph import TextGraph, load_graph
from qtx.errors import UserError, warn
from qtx.experiments.graph import GRAPH_FILE, edges_into
from qtx.experiments.graph_part import GraphPart, joint_policy, part_of
from qtx.export.packed import WEIGHTS_FILE, load_quantized
from qtx.files import write_text
from qtx.nn.bert import BertConfig
from qtx.nn.graph import adjacency
from qtx.nn.text_graph import TextGraphClassifier
from qtx.train.loop import predict
from qtx.train.sharding import make_mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier of texts, with its graph if it has one.

        classifier = Classifier.load("runs/dynamic/quantized", "runs/dynamic/graph.npz")
        labels, values = classifier([["Oil prices rose again on Monday."]])

    Attributes:
      text: the encoder with its classifier.
      variables: its parameters, and ranges if it is quantized.
      labels: names of the classes; empty for a regression.
      columns: names of the one or two texts of an example, or () where nothing says what the model was trained on.
      tokenizer: of the encoder.
      mesh: where to compute.
      max_length: tokens; the rest of a longer text is left out.
      part: what a graph model has beside the encoder, or None.
      graph: the graph that it was trained with, or None.
      cleaning: of the texts that it was trained on; None: they were as they had been written.
    """

    text: nn.Module
    variables: dict[str, Any]
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    tokenizer: Any
    mesh: Mesh
    max_length: int
    part: GraphPart | None
    graph: TextGraph | None
    cleaning: Cleaning | None

    @classmethod
    def load(
        cls, name: str, graph: str = "", max_length: int = 128, warn: Callable[[str], None] | None = None
    ) -> Classifier:
        """Loads a checkpoint (`model/` of a run) or a packed artifact (`quantized/`).

        Args:
          name: see `qtx.models.locate`.
          graph: file of the graph that the model was trained with; '': `graph.npz` beside the model's directory.
          max_length: of texts, in tokens.
          warn: gets a line about a float model that was trained to be run quantized.

        Raises:
          UserError: on a model that does not classify texts, or a graph that is missing or another one.
        """
        directory = models.locate(name)
        found: Any
        if (directory / WEIGHTS_FILE).is_file():
            found = load_quantized(directory)
            text, variables = found.model, found.variables
        else:
            found = models.load(str(directory), None)
            if found.fresh:
                raise UserError(f"{name} has no trained {' and '.join(found.fresh)}; give a model that was trained")
            text, variables = found.family.module(config=found.config), {"params": found.params}
            if warn is not None and (better := _quantized_instead(directory)):
                warn(f"{name} is the float model of a run whose quantized one was evaluated{better}")
        if not isinstance(found.config, BertConfig):
            raise UserError(f"{name} does not classify texts; give the directory of a model that does")
        if not 1 <= max_length <= found.config.max_positions:
            raise UserError(f"max_length must be from 1 to the model's {found.config.max_positions}, got {max_length}")
        count = found.config.num_labels
        labels = models.read_labels(directory) or tuple(str(i) for i in range(count))
        part, text_graph = part_of(directory), None
        if part is not None:
            path = Path(graph) if graph else directory.parent / GRAPH_FILE
            text_graph = load_graph(path)
            if text_graph.identity != part.graph:
                raise UserError(
                    f"{path} is a graph of other documents or settings than the one {name} was trained with"
                )
        tokenizer = data.load_tokenizer(directory)
        own = () if count == 1 else labels
        columns = _columns(directory, part)
        cleaning = Cleaning.load(directory)
        return cls(text, variables, own, columns, tokenizer, make_mesh(), max_length, part, text_graph, cleaning)

    def __call__(self, texts: Sequence[Sequence[str]], batch_size: int = 32) -> tuple[list[str], np.ndarray]:
        """Classifies texts; says on standard error which of them the graph knows no word of.

        Args:
          texts: each of one string, or two for a model of pairs.
          batch_size: texts that are encoded together.

        Returns:
          The label of each text (of a regression the number, as text), and log probabilities `[M, C]` (or numbers `[M, 1]`).

        Raises:
          UserError: no text; one without a word, or none that is left after cleaning; or with another number of columns than
            the model takes, or the others have. Lines are counted from 1.
        """
        if not texts:
            raise UserError("there are no texts to classify")
        for number, row in enumerate(texts, 1):
            if not any(text.strip() for text in row):
                raise UserError(f"line {number} is empty; leave it out")
            if self.columns and len(row) != len(self.columns):
                how = "" if len(self.columns) == 1 else ", separated by a tab"
                raise UserError(
                    f"line {number} has {_counted(len(row))}, but the model takes {_counted(len(self.columns))} "
                    f"({', '.join(self.columns)}){how}"
                )
            if len(row) != len(texts[0]):
                raise UserError(f"line {number} has {_counted(len(row))} and line 1 {_counted(len(texts[0]))}")
        columns = self._as_trained([list(column) for column in zip(*texts, strict=True)])
        values = (
            self._plain(columns, batch_size, "logits") if self.part is None else self._attached(columns, batch_size)
        )
        if not self.labels:
            return [f"{value:.4f}" for value in values[:, 0]], values
        if self.part is None:
            values = np.asarray(jax.nn.log_softmax(values))
        return [self.labels[i] for i in values.argmax(-1)], values

    def _as_trained(self, columns: list[list[str]]) -> list[list[str]]:
        """Returns texts as the data set of the model has them."""
        if self.cleaning is None:
            return columns
        cleaned = [[self.cleaning(text) for text in column] for column in columns]
        _require_words(list(map("".join, zip(*cleaned, strict=True))))
        return cleaned

    def _plain(self, columns: Sequence[list[str]], batch_size: int, output: str) -> np.ndarray:
        nothing = np.zeros(len(columns[0]), np.int32)
        encoded = data.encode(self.tokenizer, data.Examples(tuple(columns), nothing), self.max_length)
        buckets = bucket_lengths(encoded.lengths, self.max_length, 2)
        pad = self.text.config.pad_token_id  # type: ignore[attr-defined]
        size = -(-batch_size // self.mesh.shape["data"]) * self.mesh.shape["data"]
        batches = Batches(encoded, size, buckets, shuffle=False, pad_id=pad, epochs=1)
        return predict(self.text, self.variables, batches, self.mesh, output=output)

    def _attached(self, columns: list[list[str]], batch_size: int) -> np.ndarray:
        assert self.part is not None and self.graph is not None, "only a graph model attaches texts"
        tokenizer = data.load_tokenizer(models.locate(self.part.tokenizer)) if self.part.tokenizer else None
        words = new_documents(columns, self.part.words, tokenizer, self.cleaning is not None)
        _require_words(words)
        features = jnp.asarray(self._plain(columns, batch_size, "pooled"))
        edges = edges_into(self.graph, words)
        alone = np.flatnonzero(np.diff(edges.indptr) == 1)  # their self loop
        if len(alone):
            which = (
                f"line {alone[0] + 1}" if len(alone) == 1 else f"{len(alone)} lines, the first of them {alone[0] + 1}"
            )
            warn(f"{which}: no word is in the graph, whose vote is of the encoder's features alone")
        joint = self._joint
        variables = {**self.variables, "params": self.variables["params"] | {"gcn": self.part.params}}
        outputs: Any = joint.apply(variables, features, edges, self._entering, method="attached")
        return np.asarray(outputs.logits)

    @functools.cached_property
    def _joint(self) -> TextGraphClassifier:
        assert self.part is not None
        text: Any = self.text
        policy = joint_policy(text.policy, self.part)
        return TextGraphClassifier(text.config, text.dtype, policy, type(text), self.part.config, recompute=False)

    @functools.cached_property
    def _entering(self) -> Any:
        """What enters each convolution of the graph's own nodes: the same for all new texts."""
        assert self.part is not None and self.graph is not None
        variables = {
            "params": self.variables["params"] | {"gcn": self.part.params},
            "graph": {"adjacency": adjacency(self.graph.normalised)},
            "bank": {"features": jnp.asarray(self.part.features)},
        }
        return self._joint.apply(variables, method="entering")


def _require_words(texts: Sequence[str]) -> None:
    """Raises a `UserError` if a text is empty, which it was not before it was cleaned."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"line {number} has no word left after cleaning; leave it out")


def _counted(texts: int) -> str:
    return "one text" if texts == 1 else f"{texts} texts"


def _record_of_run(directory: Path) -> Mapping[str, Any]:
    """Returns the configuration of the run that a model's directory is part of; empty where there is none."""
    try:
        record = json.loads((directory.parent / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _columns(directory: Path, part: GraphPart | None) -> tuple[str, ...]:
    """Returns the names of the texts that a model takes, as far as its run or its graph says what it was trained on."""
    record = _record_of_run(directory)
    name = str(record.get("task", part.task if part is not None else ""))
    if name.lower() in {known.lower() for known in data.TASKS}:
        return data.get_task(name).columns
    return {"table": tuple(record.get("data", {}).get("text_columns", ())), "folder": ("text",)}.get(name, ())


def _quantized_instead(directory: Path) -> str:
    """Returns what is to be said of a float model that its run evaluated quantized; '' of any other."""
    packed = directory.parent / "quantized"
    if (packed / WEIGHTS_FILE).is_file():
        return f"; for its labels give {packed}"
    record = _record_of_run(directory)
    last = (record.get("recipe") or [""])[-1]
    if directory.name == "model" and record.get("phases", {}).get(last, {}).get("quantized"):
        return ", and is not packed; its labels can be others"
    return ""


def classify_file(model: str, graph: str, source: str, target: str, max_length: int, batch_size: int) -> None:
    """Classifies a file line by line.

    Args:
      model: see `Classifier.load`.
      graph: likewise.
      source: path of a UTF-8 file, plain or compressed, a text a line, the two of a pair separated by a tab; `-`: standard
        input.
      target: path, which gets a line for each: label, tab, probability; `-`: standard output.
      max_length: of texts, in tokens.
      batch_size: texts that are encoded together.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")

    classifier = Classifier.load(model, graph, max_length, warn)
    text = standard_input() if source == "-" else read_text(Path(source))
    lines = [line.strip().split("\t") for line in text.removesuffix("\n").split("\n")] if text else []
    labels, values = classifier(lines, batch_size)
    shown = np.exp(values.max(-1)) if classifier.labels else values[:, 0]
    found = "".join(f"{label}\t{value:.4f}\n" for label, value in zip(labels, shown, strict=True))
    if target == "-":
        sys.stdout.write(found)
    else:
        write_text(Path(target), found)
