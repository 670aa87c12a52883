"""Data augmentation for distillation: what may stand for a word, and the augmented training file.

The procedure is TinyBERT's (Jiao et al. 2020, algorithm 1), see `qtx.data.augmentation`. Masked positions of many sentences are
one batch of a compiled program, of few lengths; neighbours among word vectors are products of blocks of them.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qtx.data.augmentation import Augmentation, Sentence, Vectors, augmented, draws, masked_rows, split
from qtx.data.batching import Batches, in_order
from qtx.data.sources import TrainingRows
from qtx.files import whole_file, write_text
from qtx.train.phase import inputs
from qtx.train.sharding import replicate, shard_batch, shard_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Guesses = Callable[[Sequence[Sentence], int], dict[tuple[int, int], list[str]]]
"""What a mask may hide: of sentences, and how many words, words by the numbers of sentence and word."""
Neighbours = Callable[[Sequence[str], int], dict[str, list[str]]]
"""Words near to words, and how many; a word that has none is left out."""


class MaskedWords:
    """Guesses words in the place of a mask.

    Attributes:
      shortest: tokens of the shortest rows that are compiled; each longer length is twice as long, up to the model's limit.
    """

    shortest = 16

    def __init__(
        self, model: nn.Module, params: Any, tokenizer: PreTrainedTokenizerBase, mesh: Mesh, batch_size: int = 64
    ):
        """Places the model.

        Args:
          model: from `qtx.models.load_masked_lm`, with its parameters.
          params: nested parameters.
          tokenizer: of the model; see `qtx.data.augmentation.check_word_pieces`.
          mesh: where to compute.
          batch_size: rows of a batch; a multiple of the devices along the data axis.
        """
        self.model, self.tokenizer, self.mesh, self.batch_size = model, tokenizer, mesh, batch_size
        self.params = shard_tree(params, mesh)
        config = model.config  # type: ignore[attr-defined]
        self.limit = config.max_positions
        lengths = [self.limit]
        while lengths[0] > self.shortest:
            lengths.insert(0, max(self.shortest, (lengths[0] + 1) // 2))
        self.lengths = tuple(lengths)
        words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # Rows of the table beyond the vocabulary are no words, and neither are later pieces of words.
        words = ["" if word is None or word.startswith("##") else word for word in words]
        self.words = np.array(words + [""] * (config.vocab_size - len(words)), object)

    def __call__(self, sentences: Sequence[Sentence], count: int) -> dict[tuple[int, int], list[str]]:
        """Returns, for each eligible word of one piece, the best of `count` guesses that are words of their own."""
        rows, owners = masked_rows(sentences, self.tokenizer, self.limit)
        if not owners:
            return {}
        pad = self.model.config.pad_token_id  # type: ignore[attr-defined]
        batches = Batches(rows, self.batch_size, self.lengths, shuffle=False, pad_id=pad, epochs=1)
        count, best, index = min(count, len(self.words)), [], []
        with jax.set_mesh(self.mesh):
            for number in range(len(batches)):
                batch = batches[number]
                index.append(batch.pop("index"))
                placed = shard_batch(batch, self.mesh)  # its labels are the positions of the masks
                best.append(_best(self.model, count, self.params, inputs(self.model, placed), placed["labels"]))
        found = self.words[in_order(jax.device_get(best), index, len(owners))]
        return {owner: [word for word in words if word] for owner, words in zip(owners, found.tolist(), strict=True)}


@partial(jax.jit, static_argnums=(0, 1))
def _best(model: nn.Module, count: int, params: Any, args: tuple[jax.Array, ...], positions: jax.Array) -> jax.Array:
    """Returns the ids of the likeliest words at one position of each row, `[B, count]`, the likeliest first."""
    out: Any = model.apply({"params": params}, *args, positions[:, None])
    return jax.lax.top_k(out.logits[:, 0], count)[1]


class NearestWords:
    """Finds the nearest of word vectors by their cosine. What was asked once is not computed again."""

    block = 64
    """Words that are looked up together."""

    def __init__(self, vectors: Vectors, mesh: Mesh):
        """Places the vectors on the devices of a mesh."""
        self.words, self.table = vectors.words, replicate(vectors.table, mesh)
        self.numbers = {word: number for number, word in enumerate(vectors.words)}
        self.known: dict[tuple[str, int], list[str]] = {}

    def __call__(self, words: Sequence[str], count: int) -> dict[str, list[str]]:
        """Returns the `count` nearest other words, the nearest first; capitalized if the word is."""
        asked = dict.fromkeys(word for word in words if word in self.numbers)
        new = [word for word in asked if (word, count) not in self.known]
        for start in range(0, len(new), self.block):
            part = new[start : start + self.block]
            rows = np.zeros(self.block, np.int32)
            rows[: len(part)] = [self.numbers[word] for word in part]
            nearest = np.asarray(_nearest(self.table, rows, min(count, len(self.words) - 1)))
            for word, numbers in zip(part, nearest.tolist(), strict=False):
                others = [self.words[number] for number in numbers]
                self.known[word, count] = [other.title() for other in others] if word.istitle() else others
        return {word: self.known[word, count] for word in asked}


@partial(jax.jit, static_argnums=2)
def _nearest(table: jax.Array, rows: jax.Array, count: int) -> jax.Array:
    """Returns the numbers of the rows nearest to some rows `[R]` of a table `[N, D]`, themselves left out: `[R, count]`."""
    similar = jnp.matmul(table[rows], table.T, precision="highest")
    similar = similar.at[jnp.arange(len(rows)), rows].set(-jnp.inf)
    return jax.lax.top_k(similar, count)[1]


def candidates(
    sentences: Sequence[Sentence], count: int, guesses: Guesses, neighbours: Neighbours
) -> list[list[list[str]]]:
    """Returns what may stand for each eligible word of sentences: the word itself where nothing else is found.

    Args:
      sentences: from `qtx.data.augmentation.split`.
      count: candidates of a word at most.
      guesses: for words of one piece; see `MaskedWords`.
      neighbours: for words of several; see `NearestWords`.
    """
    several = [
        sentence.words[word]
        for sentence in sentences
        for word, (start, stop) in zip(sentence.eligible, sentence.spans, strict=True)
        if stop - start > 1
    ]
    guessed, near = guesses(sentences, count), neighbours(several, count)

    def of(number: int, sentence: Sentence, word: int, span: tuple[int, int]) -> list[str]:
        text = sentence.words[word]
        found = guessed.get((number, word)) if span[1] - span[0] == 1 else near.get(text)
        return found or [text]

    return [
        [of(number, each, word, span) for word, span in zip(each.eligible, each.spans, strict=True)]
        for number, each in enumerate(sentences)
    ]


SHARD = 256
"""Examples that are augmented and saved together: what a killed run loses, and enough to fill batches."""


@dataclasses.dataclass(frozen=True)
class Augmenter:
    """Augments training examples.

    Attributes:
      settings: how.
      tokenizer: of the masked language model.
      guesses: see `candidates`.
      neighbours: see `candidates`.
    """

    settings: Augmentation
    tokenizer: PreTrainedTokenizerBase
    guesses: Guesses
    neighbours: Neighbours

    def __call__(self, rows: TrainingRows, start: int, stop: int) -> list[tuple[str, ...]]:
        """Returns the rows that come of the examples from `start` up to `stop`, in order.

        Of each example the texts are augmented one after the other. All else stays, the label above all.
        """
        chosen = rows.rows[start:stop]
        texts = list(dict.fromkeys(row[column] for row in chosen for column in rows.texts))
        sentences = split(self.tokenizer, texts)
        found = candidates(sentences, self.settings.candidates, self.guesses, self.neighbours)
        known = dict(zip(texts, zip(sentences, found, strict=True), strict=True))
        made = []
        for example, row in enumerate(chosen, start):
            fields = list(row)
            for number, column in enumerate(rows.texts):
                sentence, words = known[row[column]]
                copies = augmented(sentence, words, *draws(self.settings, example, number, words))
                for copy in copies:
                    made.append((*fields[:column], copy, *fields[column + 1 :]))
                if self.settings.pairs == "published":
                    fields[column] = copies[-1]
        return made


def write_augmented(
    path: Path, rows: TrainingRows, augment: Augmenter, cache: Path, told: Callable[[int], None], shard: int = SHARD
) -> int:
    """Writes a task's augmented training file; when it was interrupted, the same call goes on.

    Args:
      path: what to write: a header line, if the task's file has one, and rows with tabs between fields.
      rows: the training examples.
      augment: does it.
      cache: directory of finished parts, for these examples and this augmenter alone; it stays.
      told: called with the number of examples that are done.
      shard: examples of a part.

    Returns:
      How many rows were written, the header left out.
    """
    parts = [cache / f"{start:09d}.tsv" for start in range(0, len(rows), shard)]
    for number, part in enumerate(parts):
        stop = min((number + 1) * shard, len(rows))
        if not part.exists():
            write_text(part, "".join(map(_line, augment(rows, number * shard, stop))))
        told(stop)
    lines = 0
    with whole_file(path) as partial_file, open(partial_file, "wb") as file:
        if rows.has_header:
            file.write(_line(rows.names).encode())
        for part in parts:
            with open(part, "rb") as source:
                lines += sum(1 for _ in source)
                source.seek(0)
                shutil.copyfileobj(source, file)
    return lines


def _line(fields: Sequence[str]) -> str:
    """Returns a line of a TSV file, in which a field has neither tabs nor line breaks."""
    return "\t".join(re.sub(r"[\t\r\n]+", " ", field) for field in fields) + "\n"
