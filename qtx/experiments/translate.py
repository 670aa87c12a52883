"""Translating text with a trained model: lines in, as many lines out, in their order."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from qtx import models
from qtx.data.pair_tokenizer import UNK, PairTokenizer, Rows, load
from qtx.data.reading import read_text, standard_input
from qtx.errors import UserError, warn
from qtx.export.packed import WEIGHTS_FILE, load_quantized
from qtx.files import check_writable, checksum, write_text
from qtx.methods.translation import Decoding, check_positions, translate_all
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from qtx.train.logging import progress
from qtx.train.sharding import make_mesh

_NAMED = 5  # lines that a warning names at most


@dataclasses.dataclass(frozen=True, eq=False)
class Translator:
    """A trained translation model with its tokenizer.

        translator = Translator.load("runs/en_de/quantized")
        translator(["Two dogs play in the snow."])

    Attributes:
      model: the module.
      variables: its parameters, and ranges if it is quantized.
      tokenizer: of both languages.
      mesh: where to compute.
    """

    model: nn.Module
    variables: dict[str, Any]
    tokenizer: PairTokenizer
    mesh: Mesh

    @classmethod
    def load(cls, name: str, direction: str | None = None) -> Translator:
        """Loads a checkpoint (`model/` of a run) or a packed artifact (`quantized/`).

        Args:
          name: see `qtx.models.locate`.
          direction: the one that is wanted, such as `en-de`; None: whatever the model's is.

        Raises:
          UserError: on a model that does not translate, or another direction, or a vocabulary that does not fit.
        """
        directory = models.locate(name)
        packed = (directory / WEIGHTS_FILE).is_file()
        if not packed and not isinstance(models.read_config(directory)[1], EncoderDecoderConfig):
            raise UserError(f"{name} does not translate; give the directory of a translation model")
        tokenizer = load(directory, direction)
        if packed:
            artifact = load_quantized(directory)
            model, variables, config = artifact.model, artifact.variables, artifact.config
        else:
            checkpoint = models.load(str(directory))
            config, variables = checkpoint.config, {"params": checkpoint.params}
            model = checkpoint.family.module(config=config)
        if not isinstance(config, EncoderDecoderConfig):
            raise UserError(f"{name} does not translate; give the directory of a translation model")
        tokenizer.check_sizes(config.source_vocab_size, config.target_vocab_size, config.tied == "all")
        return cls(model, variables, tokenizer, make_mesh())

    def __call__(
        self,
        sentences: Sequence[str],
        decoding: Decoding = Decoding(),
        max_length: int = 100,
        warn: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Translates sentences; one without words is translated by an empty one.

        Args:
          sentences: any number, in any order of lengths.
          decoding: how.
          max_length: source tokens; what a sentence has beyond them is left out.
          warn: told of sentences that were cut, and of unknown words.

        Returns:
          As many translations, in the order of the sentences.

        Raises: see `encoded`.
        """
        return self.translated(self.encoded(sentences, decoding, max_length, warn), decoding)

    def encoded(
        self, sentences: Sequence[str], decoding: Decoding, max_length: int, warn: Callable[[str], None] | None = None
    ) -> Rows:
        """Returns the ids of sentences, a row each; for the arguments see `__call__`.

        Raises:
          UserError: on one text in place of several, or lengths below 1 or beyond the positions of the model.
        """
        if isinstance(sentences, str):
            raise UserError("sentences must be a list of texts; put the one text into a list")
        if max_length < 1:
            raise UserError(f"max_length must be at least 1, got {max_length}")
        check_positions(self.model.config, {"max_length": max_length, "limit": decoding.limit})  # type: ignore[attr-defined]
        rows = self.tokenizer.encode_source(sentences)
        long = [str(number) for number, length in enumerate(rows.lengths, 1) if length > max_length]
        if long and warn is not None:
            which = ", ".join(long[:_NAMED]) + (", ..." if len(long) > _NAMED else "")
            warn(f"sentences cut after {max_length} tokens: {len(long)} (lines {which})")
        unknown = int((rows.ids == UNK).sum())
        if unknown and warn is not None:
            warn(f"{unknown} of {len(rows.ids)} source words are not in the vocabulary")
        return rows.cut(max_length)

    def translated(self, rows: Rows, decoding: Decoding, kept: Path | None = None) -> list[str]:
        """Translates encoded sentences; `kept`: see `qtx.methods.translation.translate_all`."""
        with progress(len(rows), f"translate {self.tokenizer.task.direction}", examples_per_step=1) as bar:
            ids = translate_all(self.model, self.variables, rows, decoding, self.mesh, told=bar.update, kept=kept)
        return self.tokenizer.decode_target(ids)

    def made_from(self, rows: Rows, decoding: Decoding) -> str:
        """Returns a name for all that decides what `translated` computes; see `qtx.files.checksum`."""
        settings = repr((self.model, decoding, self.mesh.shape))
        return checksum((settings, rows.ids, rows.lengths, *map(np.asarray, jax.tree.leaves(self.variables))))


def translate_file(
    model: str, source: str, target: str, direction: str | None, decoding: Decoding, max_length: int
) -> None:
    """Translates a file line by line.

    Args:
      model: see `Translator.load`.
      source: path of a UTF-8 file, plain or compressed; `-`: standard input.
      target: path, which gets its file when all of it is translated; until then batches that are done lie beside it, in
        `TARGET.parts_...`, and the same call goes on from them. `-`: standard output.
      direction: see `Translator.load`.
      decoding: how.
      max_length: see `Translator`.

    Raises:
      UserError: on a target that cannot be written, before anything is loaded; and see `Translator`.
    """
    if target != "-":
        check_writable(target)
    translator = Translator.load(model, direction)
    text = standard_input() if source == "-" else read_text(Path(source))
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []

    rows = translator.encoded(lines, decoding, max_length, warn)
    kept = None if target == "-" else Path(f"{target}.parts_{translator.made_from(rows, decoding)}")
    translated = "".join(f"{line}\n" for line in translator.translated(rows, decoding, kept))
    if kept is None:
        sys.stdout.write(translated)
    else:
        write_text(Path(target), translated)
        shutil.rmtree(kept, ignore_errors=True)  # there is none for an empty file
