"""Reading sentence pairs, and what is said when they cannot be read."""

import gzip
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from qtx.data.parallel import Pairs, load_pairs, load_parallel
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.tasks import TranslationTask, get_translation_task
from qtx.errors import UserError

DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or Path(__file__).parents[3] / "shared" / "data")
OWN = TranslationTask("own", "en", "de")


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    """Tests say where their data is; the environment must not."""
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)


def write(folder: Path, **files: str) -> Path:
    """Writes files; `train_en` becomes `train.en`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, language = name.rpartition("_")
        (folder / f"{stem}.{language}").write_bytes(text.encode())
    return folder


def write_corpus(folder: Path, *stems: str, size: int = 3) -> Path:
    files = {f"{stem}_{k}": "".join(f"{k} {stem} {i}\n" for i in range(size)) for stem in stems for k in ("en", "de")}
    return write(folder, **files)


# -------------------------------------------------------------------------------------------- known corpora


def test_multi30k_in_both_directions(tmp_path):
    folder = write_corpus(tmp_path / "multi30k", "train", "val", "test_2016_flickr", "test_2018_flickr")
    (folder / "train.de.gz").write_bytes(gzip.compress((folder / "train.de").read_bytes()))
    (folder / "train.de").unlink()
    splits = load_pairs("multi30k", tmp_path).splits
    assert list(splits) == ["train", "validation", "test", "test_2018_flickr"]
    assert splits["test"].source[0] == "en test_2016_flickr 0" and splits["test"].target[2] == "de test_2016_flickr 2"
    assert splits["train"].dropped == 0
    back = load_pairs(get_translation_task("multi30k", "de-en"), tmp_path).splits
    for name, split in splits.items():
        assert (back[name].source, back[name].target) == (split.target, split.source)


def test_iwslt14_takes_part_of_the_training_pairs_where_there_are_not_all(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "iwslt14", "train_subset", "valid", "test")
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    assert load_pairs("iwslt14").splits["train"].source[0] == "en train_subset 0"
    write_corpus(folder, "train")
    assert load_pairs("iwslt14").splits["train"].source[0] == "en train 0"


def test_a_language_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_corpus(tmp_path / "multi30k", "train", "val", "test_2016_flickr")
    with pytest.raises(UserError, match=r"multi30k has no en-fr; .*multi30k holds de, en"):
        load_pairs(get_translation_task("multi30k", "en-fr"), tmp_path)


def test_missing_files_and_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no .*/multi30k; point --data_dir or QTX_DATA_DIR .*multi30k/train\.en"):
        load_pairs("multi30k", tmp_path)
    with pytest.raises(UserError, match="multi30k: no data directory is set; point"):
        load_pairs("multi30k")
    folder = write_corpus(tmp_path / "multi30k", "train", "val", "test_2016_flickr")
    (folder / "val.de").unlink()
    with pytest.raises(UserError, match=r"missing file .*val\.de\[\.gz\]"):
        load_pairs("multi30k", tmp_path)
    with pytest.raises(UserError, match="corpus 'own' is not built in; use load_parallel"):
        load_pairs(OWN, tmp_path)


TABLE = "".join(f"english {i // 3}\tdeutsch {i}\tauthors\n" for i in range(300))


def test_tatoeba_keeps_all_translations_of_a_sentence_together(tmp_path):
    folder = tmp_path / "tatoeba"
    folder.mkdir()
    (folder / "eng-deu_50k.tsv.gz").write_bytes(gzip.compress(TABLE.encode()))
    found = [load_pairs("tatoeba", tmp_path, seed=seed).splits for seed in (0, 0, 1)]
    assert found[0]["test"].source == found[1]["test"].source != found[2]["test"].source
    sides = {name: set(split.source) for name, split in found[0].items()}
    assert {name: len(side) for name, side in sides.items()} == {"train": 90, "validation": 5, "test": 5}
    assert not sides["train"] & (sides["validation"] | sides["test"]) and not sides["validation"] & sides["test"]
    assert sorted(text for split in found[0].values() for text in split.target) == sorted(
        f"deutsch {i}" for i in range(300)
    )
    numbers = [[int(text.split()[1]) for text in side] for side in (found[0]["train"].source, found[0]["train"].target)]
    assert [n // 3 for n in numbers[1]] == numbers[0]
    back = load_pairs(get_translation_task("tatoeba", "de-en"), tmp_path).splits
    assert back["train"].source == found[0]["train"].target and back["train"].target == found[0]["train"].source


def test_tatoeba_errors(tmp_path):
    (tmp_path / "tatoeba").mkdir()
    path = tmp_path / "tatoeba" / "eng-deu.tsv"
    path.write_text(TABLE + "no tab\n")
    with pytest.raises(UserError, match=r"eng-deu\.tsv, line 301: expected two columns, found 1"):
        load_pairs("tatoeba", tmp_path)
    with pytest.raises(UserError, match="tatoeba has no en-fr; .* holds en-de, which serve both"):
        load_pairs(get_translation_task("tatoeba", "en-fr"), tmp_path)
    path.write_text("a\tb\na\tc\n")
    with pytest.raises(UserError, match="1 English sentences are too few"):
        load_pairs("tatoeba", tmp_path)


def ted_row(**translations: str) -> dict:
    sides = {"language": [k.encode() for k in translations], "translation": [v.encode() for v in translations.values()]}
    return {"talk_name": b"talk", "translations": sides}


def test_ted_talks_come_through_tensorflow_datasets(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    rows = [ted_row(en="Hello .", de="Grüß Gott ."), ted_row(en="A .", fr="Un ."), ted_row(de=" ", en="B .")]
    names = ("train", "validation", "test")
    monkeypatch.setattr(
        tfds, "data_source", lambda name, **_: dict.fromkeys(names, rows) if name == "ted_multi_translate" else {}
    )
    splits = load_pairs(get_translation_task("ted_talks", "de-en")).splits
    assert (splits["train"].source, splits["train"].target, splits["train"].dropped) == (
        ["Grüß Gott ."],
        ["Hello ."],
        1,
    )
    assert (splits["test"].source, splits["test"].target) == (["Grüß Gott .", ""], ["Hello .", "B ."])
    with pytest.raises(UserError, match="ted_talks has no en-pt_br in train; its languages are de, en, fr"):
        load_pairs(get_translation_task("ted_talks", "en-pt_br"))


def test_ted_talks_without_a_network(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds, "data_source", lambda *args, **kwargs: {})

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        UserError, match=r"ted_talks: tensorflow-datasets gave no ted_multi_translate.*no route.*connect"
    ):
        load_pairs("ted_talks")


# ------------------------------------------------------------------------------------------------ own files


def own(folder: Path, **options):
    files = {name: (folder / f"{name}.en", folder / f"{name}.de") for name in ("train", "validation", "test")}
    return load_parallel(OWN, files, **options).splits


def test_only_line_feeds_end_a_line(tmp_path):
    write_corpus(tmp_path, "validation", "test")
    write(tmp_path, train_en="\ufeffa\u2028b\r\n c\x0bd \ne\x85f", train_de="1\r\n2\n3\n")
    train = own(tmp_path)["train"]
    assert train.source == ["a\u2028b", "c\x0bd", "e\x85f"] and train.target == ["1", "2", "3"]


def test_pairs_with_an_empty_side_are_dropped_in_training_alone(tmp_path):
    write_corpus(tmp_path, "test")
    sides = {"en": "a\n\nc\n \ne\n", "de": "1\n2\n\n\n5\n"}
    write(tmp_path, **{f"{split}_{k}": text for split in ("train", "validation") for k, text in sides.items()})
    splits = own(tmp_path)
    assert (splits["train"].source, splits["train"].target, splits["train"].dropped) == (["a", "e"], ["1", "5"], 3)
    validation = splits["validation"]
    assert validation.source == ["a", "", "c", "", "e"] and validation.target == ["1", "2", "", "", "5"]
    assert validation.dropped == 0
    assert splits["train"].take(np.array([1])).dropped == 0  # it is of those that are left


def test_limits_keep_a_seeded_subset_in_order(tmp_path):
    write_corpus(tmp_path, "train", "validation", "test", size=40)
    found = [own(tmp_path, seed=seed, limit_train=10, limit_eval=7) for seed in (0, 0, 1)]
    assert found[0]["train"].source == found[1]["train"].source != found[2]["train"].source
    assert {name: len(split) for name, split in found[0].items()} == {"train": 10, "validation": 7, "test": 7}
    numbers = [
        [int(text.split()[-1]) for text in side] for side in (found[0]["train"].source, found[0]["train"].target)
    ]
    assert numbers[0] == numbers[1] == sorted(numbers[0])
    with pytest.raises(UserError, match="limit_eval must be at least 1, got 0"):
        own(tmp_path, limit_eval=0)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"train_en": "a\nb\n"}, r"train\.en has 2 lines but .*train\.de has 3"),
        ({"test_de": "a\nb\nc\n\n"}, r"test\.en has 3 lines but .*test\.de has 4"),
        ({"train_en": "\n\n\n"}, r"train\.en is empty"),
        ({"train_en": "a\n\n\n", "train_de": "\n2\n\n"}, "no pair has text on both sides"),
    ],
)
def test_files_that_are_not_parallel(tmp_path, files, message):
    write_corpus(tmp_path, "train", "validation", "test")
    write(tmp_path, **files)
    with pytest.raises(UserError, match=message):
        own(tmp_path)


def test_unreadable_files(tmp_path):
    write_corpus(tmp_path, "train", "validation", "test")
    (tmp_path / "train.de").write_bytes(b"gut\nsch\xf6n\nja\n")
    with pytest.raises(UserError, match=r"train\.de, line 2: not UTF-8"):
        own(tmp_path)
    (tmp_path / "train.de").unlink()
    with pytest.raises(UserError, match=r"no such file: .*train\.de"):
        own(tmp_path)
    with pytest.raises(UserError, match="own: no files for the split 'validation'"):
        load_parallel(OWN, {"train": ("a", "b")})


def test_taking_pairs_keeps_sides_together():
    pairs = Pairs(["a", "b", "c"], ["1", "2", "3"]).take(np.array([2, 0]))
    assert (pairs.source, pairs.target) == (["c", "a"], ["3", "1"])


# ----------------------------------------------------------------------------------------------- real files

REAL = {
    "multi30k": {
        "train": 29000,
        "validation": 1014,
        "test": 1000,
        "test_2017_flickr": 1000,
        "test_2017_mscoco": 461,
        "test_2018_flickr": 1071,
    },
    "iwslt14": {"validation": 7283, "test": 6750},
}


@pytest.mark.parametrize("name", REAL)
def test_real_counts(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {DATA / name}; set {DATA_DIR_VARIABLE}")
    splits = load_pairs(get_translation_task(name, "de-en"), DATA).splits
    assert {split: len(splits[split]) for split in REAL[name]} == REAL[name]
    assert all(all(split.source) and all(split.target) for split in splits.values())
