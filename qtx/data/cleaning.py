r"""The words of text graphs: cleaned corpora of single texts, and BERT's basic words for everything else.

The cleaning is that of TextGCN (Yao, Mao and Luo 2019), byte for byte. An accident of it is kept: `(`, `)` and `?` leave with a
backslash in front, and so stand in the published vocabularies. Tokenizers of models never see the backslash.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import string
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import models, normalizers, pre_tokenizers

from qtx.errors import UserError
from qtx.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_MARKER = "<<SEP>>"
MIN_COUNT = 5  # of a word in the whole corpus
_FILE = "cleaning.json"

# NLTK's English stop words, in its order; the published corpora are made with these.
_WITH_FORMS = "ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn"
STOP_WORDS = frozenset(
    "i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself "
    "she she's her hers herself it it's its itself they them their theirs themselves what which who whom this that that'll "
    "these those am is are was were be been being have has had having do does did doing a an the and but if or because as "
    "until while of at by for with about against between into through during before after above below to from up down in "
    "out on off over under again further then once here there when where why how all any both each few more most other "
    "some such no nor not only own same so than too very s t can will just don don't should should've now d ll m o re ve y "
    "ma".split()
    + _WITH_FORMS.split()
    + [f"{stem}'t" for stem in _WITH_FORMS.split() if stem != "ain"]
)


class _Kept(dict[int, str]):
    """A table for `str.translate` with a blank for every character that is not in it."""

    def __missing__(self, code: int) -> str:
        return " "


_ALLOWED = string.ascii_letters + string.digits + "(),!?'`"
_KEPT = _Kept({code: chr(code) if chr(code) in _ALLOWED else " " for code in range(256)})  # calls for others are slow
_SUFFIXES = ("'s", "'ve", "n't", "'re", "'d", "'ll")


def clean_string(text: str) -> str:
    """Cleans one text as TextGCN does.

    Everything but ASCII letters, digits and ``( ) , ! ? ' ` `` becomes a blank; `'s`, `'ve`, `n't`, `'re`, `'d`, `'ll` are
    split off, wherever they stand; punctuation stands alone, brackets and question marks behind a backslash; then lower
    case. So `DON'T` is not split, and `don't` is.
    """
    text = text.translate(_KEPT)
    for suffix in _SUFFIXES:
        text = text.replace(suffix, f" {suffix}")
    for mark in ",!":
        text = text.replace(mark, f" {mark} ")
    for mark in "()?":
        text = text.replace(mark, f" \\{mark} ")
    return " ".join(text.split()).lower()


def clean_corpus(
    texts: Iterable[str], stop_words: Collection[str] = STOP_WORDS, min_count: int = MIN_COUNT, keep_all: bool = False
) -> list[str]:
    """Cleans a whole corpus: `clean_string`, then no stop words and no rare words.

    Args:
      texts: the documents, training and test together.
      stop_words: words to leave out.
      min_count: how often a word must occur in all texts together.
      keep_all: keep all words, as published for `mr`.

    Returns:
      A string of words for each document, joined by blanks; empty where no word is left.
    """
    cleaned = [clean_string(text) for text in texts]
    if keep_all:
        return cleaned
    counts = collections.Counter(word for text in cleaned for word in text.split())
    kept = {word for word, count in counts.items() if count >= min_count and word not in stop_words}
    return [" ".join(word for word in text.split() if word in kept) for text in cleaned]


def without_backslashes(text: str) -> str:
    """Returns a cleaned text as tokenizers of models read it."""
    return text.replace("\\", "")


def with_backslashes(text: str) -> str:
    """Returns a cleaned text as graphs read it: the inverse of `without_backslashes`."""
    return re.sub(r"[()?]", r"\\\g<0>", text)


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """How the texts of a data set were cleaned before a model saw them: what texts that come later need, too.

    Attributes:
      words: that the whole corpus keeps, as `clean_string` writes them; None: all.
    """

    words: frozenset[str] | None = None

    def __call__(self, text: str) -> str:
        """Returns a raw text as the model's tokenizer reads it; empty if no word is left."""
        words = clean_string(text).split()
        return without_backslashes(" ".join(word for word in words if self.words is None or word in self.words))

    def save(self, directory: Path) -> None:
        """Writes it beside a model."""
        words = None if self.words is None else sorted(self.words)
        write_text(directory / _FILE, json.dumps({"words": words}))

    @classmethod
    def load(cls, directory: Path) -> Cleaning | None:
        """Reads what lies beside a model; None where nothing does: the model takes texts as they are.

        Raises:
          UserError: the file is damaged.
        """
        path = directory / _FILE
        if not path.is_file():
            return None
        try:
            words = json.loads(path.read_text(encoding="utf-8"))["words"]
            return cls(None if words is None else frozenset(words))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); take it from the run that trained the model") from None


def split_pair(text: str) -> tuple[str, str]:
    """Splits a line that holds a pair of texts at its first `<<SEP>>`.

    Raises:
      UserError: there is no marker.
    """
    first, marker, second = text.partition(PAIR_MARKER)
    if not marker:
        raise UserError(f"the text {text[:40]!r} holds no pair; write {PAIR_MARKER} between its two sides")
    return first.strip(), second.strip()


def basic_words(columns: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Splits texts into words as BERT does before it looks for word pieces: lower case, no accents, punctuation alone.

    That is what word pieces give when they are glued together again, but for words that have none.

    Args:
      columns: one list of N texts, or two of pairs, whose sides are joined by a blank.
      tokenizer: an uncased BERT tokenizer; words that its pieces cannot make become `[UNK]`. None keeps all words.

    Returns:
      N strings of words joined by blanks.

    Raises:
      UserError: the tokenizer is of another kind.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()

    def words(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]

    texts = [[word for side in sides for word in words(side)] for sides in zip(*columns, strict=True)]
    if tokenizer is not None:
        known = _in_pieces({word for text in texts for word in text}, tokenizer)
        texts = [[known[word] for word in text] for text in texts]
    return [" ".join(text) for text in texts]


def _in_pieces(words: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    model, normalizer = getattr(backend, "model", None), getattr(backend, "normalizer", None)
    if not isinstance(model, models.WordPiece) or not getattr(normalizer, "lowercase", True):
        raise UserError(
            "graphs take their words from an uncased BERT tokenizer, and this one is none; give another, or none"
        )
    unknown = model.unk_token
    return {word: unknown if [p.value for p in model.tokenize(word)] == [unknown] else word for word in words}
