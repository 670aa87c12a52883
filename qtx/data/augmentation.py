"""Data augmentation for distillation (TinyBERT: Jiao et al. 2020, section 3.2 and algorithm 1), the parts without a model.

Copies of a sentence in which some words are others. What may stand for a word is found once, in the sentence as it is: what a
masked language model guesses where the word is one piece of its vocabulary, and the nearest word vectors where it is several
(`qtx.methods.augmentation`). Words are those of BERT's tokenizer, lower case where the vocabulary is.

Which copies come out depends on the seed and the number of the example alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from qtx.data.reading import OPENERS
from qtx.data.tokenize import Encoded
from qtx.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COPIES = {"cola": 30, "mrpc": 30, "stsb": 30, "rte": 30, "sst2": 20, "qnli": 20, "mnli": 10, "qqp": 10}
"""Copies of a sentence by task, as published."""

# English function words, those of the published code that are letters alone: others are never replaced anyway.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
    itself they them their theirs themselves this that these those am is are was were be been being have has had having do
    does did doing a an the and but if or because as until while of at by for with about against between into through during
    before after above below to from up down in out on off over under again further then once here there all any both each
    few more most other some such no nor not only own same so than too very s t can will just don should now d ll m o re ve
    y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
    """.split()
)
_LETTERS = re.compile("[a-zA-Z]+")

Pairs = Literal["separate", "published"]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How sentences are augmented; the defaults are the published ones.

    Attributes:
      copies: how many are drawn of each sentence (N); equal ones are kept once.
      candidates: how many words may stand for a word, at most (M).
      probability: of each word to be replaced (p); a candidate can be the word itself.
      seed: of what is drawn.
      pairs: of two sentences one is augmented at a time. `'separate'`: the other is the original; `'published'`: while the
        second one is augmented the first is the last copy of it.

    Raises:
      UserError: on a value out of range.
    """

    copies: int = 30
    candidates: int = 15
    probability: float = 0.4
    seed: int = 0
    pairs: Pairs = "separate"

    def __post_init__(self):
        for name in ("copies", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"augmentation: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.probability <= 1:
            raise UserError(f"augmentation: probability must lie in [0, 1], got {self.probability}")
        if self.seed < 0:
            raise UserError(f"augmentation: seed must not be negative, got {self.seed}")
        if self.pairs not in get_args(Pairs):
            raise UserError(f"augmentation: pairs is {self.pairs!r}; choose from 'separate', 'published'")


# ------------------------------------------------------------------------------------------------ sentences


@dataclasses.dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence, its words, and its pieces in the vocabulary of a masked language model.

    Attributes:
      text: as it was given.
      words: of BERT's basic tokenizer.
      pieces: int32 `[pieces]`, ids without special tokens.
      eligible: numbers of the words that may be replaced: letters alone, and no stop words.
      spans: where the pieces of each eligible word begin and end.
    """

    text: str
    words: list[str]
    pieces: np.ndarray
    eligible: list[int]
    spans: list[tuple[int, int]]


def check_word_pieces(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises a `UserError` unless a tokenizer is one of words and their pieces, with a mask, as BERT's are.

    Args:
      tokenizer: of the masked language model.
      name: of its checkpoint, for the error.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ != "WordPiece" or tokenizer.mask_token_id is None:
        raise UserError(f"{name}: augmentation needs a vocabulary of word pieces with a [MASK]; give a BERT checkpoint")


def split(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Sentence]:
    """Splits sentences into words and their pieces."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    normalized = [backend.normalizer.normalize_str(text) if backend.normalizer else text for text in texts]
    words = [[word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] for text in normalized]
    found = []
    encodings = backend.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
    for text, its_words, encoding in zip(texts, words, encodings, strict=True):
        eligible = [
            i for i, word in enumerate(its_words) if _LETTERS.fullmatch(word) and word.lower() not in STOP_WORDS
        ]
        bounds = np.searchsorted(np.array(encoding.word_ids, np.int64), np.arange(len(its_words) + 1)).tolist()
        spans = [(bounds[i], bounds[i + 1]) for i in eligible]
        found.append(Sentence(text, its_words, np.array(encoding.ids, np.int32), eligible, spans))
    return found


def masked_rows(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[Encoded, list[tuple[int, int]]]:
    """Returns what a masked language model is asked: a row for each eligible word of one piece.

    A row is the sentence with a mask in place of the word, and the whole sentence behind it: `[CLS] masked [SEP] whole
    [SEP]`, with token types 0 and 1.

    Args:
      sentences: from `split`.
      tokenizer: of the model.
      limit: tokens of a row; the rest is cut off, and words whose mask would be there are left out.

    Returns:
      The rows, whose labels are the positions of the masks, and of each row the numbers of its sentence and word.
    """
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    rows, types, places, owners = [], [], [], []
    for number, sentence in enumerate(sentences):
        pieces = sentence.pieces
        whole = np.concatenate([[cls], pieces, [sep], pieces, [sep]]).astype(np.int32)[:limit]
        second = (np.arange(len(whole)) >= len(pieces) + 2).astype(np.int32)
        for word, (start, stop) in zip(sentence.eligible, sentence.spans, strict=True):
            if stop - start == 1 and start + 1 < limit:
                row = whole.copy()
                row[start + 1] = mask
                rows.append(row)
                types.append(second)
                places.append(start + 1)
                owners.append((number, word))
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    flat = [np.concatenate(parts) if parts else np.zeros(0, np.int32) for parts in (rows, types)]
    return Encoded(flat[0], flat[1], offsets, np.array(places, np.int32)), owners


# ---------------------------------------------------------------------------------------------- word vectors

UNKNOWN = "<unk>"


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """Word vectors.

    Attributes:
      words: N different words.
      table: float32 `[N, D]`, rows of length 1 (a row of zeros stays one).
    """

    words: list[str]
    table: np.ndarray


def read_vectors(path: str | os.PathLike[str], limit: int = 100_000) -> Vectors:
    """Reads word vectors as GloVe and word2vec write them as text: a line is a word and its numbers, blanks between them.

    Args:
      path: the file, plain or compressed (.gz, .bz2). A first line with two whole numbers, the size, is skipped, and so is
        the vector of unknown words, `<unk>`.
      limit: how many lines are read; files begin with the most frequent words.

    Raises:
      UserError: there is no such file, it is damaged or empty, or a line has another width or holds no finite number.
    """
    path = require_vectors(path)
    words: dict[str, int] = {}
    rows: list[np.ndarray] = []
    width = 0
    for number, fields in _vector_lines(path, limit):
        if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
            continue
        width = width or len(fields) - 1
        # Some words of public files hold blanks, but no word ends in a number.
        before, values = fields[:-width], fields[-width:]
        if not before or (len(before) > 1 and _is_number(before[-1])):
            raise UserError(
                f"{path}, line {number}: {len(fields) - 1} numbers, expected {width or 'some'}; repair the line"
            )
        name = " ".join(before)
        try:
            row = np.array(values, np.float32)
        except ValueError:
            row = np.array([np.nan], np.float32)
        if not np.all(np.isfinite(row)):
            raise UserError(
                f"{path}, line {number}: not {width} finite numbers behind {name!r}; repair or remove the line"
            )
        if name not in words and name != UNKNOWN:
            words[name] = len(rows)
            rows.append(row)
    if len(rows) < 2:
        raise UserError(f"{path} holds {len(rows)} word vectors; give a file with a word and its numbers on each line")
    table = np.stack(rows)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return Vectors(list(words), table / np.where(norms > 0, norms, 1))


def require_vectors(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file of word vectors, or raises a `UserError` that says where there are any."""
    if not Path(path).is_file():
        where = "https://nlp.stanford.edu/projects/glove"
        raise UserError(
            f"no such file of word vectors: {path}; fetch GloVe's, such as glove.840B.300d.txt, from {where}"
        )
    return Path(path)


def _vector_lines(path: Path, limit: int) -> Iterator[tuple[int, list[str]]]:
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(itertools.islice(file, limit), 1):  # noqa: B007 (the error names it)
                yield number, line.decode("utf-8").rstrip("\r\n ").split(" ")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert it with iconv -t utf-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; it is damaged or cut short, fetch it again") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- copies


def draws(settings: Augmentation, example: int, column: int, candidates: Sequence[Sequence[str]]) -> tuple:
    """Draws what happens to the eligible words of a sentence, from the seed and where the sentence stands.

    Args:
      settings: how.
      example: number of the example.
      column: which of its sentences.
      candidates: of each of the E eligible words.

    Returns:
      int `[copies, E]`: which candidate, and bool `[copies, E]`: whether it replaces the word.
    """
    rng = np.random.default_rng([settings.seed, example, column])
    which, whether = rng.random((2, settings.copies, len(candidates)))
    return (which * [len(each) for each in candidates]).astype(np.int64), whether < settings.probability


def augmented(
    sentence: Sentence, candidates: Sequence[Sequence[str]], choices: np.ndarray, replaced: np.ndarray
) -> list[str]:
    """Returns a sentence and its copies, each different one once, the sentence as it was given first.

    Args:
      sentence: from `split`.
      candidates: of each of its E eligible words, none empty.
      choices: int `[copies, E]`, see `draws`.
      replaced: bool `[copies, E]`.
    """
    found = {sentence.text: None}
    for its_choices, its_replaced in zip(choices.tolist(), replaced, strict=True):
        words = list(sentence.words)
        for i in np.flatnonzero(its_replaced).tolist():
            words[sentence.eligible[i]] = candidates[i][its_choices[i]]
        found[" ".join(words)] = None
    return list(found)
