"""Candidates from a masked language model and from word vectors, and the augmented file."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.data.augmentation import Augmentation, Vectors, masked_rows, read_vectors, split
from qtx.data.sources import TrainingRows
from qtx.methods.augmentation import Augmenter, MaskedWords, NearestWords, candidates, write_augmented
from qtx.nn import BertConfig
from qtx.nn.masked_lm import BertMaskedLM, Predictions
from qtx.train.sharding import make_mesh
from tests.models.hf import make_tokenizer
from tests.nn import tiny

ROOT = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((ROOT / "teacher-intervention.json").read_text())["data_augmentation"]


class Stub(nn.Module):
    """A masked language model whose logits depend on the position alone."""

    config: Any
    logits: tuple

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    @nn.compact
    def __call__(self, input_ids, attention_mask, token_type_ids, positions):
        return Predictions(jnp.asarray(self.logits)[positions], ())


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    rows = zip(GOLDEN["glove_words"], GOLDEN["glove_vectors"], strict=True)
    path.write_text("".join(" ".join([word, *map(str, vector)]) + "\n" for word, vector in rows))
    return NearestWords(read_vectors(path), make_mesh())


def test_nearest_words_are_the_published_ones(neighbours):
    want = {word: near for word, near in GOLDEN["nearest_words"].items() if near}
    assert neighbours(list(GOLDEN["nearest_words"]), GOLDEN["M"]) == want
    assert len(neighbours(["cat"], 99)["cat"]) == len(GOLDEN["glove_words"]) - 2  # neither itself nor <unk>
    assert "cat" not in neighbours(["cat"], 99)["cat"]


def test_neighbours_of_a_capitalized_word_are_capitalized():
    vectors = Vectors(["Cat", "dog", "fish"], np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32))
    assert NearestWords(vectors, make_mesh())(["Cat"], 2) == {"Cat": ["Dog", "Fish"]}


def test_candidates_are_the_published_ones(neighbours):
    import transformers

    tokenizer = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(GOLDEN["vocab"])})
    with np.load(ROOT / "teacher-intervention.npz") as file:
        logits = tuple(map(tuple, file["da/mlm_logits"].tolist()))
    config = BertConfig(vocab_size=len(logits[0]), max_positions=len(logits))
    guesses = MaskedWords(Stub(config, logits), {}, tokenizer, make_mesh())
    sentences = split(tokenizer, [case["sentence"] for case in GOLDEN["cases"]])
    found = candidates(sentences, GOLDEN["M"], guesses, neighbours)
    for case, sentence, mine in zip(GOLDEN["cases"], sentences, found, strict=True):
        calls = {call["mask_position"]: call["candidates"] for call in case["mlm_calls"]}
        for word, (start, stop), words in zip(sentence.eligible, sentence.spans, mine, strict=True):
            text = sentence.words[word]
            assert words == (calls[start + 1] if stop - start == 1 else GOLDEN["nearest_words"].get(text) or [text])


def test_guesses_in_batches_are_those_of_single_rows():
    tokenizer = make_tokenizer("bert", "cat dog mat movie plot tree river boat".split())
    config = BertConfig(len(tokenizer) + 3, 16, 1, 2, 32, max_positions=24)
    model = BertMaskedLM(config)
    params = tiny.random_params(model)
    guesses = MaskedWords(model, params, tokenizer, make_mesh(), batch_size=8)
    assert guesses.lengths == (16, 24)
    sentences = split(tokenizer, ["cat dog mat", "movie", "boat the river tree plot dog cat mat movie boat"])
    found = guesses(sentences, 5)
    rows, owners = masked_rows(sentences, tokenizer, 24)
    assert list(found) == owners and len(owners) == 13
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ids, mask, types = np.zeros((3, 13, 24), np.int32)
    for i, (start, stop) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
        length = stop - start
        ids[i, :length], types[i, :length], mask[i, :length] = rows.ids[start:stop], rows.token_type_ids[start:stop], 1
    out = jax.jit(model.apply)({"params": params}, ids, mask, types)
    for i in range(13):
        best = np.argsort(-out.logits[i, rows.labels[i]])[:5]
        assert found[owners[i]] == [words[j] for j in best if j < len(words)]  # rows without a word are left out


# The file

WORDS = "cat dog mat movie plot tree river boat".split()
ROWS = TrainingRows(
    ("id", "first", "second", "label"),
    True,
    (1, 2),
    [(str(i), f"The {WORDS[i % 8]} , is  {WORDS[-i % 8]}", f"a {WORDS[i % 5]}", f"y{i}") for i in range(11)],
)


@dataclasses.dataclass
class Calls:
    """Guesses that are the first letters of words, and fail at a call."""

    fail_at: int = 99
    count: int = 0

    def __call__(self, sentences, count):
        self.count += 1
        if self.count == self.fail_at:
            raise KeyboardInterrupt
        return {(n, word): [each.words[word][0], "z"] for n, each in enumerate(sentences) for word in each.eligible}


def augmenter(guesses, **settings):
    tokenizer = make_tokenizer("bert", WORDS)
    return Augmenter(Augmentation(**{"copies": 4} | settings), tokenizer, guesses, lambda words, count: {})


def test_only_texts_differ_and_only_one_at_a_time():
    made = augmenter(Calls())(ROWS, 0, len(ROWS))
    by_example = [[row for row in made if row[0] == str(i)] for i in range(len(ROWS))]
    assert [row for rows in by_example for row in rows] == made and len(made) > 4 * len(ROWS)
    for original, rows in zip(ROWS.rows, by_example, strict=True):
        assert rows[0] == original and rows.count(original) == 2  # each sentence has it once
        for row in rows:
            assert row[3] == original[3] and (row[1] == original[1] or row[2] == original[2])
            words = row[1].split()
            assert len(words) == 5 and words[2:4] == [",", "is"] and words[0].lower() == "the"
            assert words[1] in (original[1].split()[1], original[1].split()[1][0], "z")


def test_nothing_replaced_gives_the_words_of_the_sentence():
    made = augmenter(Calls(), probability=0.0)(ROWS, 3, 4)
    (_, first, second, _) = ROWS.rows[3]
    assert [row[1:3] for row in made] == [(first, second), (" ".join(first.lower().split()), second), (first, second)]


def test_pairs_as_published():
    made = augmenter(Calls(), pairs="published", probability=1.0, copies=1)(ROWS, 3, 4)
    separate = augmenter(Calls(), probability=1.0, copies=1)(ROWS, 3, 4)
    assert made[:2] == separate[:2]
    assert [row[1] for row in made[2:]] == [made[1][1]] * 2 and [row[2] for row in made] == [row[2] for row in separate]


def test_an_interrupted_file_goes_on(tmp_path):
    told = []
    whole = tmp_path / "whole.tsv"
    lines = write_augmented(whole, ROWS, augmenter(Calls()), tmp_path / "all", told.append, shard=20)
    assert told == [11]

    path, cache = tmp_path / "train_aug.tsv", tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write_augmented(path, ROWS, augmenter(Calls(fail_at=3)), cache, told.append, shard=4)
    assert not path.exists() and len(list(cache.iterdir())) == 2
    rest = Calls()
    assert write_augmented(path, ROWS, augmenter(rest), cache, told.append, shard=4) == lines
    assert rest.count == 1, "finished parts are kept"
    assert path.read_bytes() == whole.read_bytes() and told == [11, 4, 8, 4, 8, 11]
    text = path.read_text().splitlines()
    assert text[0] == "id\tfirst\tsecond\tlabel" and len(text) == lines + 1


def test_fields_have_no_tabs_and_no_line_breaks(tmp_path):
    rows = TrainingRows(("text", "label"), False, (0,), [("one\tcat\r\ntwo", "x")])
    write_augmented(
        tmp_path / "a.tsv", rows, augmenter(Calls(), probability=0.0), tmp_path / "cache", lambda done: None
    )
    assert (tmp_path / "a.tsv").read_text() == "one cat two\tx\n" * 2
