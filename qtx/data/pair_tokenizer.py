"""Sentences to token ids and back, with vocabularies made from the training pairs.

`words` are the published vocabularies: one per language, of the words seen at least twice ("Compressed Transformers",
section 1), where Moses rules take the place of spaCy's. `subwords` are byte pairs (Sennrich et al. 2016) over UTF-8
bytes, so nothing is unknown and decoding loses nothing. Ids 0 to 3 are the same in both.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qtx.data.parallel import Pairs
from qtx.data.tasks import TranslationTask
from qtx.errors import UserError, near_misses
from qtx.files import write_text

if TYPE_CHECKING:
    from sacremoses import MosesDetokenizer, MosesTokenizer

UNK, PAD, BOS, EOS = range(4)
SPECIALS = ("<unk>", "<pad>", "<s>", "</s>")
KINDS = ("words", "subwords")
FILE = "pair_tokenizer.json"
_VERSION = 1
_LINE_ENDS = re.compile(r"[\r\n]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Token ids of N sentences, stored end to end.

    Attributes:
      ids: [tokens] int32.
      offsets: [N + 1] int64; row i owns the tokens from `offsets[i]` up to `offsets[i + 1]`.
    """

    ids: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Rows:
        """Stores lists of ids."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = (token for row in rows for token in row)
        return cls(np.fromiter(flat, np.int32, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Returns the ids of a row."""
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens per row."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Rows:
        """Returns the rows of these numbers, in that order."""
        return self._select(rows, self.lengths[rows])

    def cut(self, limit: int) -> Rows:
        """Returns all rows, none longer than `limit` tokens."""
        return self._select(np.arange(len(self)), np.minimum(self.lengths, limit))

    def _select(self, rows: np.ndarray, lengths: np.ndarray) -> Rows:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Rows(self.ids[source], offsets)

    def between_markers(self) -> Rows:
        """Returns the rows as target rows: `<s>` before and `</s>` behind each."""
        offsets = self.offsets + 2 * np.arange(len(self) + 1)
        ids = np.empty(offsets[-1], np.int32)
        ids[offsets[:-1]] = BOS
        ids[offsets[1:] - 1] = EOS
        ids[np.arange(len(self.ids)) + 1 + 2 * np.repeat(np.arange(len(self)), self.lengths)] = self.ids
        return Rows(ids, offsets)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPairs:
    """Token ids of N pairs.

    Attributes:
      source: rows of source tokens, without markers.
      target: rows of target tokens, from `<s>` to `</s>`.
      dropped_empty: pairs left out because a side has no token.
      dropped_long: pairs left out because a side has too many.
      cut: [N] bool, the pairs that lost tokens at their end.
    """

    source: Rows
    target: Rows
    dropped_empty: int
    dropped_long: int
    cut: np.ndarray

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.source)


# -------------------------------------------------------------------------------------------- one language


class Words:
    """Words of one language, with an id for each that was seen often enough."""

    def __init__(self, words: Sequence[str], specials: Sequence[str], language: str):
        """Numbers the words behind the special tokens."""
        self.words, self.specials, self.language = list(words), tuple(specials), language
        self._ids = {word: len(specials) + i for i, word in enumerate(words)}
        self._pieces = [*specials, *words]

    def __len__(self) -> int:
        """The number of ids."""
        return len(self._pieces)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns ids; unknown words are `<unk>`."""
        ids = self._ids
        return [[ids.get(word, UNK) for word in words] for words in split_words(texts, self.language)]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Returns text; `<unk>` and ids that are no word show as `<unk>`."""
        words = len(self._pieces)
        join = _detokenizer(self.language).detokenize
        return [join([self._pieces[i] if i < words else SPECIALS[UNK] for i in row], unescape=False) for row in rows]

    def to_json(self) -> Any:
        """Returns what `from_json` needs."""
        return self.words

    @classmethod
    def from_json(cls, value: Any, specials: Sequence[str], language: str) -> Words:
        """Rebuilds it."""
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ValueError("the words are not a list of strings")
        return cls(value, specials, language)


class Subwords:
    """Byte pairs. The special ids are qtx's own, in front of the model's: no text can spell them."""

    def __init__(self, tokenizer: Tokenizer):
        """Wraps a trained tokenizer, which knows nothing of special tokens."""
        self._tokenizer = tokenizer

    @classmethod
    def fit(cls, texts: Iterable[str], size: int) -> Subwords:
        """Trains byte pairs.

        Args:
          texts: sentences of one or of both languages.
          size: ids in all, special ones included; fewer where the texts hold too few pairs.

        Raises:
          UserError: `size` is too small for the special ids and the 256 bytes.
        """
        least = len(SPECIALS) + 256
        if size < least:
            raise UserError(
                f"vocabulary size {size} is too small for {least} bytes and special ids; take some thousands"
            )
        tokenizer = Tokenizer(models.BPE())
        # A word has the same subwords wherever it stands, so every text gets a blank in front; decode takes it away.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        """The number of ids."""
        return len(SPECIALS) + self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns ids."""
        rows = self._tokenizer.encode_batch_fast([f" {text}" if text else "" for text in texts])
        return [[i + len(SPECIALS) for i in row.ids] for row in rows]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Returns text without special ids; bytes that are no UTF-8 become U+FFFD."""
        first, end = len(SPECIALS), len(self)
        known = [[i - first for i in row if first <= i < end] for row in rows]
        return [text.removeprefix(" ") for text in self._tokenizer.decode_batch(known)]

    def to_json(self) -> Any:
        """Returns what `from_json` needs."""
        return json.loads(self._tokenizer.to_str())

    @classmethod
    def from_json(cls, value: Any) -> Subwords:
        """Rebuilds it."""
        return cls(Tokenizer.from_str(json.dumps(value)))


# ---------------------------------------------------------------------------------------------- both sides


class PairTokenizer:
    """Tokenizes the source and the target side of a translation task.

    Attributes:
      kind: one of `KINDS`.
      task: the corpus it was made from and its direction.
      source: the vocabulary of the source side.
      target: the vocabulary of the target side; the same object where both languages share one.
    """

    def __init__(self, kind: str, task: TranslationTask, source: Words | Subwords, target: Words | Subwords):
        """Joins two vocabularies; see `fit` and `load`."""
        self.kind, self.task, self.source, self.target = kind, task, source, target

    @property
    def source_vocab_size(self) -> int:
        """Ids of the source side."""
        return len(self.source)

    @property
    def target_vocab_size(self) -> int:
        """Ids of the target side."""
        return len(self.target)

    @property
    def joint(self) -> bool:
        """Whether both languages share one vocabulary."""
        return self.source is self.target

    def check_sizes(self, source_vocab_size: int, target_vocab_size: int, one_table: bool = False) -> None:
        """Raises a `UserError` unless a model with tables of these sizes, or one of both sides, belongs to this tokenizer."""
        sides = (("source", source_vocab_size, len(self.source)), ("target", target_vocab_size, len(self.target)))
        for name, rows, ids in sides:
            if rows != ids:
                raise UserError(
                    f"the tokenizer has {ids} {name} tokens but the model's {name} vocabulary {rows}; "
                    "use the tokenizer that belongs to the checkpoint"
                )
        if one_table and not self.joint:  # equal sizes do not make one vocabulary of two
            raise UserError(
                "the model has one table for both languages (tied='all') but the tokenizer two vocabularies; use the tokenizer "
                "that belongs to the checkpoint, or train again with --config.model.sizes.tied=target"
            )

    def encode_source(self, texts: Sequence[str]) -> Rows:
        """Returns the ids of source sentences, without markers; an empty sentence has none."""
        return Rows.of(self.source.encode(texts))

    def encode_target(self, texts: Sequence[str]) -> Rows:
        """Returns the ids of target sentences, from `<s>` to `</s>`."""
        return Rows.of(self.target.encode(texts)).between_markers()

    def decode_target(self, rows: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """Returns one line of text per row.

        Args:
          rows: ids per sentence, [N, T] or ragged; what follows the first `</s>` is ignored, `<s>` and `<pad>` are not
            shown. A line end that a model may spell byte by byte becomes a blank: one sentence stays one line.
        """
        return [_LINE_ENDS.sub(" ", text) for text in self.target.decode([_sentence(row) for row in rows])]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `pair_tokenizer.json` into a directory, whole or not at all."""
        content = {
            "version": _VERSION,
            "kind": self.kind,
            "corpus": self.task.name,
            "source_language": self.task.source,
            "target_language": self.task.target,
            "source": self.source.to_json(),
            "target": None if self.joint else self.target.to_json(),
        }
        write_text(Path(directory) / FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def fit(
    kind: str, pairs: Pairs, task: TranslationTask, size: int = 8000, joint: bool = True, max_length: int = 100
) -> PairTokenizer:
    """Makes the vocabularies of a task from its training pairs, the same from the same pairs.

    Args:
      kind: `words` or `subwords`.
      pairs: the training pairs.
      task: corpus and languages.
      size: of a subword vocabulary, special ids included.
      joint: one subword vocabulary for both languages, or one of that size for each.
      max_length: pairs with more words on a side do not count for `words`, as they are not trained on.

    Raises:
      UserError: an unknown kind, no pairs, a size that is too small.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tokenizer {kind!r}{near_misses(kind, KINDS)}")
    if not len(pairs):
        raise UserError("there are no pairs to make vocabularies of")
    if kind == "words":
        sides = split_words(pairs.source, task.source), split_words(pairs.target, task.target)
        kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= max_length]
        source, target = (vocabulary(pair[side] for pair in kept) for side in (0, 1))
        return PairTokenizer(kind, task, Words(source, SPECIALS[:2], task.source), Words(target, SPECIALS, task.target))
    if joint:
        both = Subwords.fit((text for side in (pairs.source, pairs.target) for text in side), size)
        return PairTokenizer(kind, task, both, both)
    return PairTokenizer(kind, task, Subwords.fit(pairs.source, size), Subwords.fit(pairs.target, size))


def load(directory: str | os.PathLike[str], direction: str | None = None) -> PairTokenizer:
    """Loads what `save_pretrained` wrote.

    Args:
      directory: where `pair_tokenizer.json` is.
      direction: what the caller wants to translate, such as `en-de`; None takes it as it is.

    Raises:
      UserError: the file is missing, damaged or of another kind, or translates another direction.
    """
    path = Path(directory) / FILE
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {FILE} in {directory}; give the directory of a saved translation model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; it is damaged or cut short, copy it again") from error
    if not isinstance(content, dict) or content.get("version") != _VERSION or content.get("kind") not in KINDS:
        raise UserError(f"{path} is no tokenizer of a translation model that this version of qtx reads; save it again")
    try:
        task = TranslationTask(content["corpus"], content["source_language"], content["target_language"])
        source: Words | Subwords
        target: Words | Subwords
        if content["kind"] == "words":
            source = Words.from_json(content["source"], SPECIALS[:2], task.source)
            target = Words.from_json(content["target"], SPECIALS, task.target)
        else:
            source = Subwords.from_json(content["source"])
            target = source if content["target"] is None else Subwords.from_json(content["target"])
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); copy or save it again") from error
    if direction is not None and direction != task.direction:
        raise UserError(f"{directory} translates {task.direction}, not {direction}; load a model of that direction")
    return PairTokenizer(content["kind"], task, source, target)


def encode_pairs(tokenizer: PairTokenizer, pairs: Pairs, max_length: int = 100, train: bool = True) -> EncodedPairs:
    """Tokenizes pairs.

    Args:
      tokenizer: from `fit` or `load`.
      pairs: the pairs.
      max_length: the most tokens that a side may have, markers not counted; 100 as published.
      train: leave out pairs that are longer or have an empty side, as published; otherwise every pair is kept, in
        order, and cut where it is longer.

    Raises:
      UserError: `max_length` is below 1, or no pair is left to train on.
    """
    if max_length < 1:
        raise UserError(f"max_length must be at least 1, got {max_length}")
    source, target = (
        Rows.of(side) for side in (tokenizer.source.encode(pairs.source), tokenizer.target.encode(pairs.target))
    )
    shortest, longest = np.minimum(source.lengths, target.lengths), np.maximum(source.lengths, target.lengths)
    empty, long = shortest == 0, longest > max_length
    if not train:
        return EncodedPairs(source.cut(max_length), target.cut(max_length).between_markers(), 0, 0, long)
    kept = np.flatnonzero(~(empty | long))
    if not len(kept):
        raise UserError(f"none of {len(pairs)} pairs has 1 to {max_length} tokens on both sides; raise max_length")
    return EncodedPairs(
        source.take(kept),
        target.take(kept).between_markers(),
        int(empty.sum()),
        int((long & ~empty).sum()),
        np.zeros(len(kept), bool),
    )


# --------------------------------------------------------------------------------------------------- words


def split_words(texts: Iterable[str], language: str) -> Iterable[list[str]]:
    """Yields the words of every sentence, by the Moses rules of its language."""
    split = _tokenizer(language).tokenize
    return (split(text, escape=False) for text in texts)


def vocabulary(sentences: Iterable[Sequence[str]], min_count: int = 2) -> list[str]:
    """Returns the words of a vocabulary, without special tokens.

    Args:
      sentences: the words of every sentence; words that are spelled like a special token do not count.
      min_count: how often a word must occur.

    Returns:
      The words by falling number of occurrences; equally frequent ones in the order of their code points.
    """
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    kept = [word for word, count in counts.items() if count >= min_count and word not in SPECIALS]
    return sorted(kept, key=lambda word: (-counts[word], word))


# Importing sacremoses takes half a second. Languages without rules of their own take the English ones.
@functools.cache
def _tokenizer(language: str) -> MosesTokenizer:
    from sacremoses import MosesTokenizer

    return MosesTokenizer(lang=language)


@functools.cache
def _detokenizer(language: str) -> MosesDetokenizer:
    from sacremoses import MosesDetokenizer

    return MosesDetokenizer(lang=language)


def _sentence(row: Sequence[int] | np.ndarray) -> list[int]:
    ids = [int(i) for i in row]
    end = ids.index(EOS) if EOS in ids else len(ids)
    return [i for i in ids[:end] if i not in (PAD, BOS)]
