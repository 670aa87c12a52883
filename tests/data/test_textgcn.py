"""TextGCN's corpora: files, published splits, labels."""

import gzip
import os
import random
from pathlib import Path

import numpy as np
import pytest

from qtx.data import load, with_label_order
from qtx.data.cleaning import Cleaning
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.textgcn import published_order, read_raw, validation_size
from qtx.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or SHARED)


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    """Tests say where their data is; the environment must not."""
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


def write_mr(root: Path, documents: int = 30, **files: bytes) -> Path:
    """A corpus in which every third document is a test document; its texts name their lines."""
    (root / "textgcn" / "corpus").mkdir(parents=True)
    rows = [f"{i}\t{'train' if i % 3 else 'test'}\t{i % 2}" for i in range(documents)]
    contents = {
        "mr.txt": "\n".join(rows).encode() + b"\n",
        "corpus/mr.txt": "\r\n".join(f"Line {i} (caf\u00e9)?" for i in range(documents)).encode("latin-1") + b"\r\n",
    } | files
    for name, data in contents.items():
        (root / "textgcn" / name).write_bytes(data)
    return root


def line(text: str) -> int:
    return int(text.split()[1])


def test_splits_are_the_published_ones(tmp_path):
    dataset = load("mr", write_mr(tmp_path))
    train, test = [i for i in range(30) if i % 3], [i for i in range(30) if i % 3 == 0]
    random.seed(0)
    random.shuffle(train)
    random.shuffle(test)
    found = {name: [line(text) for text in split.texts[0]] for name, split in dataset.splits.items()}
    assert found == {"train": train[:-2], "validation": train[-2:], "test": test}
    for name, split in dataset.splits.items():
        assert split.labels.dtype == np.int32 and split.labels.tolist() == [i % 2 for i in found[name]]
    assert dataset.splits["test"].texts[0][0].endswith("( caf ) ?")  # no backslashes for tokenizers


def test_published_order_of_mrpc_keeps_its_validation_set_last():
    train, test = published_order([True] * 25 + [False] * 5, validation_last=True)
    assert validation_size(25) == 2 and sorted(train[-2:]) == [23, 24]
    assert sorted(train) == list(range(25)) and train[:-2] != list(range(23)) and sorted(test) == list(range(25, 30))


def test_a_cleaned_file_is_taken_as_it_is_and_empty_documents_are_left_out(tmp_path, capsys):
    cleaned = [f"line {i} \\(" for i in range(30)]
    cleaned[4] = cleaned[9] = ""
    text = "\n".join(cleaned).encode()
    dataset = load("mr", write_mr(tmp_path, **{"corpus/mr.clean.txt.gz": gzip.compress(text)}))
    lines = sorted(line(text) for split in dataset.splits.values() for text in split.texts[0])
    assert lines == [i for i in range(30) if i not in (4, 9)]
    assert dataset.splits["train"].texts[0][0].endswith("(")
    assert "2 of 30 documents, the first on line 5, are left out" in capsys.readouterr().err
    load("mr", write_mr(tmp_path / "whole"))
    assert not capsys.readouterr().err


def test_how_texts_were_cleaned_is_known_of_the_whole_corpus(tmp_path):
    assert load("mr", write_mr(tmp_path)).cleaning == Cleaning()
    rows = "\n".join(f"{i}\t{'train' if i % 3 else 'test'}\tacq" for i in range(30))
    texts = "\n".join("The Oil (crude) was %s." % ("dear" if i < 4 else "cheap") for i in range(30))
    files = {"R8.txt": rows.encode(), "corpus/R8.txt": texts.encode()}
    found = load("R8", write_mr(tmp_path / "R8", **files), limit_train=2, limit_eval=1)
    assert found.cleaning == Cleaning(frozenset(["oil", "\\(", "\\)", "crude", "cheap"]))
    assert found.cleaning("The cheap, dear (oil)") == "cheap ( oil )"


def test_only_line_feeds_end_documents(tmp_path):
    path = tmp_path / "raw.txt"
    path.write_bytes(b" one\rstill one \r\n\ntwo\x85\xe9\x0bmore\nthree")
    assert read_raw(path) == ["one\rstill one", "", "two\x85\xe9\x0bmore", "three"]


def test_label_order_of_a_file(tmp_path):
    dataset = load("mr", write_mr(tmp_path))
    (tmp_path / "labels.txt").write_text("1\n0\n")
    turned = with_label_order(dataset, tmp_path / "labels.txt")
    assert turned.task.labels == ("1", "0") and dataset.task.labels == ("0", "1")
    for name, split in turned.splits.items():
        assert split.labels.dtype == np.int32
        assert split.labels.tolist() == (1 - dataset.splits[name].labels).tolist()


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("1\n2\n", "line 2: unknown label '2'"),
        ("1\n1\n", "line 2: label '1' for the second time"),
        ("1\n", "names 1 of 2 classes of mr; '0' is missing"),
    ],
)
def test_bad_label_orders(tmp_path, order, error):
    (tmp_path / "labels.txt").write_text(order)
    with pytest.raises(UserError, match=error):
        with_label_order(load("mr", write_mr(tmp_path)), tmp_path / "labels.txt")


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"mr.txt": b"0\ttrain\t1\n1\ttest\t2\n"}, r"mr.txt, line 2: unknown label '2'; choose from: 0, 1"),
        ({"mr.txt": b"0\tvalid\t1\n"}, "line 1: the split 'valid' must name one of train and test"),
        ({"mr.txt": b"0\ttrain\n"}, "line 1: expected name, split and label, found 2 fields"),
        ({"mr.txt": b"0\ttrain\t1\n"}, "lists 1 documents but .*mr.txt has 30 lines"),
        ({"corpus/mr.txt": b"-\n" * 30}, "all 30 documents are empty after cleaning"),
        ({"mr.txt": b"0\ttrain\t1\n" * 30}, "no documents for the split 'test'"),
        ({"mr.txt": b"0\ttrain\t1\n" * 9 + b"0\ttest\t1\n" * 21}, "no documents for the split 'validation'"),
        ({"corpus/mr.clean.txt.gz": b"no archive"}, "cannot read .*mr.clean.txt.gz: .* damaged or cut short"),
    ],
)
def test_bad_files(tmp_path, files, error):
    with pytest.raises(UserError, match=error):
        load("mr", write_mr(tmp_path, **files))


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="R8: no data directory is set; point --data_dir"):
        load("R8")
    with pytest.raises(UserError, match="R8: no R8.txt in .*textgcn or "):
        load("R8", tmp_path)
    (write_mr(tmp_path) / "textgcn" / "corpus" / "mr.txt").unlink()
    with pytest.raises(UserError, match=r"missing file .*mr.clean.txt\[.gz\] or .*corpus/mr.txt\[.gz\]"):
        load("mr", tmp_path)


@pytest.mark.parametrize(("name", "sizes"), [("R8", (4937, 548, 2189)), ("mr", (6398, 710, 3554))])
def test_real_splits(name, sizes):
    if not (DATA / "textgcn" / f"{name}.txt").is_file():
        pytest.skip(f"no {DATA / 'textgcn' / name}.txt; set {DATA_DIR_VARIABLE}")
    splits = load(name, DATA).splits
    assert tuple(len(splits[split]) for split in ("train", "validation", "test")) == sizes
    assert all(text.strip() and "\\" not in text for split in splits.values() for text in split.texts[0])
