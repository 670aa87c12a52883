"""Building text graphs: from a configuration to a saved graph and a table of what is in it."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.experimental.sparse import BCSR
from ml_collections import ConfigDict

from qtx import data, models
from qtx.data.corpus import Corpus, make_corpus, published_splits, words_kind
from qtx.data.text_graph import (
    GraphSettings,
    TextGraph,
    attach,
    build_graph,
    identity_of,
    load_graph,
    name_of,
    save_graph,
)
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import load_dataset
from qtx.experiments.config import defaults_of
from qtx.experiments.graph_part import graph_config_from
from qtx.experiments.images import TASKS as IMAGES
from qtx.experiments.translation import TASKS as TRANSLATION
from qtx.train.logging import progress
from qtx.train.report import Table, check_config, save_config

GRAPH_FILE = "graph.npz"
INFERENCE = ("transductive", "inductive")


def corpus_from(config: ConfigDict) -> Corpus:
    """Loads the documents that `config.task`, `config.data` and `config.graph` describe.

    Raises:
      UserError: on anything in the configuration or the data that does not fit.
    """
    if config.task in TRANSLATION:
        raise UserError(f"task {config.task!r} is a translation; graphs are of texts with labels, such as R8 or rte")
    if config.task in IMAGES:
        raise UserError(f"task {config.task!r} has images; graphs are of texts with labels, such as R8 or rte")
    dataset, section = load_dataset(config), config.graph
    if config.data.splits != "graph":
        dataset = published_splits(dataset)
    needed = section.tokenizer and words_kind(dataset, section.words) == "basic"
    tokenizer = data.load_tokenizer(models.locate(section.tokenizer)) if needed else None
    return make_corpus(dataset, section.words, tokenizer)


def settings_from(section: ConfigDict) -> GraphSettings:
    """Reads the section `graph`; raises a `UserError` on a value that does not exist."""
    if section.inference not in INFERENCE:
        raise UserError(f"unknown graph.inference {section.inference!r}{near_misses(section.inference, INFERENCE)}")
    inductive = section.inference == "inductive"
    return GraphSettings(section.adj_type, section.window, section.neighbours, section.doc_doc_nodes, inductive)


def file_of(corpus: Corpus, settings: GraphSettings, path: Path) -> Path:
    """Returns the file of a graph: the path, or if that is no `.npz` and no file, one in it as a directory of graphs.

    Its name there says which graph it is, so runs on several graphs can share the directory.
    """
    if path.suffix == ".npz" or path.is_file():
        return path
    return path / name_of(identity_of(corpus.texts, corpus.n_train, settings))


def graph_from(corpus: Corpus, settings: GraphSettings, path: Path) -> TextGraph:
    """Returns the graph of a corpus: the saved one if there is one, else a new one, which is saved.

    The file appears whole, so runs that begin at the same time may both build a graph, and both have a right one.

    Raises:
      UserError: the file is damaged, or a graph of other data or settings.
    """
    if path.exists():
        graph = load_graph(path)
        graph.check(corpus.texts, corpus.n_train, settings, str(path))
        return graph
    graph = build_graph(corpus.texts, corpus.n_train, settings, track)
    save_graph(graph, path)
    return graph


def graph_of_run(
    corpus: Corpus, settings: GraphSettings, given: str, models: Sequence[Path | None]
) -> tuple[TextGraph, Path | None]:
    """Returns the graph that a run needs, and its file, if it has one.

    Args:
      corpus: the documents.
      settings: how the graph is built.
      given: a file, or a directory of graphs: see `file_of`. '': the graph of the run of one of the models if it is the same,
        else a new one, which is not saved here.
      models: directories of models that the run begins with.

    Raises:
      UserError: the given file is damaged, or a graph of other data or settings.
    """
    if given:
        path = file_of(corpus, settings, Path(given))
        return graph_from(corpus, settings, path), path
    identity = identity_of(corpus.texts, corpus.n_train, settings)
    for directory in models:
        path = Path() if directory is None else directory.parent / GRAPH_FILE
        # One that is damaged was not asked for, and is built again.
        with contextlib.suppress(UserError):
            if path.is_file() and (graph := load_graph(path)).identity == identity:
                return graph, path
    return build_graph(corpus.texts, corpus.n_train, settings, track), None


def give_graph(graph: TextGraph, path: Path, target: Path) -> None:
    """Gives a run the graph that it was trained with: a further name of its file where the disk can, else a copy.

    Args:
      graph: the graph.
      path: of its file.
      target: of the run.
    """
    if target.exists() and path.exists() and target.samefile(path):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        save_graph(graph, target)


def edges_into(graph: TextGraph, texts: Sequence[str]) -> BCSR:
    """Returns the edges of new documents into a graph, for the device; see `qtx.data.text_graph.attach`."""
    rows = attach(graph, texts)
    return BCSR((jnp.asarray(rows.data), jnp.asarray(rows.indices), jnp.asarray(rows.indptr)), shape=rows.shape)


def build(config: ConfigDict, workdir: str) -> TextGraph:
    """Builds the graph of a task, saves it as `workdir/graph.npz`, and prints what is in it.

    Raises:
      UserError: bad input, or a run directory of another configuration.
    """
    start = time.monotonic()
    settings = settings_from(config.graph)
    graph_config_from(config.bittransgnn)  # which the graph does not need, and training will refuse
    if (Path(workdir) / "config.json").exists():
        check_config(config, workdir, defaults_of(config))
    corpus = corpus_from(config)
    path = Path(workdir) / GRAPH_FILE
    if path.exists():
        print(f"{path} is there already; it is checked, not built again")
    graph = graph_from(corpus, settings, path)
    save_config(config, workdir)
    table = table_of(graph, corpus, config.task, time.monotonic() - start)
    table.save(workdir, "graph")
    table.print()
    return graph


def table_of(graph: TextGraph, corpus: Corpus, task: str, seconds: float) -> Table:
    """Returns the counts of a graph: documents, words, nodes, windows, edges; and what they took."""
    used = {name: len(split) for name, split in corpus.dataset.splits.items()}
    if graph.settings.inductive:
        used.pop("test", None)
    rows: list[tuple[str, Any]] = [(f"{name} documents", size) for name, size in used.items()]
    rows += [("documents left out, without words", corpus.skipped)] if corpus.skipped else []
    rows += [("words", len(graph.vocabulary)), ("nodes", graph.n_nodes), ("windows", graph.n_windows)]
    rows += [(f"edges {kind}", count) for kind, count in graph.edges().items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rows += [("seconds", f"{seconds:.1f}"), ("MiB of memory at most", round(peak / 2**20))]
    kind = "inductive" if graph.settings.inductive else "transductive: counted over test documents, too"
    title = f"{task}, {graph.settings.adj_type}, {kind}"
    shown = [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in rows]
    return Table(("graph", "count"), shown, title=title)


def track(items: Sequence[Any], description: str) -> Iterator[Any]:
    """Yields items and shows how many are done."""
    with progress(len(items), description) as shown:
        for number, item in enumerate(items, 1):
            yield item
            shown.update(number)
