"""The built-in tasks: what a task's columns, labels, languages and metrics are called, and nothing about files."""

from __future__ import annotations

import dataclasses
import re

from qtx.errors import UserError, near_misses

METRICS = ("accuracy", "f1", "weighted_f1", "matthews", "pearson", "spearman")


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of classification or regression, of texts or images.

    The main score of a task is the mean of its metrics; MNLI's final score is the mean of its accuracies on
    `validation` and `validation_mismatched`.

    Attributes:
      name: what users write.
      columns: the names of the one or two text columns; none for images.
      labels: class names, in the order of the class ids; empty for regression.
      metrics: names out of `METRICS`.
      also: further ones that are reported beside them and are no part of the score.
      tfds: the name in tensorflow-datasets; None where there is none.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    tfds: str | None = None
    also: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        """Whether the labels are real numbers instead of classes."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """The number of outputs a head needs: one per class, and 1 for regression."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")
_WEIGHTED = ("weighted_f1",)
_ENTAILMENT = ("entailment", "not_entailment")
_NEWSGROUPS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
_REUTERS_8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_REUTERS_52 = tuple(
    "acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas gnp gold grain heat housing income "
    "instal-debt interest ipi iron-steel jet jobs lead lei livestock lumber meal-feed money-fx money-supply nat-gas "
    "nickel orange pet-chem platinum potato reserves retail rubber ship strategic-metal sugar tea tin trade veg-oil wpi "
    "zinc".split()
)
_DISEASES = tuple(f"C{i:02d}" for i in range(1, 24))  # MeSH categories

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), "glue/cola"),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "glue/sst2"),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "glue/mrpc"),
        Task("stsb", _PAIR, (), ("pearson", "spearman"), "glue/stsb"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "glue/qqp"),
        Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), tfds="glue/mnli"),
        Task("qnli", ("question", "sentence"), _ENTAILMENT, tfds="glue/qnli"),
        Task("rte", _PAIR, _ENTAILMENT, tfds="glue/rte"),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), tfds="glue/wnli"),
        Task("ag_news", ("text",), ("World", "Sports", "Business", "Sci/Tech"), tfds="ag_news_subset"),
        Task("film_reviews", ("text",), ("rotten", "fresh")),
        Task("bbc_news", ("text",), ("business", "entertainment", "politics", "sports", "tech")),
        # The corpora of TextGCN (Yao, Mao and Luo 2019). Classes are sorted: the published order changes with every build.
        Task("20ng", ("text",), _NEWSGROUPS, also=_WEIGHTED),
        Task("R8", ("text",), _REUTERS_8, also=_WEIGHTED),
        Task("R52", ("text",), _REUTERS_52, also=_WEIGHTED),
        Task("ohsumed", ("text",), _DISEASES, also=_WEIGHTED),
        Task("mr", ("text",), ("0", "1"), also=_WEIGHTED),  # negative, positive
    )
}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cifar10", (), _CIFAR10, tfds="cifar10"),
        Task("mnist", (), tuple("0123456789"), tfds="mnist"),
    )
}
_BY_LOWER = {name.lower(): task for name, task in (TASKS | IMAGE_TASKS).items()}


def get_task(name: str) -> Task:
    """Returns the built-in task of that name; capitals make no difference (`r8` is `R8`).

    Raises:
      UserError: there is no such task; the message names the nearest ones.
    """
    if name.lower() not in _BY_LOWER:
        raise UserError(f"unknown task {name!r}{near_misses(name, TASKS | IMAGE_TASKS)}")
    return _BY_LOWER[name.lower()]


@dataclasses.dataclass(frozen=True)
class TranslationTask:
    """Translation of sentences of one language into another.

    Attributes:
      name: what users write: one of `CORPORA`, or the name of their own files.
      source: the code of the language to translate from, such as `en`.
      target: the code of the language to translate into.
    """

    name: str
    source: str
    target: str

    @property
    def direction(self) -> str:
        """Both languages, as in `en-de`."""
        return f"{self.source}-{self.target}"


CORPORA = ("multi30k", "iwslt14", "tatoeba", "ted_talks")
_DIRECTION = re.compile(r"([a-z]{2,3}(?:_[a-z]+)?)-([a-z]{2,3}(?:_[a-z]+)?)")


def get_translation_task(name: str, direction: str = "en-de") -> TranslationTask:
    """Returns a built-in corpus in one direction; which languages it has is known when it is loaded.

    Args:
      name: one of `CORPORA`.
      direction: source and target language, such as `en-de` or `de-en`; a country follows an underscore (`pt_br`).

    Raises:
      UserError: there is no such corpus, or the direction is not one.
    """
    if name not in CORPORA:
        raise UserError(f"unknown corpus {name!r}{near_misses(name, CORPORA)}")
    return TranslationTask(name, *languages_of(direction))


def languages_of(direction: str) -> tuple[str, str]:
    """Returns the source and the target language of a direction such as `en-de`.

    Raises:
      UserError: it is not of that form, or both are the same.
    """
    match = _DIRECTION.fullmatch(direction)
    if match is None or match[1] == match[2]:
        raise UserError(f"{direction!r} is not a direction; name two languages, source first, such as en-de or de-en")
    return match[1], match[2]
