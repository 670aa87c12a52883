"""Building the graph of a task from a configuration."""

import csv

import numpy as np
import pytest

from qtx.data.text_graph import load_graph
from qtx.errors import UserError
from qtx.experiments.graph import build, corpus_from, settings_from


@pytest.fixture
def graph_config(tiny_config):
    """The graph of the tiny data, with short windows."""
    tiny_config.graph.tokenizer = ""
    tiny_config.graph.window = 5
    return tiny_config


def counts(workdir):
    with open(workdir / "graph.csv", newline="") as file:
        return {name: value for name, value in csv.reader(file)}


def test_build_saves_a_graph_and_its_counts(graph_config, tmp_path, capsys):
    graph = build(graph_config, tmp_path)
    shown = capsys.readouterr()
    assert "transductive: counted over test documents, too" in " ".join(shown.out.split())
    assert "windows: 1/1" in shown.err and "neighbours: 1/1" in shown.err
    found = counts(tmp_path)
    # 96 training documents, a tenth of them for validation; the validation documents are the test documents.
    sizes = [found[f"{name} documents"] for name in ("train", "validation", "test")]
    assert sizes == ["87", "9", "48"] and graph.document_nodes[96] == 96 + len(graph.vocabulary)
    assert found["edges word-word"] == f"{graph.edges()['word-word']:,}"
    assert (tmp_path / "config.json").is_file()
    saved = load_graph(tmp_path / "graph.npz")
    assert abs(saved.raw - graph.raw).sum() == 0

    again = build(graph_config, tmp_path)
    assert "is there already; it is checked, not built again" in capsys.readouterr().out
    assert again.fingerprint == graph.fingerprint


def test_an_inductive_graph_has_no_test_documents(graph_config, tmp_path):
    graph_config.graph.inference = "inductive"
    graph_config.graph.adj_type = "no_doc"
    graph = build(graph_config, tmp_path)
    assert graph.n_documents == graph.n_train == 96 and "test documents" not in counts(tmp_path)


def test_the_tokenizer_says_which_words_are_unknown(graph_config, tiny_checkpoint):
    graph_config.graph.tokenizer = str(tiny_checkpoint)
    texts = corpus_from(graph_config).texts
    assert {"film", "[UNK]"} < {word for text in texts for word in text.split()}  # the numbers of rows are unknown
    graph_config.graph.words = "cleaned"
    texts = corpus_from(graph_config).texts
    assert not {"the", "[UNK]"} & {word for text in texts for word in text.split()}


def test_rows_of_the_data_set_are_the_documents(graph_config, rotten=1):
    corpus = corpus_from(graph_config)
    rows = [text for name in ("train", "validation", "test") for text in corpus.dataset.splits[name].texts[0]]
    assert corpus.texts == rows and corpus.n_train == 96
    labels = np.concatenate([split.labels for split in corpus.dataset.splits.values()])
    assert [rotten if text.split()[0] in ("bad", "awful") else 1 - rotten for text in rows] == labels.tolist()


def test_classes_may_have_the_order_of_a_file(graph_config, tmp_path):
    assert corpus_from(graph_config).dataset.task.labels == ("fresh", "rotten")
    (tmp_path / "labels.txt").write_text("rotten\nfresh\n")
    graph_config.data.label_order = str(tmp_path / "labels.txt")
    dataset = corpus_from(graph_config).dataset
    assert dataset.task.labels == ("rotten", "fresh")
    test_rows_of_the_data_set_are_the_documents(graph_config, rotten=0)


def test_another_configuration_or_other_data_need_another_directory(graph_config, tmp_path):
    build(graph_config, tmp_path)
    graph_config.graph.adj_type = "no_doc"
    with pytest.raises(UserError, match="holds a run with graph.adj_type='full', not 'no_doc'; use another workdir"):
        build(graph_config, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="graph.npz was built with adj_type='full', not 'no_doc'; remove it"):
        build(graph_config, tmp_path)
    graph_config.graph.adj_type = "full"
    graph_config.graph.words = "cleaned"
    with pytest.raises(UserError, match="graph.npz was built from other data"):
        build(graph_config, tmp_path)


def test_bad_values(graph_config):
    graph_config.graph.inference = "inductiv"
    with pytest.raises(UserError, match="unknown graph.inference 'inductiv'; did you mean 'inductive'"):
        settings_from(graph_config.graph)
    graph_config.task = "multi30k"
    with pytest.raises(UserError, match="task 'multi30k' is a translation"):
        corpus_from(graph_config)
