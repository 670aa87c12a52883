"""Texts to token ids: any Hugging Face tokenizer in, compact ragged arrays out."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qtx.data.sources import Examples
from qtx.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without any of these in a directory transformers makes up a tokenizer of nothing but special tokens.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.spm", "*.tiktoken")
_PROBE = "the house is in the city and we have a good time"
_CHUNK = 4096  # texts per call: bounds the Python lists that exist at one time


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of N examples, stored end to end.

    Attributes:
      ids: [tokens] int32.
      token_type_ids: [tokens] int32, 1 in the second text of a pair where the tokenizer tells them apart.
      offsets: [N + 1] int64; example i owns the tokens from `offsets[i]` up to `offsets[i + 1]`.
      labels: [N] int32 class ids or float32 scores.
    """

    ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: tokens per example, special tokens included."""
        return np.diff(self.offsets)


def load_tokenizer(directory_or_id: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory, or by its id from the model hub or its cache.

    Padding and truncation that are stored in the tokenizer's file are switched off: they would act on every text,
    whatever length the caller asks for.

    Raises:
      UserError: there is no such directory or id, or no readable tokenizer in it.
    """
    name = os.fspath(directory_or_id)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(next(path.glob(pattern), None) for pattern in _VOCABULARY_FILES):
            raise UserError(f"{path} holds no tokenizer, none of {', '.join(_VOCABULARY_FILES)}; copy it there")
        name = str(path)
    elif path.exists():
        raise UserError(f"{path} is a file; give the directory that holds the tokenizer's files")
    elif name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise UserError(f"no such directory: {path}; give a directory that holds tokenizer.json or vocab.txt")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": it is not wanted
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a config.json of a family that is qtx's own is no reason for advice
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the readers of the many formats raise anything, bare Exception included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load a tokenizer from {name!r}: {reason}; give a directory that holds one") from error
    finally:
        logging.set_verbosity(verbosity)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that a tokenizer can feed a model.

    Args:
      tokenizer: the tokenizer.
      vocab_size: rows of the model's word embedding.

    Raises:
      UserError: the tokenizer has ids that the embedding lacks, or knows no word of plain English.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding only {vocab_size} rows; "
            "use the tokenizer that belongs to the checkpoint"
        )
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if all(token == tokenizer.unk_token_id for token in ids):
        raise UserError(
            f"the tokenizer knows none of the words in {_PROBE!r}; its vocabulary file is missing or of another kind"
        )


def encode(tokenizer: PreTrainedTokenizerBase, examples: Examples, max_length: int) -> Encoded:
    """Tokenizes examples, with the tokenizer's special tokens.

    Args:
      tokenizer: from `load_tokenizer`.
      examples: one text column, or two, which are encoded as a pair.
      max_length: the most tokens an example may have, special tokens included; the longer text of a pair is cut first.

    Raises:
      UserError: `max_length` leaves no room for text.
    """
    columns = len(examples.texts)
    special = tokenizer.num_special_tokens_to_add(pair=columns == 2)
    if max_length < special + columns:
        raise UserError(
            f"max_length {max_length} leaves no room for text beside {special} special tokens; "
            f"use at least {special + columns}"
        )
    ids, types, lengths = [], [], []
    for start in range(0, len(examples), _CHUNK):
        chunk = tokenizer(
            *(column[start : start + _CHUNK] for column in examples.texts),
            truncation="longest_first",
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        lengths += [len(row) for row in chunk["input_ids"]]
        ids.append(np.concatenate([np.asarray(row, np.int32) for row in chunk["input_ids"]]))
        types.append(np.concatenate([np.asarray(row, np.int32) for row in chunk["token_type_ids"]]))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Encoded(np.concatenate(ids), np.concatenate(types), offsets, examples.labels)
