"""Text graphs: documents and words as nodes, joined by word windows, TF-IDF and nearest neighbours.

After TextGCN (Yao, Mao and Luo 2019), with the document-document edges of BitTransGNN. All of it is sparse.

Nodes are, in this order, training documents (validation last), words in sorted order, test documents. Everything is counted
over all documents of the graph, test documents included where it is transductive: that is the method, and reports should
say so.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from qtx.data.graph_edges import (
    Track,
    count_windows,
    directions,
    features_of_words,
    inverse_document_frequency,
    nearest,
    normalised,
    untracked,
    word_word,
)
from qtx.errors import UserError, near_misses
from qtx.files import whole_file

# Which edges a type has: words of windows, words of documents, neighbours of documents. The last one has no word nodes.
ADJ_TYPES = {
    "full": (True, True, True),
    "no_doc": (True, True, False),
    "no_ww": (False, True, True),
    "doc_doc": (False, False, True),
}
DOC_DOC_NODES = ("fixed", "as_published")
_FORMAT, _VERSION = "qtx text graph", 1


@dataclasses.dataclass(frozen=True)
class GraphSettings:
    """How a graph is built.

    Attributes:
      adj_type: one of `ADJ_TYPES`; `no_doc` is the graph of TextGCN and BertGCN.
      window: words in a window.
      neighbours: of each document, at most.
      doc_doc_nodes: `fixed`, or `as_published`: edges between documents use positions of documents as numbers of nodes, so
        those of test documents lie on words, in `full` and `no_ww`.
      inductive: only training documents are in the graph, and nothing is counted in others.

    Raises:
      UserError: a value that does not exist.
    """

    adj_type: str = "full"
    window: int = 20
    neighbours: int = 25
    doc_doc_nodes: str = "fixed"
    inductive: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("adj_type", self.adj_type, ADJ_TYPES),
            ("doc_doc_nodes", self.doc_doc_nodes, DOC_DOC_NODES),
        ):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}{near_misses(value, known)}")
        for name, number, least in (("window", self.window, 2), ("neighbours", self.neighbours, 1)):
            if number < least:
                raise UserError(f"{name} of a graph must be at least {least}, got {number}")


@dataclasses.dataclass(frozen=True, eq=False)
class TextGraph:
    """A graph of D documents and V words, N nodes, and what it takes to attach further documents.

    Attributes:
      settings: how it was built.
      raw: [N, N] float64 directed weights: word to word (both ways), document to word, document to neighbour.
      vocabulary: V words, sorted.
      counts: [D, V] int64, how often each word occurs in each document.
      n_train: documents before the words, validation included.
      n_windows: windows in all documents; 0 for a type without word windows, as in `word_windows`.
      word_windows: [V] int64, windows that hold each word.
      fingerprint: of the texts.
    """

    settings: GraphSettings
    raw: sp.csr_matrix
    vocabulary: tuple[str, ...]
    counts: sp.csr_matrix
    n_train: int
    n_windows: int
    word_windows: np.ndarray
    fingerprint: str

    @property
    def identity(self) -> str:
        """Of texts and settings: what a model that was trained on the graph belongs to."""
        return _identity(self.fingerprint, self.settings)

    @property
    def n_documents(self) -> int:
        """D, all documents."""
        return self.counts.shape[0]

    @property
    def n_nodes(self) -> int:
        """N, documents and, but for `doc_doc`, words."""
        return self.raw.shape[0]

    @property
    def document_nodes(self) -> np.ndarray:
        """[D]: the node of each document, in the order of the texts."""
        return _document_nodes(self.n_train, self.n_documents, self.n_nodes - self.n_documents)

    @property
    def word_nodes(self) -> np.ndarray:
        """[V], or [0] in a graph without words: the node of each word."""
        return np.arange(self.n_train, self.n_train + self.n_nodes - self.n_documents)

    @functools.cached_property
    def idf(self) -> np.ndarray:
        """[V] ln(D / documents with the word): what a word of a document weighs, times its count."""
        return inverse_document_frequency(self.counts)

    @functools.cached_property
    def normalised(self) -> sp.csr_matrix:
        """[N, N] float32, symmetric: see `graph_edges.normalised`."""
        return normalised(self.raw).astype(np.float32)

    @functools.cached_property
    def degrees(self) -> np.ndarray:
        """[N] float32 row sums with the self loop, of weight 1, which is what normalising leaves on the diagonal."""
        return 1 / self.normalised.diagonal()

    @functools.cached_property
    def features(self) -> _Features:
        """What neighbours of documents are found by."""
        return _Features.of(self.vocabulary, self.counts)

    def edges(self) -> dict[str, int]:
        """Returns how many edges there are by the nodes that they join, as directed, and of all when they go both ways.

        A word that is in every document has weight 0 there; such edges are counted, and not stored.
        """
        is_word = np.zeros(self.n_nodes, bool)
        is_word[self.word_nodes] = True
        from_word, to_word = np.repeat(is_word, np.diff(self.raw.indptr)), is_word[self.raw.indices]
        stored, pairs = int(np.sum(~from_word & to_word)), self.counts.nnz if is_word.any() else 0
        return {
            "word-word": int(np.sum(from_word & to_word)),
            "document-word": pairs,
            "document-word of weight 0": pairs - stored,
            "document-document": int(np.sum(~from_word & ~to_word)),
            "all, both ways": self.normalised.nnz - self.n_nodes,
        }

    def check(self, texts: Sequence[str], n_train: int, settings: GraphSettings, source: str = "the graph") -> None:
        """Raises a `UserError` unless these texts and settings, as for `build_graph`, would give this graph."""
        used = _used(texts, n_train, settings)
        remedy = "remove it and build it again, or take another place"
        for field in dataclasses.fields(settings):
            old, new = getattr(self.settings, field.name), getattr(settings, field.name)
            if old != new:
                raise UserError(f"{source} was built with {field.name}={old!r}, not {new!r}; {remedy}")
        if self.fingerprint != _fingerprint(used, n_train):
            raise UserError(
                f"{source} was built from other data ({self.n_documents} documents, {self.n_train} of them before the words; "
                f"here {len(used)} and {n_train}); {remedy}"
            )


def build_graph(
    texts: Sequence[str], n_train: int, settings: GraphSettings | None = None, track: Track = untracked
) -> TextGraph:
    """Builds a graph.

    Args:
      texts: documents, words joined by white space: training, validation, test.
      n_train: how many of them are for training or validation.
      settings: how to build; None for the default.
      track: shows the progress.

    Raises:
      UserError: a document without words, too few documents for their neighbours, no document for training.
    """
    settings = settings or GraphSettings()
    has_windows, has_words, has_neighbours = ADJ_TYPES[settings.adj_type]
    texts = _used(texts, n_train, settings)
    if not 1 <= n_train <= len(texts):
        raise UserError(f"n_train of a graph must be from 1 to its {len(texts)} documents, got {n_train}")
    if has_neighbours and len(texts) <= settings.neighbours:
        raise UserError(
            f"{settings.neighbours} neighbours need {settings.neighbours + 1} documents, and there are {len(texts)}; "
            f"lower neighbours, or take adj_type 'no_doc'"
        )
    words = [text.split() for text in texts]
    _require_words(words)
    vocabulary = tuple(sorted({word for document in words for word in document}))
    tokens, offsets = _numbered(words, vocabulary)
    counts = _counts(tokens, offsets, len(vocabulary))
    size = len(vocabulary)
    n_windows, word_windows, between_words = 0, np.zeros(size, np.int64), None
    if has_windows:
        windows = count_windows(tokens, offsets, size, settings.window, track)
        n_windows, word_windows, between_words = windows.total, windows.words, word_word(windows)
    to_words = sp.csr_matrix(counts.multiply(inverse_document_frequency(counts))) if has_words else None
    between_documents = None
    if has_neighbours:
        rows = _Features.of(vocabulary, counts).documents
        between_documents = nearest(rows, rows, settings.neighbours, same=True, track=track)
    raw = assemble(between_words, to_words, between_documents, n_train, settings)
    fingerprint = _fingerprint(texts, n_train)
    return TextGraph(settings, raw, vocabulary, counts, n_train, n_windows, word_windows, fingerprint)


def assemble(
    between_words: sp.csr_matrix | None,
    to_words: sp.csr_matrix | None,
    between_documents: sp.csr_matrix | None,
    n_train: int,
    settings: GraphSettings,
) -> sp.csr_matrix:
    """Puts edges on nodes.

    Args:
      between_words: [V, V] weights, or None.
      to_words: [D, V] weights from documents, or None: then there are no word nodes.
      between_documents: [D, D] weights, or None.
      n_train: documents before the words.
      settings: of these, `doc_doc_nodes`.

    Returns:
      [N, N] float64 without stored zeros; edges of two kinds on one place, of which there are none in `fixed`, are added.
    """
    if to_words is None:
        assert between_documents is not None, "a graph has words or neighbours"
        return between_documents
    documents, size = to_words.shape
    nodes = _document_nodes(n_train, documents, size)
    words = np.arange(n_train, n_train + size)
    shape = (documents + size, documents + size)
    raw = _on_nodes(to_words, nodes, words, shape)
    if between_words is not None:
        raw = raw + _on_nodes(between_words, words, words, shape)
    if between_documents is not None:
        place = nodes if settings.doc_doc_nodes == "fixed" else np.arange(documents)
        raw = raw + _on_nodes(between_documents, place, place, shape)
    raw.eliminate_zeros()
    return raw


def attach(graph: TextGraph, texts: Sequence[str], track: Track = untracked) -> sp.csr_matrix:
    """Attaches new documents to a graph that stays as it is, for inference.

    A new document has the edges that it would have as one of the graph's: to words (count times the graph's idf) and to its
    nearest documents of the graph (cosine of TF-IDF with the graph's frequencies), as far as the graph's type has them, and
    its self loop of weight 1. Words that the graph does not know count nowhere. An edge of weight w between new document i
    and node j becomes w / sqrt(d_i d_j): d_i is the sum of i's own edges, d_j is the graph's, as it was. No two new
    documents are joined, and nothing flows from them into the graph, so what is predicted of one does not depend on which
    others come with it, and features of the graph's nodes can be computed once.

    Args:
      graph: the graph.
      texts: M documents, words joined by white space, made as the graph's texts were.
      track: shows the progress.

    Returns:
      [M, N + M] float32 rows of the normalised adjacency: M further rows, and M further columns for their self loops.

    Raises:
      UserError: a document without words.
    """
    words = [text.split() for text in texts]
    _require_words(words)
    known = frozenset(graph.vocabulary)
    tokens, offsets = _numbered([[word for word in document if word in known] for document in words], graph.vocabulary)
    counts = _counts(tokens, offsets, len(graph.vocabulary))
    _, has_words, has_neighbours = ADJ_TYPES[graph.settings.adj_type]
    new, shape = np.arange(len(words)), (len(words), graph.n_nodes)
    rows = sp.csr_matrix(shape)
    if has_words:
        rows = rows + _on_nodes(sp.csr_matrix(counts.multiply(graph.idf)), new, graph.word_nodes, shape)
    if has_neighbours:
        queries = graph.features.directions_of(counts)
        found = nearest(queries, graph.features.documents, graph.settings.neighbours, same=False, track=track)
        rows = rows + _on_nodes(found, new, graph.document_nodes, shape)
    rows.eliminate_zeros()
    own = 1 + np.asarray(rows.sum(1)).ravel()
    scaled = sp.diags(1 / np.sqrt(own)) @ rows @ sp.diags(1 / np.sqrt(graph.degrees))
    return sp.hstack([scaled, sp.diags(1 / own)], format="csr", dtype=np.float32)


# ------------------------------------------------------------------------------------------------- files


def identity_of(texts: Sequence[str], n_train: int, settings: GraphSettings) -> str:
    """Returns the `TextGraph.identity` of what `build_graph` would make of the same arguments; nothing is built."""
    return _identity(_fingerprint(_used(texts, n_train, settings), n_train), settings)


def name_of(identity: str) -> str:
    """Returns the name of a graph's file in a directory of graphs: another one for other texts, settings or layouts."""
    return f"{hashlib.sha256(f'{_VERSION} {identity}'.encode()).hexdigest()[:16]}.npz"


def save_graph(graph: TextGraph, path: str | os.PathLike[str]) -> None:
    """Writes a graph as one file, whole or not at all."""
    record = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": dataclasses.asdict(graph.settings),
        "n_train": graph.n_train,
        "n_windows": graph.n_windows,
        "fingerprint": graph.fingerprint,
    }
    arrays: dict[str, Any] = {
        "record": _as_bytes(json.dumps(record)),
        "vocabulary": _as_bytes("\n".join(graph.vocabulary)),
        "word_windows": graph.word_windows,
    }
    for name, matrix in (("raw", graph.raw), ("counts", graph.counts)):
        arrays |= {f"{name}_data": matrix.data, f"{name}_indices": matrix.indices, f"{name}_indptr": matrix.indptr}
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_graph(path: str | os.PathLike[str]) -> TextGraph:
    """Reads what `save_graph` wrote; `TextGraph.check` says whether it is of the data at hand.

    Raises:
      UserError: there is no such file, it is damaged, or of another kind or version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        record = json.loads(_as_text(arrays["record"]))
        if (record["format"], record["version"]) != (_FORMAT, _VERSION):
            raise UserError(
                f"{path} is a {record['format']} of version {record['version']}, not {_VERSION}; build it again"
            )
        vocabulary = tuple(_as_text(arrays["vocabulary"]).split("\n"))
        documents, nodes = (len(arrays[f"{name}_indptr"]) - 1 for name in ("counts", "raw"))
        raw, counts = (
            sp.csr_matrix(tuple(arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr")), shape)
            for name, shape in (("raw", (nodes, nodes)), ("counts", (documents, len(vocabulary))))
        )
        return TextGraph(
            GraphSettings(**record["settings"]),
            raw,
            vocabulary,
            counts,
            record["n_train"],
            record["n_windows"],
            arrays["word_windows"],
            record["fingerprint"],
        )
    except FileNotFoundError:
        raise UserError(f"no graph {path}; build it with launch/build_graph.py") from None
    except UserError:
        raise
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        # The reason stays with the error: NumPy's own advice for a file of another kind is to load it unsafely.
        raise UserError(f"{path} is no whole graph; build it again with launch/build_graph.py") from error


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _as_text(array: np.ndarray) -> str:
    return array.tobytes().decode("utf-8")


# ------------------------------------------------------------------------------------------------ helpers


@dataclasses.dataclass(frozen=True, eq=False)
class _Features:
    """Documents as directions: TF-IDF with raw counts and idf ln(D / df) + 1, rows of length 1.

    Attributes:
      of_words: [V, F] see `features_of_words`.
      weights: [F] idf.
      documents: [D, F] the documents of a graph.
    """

    of_words: sp.csr_matrix
    weights: np.ndarray
    documents: sp.csr_matrix

    @classmethod
    def of(cls, vocabulary: Sequence[str], counts: sp.csr_matrix) -> _Features:
        of_words = features_of_words(vocabulary)
        features = counts @ of_words
        weights = inverse_document_frequency(features) + 1
        return cls(of_words, weights, directions(features, weights))

    def directions_of(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Returns [M, F] for counts of words [M, V]."""
        return directions(counts @ self.of_words, self.weights)


def _used(texts: Sequence[str], n_train: int, settings: GraphSettings) -> Sequence[str]:
    return texts[:n_train] if settings.inductive else texts


def _identity(fingerprint: str, settings: GraphSettings) -> str:
    return f"{fingerprint} {settings}"


def _fingerprint(texts: Sequence[str], n_train: int) -> str:
    found = hashlib.sha256(f"{n_train}/{len(texts)}\n".encode())
    for text in texts:
        found.update(f"{text}\n".encode())
    return found.hexdigest()


def _require_words(documents: Sequence[Sequence[str]]) -> None:
    empty = [i for i, words in enumerate(documents) if not words]
    if empty and len(empty) == len(documents):
        raise UserError(f"none of the {len(documents)} documents has a word left after cleaning; check the texts")
    if empty:
        raise UserError(f"document {empty[0]} (counted from 0) has no word left after cleaning; leave it out")


def _numbered(documents: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns [T] word numbers, end to end, and [D + 1] where each document begins."""
    number = {word: i for i, word in enumerate(vocabulary)}
    offsets = np.concatenate([[0], np.cumsum([len(words) for words in documents], dtype=np.int64)])
    tokens = np.fromiter((number[word] for words in documents for word in words), np.int64, offsets[-1])
    return tokens, offsets


def _counts(tokens: np.ndarray, offsets: np.ndarray, size: int) -> sp.csr_matrix:
    found = sp.csr_matrix((np.ones(len(tokens), np.int64), tokens, offsets), (len(offsets) - 1, size))
    found.sum_duplicates()
    return found


def _document_nodes(n_train: int, documents: int, words: int) -> np.ndarray:
    numbers = np.arange(documents)
    return np.where(numbers < n_train, numbers, numbers + words)


def _on_nodes(matrix: sp.csr_matrix, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Returns a matrix of this shape with a matrix's entries at other numbers of rows and columns, both increasing."""
    starts = np.zeros(shape[0] + 1, np.int64)
    starts[rows + 1] = np.diff(matrix.indptr)
    return sp.csr_matrix((matrix.data, columns.astype(np.int32)[matrix.indices], np.cumsum(starts)), shape)
