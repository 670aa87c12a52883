r"""Ternary transformers by distillation, and teacher intervention (Kim et al. 2023): MiniLM on GLUE.

    python launch/train.py --config=configs/finetune.py:rte --data_dir=DATA --workdir=runs/rte
    python launch/train.py --config=configs/teacher_intervention.py:gradual --config.model.name=runs/rte/model --data_dir=DATA \
        --workdir=runs/rte_gradual
    python launch/sweep.py --config=configs/teacher_intervention.py:glue --data_dir=DATA --workdir=runs/glue

The student begins as its teacher, a model that is trained on the task: weights and word table with three values, 8 bits for
what enters a product. The argument is a method, or `glue`: all of them on RTE, MRPC, STS-B and CoLA as a sweep over seeds;
`rte`, `mrpc`, `stsb` and `cola` are the sweeps over one of these tasks. Methods are

    ternary                   ternary training on the labels, without a teacher
    ternarybert               distillation for as many steps (logits, hidden states, attention scores)
    distilled                 distillation by the losses of intervention (attention outputs, too) without intervention
    output, context, map      60 steps (CoLA: 120) with the teacher's tensor in place, then distillation
    gradual, inverted, stochastic  the same with one kind after the other, the other way round, or drawn
    METHOD+quarter            a quarter of the steps, those with the teacher's tensors included
    published_METHOD          BertAdam at 2e-5; padding counts in ranges and losses

Three epochs at 1e-4 (2e-5, as published for BERT-base, is too slow for this encoder), linear decay after a tenth of warm-up,
batches of 32 (CoLA: 16). Expected of `cola` (Matthews, one seed): full precision 0.26, ternary 0.23, ternarybert 0.24, gradual
0.22, distilled 0.23, in a quarter of the steps ternarybert 0.13 and gradual 0.11 (that with the 120 first steps whole, where
now they are 30); the rest was not run.

`smoke` needs no trained model: it fine-tunes for nine steps, then trains `ternary` for as many. `smoke+sweep` is a sweep of
full precision and `gradual`, which begins with its model. They take some minutes of CPU time.
"""

from collections.abc import Iterable

from qtx.errors import UserError, near_misses
from qtx.experiments.config import base, changed, sweeping

INTERVENTIONS = ("output", "context", "map", "gradual", "inverted", "stochastic")
PUBLISHED = {
    "quant.student": "published",
    "teacher.padding": "published",
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
        raise UserError(f"configs/teacher_intervention.py: unknown method {plain!r}{near_misses(plain, known)}")
    fields = known[plain] | (PUBLISHED if name.startswith("published_") else {})
    for extra in extras:
        if extra != "quarter":
            raise UserError(f"configs/teacher_intervention.py: {plain} does not go with {extra!r}; choose 'quarter'")
        fields |= {f"phases.{phase}.share": 0.25 for phase in ("intervene", "qat")}
    return fields


EPOCHS = 3.0
# Per task: batch size, tokens, steps of the first phase, epochs of the teacher (few examples take more of them).
TASKS = {"rte": (32, 128, 60, 5.0), "mrpc": (32, 128, 60, 3.0), "stsb": (32, 128, 60, 3.0), "cola": (16, 64, 120, 3.0)}


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
    alone = {"teacher.name": ""}
    rows = [dict(name="full precision", changes=alone | {"recipe": ("finetune",), "model.fresh_head": True})]
    for name in names:
        fields = {"model.fresh_head": False} | method(name)
        taught = "phases.qat.losses" in fields
        rows.append(dict(name=name, changes=fields if taught else alone | fields, start="full precision"))
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
    """Returns the configuration of a method, or the sweep over all of them."""
    config = base()
    config.task = "rte"
    config.model.fresh_head = False
    config.quant.update(student="corrected", weight_scheme="ternary")
    config.phases.qat.epochs = EPOCHS
    config.phases.intervene.steps = 60
    for phase in (config.phases.intervene, config.phases.qat):
        phase.optimizer.learning_rate = 1e-4
    if arg == "glue" or arg in TASKS:
        config.model.pooling = "mean"  # as the sentence encoder was trained
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
    return changed(config, method(arg), f"configs/teacher_intervention.py:{arg}")
