"""BitTransGNN by configuration: training, resuming, what is saved, distillation, and texts that come later."""

import copy
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import traverse_util

from qtx.data.corpus import words_kind
from qtx.data.tasks import get_task
from qtx.data.text_graph import load_graph
from qtx.errors import UserError
from qtx.experiments import efficiency
from qtx.experiments.analyze import analyze
from qtx.experiments.classification import load_dataset
from qtx.experiments.classify import Classifier, classify_file
from qtx.experiments.config import analysis, changed
from qtx.experiments.graph_classification import GraphClassification
from qtx.experiments.graph_part import GRAPH_PART, GraphPart
from qtx.experiments.plan import plan
from qtx.experiments.run import evaluate, make_recipe, quantize, train_and_evaluate
from qtx.experiments.setup import setup
from qtx.export.packed import load_quantized
from qtx.methods.bittransgnn import graph_loss
from qtx.nn.graph import adjacency
from qtx.nn.text_graph import StudentAndTeacher, TextGraphClassifier, mixture
from tests.conftest import WORDS, make_tiny_config
from tests.experiments.test_launch import get_config


def write_corpus(directory, documents=60, task="mr"):
    """Writes a small corpus in the layout of TextGCN: two thirds for training, and the others have a word that these lack."""
    rng = np.random.default_rng(0)
    rows, texts = [], []
    for i in range(documents):
        words = [rng.choice(["good", "great"] if i % 2 else ["bad", "awful"]), *rng.choice(WORDS, rng.integers(3, 8))]
        split = "train" if 3 * i < 2 * documents else "test"
        words += ["Unseen?"] if split == "test" else []
        rows.append(f"{i}\t{split}\t{get_task(task).labels[i % 2]}")
        texts.append(" ".join(words))
    (directory / "corpus").mkdir()
    (directory / f"{task}.txt").write_text("\n".join(rows))
    (directory / "corpus" / f"{task}.txt").write_text("\n".join(texts))
    return texts


def graph_config(tiny_checkpoint, tiny_data, corpus, method="dynamic"):
    """A run on the corpus with ternary weights, without calibration of ranges."""
    config = make_tiny_config(tiny_checkpoint, tiny_data)
    config.task, config.data.dir, config.model.pooler = "mr", str(corpus), False
    config.graph.update(tokenizer="", neighbours=4)
    config.bittransgnn.update(method=method, hidden_size=6)
    config.recipe, config.quant.bit.states = ("qat",), 3
    config.phases.qat.update(steps=0, epochs=2.0, ranges="fixed", evaluate_every=1.0)
    config.phases.qat.optimizer.learning_rate = 1e-2
    return config


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_data, tmp_path_factory):
    """A dynamic run: configuration, directory, texts of its corpus and result."""
    root = tmp_path_factory.mktemp("graph")
    (root / "data").mkdir()
    texts = write_corpus(root / "data")
    config = graph_config(tiny_checkpoint, tiny_data, root / "data")
    config.bittransgnn.graph = str(root / "graphs")
    return config, root / "run", texts, train_and_evaluate(config, root / "run")


def test_rows_of_a_sweep_share_their_graph(tmp_path):
    config = get_config("bittransgnn", "mr+sweep")

    def places(config):
        return {trial.row.name: trial.run_config(tmp_path, 0, {}).bittransgnn.graph for trial in plan(config)}

    shared = str(tmp_path.resolve() / "graphs")
    found = places(config)
    for name in ("static 1.58", "dynamic 1.58", "dynamic PFTQ 2.32", "distillation 1.58"):
        assert found[name] == shared
    assert not found["BitTransformer 1.58"] and not found["direct separation 1.58"]
    assert places(get_config("bittransgnn", "mr+lambda"))["static 1.58"] == shared
    config.bittransgnn.graph = "mine.npz"
    assert places(config)["static 1.58"] == "mine.npz"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("mr+static+dynamic", "asks for static and dynamic; name one method"),
        ("mr+sweep+dynamic", "asks for sweep and dynamic"),
        ("mr+lambda+analysis", "asks for lambda and analysis"),
        ("table+dynamic", "`table` has all methods"),
    ],
)
def test_an_argument_has_one_method(argument, named):
    with pytest.raises(UserError, match=named):
        get_config("bittransgnn", argument)


def test_every_published_task_has_a_configuration():
    published = ("20ng", "mr", "r8", "r52", "ohsumed", "cola", "mrpc", "stsb", "rte", "wnli")
    assert {get_config("bittransgnn", name).task.lower() for name in published} == set(published)
    deciding = {"mr": "accuracy", "rte": "accuracy", "cola": "matthews", "mrpc": "f1", "stsb": "pearson"}
    for name, metric in deciding.items():
        config = get_config("bittransgnn", f"{name}+sweep")
        assert config.sweep.metric == f"test_{metric}" and metric in get_task(name).metrics
        assert {phase.metric for phase in (config.phases.finetune, config.phases.qat)} == {metric}


def test_several_tasks_have_one_table():
    config = get_config("bittransgnn", "table")
    trials = {trial.name: trial for trial in plan(config)}
    assert {trial.config.task for trial in trials.values()} == {"R8", "mr", "ohsumed", "mrpc"}
    assert trials["mrpc/dynamic_1.58/seed_0"].config.phases.qat.metric == "f1"
    assert trials["mr/dynamic_1.58/seed_0"].config.phases.qat.metric == "accuracy"
    assert trials["mr/distillation_2.32/seed_2"].row.published == {"r8": 0.978, "mr": 0.8467}
    assert config.sweep.metric == "test_accuracy" and config.sweep.columns == "task"


@pytest.mark.parametrize("argument", ["sweep", "lambda"])
def test_smoke_of_a_sweep_is_short(argument):
    found, whole = (plan(get_config("bittransgnn", f"mr+{argument}{end}")) for end in ("+smoke", ""))
    assert {trial.row.name for trial in found} == {trial.row.name for trial in whole} and len(found) <= 14
    for trial in found:
        config = trial.run_config(Path("runs"), 0, {})
        assert {phase.epochs for phase in config.phases.values() if phase.keep_best} == {1.0}
        assert config.data.limit_train == 120
    assert {trial.seeds for trial in found} == {(0,)}


def test_the_run_has_its_graph_and_weighted_f1_beside_the_score(run):
    config, workdir, _, result = run
    (shared,) = (workdir.parent / "graphs").iterdir()
    assert shared.samefile(workdir / "graph.npz")
    found = result["metrics"]["qat"]
    assert {"weighted_f1", "test_weighted_f1"} < found.keys() and found["score"] == found["accuracy"]


def test_smoke(run, tmp_path):
    tiny, *_ = run
    config = get_config("bittransgnn", "mr+dynamic+smoke")
    config.data.dir, config.model.name, config.model.fresh_head = tiny.data.dir, tiny.model.name, True
    config.graph.update(tokenizer="", neighbours=4)
    assert set(train_and_evaluate(config, tmp_path)["metrics"]) == set(config.recipe)
    assert (tmp_path / "quantized").is_dir()


@pytest.mark.parametrize("method", ["", "dynamic"])
def test_the_older_code_adds_no_biases_in_quantized_layers(run, tmp_path, method):
    tiny, *_ = run
    config = copy.deepcopy(tiny)
    config.bittransgnn.method, config.quant.bit.linear_bias, config.phases.qat.epochs = method, False, 1.0
    found = flat(train_and_evaluate(config, tmp_path)["params"])
    biases = {name: np.any(value) for name, value in found.items() if name.endswith("/bias")}
    quantized = {name for name in biases if "/norm/" not in name and not name.startswith("gcn/")}
    assert quantized and {name for name in biases if not biases[name]} == quantized
    kernel = "encoder/layer_0/ffn/up/kernel"
    assert np.any(found[kernel] != flat(setup(config).variables["params"])[kernel])


def test_biases_that_a_phase_in_full_precision_trains_cannot_be_left_out(run, tmp_path):
    config = copy.deepcopy(run[0])
    config.bittransgnn.method, config.quant.bit.linear_bias, config.recipe = "", False, ("finetune", "qat")
    with pytest.raises(UserError, match="quant.bit.linear_bias is False, but the recipe begins with 'finetune'"):
        train_and_evaluate(config, tmp_path)


def flat(tree):
    return {name: np.asarray(value) for name, value in traverse_util.flatten_dict(tree, sep="/").items()}


def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(run, tmp_path, monkeypatch):
    config, _, _, whole = run
    calls = []
    memory = GraphClassification.memory

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 3:  # after the second epoch's last step
            raise KeyboardInterrupt
        return memory(self, *args)

    config = copy.deepcopy(config)
    config.checkpoint_every = 3
    monkeypatch.setattr(GraphClassification, "memory", stops)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(GraphClassification, "memory", memory)
    resumed = train_and_evaluate(config, tmp_path)
    for kind in ("params", "bank"):
        for name, value in flat(whole[kind]).items():
            np.testing.assert_array_equal(flat(resumed[kind])[name], value, err_msg=name)


def test_the_bank_is_that_of_the_encoder_and_zero_for_words(run):
    _, _, _, result = run
    experiment, bank = result["experiment"], np.asarray(result["bank"]["features"])
    model = make_recipe(experiment)[0][0].model
    np.testing.assert_array_equal(bank, experiment.features(model, result))  # it was refreshed before the evaluation
    words = experiment.graph.word_nodes
    assert len(words) and not bank[words].any() and np.all(np.any(np.delete(bank, words, 0), 1))


def test_saved_models_say_the_same(run):
    config, workdir, _, result = run
    experiment = result["experiment"]
    model = make_recipe(experiment)[0][0].model
    expected = experiment.logits(model, {name: result[name] for name in ("params", "ranges", "bank")})
    packed = copy.deepcopy(config)
    packed.model.update(name=str(workdir / "quantized"), fresh_head=False)
    found = setup(packed)
    for split, values in found.logits(found.model, found.variables).items():
        np.testing.assert_allclose(values, expected[split], atol=1e-5)
    assert evaluate(packed)["accuracy"] == pytest.approx(result["metrics"]["qat"]["accuracy"])
    packed.bittransgnn.method, packed.data.splits = "", "graph"  # direct separation
    alone = setup(packed)
    text = experiment.text_model(model)
    variables = {"params": result["params"], "ranges": result["ranges"]}
    values = alone.logits(alone.model, alone.variables)["test"]
    direct = super(GraphClassification, experiment).logits(text, variables, ["test"])["test"]
    np.testing.assert_allclose(values, direct, atol=1e-5)


def test_static_training_moves_the_convolution_alone(run, tmp_path):
    config, workdir, *_ = run
    config = copy.deepcopy(config)
    config.bittransgnn.method = "static"
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    experiment = setup(config)
    phase = make_recipe(experiment)[0][0]
    assert phase.refresh == "never" and phase.trainable == ("gcn/**",) and not phase.model.recompute
    memory = phase.memory(phase.model, experiment.variables, phase.constants)["bank"]
    product = experiment.graph.normalised @ np.asarray(memory["features"])
    np.testing.assert_allclose(memory["propagated"], product, atol=1e-5)
    before, after = flat(experiment.pretrained.params), flat(train_and_evaluate(config, tmp_path)["params"])
    moved = {name for name, value in before.items() if np.any(after[name] != value)}
    assert moved and all(name.startswith("gcn/") for name in moved)


@pytest.fixture(scope="module")
def suppressed(run, tmp_path_factory):
    """A configuration of outlier suppression with clipped and learned ranges, and the directory of its run."""
    config, workdir, *_ = run
    config, directory = copy.deepcopy(config), tmp_path_factory.mktemp("suppressed")
    config.bittransgnn.update(method="", graph="")
    config.data.splits, config.quant.bit.states, config.quant.outlier_suppression = "graph", 0, "os"
    config.quant.update(weight_bits=4, activation_bits=4)
    config.outlier_suppression.learning_rate = 1e-3
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    quantize(config, directory)
    config.model.name, config.calibration.ranges = str(directory / "model"), str(directory / "quantized")
    return config, directory


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_outlier_suppression_goes_on_with_its_ranges(suppressed, tmp_path, method):
    config, directory = suppressed
    config = copy.deepcopy(config)
    config.bittransgnn.method, config.phases.qat.epochs = method, 1.0
    train_and_evaluate(config, tmp_path)
    before, after = (load_quantized(path / "quantized") for path in (directory, tmp_path))
    ranges, kept = flat(before.ranges), flat(after.ranges)
    assert ranges and ranges.keys() == kept.keys()
    for name, value in ranges.items():
        np.testing.assert_array_equal(kept[name], value, err_msg=name)
    moved = {name for name, value in flat(before.params).items() if np.any(flat(after.params)[name] != value)}
    assert bool(moved) == (method == "dynamic")
    alone = copy.deepcopy(config)
    alone.bittransgnn.method, alone.calibration.ranges = "", ""
    logits = []
    for path in (directory, tmp_path):
        alone.model.name = str(path / "quantized")
        experiment = setup(alone)
        logits.append(experiment.logits(experiment.model, experiment.variables, ["test"])["test"])
    assert np.allclose(*logits, atol=1e-6) == (method == "static"), "direct separation of a frozen encoder is itself"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quant.weight_bits": 8, "quant.activation_bits": 8}, "set the fields of `quant`"),
        (
            {
                "quant.outlier_suppression": "",
                "quant.bit.states": 3,
                "quant.weight_bits": None,
                "quant.activation_bits": 8,
            },
            "no ranges of activations that are stored",
        ),
        ({"calibration.ranges": "/no/such"}, "/no/such"),
    ],
)
def test_ranges_that_do_not_fit(suppressed, fields, named):
    config = changed(suppressed[0], {"bittransgnn.method": "static"} | fields, "test")
    with pytest.raises(UserError, match=named):
        make_recipe(setup(config))


def test_ranges_are_for_training(suppressed, tmp_path):
    with pytest.raises(UserError, match="calibration.ranges is what training begins with"):
        quantize(suppressed[0], tmp_path)


def test_distillation_learns_from_the_votes_of_the_teacher(run, tmp_path):
    config, workdir, _, result = run
    config = copy.deepcopy(config)
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    config.bittransgnn.update(method="distillation", teacher=str(workdir / "quantized"))
    experiment = setup(config)
    phase = make_recipe(experiment)[0][0]
    teacher = result["experiment"]
    model = make_recipe(teacher)[0][0].model
    votes = teacher.logits(model, {name: result[name] for name in ("params", "ranges", "bank")}, ["train"])["train"]
    found = mixture(phase.constants["graph"], phase.constants["text"], config.bittransgnn.mix)
    np.testing.assert_allclose(found, votes, atol=1e-5)
    student = train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "model" / GRAPH_PART).exists() and "gcn" not in student["params"]
    for section, field, value in ((config.graph, "adj_type", "no_doc"), (config.data, "limit_train", 20)):
        section[field] = value
        with pytest.raises(UserError, match="graph of other documents"):
            setup(config)


def test_online_distillation_trains_both(run, tmp_path):
    config, workdir, *_ = run
    config = copy.deepcopy(config)
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    config.bittransgnn.method = "online"
    config.phases.qat.epochs = 1.0
    experiment = setup(config)
    assert isinstance(experiment.model, StudentAndTeacher)
    phase = make_recipe(experiment)[0][0]
    assert {rule.pattern.partition("/")[0] for rule in phase.model.policy.weights} == {"student", "teacher"}
    before, found = flat(experiment.pretrained.params), train_and_evaluate(config, tmp_path)
    after = flat(found["params"])
    for part in ("student/encoder/", "student/classifier/", "teacher/encoder/", "teacher/gcn/"):
        assert any(np.any(after[name] != before[name]) for name in before if name.startswith(part)), part
    assert not (tmp_path / "model" / GRAPH_PART).exists()
    alone = copy.deepcopy(config)
    alone.model.name, alone.bittransgnn.method, alone.data.splits = str(tmp_path / "quantized"), "", "graph"
    assert evaluate(alone)["accuracy"] == pytest.approx(found["metrics"]["qat"]["accuracy"])


def test_an_inductive_graph_knows_no_test_document(run):
    config = copy.deepcopy(run[0])
    config.graph.inference = "inductive"
    experiment = setup(config)
    assert experiment.graph.n_documents == len(experiment.encoded["train"]) + len(experiment.encoded["validation"])
    assert make_recipe(experiment)[0][0].objective is graph_loss


def test_test_documents_are_attached_to_an_inductive_graph(run, tmp_path):
    config = copy.deepcopy(run[0])
    config.graph.inference = "inductive"
    metrics = train_and_evaluate(config, tmp_path / "run")["metrics"]["qat"]
    assert 0 <= metrics["test_accuracy"] <= 1
    config.model.update(name=str(tmp_path / "run" / "quantized"), fresh_head=False)
    experiment = setup(config)
    found = experiment.logits(experiment.model, experiment.variables)
    # As texts that come when all is trained: the way of launch/classify.py, which reads them from nothing but the files.
    (texts,) = experiment.corpus.dataset.splits["test"].texts
    assert "unseen" not in experiment.graph.vocabulary and all("unseen" in text for text in texts)
    _, values = Classifier.load(config.model.name, max_length=config.data.max_length)([[text] for text in texts])
    np.testing.assert_allclose(found["test"], values, atol=1e-5)


@pytest.mark.parametrize("method", ["", "static"])
def test_new_texts_are_cleaned_as_their_corpus_was(run, tmp_path, method):
    tiny, *_ = run
    texts = write_corpus(tmp_path, task="R8")
    texts = [f"{text}, rarest{i} of the films" for i, text in enumerate(texts)]
    (tmp_path / "corpus" / "R8.txt").write_text("\n".join(texts))
    config = copy.deepcopy(tiny)
    config.task, config.data.dir, config.data.splits = "R8", str(tmp_path), "graph"
    config.bittransgnn.update(method=method, graph="")
    config.graph.inference = "inductive"
    train_and_evaluate(config, tmp_path / "run")
    config.model.update(name=str(tmp_path / "run" / "quantized"), fresh_head=False)
    experiment = setup(config)
    found = experiment.logits(experiment.model, experiment.variables)["test"]
    (cleaned,) = experiment.dataset.splits["test"].texts
    raw = [next(text for text in texts if experiment.dataset.cleaning(text) == each) for each in cleaned]
    assert not any("rarest" in text or "the" in text.split() for text in cleaned)
    _, values = Classifier.load(config.model.name, max_length=config.data.max_length)([[text] for text in raw])
    expected = found if method else jax.nn.log_softmax(found)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    with pytest.raises(UserError, match="line 2 has no word left after cleaning"):
        Classifier.load(config.model.name, max_length=16)([["good film"], ["the rarest"]])


def test_the_words_of_a_graph_do_not_clean_what_the_encoder_reads(run, tmp_path):
    tiny, *_ = run
    texts = write_corpus(tmp_path)
    for name, part in (
        ("mr", texts[:40]),
        ("validation", texts[40:]),
    ):  # called as a corpus of TextGCN, which it is not
        rows = [f"{text.capitalize()}.\t{i % 2}" for i, text in enumerate(part)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    config = copy.deepcopy(tiny)
    config.task, config.data.splits = "table", "graph"
    config.data.update(train=str(tmp_path / "mr.tsv"), validation=str(tmp_path / "validation.tsv"))
    config.data.update(text_columns=("text",), label_column="label")
    assert graph_words(config) == "basic"
    config.graph.words = "cleaned"
    config.bittransgnn.update(method="static", mix=0.0, graph="")
    train_and_evaluate(config, tmp_path / "run")
    new = [["The film? Zzz was GOOD."], ["Great plot..."], ["zzz"]]
    classifier = Classifier.load(str(tmp_path / "run" / "quantized"), max_length=16)
    alone = dataclasses.replace(classifier, part=None, graph=None)
    np.testing.assert_allclose(classifier(new)[1], alone(new)[1], atol=1e-5)


def graph_words(config):
    """Returns the kind of words of a configuration's graph."""
    return words_kind(load_dataset(config), config.graph.words)


def test_a_text_that_the_graph_knows_no_word_of(run, capsys):
    _, workdir, *_ = run
    classifier = Classifier.load(str(workdir / "quantized"), max_length=16)
    _, values = classifier([["good film"], ["goodness me"], ["was zzzqqq"], ["cityscape"]])
    assert capsys.readouterr().err.startswith("warning: 2 lines, the first of them 2: no word is in the graph")
    assert np.abs(values[1] - values[3]).max() > 1e-4, "the encoder reads what the graph does not know"
    classifier([["good film"]])
    assert not capsys.readouterr().err


def test_what_a_moved_model_says_of_itself(run, tmp_path):
    _, workdir, *_ = run
    shutil.copytree(workdir / "model", tmp_path / "run" / "model")
    shutil.copy(workdir / "config.json", tmp_path / "run")
    told: list[str] = []
    graph, length = str(workdir / "graph.npz"), 16
    Classifier.load(str(tmp_path / "run" / "model"), graph, length, told.append)
    assert len(told) == 1 and "is not packed" in told[0]
    (tmp_path / "run" / "config.json").write_text("[]")
    found = Classifier.load(str(tmp_path / "run" / "model"), graph, length, told.append)
    assert len(told) == 1 and found.columns == ("text",)  # which the graph says
    (tmp_path / "run" / "model" / GRAPH_PART).unlink()
    found = Classifier.load(str(tmp_path / "run" / "model"), "", length)
    assert found.columns == ()
    with pytest.raises(UserError, match="line 2 has 2 texts and line 1 one text"):
        found([["good"], ["good", "bad"]])


def test_new_texts_are_classified_by_their_own_edges(run, tmp_path, capsys):
    _, workdir, texts, _ = run
    classifier = Classifier.load(str(workdir / "quantized"), max_length=16)
    new = [[text] for text in texts[:7]]
    labels, values = classifier(new)
    assert set(labels) <= {"0", "1"}
    np.testing.assert_allclose(np.exp(values).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(classifier(new[3:4])[1], values[3:4], atol=1e-5)  # whatever comes with it
    (tmp_path / "texts.txt").write_text("\n".join(texts[:7]) + "\n")
    files = str(tmp_path / "texts.txt"), str(tmp_path / "labels.txt")
    classify_file(str(workdir / "model"), str(workdir / "graph.npz"), *files, 16, 4)
    lines = (tmp_path / "labels.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == labels
    for rows, named in (
        ([["good"], [" "]], "line 2 is empty"),
        ([["good"], ["a film", "b"]], r"line 2 has 2 texts, but the model takes one text \(text\)"),
        ([["good"], ["film"], ["@@@"]], "line 3 has no word left"),
        ([], "no texts"),
    ):
        with pytest.raises(UserError, match=named):
            classifier(rows)
    assert "warning" in capsys.readouterr().err, "the float model is not what was evaluated"
    classify_file(str(workdir / "quantized"), "", *files, 16, 4)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "graph.npz").write_bytes((workdir / "graph.npz").read_bytes()[:-50])
    with pytest.raises(UserError, match="no whole graph"):
        Classifier.load(str(workdir / "model"), str(tmp_path / "graph.npz"), 16)


@pytest.mark.parametrize(("method", "rule"), [("dynamic", "corrected"), ("", "as_published")])
def test_efficiency_counts_the_graph_of_the_run(run, tmp_path, monkeypatch, method, rule):
    config, workdir, *_ = run
    config = copy.deepcopy(config)
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    config.bittransgnn.update(method=method, graph="")
    config.data.splits, config.quant.bit.gcn_states = "graph", 3 if method else 0
    with config.unlocked():
        config.analyses, config.analysis = ("efficiency",), analysis()
    section = config.analysis.efficiency
    section.update(tokens=8, rule=rule)
    monkeypatch.setattr(efficiency, "_latency", lambda *args: [])
    monkeypatch.setattr(efficiency.published, "encoder_of", lambda family, sizes: efficiency.published.Encoder())
    analyze(config, tmp_path / "found")
    graph = load_graph(workdir / "graph.npz")
    entries = graph.normalised.nnz if rule == "corrected" else graph.raw.nnz
    by_hand = dict(nodes=graph.n_nodes, entries=entries, hidden=6)
    if method:
        by_hand |= dict(bits=np.log2(3), input_bits=8.0)
    section.graph.update(by_hand)
    section.sequences = graph.n_documents
    analyze(config, tmp_path / "given")
    found, given = ((tmp_path / name / "efficiency.csv").read_text() for name in ("found", "given"))
    assert found == given and "energy with the graph" in found
    if rule == "corrected":
        features = 4 * graph.n_documents * 16 / 2**20
        assert any(
            row.startswith('theory,"graph, features"') and f"{features:.4g}"[:5] in row for row in found.split("\n")
        )
    else:  # the run of a moved model is not beside it
        shutil.copytree(workdir / "model", tmp_path / "moved" / "model")
        config.model.name, section.sequences = str(tmp_path / "moved" / "model"), 0
        section.graph.nodes = 0
        analyze(config, tmp_path / "moved" / "efficiency")
        assert "graph" not in (tmp_path / "moved" / "efficiency" / "efficiency.csv").read_text()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bittransgnn.mix": 1.5}, "must lie in \\[0, 1\\]"),
        ({"bittransgnn.method": "dynamics"}, "'dynamic'"),
        ({"bittransgnn.method": "distillation"}, "bittransgnn.teacher"),
        ({"bittransgnn.alpha": -1.0}, "alpha"),
        ({"bittransgnn.target": "probability"}, "'probabilities'"),
        ({"bittransgnn.dropout": 1.0}, "dropout"),
        ({"model.pooler": True}, "model.pooler=False"),
        ({"task": "multi30k"}, "texts with labels"),
        ({"data.splits": "graphs"}, "'graph'"),
        ({"bittransgnn.refresh": "later"}, "time of refreshing"),
        ({"bittransgnn.teacher": "/no/such"}, "for the method 'distillation'"),
        ({"bittransgnn.method": "", "bittransgnn.mix": 7.0}, "must lie in"),
        ({"phases.qat.losses": "ternarybert"}, "phases.qat.losses 'ternarybert' is for encoders alone"),
        ({"phases.qat.metric": "weighted_f"}, "phases.qat.metric: .* did you mean 'weighted_f1'"),
        ({"phases.qat.metric": "test_accuracy"}, "phases.qat.metric: "),
        ({"model.fresh_head": False, "model.name": "all-MiniLM-L6-v2"}, "bittransgnn.py:mr\\+encoder first"),
    ],
)
def test_what_does_not_fit(run, tmp_path, fields, named):
    config = changed(run[0], fields, "test")
    with pytest.raises(UserError, match=named):
        train_and_evaluate(config, tmp_path)


def test_what_does_nothing_without_a_method_is_said(run, capsys):
    config = changed(run[0], {"bittransgnn.method": "", "bittransgnn.hidden_size": 256}, "test")
    config.bittransgnn.update(graph="", mix=0.9)
    setup(config)
    assert "bittransgnn.mix does nothing" in capsys.readouterr().err
    config.bittransgnn.mix = 0.5
    setup(config)
    assert not capsys.readouterr().err


def test_a_damaged_graph_part(run, tmp_path):
    _, workdir, *_ = run
    with pytest.raises(UserError, match="no trained BitTransGNN"):
        GraphPart.load(tmp_path)
    (tmp_path / GRAPH_PART).write_bytes((workdir / "model" / GRAPH_PART).read_bytes()[:100])
    with pytest.raises(UserError, match="truncated"):
        GraphPart.load(tmp_path)


def test_without_a_graph_every_document_stands_alone(run):
    _, _, _, result = run
    experiment = result["experiment"]
    model: TextGraphClassifier = make_recipe(experiment)[0][0].model.clone(policy=None)
    apply = jax.jit(model.apply)
    batch = next(iter(experiment.batches("test", 4, shuffle=False, epochs=1)))
    args = [jnp.asarray(batch[name]) for name in model.inputs]
    variables = {"params": result["params"]}
    alone = apply(variables, *args)
    loops = adjacency(scipy.sparse.eye_array(4))
    own = variables | {"graph": {"adjacency": loops}, "bank": {"features": jnp.zeros((4, 16))}}
    same = apply(own, *args[:3], jnp.arange(4))
    np.testing.assert_allclose(alone.logits, same.logits, atol=1e-6)


def test_what_a_graph_model_makes_of_its_documents(run, tmp_path):
    config, workdir, *_ = run
    config = copy.deepcopy(config)
    config.model.update(name=str(workdir / "model"), fresh_head=False)
    with config.unlocked():
        config.analyses, config.analysis = ("features",), analysis()
    config.analysis.features.methods = ("pca",)
    text = analyze(config, tmp_path)
    for name in ("features.png", "profiles_mean.png", "profiles_rsa.png"):
        assert f"({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    config.analysis.features.split = "tests"
    with pytest.raises(UserError, match="'test'"):
        analyze(config, tmp_path / "other")
    with pytest.raises(UserError, match="leave bittransgnn.method empty"):
        quantize(config, tmp_path / "packed")
