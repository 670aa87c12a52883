"""Kinds of cases of BitTransGNN about text graphs: cleaning, splits, edges, normalisation."""

import dataclasses
import json

import numpy as np
import scipy.sparse as sp

from qtx.data import graph_edges
from qtx.data.cleaning import basic_words, clean_corpus, clean_string, split_pair
from qtx.data.text_graph import GraphSettings, assemble, build_graph
from qtx.data.textgcn import published_order, validation_size


def strings(array):
    """A list of strings that is stored as JSON."""
    return json.loads(str(array))


def tolerance(case):
    return {name: case.entry["tolerance"][name] for name in ("atol", "rtol")}


def documents_of(case, graph_texts=None, validation_last=False):
    """Documents in node order: their positions among those that are not empty, their texts, how many come before the words."""
    inputs = case.values("inputs")
    texts = [str(text) for text in inputs["texts"]]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    train, test = published_order(["train" in str(inputs["splits"][i]) for i in kept], validation_last)
    order = train + test
    texts = [texts[kept[i]] for i in order]
    return order, kept, (graph_texts(texts) if graph_texts else texts), len(train)


def settings_of(case, **fields):
    params = case.entry["parameters"]
    return GraphSettings(window=params["window"], neighbours=params.get("knn", 25), **fields)


def check_clean_str(case):
    inputs, outputs = case.values("inputs"), case.values("outputs")
    assert [clean_string(text) for text in strings(inputs["strings"])] == strings(outputs["cleaned"])


def check_remove_words(case):
    inputs, outputs = case.values("inputs"), case.values("outputs")
    docs, stop = strings(inputs["docs"]), strings(inputs["stop_words"])
    assert clean_corpus(docs, frozenset(stop), case.entry["parameters"]["min_count"]) == strings(outputs["filtered"])
    assert clean_corpus(docs, keep_all=True) == strings(outputs["mr_not_filtered"])


def expected_matrix(outputs, name, shape):
    """A sparse matrix of the case, whose entries are stored under `name/row`, `name/col` and `name/val`."""
    row, col, val = (outputs[f"{name}/{part}" if name else part] for part in ("row", "col", "val"))
    return sp.csr_matrix((val, (row, col)), shape)


def check_matrix(case, found, outputs, name):
    """A sparse matrix against its expected entries; stored zeros do not matter."""
    expected = expected_matrix(outputs, name, found.shape).toarray()
    np.testing.assert_array_equal(found.toarray() != 0, expected != 0)
    np.testing.assert_allclose(found.toarray(), expected, **tolerance(case))


def check_neighbours(case, texts, n_train, outputs):
    """Documents' neighbours; of equally near ones the reference takes any, and its choice is returned."""
    graph = build_graph(texts, n_train, settings_of(case, adj_type="doc_doc"))
    everyone = dataclasses.replace(graph.settings, neighbours=len(texts) - 1)
    similarities = build_graph(texts, n_train, everyone).raw.toarray()
    chosen = expected_matrix(outputs, "doc_doc/raw", similarities.shape)
    found, expected = graph.raw.toarray(), chosen.toarray()
    np.testing.assert_allclose(np.sort(found), np.sort(expected), **tolerance(case))
    np.testing.assert_allclose(expected, np.where(expected, similarities, 0), **tolerance(case))
    nearer = similarities > np.min(np.where(found, found, np.inf), axis=1, keepdims=True) + tolerance(case)["atol"]
    assert (found[nearer] > 0).all() and (expected[nearer] > 0).all()
    return graph.raw, chosen


def check_transductive(case):
    outputs, params = case.values("outputs"), case.entry["parameters"]
    order, kept, texts, n_train = documents_of(case)
    assert [kept[i] for i in order] == outputs["doc_order"].tolist()
    assert (n_train, len(texts) - n_train) == (params["n_train_and_val"], params["n_test"])
    assert validation_size(n_train) == params["n_val"]
    words = build_graph(texts, n_train, settings_of(case, adj_type="no_doc"))
    assert list(words.vocabulary) == outputs["vocab_sorted"].tolist()
    own, neighbours = check_neighbours(case, texts, n_train, outputs)
    between, to_words = parts(words, words.word_nodes)
    found = {"no_doc": words.raw, "doc_doc": neighbours}
    for name, edges in (("full", between), ("no_ww", None)):
        settings = settings_of(case, adj_type=name)
        built = build_graph(texts, n_train, settings).raw
        assert abs(built - assemble(edges, to_words, own, n_train, settings)).sum() == 0
        found[name] = assemble(edges, to_words, neighbours, n_train, settings)
    forms = {"raw": lambda raw: raw, "sym": graph_edges.symmetrised, "norm": graph_edges.normalised}
    keys = {key.removesuffix("/row") for key in outputs if key.endswith("/row")}
    for key in sorted(key for key in keys if not key.startswith("original")):
        name, form = key.split("/")
        check_matrix(case, forms[form](found[name]), outputs, key)
    # The published graphs: the order of words is another, so that neighbours of test documents lie on other words.
    number = {word: i for i, word in enumerate(words.vocabulary)}
    between, to_words = parts(words, words.word_nodes[[number[w] for w in outputs["original_vocab_order"].tolist()]])
    settings = settings_of(case, doc_doc_nodes="as_published")
    for name, edges in (("original_full", between), ("original_no_ww", None)):
        check_matrix(case, assemble(edges, to_words, neighbours, n_train, settings), outputs, name)


def parts(graph, words):
    """Weights between words, and from documents to words, with the words in an order of their nodes."""
    return graph.raw[words][:, words], graph.raw[graph.document_nodes][:, words]


def check_inductive(case):
    outputs, params = case.values("outputs"), case.entry["parameters"]
    order, kept, texts, n_train = documents_of(case)
    graph = build_graph(texts, n_train, settings_of(case, adj_type="no_doc", inductive=True))
    assert [kept[i] for i in order[:n_train]] == outputs["doc_order"].tolist()
    assert (graph.n_documents, validation_size(n_train)) == (params["n_docs"], params["n_val"])
    assert list(graph.vocabulary) == outputs["vocab_sorted"].tolist()
    check_matrix(case, graph.raw, outputs, "raw")
    check_matrix(case, graph_edges.normalised(graph.raw), outputs, "norm")


def check_pairs(case):
    outputs, params = case.values("outputs"), case.entry["parameters"]

    def words(texts):
        return basic_words(list(zip(*map(split_pair, texts), strict=True)))

    order, kept, texts, n_train = documents_of(case, words, validation_last=case.kind.endswith("mrpc"))
    assert [kept[i] for i in order] == outputs["doc_order"].tolist() and n_train == params["n_train_and_val"]
    graph = build_graph(texts, n_train, settings_of(case, adj_type="no_doc"))
    assert list(graph.vocabulary) == outputs["vocab_sorted"].tolist()
    if "no_doc/raw/row" in outputs:
        check_matrix(case, graph.raw, outputs, "no_doc/raw")
    if "doc_doc/raw/row" in outputs:
        check_neighbours(case, texts, n_train, outputs)


def check_normalise(case):
    adjacency, outputs = sp.csr_matrix(case.values("inputs")["adj"]), case.values("outputs")
    np.testing.assert_allclose(graph_edges.symmetrised(adjacency).toarray(), outputs["sym"], **tolerance(case))
    np.testing.assert_allclose(graph_edges.normalised(adjacency).toarray(), outputs["norm"], **tolerance(case))


HANDLERS = {
    "clean_str": check_clean_str,
    "remove_words": check_remove_words,
    "graph_transductive": check_transductive,
    "graph_inductive": check_inductive,
    "graph_pairs_rte": check_pairs,
    "graph_pairs_mrpc": check_pairs,
    "adj_normalise": check_normalise,
}
