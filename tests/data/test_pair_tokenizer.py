"""Tokenizers made from sentence pairs: vocabularies, ids, text, files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx.data import pair_tokenizer
from qtx.data.pair_tokenizer import BOS, EOS, FILE, PAD, SPECIALS, UNK, Rows, encode_pairs, fit, load, vocabulary
from qtx.data.parallel import Pairs, load_pairs
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.tasks import TranslationTask
from qtx.errors import UserError

DATA = Path(os.environ.get(DATA_DIR_VARIABLE) or Path(__file__).parents[3] / "shared" / "data")
TASK = TranslationTask("made_up", "en", "de")
PAIRS = Pairs(
    ["A dog runs.", "A cat runs, too.", "The dog's cat sleeps.", "The dog sleeps."],
    ["Ein Hund läuft.", "Eine Katze läuft auch.", "Die Katze des Hundes schläft.", "Der Hund schläft."],
)
KINDS = [("words", True), ("subwords", True), ("subwords", False)]


def make(kind="subwords", joint=True, **options):
    return fit(kind, PAIRS, TASK, size=300, joint=joint, **options)


def rows_of(encoded):
    return [encoded[i].tolist() for i in range(len(encoded))]


# ---------------------------------------------------------------------------------------------------- words


def test_vocabulary_order_and_specials():
    sentences = [["b", "a", "<pad>", "c"], ["a", "<pad>", "ä", "B", "B", "ä"], ["z", "z", "z", "b"]]
    assert vocabulary(sentences) == ["z", "B", "a", "b", "ä"]
    assert vocabulary(sentences, min_count=1)[-1] == "c"


def test_words_as_published():
    tokenizer = make("words")
    assert tokenizer.source.words == [".", "dog", "A", "The", "cat", "runs", "sleeps"]
    assert (tokenizer.source_vocab_size, tokenizer.target_vocab_size) == (2 + 7, 4 + len(tokenizer.target.words))
    assert rows_of(tokenizer.encode_source(["The bird runs ."])) == [[5, UNK, 7, 2]]
    target = tokenizer.encode_target(["Hund läuft <s> ."])[0].tolist()
    ids = {word: 4 + i for i, word in enumerate(tokenizer.target.words)}
    assert target == [BOS, ids["Hund"], ids["läuft"], UNK, UNK, UNK, ids["."], EOS]


def test_words_of_pairs_that_are_too_long_do_not_count():
    long = Pairs([*PAIRS.source, "x " * 101], [*PAIRS.target, "y"])
    assert fit("words", long, TASK).source.words == make("words").source.words
    assert "x" in fit("words", long, TASK, max_length=101).source.words


def test_words_are_joined_by_the_rules_of_the_language():
    tokenizer = fit("words", Pairs(["a"] * 2, ["Er sagt (laut): 3,5 % & mehr!"] * 2), TASK)
    rows = rows_of(tokenizer.encode_target(["Er sagt (laut): mehr & mehr!"]))
    assert tokenizer.decode_target(rows) == ["Er sagt (laut): mehr & mehr!"]
    assert tokenizer.decode_target([[BOS, UNK, 9999, EOS]]) == ["<unk> <unk>"]


# ------------------------------------------------------------------------------------------------- subwords


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=30), max_size=5))
def test_subwords_lose_nothing(texts):
    tokenizer = test_subwords_lose_nothing.tokenizer
    texts = [*texts, "</s> <pad><s>", " two  blanks ", "日本語 🙂"]
    encoded = tokenizer.encode_target(texts)
    assert tokenizer.decode_target(rows_of(encoded)) == texts
    for row in rows_of(encoded):
        assert row[0] == BOS and row[-1] == EOS and all(id >= len(SPECIALS) for id in row[1:-1])
        assert max(row) < tokenizer.target_vocab_size


test_subwords_lose_nothing.tokenizer = make()


def test_subwords_of_both_languages_are_shared_or_not():
    joint, separate = make(joint=True), make(joint=False)
    assert joint.source is joint.target and joint.source_vocab_size == 300
    assert separate.source is not separate.target
    text = ["Die Katze schläft."]
    assert rows_of(joint.encode_source(text))[0] == rows_of(joint.encode_target(text))[0][1:-1]
    assert len(separate.encode_source(text)[0]) > len(separate.encode_target(text)[0][1:-1])


def test_a_word_has_the_same_subwords_at_the_start():
    tokenizer = make()
    first, later = (rows_of(tokenizer.encode_source([text]))[0] for text in ("dog", "A dog"))
    assert later[-len(first) :] == first


def test_decoding_gives_one_line_per_row():
    tokenizer = make()
    newline = rows_of(tokenizer.encode_source(["a\n\rb"]))[0]
    row = np.array([BOS, *newline, PAD, EOS, *newline])
    assert tokenizer.decode_target([row, [BOS, EOS], []]) == ["a b", "", ""]
    assert tokenizer.decode_target(np.array([[BOS, UNK, 9999, EOS, PAD]])) == [""]
    one_byte = tokenizer.source._tokenizer.token_to_id("Ã") + len(SPECIALS)
    assert tokenizer.decode_target([[one_byte]]) == ["\ufffd"]


# -------------------------------------------------------------------------------------------------- both kinds


@pytest.mark.parametrize("kind, joint", KINDS)
def test_fitting_is_deterministic_and_files_keep_everything(tmp_path, kind, joint):
    tokenizer = make(kind, joint)
    tokenizer.save_pretrained(tmp_path / "a")
    make(kind, joint).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE]
    loaded = load(tmp_path / "a", "en-de")
    assert (loaded.kind, loaded.task) == (kind, TASK)
    assert (loaded.source is loaded.target) == (tokenizer.source is tokenizer.target)
    texts = [*PAIRS.source, *PAIRS.target, "Ünknown <s> wörds", ""]
    assert rows_of(loaded.encode_source(texts)) == rows_of(tokenizer.encode_source(texts))
    encoded = rows_of(tokenizer.encode_target(texts))
    assert rows_of(loaded.encode_target(texts)) == encoded
    assert loaded.decode_target(encoded) == tokenizer.decode_target(encoded)


@pytest.mark.parametrize("kind, joint", KINDS)
def test_an_empty_sentence_has_no_tokens(kind, joint):
    tokenizer = make(kind, joint)
    assert rows_of(tokenizer.encode_source(["", "a", ""]))[::2] == [[], []]
    assert rows_of(tokenizer.encode_target([""])) == [[BOS, EOS]]
    assert tokenizer.decode_target(rows_of(tokenizer.encode_target([""]))) == [""]


def test_training_drops_what_evaluation_cuts():
    tokenizer = make("words")
    pairs = Pairs(["A dog .", "A", "\x07", "A A A A", "cat"], ["Hund", "Hund Hund Hund Hund .", "Hund", "", "."])
    train = encode_pairs(tokenizer, pairs, max_length=3)
    assert (len(train), train.dropped_empty, train.dropped_long, train.cut.tolist()) == (2, 2, 1, [False] * 2)
    assert train.source.lengths.tolist() == [3, 1] and train.target.lengths.tolist() == [3, 3]
    kept = encode_pairs(tokenizer, pairs, max_length=3, train=False)
    assert (len(kept), kept.dropped_empty, kept.dropped_long) == (5, 0, 0)
    assert kept.cut.tolist() == [False, True, False, True, False]
    assert kept.source.lengths.tolist() == [3, 1, 0, 3, 1] and kept.target.lengths.tolist() == [3, 5, 3, 2, 3]
    assert kept.target[1].tolist()[0] == BOS and kept.target[1].tolist()[-1] == EOS
    with pytest.raises(UserError, match="none of 5 pairs has 1 to 0|max_length must be at least 1"):
        encode_pairs(tokenizer, pairs, max_length=0)
    with pytest.raises(UserError, match="none of 1 pairs has 1 to 3 tokens on both sides"):
        encode_pairs(tokenizer, pairs.take(np.array([3])), max_length=3)


@given(st.lists(st.lists(st.integers(4, 99), max_size=6), max_size=8), st.integers(1, 5))
def test_rows_behave_like_lists(lists, limit):
    rows = Rows.of(lists)
    assert rows_of(rows) == lists and rows.lengths.tolist() == [len(row) for row in lists]
    assert rows_of(rows.cut(limit)) == [row[:limit] for row in lists]
    assert rows_of(rows.between_markers()) == [[BOS, *row, EOS] for row in lists]
    backwards = np.arange(len(lists))[::-1]
    assert rows_of(rows.take(backwards)) == lists[::-1]
    assert rows.cut(limit).ids.dtype == rows.between_markers().ids.dtype == np.int32


# ------------------------------------------------------------------------------------------------- errors


def test_fit_errors():
    with pytest.raises(UserError, match=r"unknown tokenizer 'subword'; did you mean 'subwords'"):
        fit("subword", PAIRS, TASK)
    with pytest.raises(UserError, match="no pairs"):
        fit("words", Pairs([], []), TASK)
    with pytest.raises(UserError, match="vocabulary size 259 is too small for 260"):
        fit("subwords", PAIRS, TASK, size=259)


def test_a_model_of_other_sizes_is_refused():
    tokenizer = make("words")
    tokenizer.check_sizes(tokenizer.source_vocab_size, tokenizer.target_vocab_size)
    with pytest.raises(UserError, match="the tokenizer has 9 source tokens but the model's source vocabulary 8"):
        tokenizer.check_sizes(8, tokenizer.target_vocab_size)
    with pytest.raises(UserError, match="model's target vocabulary 99"):
        tokenizer.check_sizes(9, 99)


def test_one_table_is_for_one_vocabulary():
    twice, once = (fit("subwords", PAIRS, TASK, size=262, joint=joint) for joint in (False, True))
    assert twice.source_vocab_size == twice.target_vocab_size and not twice.joint and once.joint
    once.check_sizes(once.source_vocab_size, once.target_vocab_size, one_table=True)
    with pytest.raises(UserError, match="one table for both languages .* two vocabularies.*sizes.tied=target"):
        twice.check_sizes(twice.source_vocab_size, twice.target_vocab_size, one_table=True)


@pytest.mark.parametrize("kind, joint", KINDS)
def test_damaged_files(tmp_path, kind, joint):
    with pytest.raises(UserError, match=f"no {FILE} in .*nowhere"):
        load(tmp_path / "nowhere")
    make(kind, joint).save_pretrained(tmp_path)
    path = tmp_path / FILE
    with pytest.raises(UserError, match="translates en-de, not de-en; load a model of that direction"):
        load(tmp_path, "de-en")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load(tmp_path)
    for name in ("source", "source_language"):
        path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != name}))
        with pytest.raises(UserError, match=f"{FILE} is damaged .*{name}"):
            load(tmp_path)
    path.write_text(json.dumps(json.loads(whole) | {"source": {"words": 3}}))
    with pytest.raises(UserError, match=f"{FILE} is damaged"):
        load(tmp_path)
    for content in (
        "[]",
        json.dumps(json.loads(whole) | {"version": 0}),
        json.dumps(json.loads(whole) | {"kind": "x"}),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match="is no tokenizer of a translation model"):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------ real data


def test_real_multi30k_round_trip():
    if not (DATA / "multi30k").is_dir():
        pytest.skip(f"no {DATA / 'multi30k'}; set {DATA_DIR_VARIABLE}")
    dataset = load_pairs("multi30k", DATA, limit_train=2000)
    tokenizer = pair_tokenizer.fit("subwords", dataset.splits["train"], dataset.task, 1000)
    test = dataset.splits["test"]
    encoded = encode_pairs(tokenizer, test, train=False)
    assert not encoded.cut.any() and tokenizer.source_vocab_size == 1000
    assert tokenizer.decode_target(rows_of(encoded.target)) == test.target
