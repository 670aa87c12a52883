"""Data augmentation without a model: words, rows with masks, word vectors, copies."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from qtx.data.augmentation import (
    STOP_WORDS,
    Augmentation,
    augmented,
    check_word_pieces,
    draws,
    masked_rows,
    read_vectors,
    split,
)
from qtx.errors import UserError
from tests.models.hf import make_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "teacher-intervention.json").read_text())[
    "data_augmentation"
]


@pytest.fixture(scope="module")
def tokenizer():
    import transformers

    return transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(GOLDEN["vocab"])})


def test_stop_words_are_the_published_ones():
    assert frozenset(word for word in GOLDEN["stop_words"] if word.isalpha()) == STOP_WORDS


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["sentence"])
def test_words_and_rows_are_the_published_ones(tokenizer, case):
    (sentence,) = split(tokenizer, [case["sentence"]])
    assert sentence.words == case["tokens"] and sentence.eligible == case["eligible_positions"]
    rows, owners = masked_rows([sentence], tokenizer, 512)
    assert len(owners) == len(rows) == len(case["mlm_calls"])
    for i, call in enumerate(case["mlm_calls"]):
        mine = slice(rows.offsets[i], rows.offsets[i + 1])
        assert rows.ids[mine].tolist() == call["input_ids"]
        assert rows.token_type_ids[mine].tolist() == call["segment_ids"]
        assert rows.labels[i] == call["mask_position"]


def test_rows_are_cut_and_words_behind_the_cut_left_out(tokenizer):
    sentences = split(tokenizer, ["", "cat dog mat movie plot"])
    rows, owners = masked_rows(sentences, tokenizer, 4)
    assert owners == [(1, 0), (1, 1), (1, 2)] and rows.lengths.tolist() == [4, 4, 4]
    assert rows.ids.reshape(3, 4)[np.arange(3), rows.labels].tolist() == [tokenizer.mask_token_id] * 3
    assert not rows.token_type_ids.any()
    empty, owners = masked_rows(sentences[:1], tokenizer, 4)
    assert len(empty) == 0 and owners == []


def test_words_that_are_never_replaced(tokenizer):
    (sentence,) = split(tokenizer, ["The x-y [MASK] cat's café is Very n0t good ."])
    assert [sentence.words[i] for i in sentence.eligible] == ["x", "mask", "cat", "cafe", "good"]  # y is a stop word
    assert [stop - start for start, stop in sentence.spans] == [1, 1, 1, 2, 1]


def test_other_vocabularies_are_refused():
    with pytest.raises(UserError, match="here: augmentation needs a vocabulary of word pieces"):
        check_word_pieces(make_tokenizer("roberta", ["cat"]), "here")


# Copies


def drawn(case, candidates):
    numbers = iter(value for _, value in case["draws"])
    found = np.array([[[next(numbers), next(numbers)] for _ in candidates] for _ in range(GOLDEN["N"])])
    return found[..., 0].astype(int), found[..., 1] < GOLDEN["p"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["sentence"])
def test_copies_are_the_published_ones(tokenizer, case):
    (sentence,) = split(tokenizer, [case["sentence"]])
    guessed = {call["mask_position"]: call["candidates"] for call in case["mlm_calls"]}
    candidates = []
    for word, (start, stop) in zip(sentence.eligible, sentence.spans, strict=True):
        text = sentence.words[word]
        found = guessed[start + 1] if stop - start == 1 else GOLDEN["nearest_words"].get(text)
        candidates.append(found or [text])
    assert augmented(sentence, candidates, *drawn(case, candidates)) == case["result"]


def test_draws_depend_on_the_seed_and_the_place_alone():
    candidates = [["a"], ["a", "b"], ["a", "b", "c"]]
    settings = Augmentation(copies=200)
    choices, replaced = draws(settings, 7, 0, candidates)
    again = draws(settings, 7, 0, candidates)
    assert np.array_equal(again[0], choices) and np.array_equal(again[1], replaced)
    for other in (
        draws(settings, 8, 0, candidates),
        draws(settings, 7, 1, candidates),
        draws(Augmentation(copies=200, seed=1), 7, 0, candidates),
    ):
        assert not np.array_equal(other[1], replaced)
    assert choices.min(0).tolist() == [0, 0, 0] and choices.max(0).tolist() == [0, 1, 2]
    assert abs(replaced.mean() - 0.4) < 0.06
    assert not draws(Augmentation(probability=0.0), 7, 0, candidates)[1].any()
    assert draws(Augmentation(probability=1.0), 7, 0, candidates)[1].all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"copies": 0}, "copies must be at least 1"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"probability": 1.5}, r"probability must lie in \[0, 1\], got 1.5"),
        ({"seed": -1}, "seed must not be negative"),
        ({"pairs": "mixed"}, "'mixed'; choose from 'separate', 'published'"),
    ],
)
def test_settings_out_of_range(fields, named):
    with pytest.raises(UserError, match=named):
        Augmentation(**fields)


# Word vectors


def test_vectors_are_read_normalized_and_limited(tmp_path):
    path = tmp_path / "vectors.txt.gz"
    with gzip.open(path, "wt") as file:
        file.write("3 2\ncat 3 4\nat name@x.org 0 0\ncat 9 9\nümlaut 0 -2\nlate 1 1\n")
    found = read_vectors(path, limit=5)
    assert found.words == ["cat", "at name@x.org", "ümlaut"]  # the first of two of a kind
    np.testing.assert_allclose(found.table, [[0.6, 0.8], [0, 0], [0, -1]])
    assert found.table.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cat 1 2\ndog 1\n", "line 2: 1 numbers, expected 2"),
        ("cat 1 2\ndog 1 2 3\n", "line 2: 3 numbers, expected 2"),
        ("cat\ndog\n", "line 1: 0 numbers"),
        ("cat 1 2\ndog 1 x\n", "line 2: not 2 finite numbers behind 'dog'"),
        ("cat 1 2\ndog nan 1\n", "line 2: not 2 finite numbers"),
        ("", "holds 0 word vectors"),
    ],
)
def test_broken_vectors(tmp_path, text, named):
    (tmp_path / "vectors.txt").write_text(text)
    with pytest.raises(UserError, match=named):
        read_vectors(tmp_path / "vectors.txt")


def test_damaged_vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    with pytest.raises(UserError, match="no such file of word vectors: .*fetch GloVe's"):
        read_vectors(path)
    path.write_bytes("cat 1 2\n\xfcx 1 2\n".encode("latin-1"))
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_vectors(path)
    cut = tmp_path / "vectors.txt.gz"
    cut.write_bytes(gzip.compress(b"cat 1 2\n" * 1000)[:-20])
    with pytest.raises(UserError, match="cannot read .*fetch it again"):
        read_vectors(cut)
