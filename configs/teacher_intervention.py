r"""Ternary transformers by distillation, and teacher intervention (Kim et al. 2023): MiniLM on GLUE.

    python launch/train.py --config=configs/teacher_intervention.py:cola+full_precision --data_dir=DATA --workdir=runs/cola
    python launch/train.py --config=configs/teacher_intervention.py:cola+gradual --config.model.name=runs/cola/model \
        --data_dir=DATA --workdir=runs/cola_gradual
    python launch/sweep.py --config=configs/teacher_intervention.py:glue --data_dir=DATA --workdir=runs/glue

The student begins as its teacher, a model that is trained on the task: weights and word table with three values, 8 bits for
what enters a product. The argument is a task and a method, `TASK+METHOD`, which is what the sweep over the task runs; a method
alone is RTE's. `glue` is a sweep over seeds of all methods on all tasks, and `rte`, `mrpc`, `stsb`, `cola` and `sst2` are
those over one of them. Methods are

    full_precision            the teacher: fine-tuning of the sentence encoder
    ternary                   ternary training on the labels, without a teacher
    ternarybert               distillation for as many steps (logits, hidden states, attention scores)
    distilled                 distillation by the losses of intervention (attention outputs, too) without intervention
    output, context, map      60 steps (CoLA: 120) with the teacher's tensor in place, then distillation
    gradual, inverted, stochastic  the same with one kind after the other, the other way round, or drawn
    METHOD+quarter            a quarter of the steps, those with the teacher's tensors included
    published_METHOD          BertAdam at 2e-5; padding counts in ranges and losses, and its row of the table is not trained

Three epochs at 1e-4 (2e-5, as published for BERT-base, is too slow for this encoder), linear decay after a tenth of warm-up,
batches of 32 (CoLA: 16), texts of 128 tokens (CoLA, SST-2: 64). `TASK` sets these: another one by `--config.task` would keep
what RTE has.

Expected of `cola` (Matthews, one seed): full precision 0.26, ternary 0.23, ternarybert 0.24, gradual 0.22, distilled 0.23, in a
quarter of the steps ternarybert 0.13 and gradual 0.11 (that with the 120 first steps whole, where now they are 30). Of `mrpc`
(mean of accuracy and F1, one seed, eight minutes a row on a core): full precision 0.81, ternary 0.76, ternarybert, gradual and
distilled 0.77, the other interventions 0.78, in a quarter of the steps ternarybert 0.75 and gradual 0.76. Of `rte`
(accuracy, one seed): full precision 0.61, ternary 0.51, ternarybert 0.52, gradual 0.53. The rest was not run.

`smoke` needs no trained model: it fine-tunes for nine steps, then trains `ternary` for as many. `smoke+sweep` is a sweep of
full precision and `gradual`, which begins with its model. They take some minutes of CPU time.
"""

from collections.abc import Iterable

from qtx.errors import UserError
from qtx.experiments.config import base, changed, sweeping, without_teacher

INTERVENTIONS = ("output", "context", "map", "gradual", "inverted", "stochastic")
FULL = "full_precision"
PUBLISHED = {
    "quant.student": "published",
    "phases.intervene.optimizer.name": "bert_adam",
    "phases.qat.optimizer.name": "bert_adam",
    "phases.intervene.optimizer.eps": 1e-6,
    "phases.qat.optimizer.eps": 1e-6,
    "phases.intervene.optimizer.learning_rate": 2e-5,
    "phases.qat.optimizer.learning_rate": 2e-5,
}


def methods() -> dict[str, dict]:
    """Returns the fields in which each method differs from the others."""
    found: dict[str, dict] = {
        FULL: {"recipe": ("finetune",), "model.fresh_head": True},
        "ternary": {"recipe": ("qat",)},
        "ternarybert": {"recipe": ("qat",), "phases.qat.losses": "ternarybert"},
        "distilled": {"recipe": ("qat",), "phases.qat.losses": "teacher_intervention"},
    }
    for name in INTERVENTIONS:
        found[name] = {
            "recipe": ("intervene", "qat"),
            "phases.intervene.intervention": name,
            "phases.intervene.losses": "teacher_intervention",
            "phases.qat.losses": "teacher_intervention",
            "phases.qat.including": "intervene",
        }
    return found


def method(name: str) -> dict:
    """Returns the fields of a method with its suffix; raises a `UserError` on one that does not exist."""
    plain, *extras = name.removeprefix("published_").split("+")
    known = methods()
    if plain not in known:
        raise UserError(
            f"configs/teacher_intervention.py: unknown task or method {plain!r}; give TASK+METHOD or, for RTE, METHOD; tasks "
            f"are {', '.join(TASKS)} (alone, or 'glue' for all, a sweep), methods {', '.join(known)}"
        )
    fields = {"model.fresh_head": False} | known[plain]
    if name.startswith("published_"):
        if plain == FULL:
            raise UserError(f"configs/teacher_intervention.py: {FULL} is as published already; leave 'published_' out")
        fields |= PUBLISHED | ({"teacher.padding": "published"} if is_taught(fields) else {})
    for extra in extras:
        if extra != "quarter" or plain == FULL:
            choose = "'quarter' for another method" if plain == FULL else "'quarter'"
            raise UserError(f"configs/teacher_intervention.py: {plain} does not go with {extra!r}; choose {choose}")
        fields |= {f"phases.{phase}.share": 0.25 for phase in ("intervene", "qat")}
    return fields


def is_taught(fields: dict) -> bool:
    """Whether a method has a teacher."""
    return "phases.qat.losses" in fields


EPOCHS = 3.0
# Per task: batch size, tokens, steps of the first phase, epochs of the teacher (few examples take more of them).
TASKS = {
    "rte": (32, 128, 60, 5.0),
    "mrpc": (32, 128, 60, 3.0),
    "stsb": (32, 128, 60, 3.0),
    "cola": (16, 64, 120, 3.0),
    "sst2": (32, 64, 60, 3.0),
}


def task_fields(name: str) -> dict:
    """Returns the fields of a task."""
    batch, tokens, first, epochs = TASKS[name]
    sizes = {f"phases.{phase}.batch_size": batch for phase in ("finetune", "intervene", "qat")}
    return {
        "task": name,
        "data.max_length": tokens,
        "phases.intervene.steps": first,
        "phases.finetune.epochs": epochs,
        **sizes,
    }


def sweep_rows(names: Iterable[str]) -> tuple[dict, ...]:
    """Returns a row for full precision, and one for each method, which begins with its model.

    A teacher that the sweep is given is for the rows that learn from one.
    """
    rows = [dict(name="full precision", changes=without_teacher() | method(FULL))]
    for name in names:
        fields = method(name) if is_taught(method(name)) else without_teacher() | method(name)
        rows.append(dict(name=name, changes=fields, start="full precision"))
    return tuple(rows)


def table(tasks: Iterable[str]):
    """Returns the section of the sweep over all methods on some tasks."""
    return sweeping(
        name="teacher_intervention",
        grid=(("task", {task: task_fields(task) for task in tasks}),),
        rows=sweep_rows(
            ("ternary", "ternarybert", "distilled", *INTERVENTIONS, "gradual+quarter", "ternarybert+quarter")
        ),
        seeds=(1000, 1001, 1002),
        columns="task",
        orderings=(
            ("ternarybert", ">", "ternary"),
            *((name, ">", "ternarybert") for name in INTERVENTIONS[:4]),
            ("gradual", ">", "inverted"),
            ("gradual+quarter", ">=", "ternarybert"),
        ),
    )


def get_config(arg: str = "gradual"):
    """Returns the configuration of a method on a task, or a sweep over all methods."""
    config = base()
    config.model.fresh_head = False
    config.model.pooling = "mean"  # as the sentence encoder was trained
    config.quant.update(student="corrected", weight_scheme="ternary")
    config.phases.qat.epochs = EPOCHS
    for phase in (config.phases.intervene, config.phases.qat):
        phase.optimizer.learning_rate = 1e-4
    task, _, name = arg.partition("+")
    if task not in TASKS:
        task, name = "rte", arg
    config = changed(config, task_fields(task), f"configs/teacher_intervention.py:{arg}")
    if arg == "glue" or arg in TASKS:
        config.sweep = table([arg] if arg in TASKS else list(TASKS))
        return config
    if arg in ("smoke", "smoke+sweep"):
        config = changed(config, method("ternary") | {"recipe": ("finetune", "qat"), "model.fresh_head": True}, arg)
        config.data.update(limit_train=64, limit_eval=16, max_length=32)
        config.phases.finetune.update(epochs=1.0, batch_size=8)
        config.phases.intervene.update(steps=3, batch_size=8)
        config.phases.qat.update(epochs=1.0, batch_size=8)
        if arg == "smoke+sweep":
            config.sweep = sweeping(name="teacher_intervention_smoke", rows=sweep_rows(("gradual",)))
        return config
    return changed(config, method(name), f"configs/teacher_intervention.py:{arg}")
