"""Cleaning of corpora, and the words of texts that are not cleaned."""

import hashlib
import os
from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from qtx.data.cleaning import (
    STOP_WORDS,
    Cleaning,
    basic_words,
    clean_corpus,
    clean_string,
    split_pair,
    with_backslashes,
    without_backslashes,
)
from qtx.data.reading import DATA_DIR_VARIABLE
from qtx.data.textgcn import read_raw
from qtx.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
CORPUS = Path(os.environ.get(DATA_DIR_VARIABLE) or SHARED) / "textgcn" / "corpus"

# Object ids of the cleaned files in the published repository.
BLOBS = {
    "20ng": "ec0252dd1453779d2e900775249d9651f0ca4011",
    "R8": "27dcbc70d3ebb03d07735317546eadd097f87acf",
    "R52": "e002b84392152cdf0be3886c141e971513376e1b",
    "ohsumed": "e045c8d38e8d65018bb59a98bfef6ea852127769",
    "mr": "41bd8c2804c2fe4e29df42e1b38f506b9594e463",
}


@pytest.mark.parametrize("name", BLOBS)
def test_cleaned_corpora_are_the_published_bytes(name):
    path = CORPUS / f"{name}.txt.gz"
    if not path.is_file():
        pytest.skip(f"no {path}; set {DATA_DIR_VARIABLE}")
    data = "\n".join(clean_corpus(read_raw(path), keep_all=name == "mr")).encode("latin-1")
    assert hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == BLOBS[name]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Don't stop!", "do n't stop !"),
        ("DON'T", "don't"),  # replaced before the letters become small
        ("What?! (really)", r"what \? ! \( really \)"),
        ("a-b_c\td\u00e9\\f", "a b c d f"),
        ("it's, you'd they'll", "it 's , you 'd they 'll"),
        ("  `quoted'  ", "`quoted'"),
        ("", ""),
    ],
)
def test_clean_string(text, cleaned):
    assert clean_string(text) == cleaned


def test_backslashes_go_and_come_back():
    cleaned = clean_string("(Who?) I (we), you!?")
    assert "\\" not in without_backslashes(cleaned)
    assert with_backslashes(without_backslashes(cleaned)) == cleaned


def test_stop_words_and_rare_words_go():
    texts = ["The grain, the grain"] * 3 + ["Rare grain"]
    assert len(STOP_WORDS) == 179
    assert clean_corpus(texts) == ["grain grain"] * 3 + ["grain"]
    assert clean_corpus(texts, min_count=3) == ["grain , grain"] * 3 + ["grain"]
    assert clean_corpus(texts, keep_all=True) == ["the grain , the grain"] * 3 + ["rare grain"]


def test_basic_words_are_those_of_bert(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "ship", "##s", ".", "'", "s", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    columns = (["Caf\u00e9 ships.", "a\u2603 b"], ["SHIP'S", ""])
    assert basic_words(columns) == ["cafe ships . ship ' s", "a\u2603 b"]
    known = basic_words(columns, tokenizer)
    assert known == ["cafe ships . ship ' s", "[UNK] [UNK]"]
    # Word pieces, glued together again.
    pieces = [" ".join(tokenizer.tokenize(side)).replace(" ##", "") for side in columns[0]]
    assert basic_words(columns[:1], tokenizer) == pieces


def test_basic_words_need_an_uncased_tokenizer(tmp_path):
    class Other:
        is_fast = False

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    for tokenizer in (Other(), BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=False)):
        with pytest.raises(UserError, match="from an uncased BERT tokenizer, and this one is none"):
            basic_words((["a"],), tokenizer)


def test_pairs_are_split_at_the_first_marker():
    assert split_pair("One side. <<SEP>> The other <<SEP>> side") == ("One side.", "The other <<SEP>> side")
    with pytest.raises(UserError, match="holds no pair; write <<SEP>>"):
        split_pair("One side")


def test_how_texts_were_cleaned_lies_beside_a_model(tmp_path):
    assert Cleaning.load(tmp_path) is None
    for cleaning in (Cleaning(), Cleaning(frozenset(["oil", "\\?", "caf\u00e9"]))):
        cleaning.save(tmp_path)
        assert Cleaning.load(tmp_path) == cleaning
    (tmp_path / "cleaning.json").write_text("{}")
    with pytest.raises(UserError, match="cleaning.json cannot be read"):
        Cleaning.load(tmp_path)
