"""Where sentence pairs come from: parallel files of known corpora, tensorflow-datasets, the user's own parallel files.

Line n of a source file is translated by line n of its target file. What would shift one against the other is an error;
no pair is dropped in evaluation.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qtx.data.reading import (
    as_text,
    check_limits,
    find_files,
    from_tfds,
    limited,
    places,
    read_lines,
    read_text,
)
from qtx.data.tasks import TranslationTask, get_translation_task
from qtx.errors import UserError

Paths = tuple[str | os.PathLike[str], str | os.PathLike[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """One split: sentences and their translations, without white space around them.

    Attributes:
      source: N sentences.
      target: N translations.
      dropped: how many pairs with an empty side were left out; always 0 in evaluation, which keeps them.
    """

    source: list[str]
    target: list[str]
    dropped: int = 0

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.source)

    def take(self, rows: np.ndarray) -> Pairs:
        """Returns the pairs at these row numbers, in that order; none was left out of them."""
        return Pairs([self.source[row] for row in rows], [self.target[row] for row in rows])


@dataclasses.dataclass(frozen=True, eq=False)
class ParallelDataset:
    """A translation task with its splits: always `train` and `validation`, and tests such as `test`."""

    task: TranslationTask
    splits: dict[str, Pairs]


def load_pairs(
    task: str | TranslationTask,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> ParallelDataset:
    """Loads a built-in corpus.

    `multi30k` and `iwslt14` are files with one sentence per line (plain or .gz) in `<data_dir>/NAME/`, such as `train.en`
    and `train.de`. Multi30k's `test` is `test_2016_flickr`; its other tests keep their names. Of iwslt14 part of the
    training pairs will do (`train_subset`). `tatoeba` is a table without header, English first, in `<data_dir>/tatoeba/`,
    such as `eng-deu.tsv`; a twentieth of its English sentences, with all their translations, is each of validation and
    test. `ted_talks`, the talks that IWSLT's sets are taken from (Qi et al. 2018), comes through tensorflow-datasets, which
    has no builder of IWSLT itself.

    Args:
      task: from `get_translation_task`, or a corpus by name, English to German.
      data_dir: where the files are; the environment variable QTX_DATA_DIR when not given.
      seed: of tatoeba's split and of the limited subsets.
      limit_train: keep a random subset of at most this many training pairs.
      limit_eval: the same for every other split.

    Raises:
      UserError: unknown corpus or language, bad limit, missing or damaged data, files of different lengths.
    """
    task = get_translation_task(task) if isinstance(task, str) else task
    check_limits(limit_train, limit_eval)
    if task.name not in _LOADERS:
        raise UserError(f"corpus {task.name!r} is not built in; use load_parallel for your own files")
    splits = _LOADERS[task.name](task, data_dir, seed)
    return ParallelDataset(task, limited(splits, limit_train, limit_eval, seed))


def load_parallel(
    task: TranslationTask,
    files: Mapping[str, Paths],
    seed: int = 0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> ParallelDataset:
    """Loads parallel files: one sentence per line, UTF-8, plain or compressed (.gz, .bz2).

    Args:
      task: a name and the two languages of the files.
      files: (source file, target file) of every split; `train` and `validation` must be among them.
      seed: of the limited subsets.
      limit_train: keep a random subset of at most this many training pairs.
      limit_eval: the same for every other split.

    Raises:
      UserError: a missing split, a bad limit, anything wrong with a file, files of different lengths.
    """
    check_limits(limit_train, limit_eval)
    for name in ("train", "validation"):
        if name not in files:
            raise UserError(f"{task.name}: no files for the split {name!r}; give its source and its target file")
    splits = {name: _read_pair(name, Path(source), Path(target)) for name, (source, target) in files.items()}
    return ParallelDataset(task, limited(splits, limit_train, limit_eval, seed))


# --------------------------------------------------------------------------------------- one file per language


_FILES: dict[str, dict[str, Sequence[str]]] = {
    "multi30k": {
        "train": ("train",),
        "validation": ("val",),
        "test": ("test_2016_flickr",),
        "test_2017_flickr": ("test_2017_flickr",),
        "test_2017_mscoco": ("test_2017_mscoco",),
        "test_2018_flickr": ("test_2018_flickr",),
    },
    "iwslt14": {"train": ("train", "train_subset"), "validation": ("valid",), "test": ("test",)},
}
_NEEDED = ("train", "validation", "test")
FURTHER_TESTS = tuple(name for splits in _FILES.values() for name in splits if name not in _NEEDED)
"""Tests that a corpus may have beside `test`."""


def _load_files(task: TranslationTask, data_dir: str | os.PathLike[str] | None, seed: int) -> dict[str, Pairs]:
    files = _FILES[task.name]
    folder = _folder(task, data_dir, f"{files['train'][0]}.{task.source}")
    _check_languages(task, folder, (language for stem in files["train"] for language in _suffixes(folder, stem)))
    optional = [name for name in files if name not in _NEEDED]
    sides = []
    for language in (task.source, task.target):
        names = {split: [f"{stem}.{language}" for stem in stems] for split, stems in files.items()}
        sides.append(find_files(task.name, folder, names, optional))
    return {name: _read_pair(name, sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]}


def _suffixes(folder: Path, stem: str) -> list[str]:
    """Returns the languages that a file exists in."""
    names = [path.name.removesuffix(".gz") for path in folder.glob(f"{stem}.*") if path.is_file()]
    return [name.removeprefix(f"{stem}.") for name in names]


def _read_pair(split: str, source: Path, target: Path) -> Pairs:
    sides = read_lines(source), read_lines(target)
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{source} has {len(sides[0])} lines but {target} has {len(sides[1])}; "
            "line n of one must translate line n of the other"
        )
    return _made(split, *sides, str(source))


def _made(split: str, source: list[str], target: list[str], origin: str) -> Pairs:
    """Returns a split; pairs with an empty side are left out in training, as published (section 1), and counted."""
    if split != "train":
        return Pairs(source, target)
    kept = [pair for pair in zip(source, target, strict=True) if all(pair)]
    if not kept:
        raise UserError(f"{origin}: no pair has text on both sides; check the files")
    return Pairs([pair[0] for pair in kept], [pair[1] for pair in kept], len(source) - len(kept))


# ------------------------------------------------------------------------------------------------ tatoeba


_TABLE = re.compile(r"(eng)-([a-z]{3}).*\.tsv(?:\.gz)?")
_SHORT_CODES = {"eng": "en", "deu": "de", "fra": "fr", "spa": "es", "ita": "it", "por": "pt", "nld": "nl", "rus": "ru"}


def _load_tatoeba(task: TranslationTask, data_dir: str | os.PathLike[str] | None, seed: int) -> dict[str, Pairs]:
    folder = _folder(task, data_dir, "eng-deu.tsv")
    tables: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _TABLE.fullmatch(path.name):
            tables.setdefault(tuple(_SHORT_CODES.get(code, code) for code in match.groups()), path)
    wanted = (task.source, task.target)
    if not {wanted, wanted[::-1]} & tables.keys():
        found = " and ".join("-".join(codes) for codes in tables) or "no table such as eng-deu.tsv"
        raise UserError(f"{task.name} has no {task.direction}; {folder} holds {found}, which serve both directions")
    path = tables.get(wanted) or tables[wanted[::-1]]
    rows = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) < 2:
            raise UserError(f"{path}, line {number}: expected two columns, found {len(fields)}; repair the line")
        rows.append((fields[0].strip(), fields[1].strip()))  # what may follow names the sentences' authors
    # One English sentence has several translations: all go to one split, else its words would be known before the test.
    sentences = list(dict.fromkeys(english for english, _ in rows))
    if len(sentences) < 3:
        raise UserError(f"{path}: {len(sentences)} English sentences are too few to split; add some")
    order = np.random.default_rng(seed).permutation(len(sentences))
    size = max(1, len(sentences) // 20)
    chosen = {"validation": order[:size], "test": order[size : 2 * size], "train": order[2 * size :]}
    split_of = {sentences[i]: name for name, numbers in chosen.items() for i in numbers}
    splits = {}
    for name in _NEEDED:
        pairs = [row for row in rows if split_of[row[0]] == name]
        sides = [row[0] for row in pairs], [row[1] for row in pairs]
        splits[name] = _made(name, *(sides if task.source == "en" else sides[::-1]), str(path))
    return splits


# ------------------------------------------------------------------------------------ tensorflow-datasets


def _load_ted_talks(task: TranslationTask, data_dir: str | os.PathLike[str] | None, seed: int) -> dict[str, Pairs]:
    """TED talks in sixty languages; a talk's sentences are not all there in every language."""
    raw = from_tfds(task.name, "ted_multi_translate", "http://phontron.com", "", ())
    splits: dict[str, Pairs] = {}
    wanted = [language.replace("_", "-") for language in (task.source, task.target)]
    for name, rows in raw.items():
        languages: set[str] = set()
        pairs = []
        for row in rows:
            sides = row["translations"]
            known = {as_text(k): as_text(v) for k, v in zip(sides["language"], sides["translation"], strict=True)}
            languages.update(known)
            if all(language in known for language in wanted):
                pairs.append([known[language].strip() for language in wanted])
        if not pairs:
            found = ", ".join(sorted(language.replace("-", "_") for language in languages))
            raise UserError(f"{task.name} has no {task.direction} in {name}; its languages are {found}")
        splits[name] = _made(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs], task.name)
    return splits


_LOADERS = {name: _load_files for name in _FILES} | {"tatoeba": _load_tatoeba, "ted_talks": _load_ted_talks}


# ---------------------------------------------------------------------------------------------- languages


def _folder(task: TranslationTask, data_dir: str | os.PathLike[str] | None, example: str) -> Path:
    searched = places(data_dir, (task.name,))
    folder = next((path for path in searched if path.is_dir()), None)
    if folder is None:
        looked = f"no {searched[0]}" if searched else "no data directory is set"
        raise UserError(
            f"{task.name}: {looked}; point --data_dir or QTX_DATA_DIR at a folder with {task.name}/{example}, "
            "or take ted_talks, which tensorflow-datasets downloads"
        )
    return folder


def _check_languages(task: TranslationTask, folder: Path, languages: Iterable[str]) -> None:
    known = sorted(set(languages))
    for language in (task.source, task.target):
        if language not in known:
            found = ", ".join(known) or "no training files"
            raise UserError(f"{task.name} has no {task.direction}; {folder} holds {found}")
