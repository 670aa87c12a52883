"""Building the graph of a task from a configuration."""

import csv

import numpy as np
import pytest

from qtx.data.text_graph import build_graph, load_graph
from qtx.errors import UserError
from qtx.experiments import graph as graphs
from qtx.experiments.graph import build, corpus_from, give_graph, graph_of_run, settings_from


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


def test_graphs_in_a_directory_are_built_once(graph_config, tmp_path, monkeypatch):
    built = []

    def counted(*args):
        built.append(args[2])
        return build_graph(*args)

    monkeypatch.setattr(graphs, "build_graph", counted)
    corpus = corpus_from(graph_config)
    for adj_type in ("full", "full", "no_doc", "full"):
        graph_config.graph.adj_type = adj_type
        settings = settings_from(graph_config.graph)
        graph, path = graph_of_run(corpus, settings, str(tmp_path / "graphs"), ())
        assert graph.settings.adj_type == adj_type and load_graph(path).identity == graph.identity
    assert [settings.adj_type for settings in built] == ["full", "no_doc"]
    assert len(list((tmp_path / "graphs").iterdir())) == 2

    # A run has it under a further name, which costs no room, and another run that begins with its model takes it.
    (tmp_path / "run").mkdir()
    give_graph(graph, path, tmp_path / "run" / "graph.npz")
    assert path.samefile(tmp_path / "run" / "graph.npz")
    give_graph(graph, tmp_path / "gone.npz", tmp_path / "run" / "graph.npz")
    assert load_graph(tmp_path / "run" / "graph.npz").identity == graph.identity and not path.samefile(
        tmp_path / "run" / "graph.npz"
    )
    models = (None, tmp_path / "elsewhere" / "model", tmp_path / "run" / "model")
    assert graph_of_run(corpus, settings, "", models)[1] == tmp_path / "run" / "graph.npz" and len(built) == 2
    (tmp_path / "run" / "graph.npz").write_bytes(b"none")
    assert graph_of_run(corpus, settings, "", models)[1] is None and len(built) == 3


def test_bad_values(graph_config, tmp_path):
    graph_config.graph.inference = "inductiv"
    with pytest.raises(UserError, match="unknown graph.inference 'inductiv'; did you mean 'inductive'"):
        settings_from(graph_config.graph)
    graph_config.graph.inference, graph_config.bittransgnn.mix = "inductive", 1.5
    with pytest.raises(UserError, match="must lie in"):
        build(graph_config, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    graph_config.task = "multi30k"
    with pytest.raises(UserError, match="task 'multi30k' is a translation"):
        corpus_from(graph_config)
    graph_config.task = "cifar10"
    with pytest.raises(UserError, match="task 'cifar10' has images; graphs are of texts"):
        corpus_from(graph_config)
    (tmp_path / "graph.npz").write_text("garbage")
    with pytest.raises(UserError, match="no whole graph") as caught:
        load_graph(tmp_path / "graph.npz")
    assert "pickle" not in str(caught.value)
