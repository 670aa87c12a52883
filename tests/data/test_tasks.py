"""The task table."""

import pytest

from qtx.data.tasks import METRICS, TASKS, Task, TranslationTask, get_task, get_translation_task, languages_of
from qtx.data.textgcn import CORPORA
from qtx.errors import UserError


def test_the_nine_glue_tasks_ag_news_the_two_packaged_ones_and_textgcn():
    glue = {name for name, task in TASKS.items() if (task.tfds or "").startswith("glue/")}
    assert glue == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    assert TASKS.keys() - glue == {"ag_news", "film_reviews", "bbc_news", *CORPORA}


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_is_consistent(task):
    assert len(task.columns) in (1, 2)
    assert {*task.metrics, *task.also} <= set(METRICS) and task.metrics and not set(task.metrics) & set(task.also)
    assert task.is_regression == (task.name == "stsb") == (task.num_labels == 1)
    assert len(set(task.labels)) == len(task.labels)
    assert get_task(task.name) is task


def test_label_ids_follow_the_published_order():
    assert get_task("mnli").labels == ("entailment", "neutral", "contradiction")
    assert get_task("rte").labels.index("entailment") == 0
    assert get_task("wnli").labels.index("entailment") == 1
    assert get_task("ag_news").labels == ("World", "Sports", "Business", "Sci/Tech")
    assert get_task("cola").metrics == ("matthews",)
    assert get_task("mrpc").metrics == get_task("qqp").metrics == ("accuracy", "f1")
    assert get_task("stsb").metrics == ("pearson", "spearman")
    assert all((TASKS[name].metrics, TASKS[name].also) == (("accuracy",), ("weighted_f1",)) for name in CORPORA)


def test_classes_of_textgcn_are_sorted_and_capitals_make_no_difference():
    assert [TASKS[name].num_labels for name in CORPORA] == [20, 8, 52, 23, 2]
    assert all(list(TASKS[name].labels) == sorted(TASKS[name].labels) for name in CORPORA)
    assert get_task("r8") is get_task("R8") and get_task("RTE") is get_task("rte")


def test_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown task 'film_review'; did you mean 'film_reviews'\?"):
        get_task("film_review")


def test_tasks_hash_so_that_they_can_be_static_arguments():
    assert hash(Task("a", ("text",), ("x", "y"))) == hash(Task("a", ("text",), ("x", "y")))


def test_translation_tasks_have_two_languages():
    task = get_translation_task("multi30k", "de-en")
    assert (task.source, task.target, task.direction) == ("de", "en", "de-en")
    assert hash(task) == hash(TranslationTask("multi30k", "de", "en"))
    assert languages_of("pt_br-en") == ("pt_br", "en")
    with pytest.raises(UserError, match=r"unknown corpus 'multi30'; did you mean 'multi30k'\?"):
        get_translation_task("multi30")
    for direction in ("en", "en-en", "en-de-fr", "E2G", "en-", ""):
        with pytest.raises(UserError, match="is not a direction; name two languages"):
            get_translation_task("multi30k", direction)
