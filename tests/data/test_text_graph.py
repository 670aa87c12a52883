"""Text graphs against plain loops over dense matrices, their files, and documents that come later."""

import collections
import dataclasses
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.neighbors import NearestNeighbors

from qtx.data import graph_edges, load
from qtx.data.corpus import make_corpus
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.text_graph import ADJ_TYPES, GraphSettings, attach, build_graph, load_graph, save_graph
from qtx.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or SHARED)
SETTINGS = GraphSettings(window=4, neighbours=5)


def documents(count=14, seed=4, words=25):
    """Documents whose neighbours, with this seed, are all at different distances."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(words)] + ["it's", "\\(", "a"]
    lengths = rng.integers(5, 25, count)
    return [" ".join(["all", *rng.choice(vocabulary, length)]) for length in lengths]


def windows_of(texts, size):
    for text in texts:
        words = text.split()
        for start in range(max(len(words) - size, 0) + 1):
            yield words[start : start + size]


def dense_parts(texts, settings):
    """The three kinds of edges by definition (TextGCN; BitTransGNN), as dense matrices over words and documents."""
    vocabulary = sorted({word for text in texts for word in text.split()})
    total, seen, pairs = 0, collections.Counter(), collections.Counter()
    for window in windows_of(texts, settings.window):
        total += 1
        seen.update(set(window))
        pairs.update(itertools.permutations(window, 2))
    between = np.zeros((len(vocabulary),) * 2)
    for (i, a), (j, b) in itertools.product(enumerate(vocabulary), repeat=2):
        if a != b and pairs[a, b]:
            between[i, j] = max(0, math.log(pairs[a, b] * total / (seen[a] * seen[b])))
    counts = np.array([[text.split().count(word) for word in vocabulary] for text in texts])
    to_words = counts * np.log(len(texts) / (counts > 0).sum(0))
    terms = CountVectorizer().fit_transform(texts).toarray()
    weighted = terms * (np.log(len(texts) / (terms > 0).sum(0)) + 1)
    search = NearestNeighbors(n_neighbors=settings.neighbours, metric="cosine").fit(weighted)
    distances = search.kneighbors_graph(mode="distance").toarray()
    chosen = search.kneighbors_graph(mode="connectivity").toarray()
    return vocabulary, between, to_words, np.where(chosen, 1 - distances, 0), total, [seen[word] for word in vocabulary]


def test_all_kinds_of_edges_lie_on_their_nodes():
    texts, n_train = documents(), 9
    vocabulary, between, to_words, neighbours, total, seen = dense_parts(texts, SETTINGS)
    nodes = [*range(9), *range(9 + len(vocabulary), 14 + len(vocabulary))]
    words = np.arange(9, 9 + len(vocabulary))
    for name, (has_windows, has_words, has_neighbours) in ADJ_TYPES.items():
        graph = build_graph(texts, n_train, dataclasses.replace(SETTINGS, adj_type=name))
        expected = np.zeros((len(texts) + len(vocabulary),) * 2)
        if has_windows:
            expected[np.ix_(words, words)] = between
        if has_words:
            expected[np.ix_(nodes, words)] = to_words
        if has_neighbours:
            expected[np.ix_(nodes, nodes)] = neighbours
        if not has_words:
            expected = neighbours
        else:
            assert graph.document_nodes.tolist() == nodes and graph.word_nodes.tolist() == words.tolist()
        np.testing.assert_allclose(graph.raw.toarray(), expected, atol=1e-12)
        assert list(graph.vocabulary) == vocabulary
        assert graph.n_windows == (total if has_windows else 0)
        assert graph.word_windows.tolist() == (seen if has_windows else [0] * len(seen))
        found = graph.edges()
        assert found["word-word"] == (np.count_nonzero(between) if has_windows else 0)
        assert found["document-word of weight 0"] == (len(texts) if has_words else 0)  # the word "all"
        assert found["document-document"] == (np.count_nonzero(neighbours) if has_neighbours else 0)


@pytest.mark.parametrize("window", [2, 3, 7, 20])
def test_windows_are_counted_as_if_they_were_made(window, monkeypatch):
    monkeypatch.setattr(graph_edges, "_POSITIONS", 17)  # several chunks
    texts = documents(12, seed=window, words=4)
    number = {word: i for i, word in enumerate(sorted({word for text in texts for word in text.split()}))}
    tokens = np.array([number[word] for text in texts for word in text.split()])
    offsets = np.concatenate([[0], np.cumsum([len(text.split()) for text in texts])])
    found = graph_edges.count_windows(tokens, offsets, len(number), window)
    made = np.array([[part.count(word) for word in number] for part in windows_of(texts, window)])
    assert found.total == len(made)
    assert found.words.tolist() == (made > 0).sum(0).tolist()
    assert found.pairs.toarray().tolist() == np.triu(made.T @ made, 1).tolist()


def test_neighbours_are_found_in_blocks_and_ties_go_to_the_first(monkeypatch):
    monkeypatch.setattr(graph_edges, "_ROWS", 3)
    rows = graph_edges.directions(graph_edges.sp.csr_matrix(np.eye(4)[[0, 0, 0, 0, 1, 1, 2]]), np.ones(4))
    found = graph_edges.nearest(rows, rows, 2, same=True).toarray()
    assert [np.flatnonzero(row).tolist() for row in found] == [[1, 2], [0, 2], [0, 1], [0, 1], [5], [4], []]


def test_normalised_is_symmetric_and_keeps_lonely_nodes():
    raw = graph_edges.sp.csr_matrix(np.array([[0, 2.0, 0], [1, 0, 0], [0, 0, 0]]))
    expected = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0], [0, 0, 1]]
    np.testing.assert_allclose(graph_edges.normalised(raw).toarray(), expected)


def test_inductive_graphs_see_training_documents_alone():
    texts = documents()
    inductive = build_graph(texts, 9, dataclasses.replace(SETTINGS, inductive=True))
    alone = build_graph(texts[:9], 9, SETTINGS)
    assert inductive.vocabulary == alone.vocabulary
    assert abs(inductive.raw - alone.raw).sum() == 0
    inductive.check(texts[:9] + ["other", "test documents"], 9, inductive.settings)


def test_neighbours_on_the_published_nodes_lie_on_words():
    texts = documents()
    fixed = build_graph(texts, 9, SETTINGS)
    published = build_graph(texts, 9, dataclasses.replace(SETTINGS, doc_doc_nodes="as_published"))
    words = build_graph(texts, 9, dataclasses.replace(SETTINGS, adj_type="no_doc")).raw
    documents_alone = build_graph(texts, 9, dataclasses.replace(SETTINGS, adj_type="doc_doc")).raw.toarray()
    moved = (published.raw - words).toarray()
    np.testing.assert_allclose(moved[:14, :14], documents_alone, atol=1e-12)
    np.testing.assert_allclose(moved[14:], 0, atol=1e-12)
    nodes = fixed.document_nodes
    np.testing.assert_allclose((fixed.raw - words).toarray()[np.ix_(nodes, nodes)], documents_alone, atol=1e-12)


@pytest.mark.parametrize("adj_type", ADJ_TYPES)
def test_attached_documents_have_their_own_edges(adj_type):
    texts, new = documents(), ["w1 w1 all it's never", "unheard of", "w3"]
    graph = build_graph(texts, 9, dataclasses.replace(SETTINGS, adj_type=adj_type))
    rows = attach(graph, new)
    assert rows.shape == (3, graph.n_nodes + 3) and rows.dtype == np.float32
    known = [" ".join(word for word in text.split() if word in graph.vocabulary) for text in new]
    expected = np.zeros((3, graph.n_nodes))
    if adj_type != "doc_doc":
        found = np.array([[text.split().count(word) for text in texts] for word in graph.vocabulary])
        idf = np.log(len(texts) / (found > 0).sum(1))
        expected[:, graph.word_nodes] = [[text.split().count(w) for w in graph.vocabulary] for text in known] * idf
    if adj_type != "no_doc":
        vectorizer = CountVectorizer(vocabulary=sorted({t for text in texts for t in re.findall(r"\b\w\w+\b", text)}))
        terms, queries = vectorizer.transform(texts).toarray(), vectorizer.transform(known).toarray()
        weights = np.log(len(texts) / (terms > 0).sum(0)) + 1
        sides = [side * weights for side in (queries, terms)]
        sides = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9) for side in sides]
        similar = sides[0] @ sides[1].T
        for row, values in zip(expected, similar, strict=True):
            near = np.argsort(-values, kind="stable")[:5]
            row[graph.document_nodes[near]] = values[near]
    degrees = 1 + expected.sum(1, keepdims=True)
    old = 1 + graph_edges.symmetrised(graph.raw).sum(1).A1
    np.testing.assert_allclose(
        rows[:, : graph.n_nodes].toarray(), expected / np.sqrt(degrees * old), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(rows[:, graph.n_nodes :].toarray(), np.diag(1 / degrees[:, 0]), rtol=1e-6)
    assert rows[1].nnz == 1  # no word is known: its own feature is all it has
    together, alone = attach(graph, new[2:])[:, : graph.n_nodes], rows[2:, : graph.n_nodes]
    assert abs(together - alone).sum() == 0  # what else is attached makes no difference


def test_a_graph_is_read_as_it_was_written(tmp_path):
    texts = documents()
    graph = build_graph(texts, 9, SETTINGS)
    save_graph(graph, tmp_path / "graph.npz")
    found = load_graph(tmp_path / "graph.npz")
    found.check(texts, 9, SETTINGS)
    assert (found.settings, found.vocabulary, found.n_train) == (graph.settings, graph.vocabulary, graph.n_train)
    assert found.n_windows == graph.n_windows and found.word_windows.tolist() == graph.word_windows.tolist()
    assert found.raw.data.tobytes() == graph.raw.data.tobytes()
    assert abs(attach(found, ["w1 w2"]) - attach(graph, ["w1 w2"])).sum() == 0
    assert found.normalised.dtype == np.float32


def test_a_graph_of_other_data_or_settings_is_refused():
    texts = documents()
    graph = build_graph(texts, 9, SETTINGS)
    with pytest.raises(
        UserError, match="built from other data .14 documents, 9 of them before the words; here 14 and 9"
    ):
        graph.check([*texts[:-1], "w1"], 9, SETTINGS)
    with pytest.raises(UserError, match="built from other data"):
        graph.check(texts, 10, SETTINGS)
    with pytest.raises(UserError, match="x.npz was built with window=4, not 20; remove it and build it again"):
        graph.check(texts, 9, dataclasses.replace(SETTINGS, window=20), "x.npz")


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "graph.npz"
    with pytest.raises(UserError, match="no graph .*graph.npz; build it with"):
        load_graph(path)
    save_graph(build_graph(documents(), 9, SETTINGS), path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = bytearray(whole)
    damaged[middle] ^= 255
    for data in (whole[:middle], whole[:-1], b"", b"text", bytes(damaged)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="graph.npz is no whole graph; build it again"):
            load_graph(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(UserError, match="no whole graph"):
        load_graph(path)


def test_files_of_other_versions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qtx.data.text_graph._VERSION", 2)
    save_graph(build_graph(documents(), 9, SETTINGS), tmp_path / "graph.npz")
    monkeypatch.undo()
    with pytest.raises(UserError, match="is a qtx text graph of version 2, not 1; build it again"):
        load_graph(tmp_path / "graph.npz")


def test_documents_without_words_are_named():
    texts = documents()
    with pytest.raises(UserError, match=r"document 3 \(counted from 0\) has no word left after cleaning"):
        build_graph([*texts[:3], " ", *texts[4:]], 9, SETTINGS)
    with pytest.raises(UserError, match="none of the 14 documents has a word left"):
        build_graph([""] * 14, 9, SETTINGS)
    with pytest.raises(UserError, match="document 1"):
        attach(build_graph(texts, 9, SETTINGS), ["w1", ""])


def test_settings_and_sizes_that_do_not_exist():
    with pytest.raises(UserError, match="unknown adj_type 'no_docs'; did you mean 'no_doc'"):
        GraphSettings("no_docs")
    with pytest.raises(UserError, match="unknown doc_doc_nodes 'fix'"):
        GraphSettings(doc_doc_nodes="fix")
    with pytest.raises(UserError, match="window of a graph must be at least 2, got 1"):
        GraphSettings(window=1)
    with pytest.raises(UserError, match="25 neighbours need 26 documents, and there are 14"):
        build_graph(documents(), 9)
    with pytest.raises(UserError, match="n_train of a graph must be from 1 to its 14 documents, got 15"):
        build_graph(documents(), 15, SETTINGS)


@pytest.mark.parametrize(
    ("name", "words", "windows", "word_word", "document_word", "neighbours", "both"),
    [
        ("R8", 7688, 367611, 2841760, 323670, 191850, 3489100 + 308846),
        ("mr", 18764, 53708, 1504598, 196826, 265925, 1898250 + 393008),
    ],
)
def test_real_graphs_have_the_published_sizes(name, words, windows, word_word, document_word, neighbours, both):
    if not (DATA / "textgcn" / f"{name}.txt").is_file():
        pytest.skip(f"no {DATA / 'textgcn' / name}.txt; set {DATA_DIR_VARIABLE}")
    corpus = make_corpus(load(name, DATA))
    graph = build_graph(corpus.texts, corpus.n_train)
    assert (len(graph.vocabulary), graph.n_windows) == (words, windows)
    assert graph.edges() == {
        "word-word": word_word,
        "document-word": document_word,
        "document-word of weight 0": 0,
        "document-document": neighbours,
        "all, both ways": both,
    }
    loops = graph.normalised.diagonal()
    assert (loops > 0).all() and abs(graph.normalised - graph.normalised.T).max() < 1e-6
