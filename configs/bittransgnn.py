r"""BitTransGNN: a low-bit encoder beside a graph convolution over a text graph; MiniLM on TextGCN's corpora and GLUE.

    python launch/build_graph.py --config=configs/bittransgnn.py:r8 --data_dir=DATA --workdir=runs/r8_graph
    python launch/sweep.py --config=configs/bittransgnn.py:r8+sweep --data_dir=DATA --workdir=runs/r8
    python launch/sweep.py --config=configs/bittransgnn.py:table --data_dir=DATA --workdir=runs/bittransgnn

One row after the other by hand, each from the model of the one before:

    python launch/train.py --config=configs/bittransgnn.py:r8+encoder --data_dir=DATA --workdir=runs/encoder
    python launch/train.py --config=configs/bittransgnn.py:r8+dynamic --config.model.name=runs/encoder/model --data_dir=DATA \
        --workdir=runs/dynamic
    python launch/evaluate.py --config=configs/bittransgnn.py:r8 --config.model.name=runs/dynamic/quantized --data_dir=DATA
    python launch/train.py --config=configs/bittransgnn.py:r8+distillation --config.model.name=runs/encoder/model \
        --config.bittransgnn.teacher=runs/dynamic/quantized --data_dir=DATA --workdir=runs/student

The third line is direct separation: the encoder of a trained model on its own. A run takes the graph of the model or teacher
that it begins with, if it has the same one; runs of a sweep share theirs, in its directory `graphs`.

The argument is a task (r8, r52, 20ng, mr, ohsumed; cola, mrpc, stsb, rte, wnli), then what is trained, which is one word:

    full_precision  the encoder with its classifier; with TASK alone, it is what is evaluated
    encoder         the same with few states (BitTransformer): 3, or --config.quant.bit.states=2, 4, 5
    static          features computed once, the graph convolution trained
    dynamic         encoder and graph convolution trained together
    distillation    the encoder learns from a trained `dynamic`; `online`: while that is trained
    sweep           all of them at 1.58 and 2.32 bits, over seeds; `lambda`: static, over the share of the graph
    analysis        behind a method: its model in the plane, and the profiles of its classes, by launch/analyze.py

`table` alone is `sweep` on R8, MR, Ohsumed and MRPC, in one table of accuracy.

Settings follow the published ones (batches of 32, 128 tokens, 1e-3 for the convolution, tenth of the rates from half of the
epochs on) but for epochs: 100 with patience there, as below here, which suits a CPU. `dynamic` and, in a sweep, `dynamic PFTQ`
begin with a new convolution, and three epochs of an encoder that moves leave it below `static`; the row `dynamic` of a sweep
goes on from `static` instead, the encoder at 1e-5, the convolution at 2e-4, lambda 0.5. Features are means over tokens, as this
encoder was trained. What is best is so by Matthews correlation on cola, F1 on mrpc, Pearson correlation on stsb, accuracy on
the others, as published.

`smoke`, behind any task and method, takes few documents and one epoch: seconds a run; of a sweep one seed, and of `lambda`
three shares.

Expected at 1.58 bits, accuracy on the test data (one seed; an hour and a half a task on one core), of encoder, static, dynamic,
its direct separation and distillation: `r8` 0.980, 0.980, 0.980, 0.979, 0.980; `mr` 0.774, 0.785 and, dynamic beside a
new convolution, 0.780, 0.767, 0.774; `ohsumed` 0.594, 0.605, 0.606, 0.588, 0.607; `mrpc` 0.696, 0.692, 0.684, 0.680, 0.668; of
full precision 0.974, 0.822, 0.621, 0.759. At 2.32 bits `mrpc` has 0.673 and 0.693. The rest was not run.
"""

from collections.abc import Sequence

from qtx.errors import UserError, near_misses
from qtx.experiments.config import analysis, base, changed, sweeping

GLUE = ("cola", "mrpc", "stsb", "rte", "wnli")
TASKS = {"r8": "R8", "r52": "R52"} | {name: name for name in ("20ng", "mr", "ohsumed", *GLUE)}
TABLE = ("r8", "mr", "ohsumed", "mrpc")
METRICS = {"cola": "matthews", "mrpc": "f1", "stsb": "pearson"}  # that decides; of the others it is accuracy
GRAPH_RATE = 1e-3

METHODS: dict[str, dict] = {
    "full_precision": {"recipe": ("finetune",)},
    "encoder": {"recipe": ("qat",)},
    "static": {
        "recipe": ("qat",),
        "bittransgnn.method": "static",
        "phases.qat.epochs": 10.0,
        "phases.qat.optimizer.learning_rate": GRAPH_RATE,
    },
    "dynamic": {
        "recipe": ("qat",),
        "bittransgnn.method": "dynamic",
        "bittransgnn.mix": 0.7,
        "phases.qat.epochs": 3.0,
        "phases.qat.optimizer.learning_rate": 2e-5,
        "phases.qat.optimizer.rate_factors": (("gcn/**", GRAPH_RATE / 2e-5),),
    },
    "distillation": {
        "recipe": ("qat",),
        "bittransgnn.method": "distillation",
        "phases.qat.epochs": 3.0,
        "phases.qat.optimizer.learning_rate": 5e-5,
    },
}
CONTINUED = {  # `dynamic` of a sweep: the convolution is trained already, and the encoder moves slowly enough for it to follow
    "bittransgnn.mix": 0.5,
    "phases.qat.optimizer.learning_rate": 1e-5,
    "phases.qat.optimizer.rate_factors": (("gcn/**", 20.0),),
}
METHODS["online"] = METHODS["dynamic"] | {
    "bittransgnn.method": "online",
    "phases.qat.optimizer.rate_factors": (("teacher/gcn/**", GRAPH_RATE / 2e-5),),
}
WORDS = (*METHODS, "sweep", "lambda", "analysis", "smoke")
SHARED = {"bittransgnn.graph": "/graphs"}  # what runs of a sweep build once, in a directory of the sweep
STARTED = ("static", "dynamic", "distillation", "online")  # from a trained encoder
PUBLISHED = {  # accuracy of BERT-base in percent: 1.58 bits, then 2.32
    "R8": {"BitTransformer": (97.29, 96.82), "static": (97.72, 98.02), "dynamic": (97.78, 98.12)},
    "mr": {"BitTransformer": (77.66, 81.86), "static": (79.02, 83.24), "dynamic": (80.23, 85.27)},
    "ohsumed": {"BitTransformer": (64.08, 66.62)},
}
PUBLISHED["R8"] |= {"direct separation": (97.76, 97.67), "distillation": (97.25, 97.80)}
PUBLISHED["mr"] |= {"direct separation": (78.14, 84.78), "distillation": (79.63, 84.67)}


def task_fields(task: str) -> dict:
    """Returns the fields of a task."""
    metric = METRICS.get(task, "accuracy")
    return {"task": TASKS[task], "phases.finetune.metric": metric, "phases.qat.metric": metric}


def rows(tasks: Sequence[str]) -> list[dict]:
    """Returns the rows of the table of some tasks."""
    found: list[dict] = [
        dict(name="TF-IDF", entry="baseline", ignores=("seed",)),
        dict(name="full precision", changes=METHODS["full_precision"]),
    ]
    for number, (bits, states) in enumerate((("1.58", 3), ("2.32", 5))):
        width = {"quant.bit.states": states}
        encoder, dynamic = f"BitTransformer {bits}", f"dynamic {bits}"

        def row(name: str, method: str, start="", changes=(), bits=bits, width=width, number=number, **fields) -> dict:
            changes = METHODS[method] | width | dict(changes)
            if "bittransgnn.method" in changes:
                fields["uses"] = SHARED | fields.get("uses", {})
            chosen = {task: PUBLISHED.get(TASKS[task], {}).get(name) for task in tasks}
            published = {task: values[number] / 100 for task, values in chosen.items() if values}
            return dict(name=f"{name} {bits}", start=start, changes=changes, published=published, **fields)

        found += [
            row("BitTransformer", "encoder"),
            row("static", "static", encoder),
            row("dynamic", "dynamic", f"static {bits}", CONTINUED),
            row("dynamic PFTQ", "dynamic", "full precision"),
            row("direct separation", "encoder", dynamic, entry="quantize"),
            row("distillation", "distillation", encoder, uses={"bittransgnn.teacher": f"{dynamic}/quantized"}),
        ]
    return found


def get_config(arg: str = "r8"):
    """Returns the configuration of a task and a method, or a sweep."""
    task, *words = arg.lower().split("+")
    for word, known in ((task, (*TASKS, "table")), *((word, WORDS) for word in words)):
        if word not in known:
            raise UserError(f"configs/bittransgnn.py: unknown word {word!r}{near_misses(word, known)}")
    tasks = (task,)
    if task == "table":
        if set(words) - {"smoke"}:
            raise UserError(
                f"configs/bittransgnn.py: {arg!r}: `table` has all methods; name a task in its place, as in r8"
            )
        tasks, task, words = TABLE, TABLE[0], ["sweep", *words]
    chosen = [word for word in words if word in (*METHODS, "sweep", "lambda")]
    if len(chosen) > 1 or "analysis" in words and {"sweep", "lambda"} & set(chosen):
        both = " and ".join(chosen if len(chosen) > 1 else (*chosen, "analysis"))
        raise UserError(f"configs/bittransgnn.py: {arg!r} asks for {both}; name one method, or one sweep")
    config = changed(base(), task_fields(task), arg)
    config.data.splits = "graph"
    config.data.max_length = 128
    config.model.update(pooling="mean", pooler=False)
    config.quant.bit.states = 3
    config.phases.finetune.update(epochs=3.0)
    config.phases.finetune.optimizer.learning_rate = 5e-5
    config.phases.qat.update(epochs=6.0, ranges="fixed")
    config.phases.qat.optimizer.learning_rate = 1e-4
    for phase in (config.phases.finetune, config.phases.qat):
        phase.update(evaluate_every=1.0, keep_best=True, patience=10)
        phase.optimizer.update(schedule="milestones", warmup=0.0, weight_decay=0.0, max_grad_norm=0.0)
    config.model.fresh_head = not any(word in STARTED for word in words) and bool(words)
    for word in words:
        config = changed(config, METHODS.get(word, {}), arg)
    if "sweep" in words or "lambda" in words:
        config.model.fresh_head = True
        config.sweep = lambda_sweep(task) if "lambda" in words else methods_sweep(tasks)
    if "analysis" in words:
        config.analyses, config.analysis, config.model.fresh_head = ("features",), analysis(), False
    if "smoke" in words:
        config.data.update(limit_train=120, limit_eval=60, max_length=32)
        for phase in (config.phases.finetune, config.phases.qat):
            phase.update(epochs=1.0)
        if "sweep" in config:
            _shorten(config.sweep)
    return config


def _shorten(section) -> None:
    """Cuts a sweep to one seed, one epoch a run and, of a grid, its ends and its middle."""

    def short(changes: dict) -> dict:
        return {name: 1.0 if name.endswith(".epochs") else value for name, value in changes.items()}

    section.rows = tuple(row | {"changes": short(row.get("changes", {}))} for row in section.rows)
    section.grid = tuple(
        (axis, values if axis == "task" else (values[0], values[len(values) // 2], values[-1]))
        for axis, values in section.grid
    )
    section.seeds = section.seeds[:1]


def methods_sweep(tasks: Sequence[str]):
    """Returns the section of the table of all methods on some tasks; of several, accuracy is what all of them have."""
    claims = []
    for bits in ("1.58", "2.32"):
        graphs = ("dynamic", "dynamic PFTQ", "static", "direct separation", "distillation")
        claims += [(f"{name} {bits}", ">", f"BitTransformer {bits}") for name in graphs]
    return sweeping(
        name=f"bittransgnn_{'_'.join(tasks)}",
        grid=(("task", {task: task_fields(task) for task in tasks}),),
        columns="task",
        rows=tuple(rows(tasks)),
        seeds=(0, 1, 2),
        metric=f"test_{'accuracy' if len(tasks) > 1 else METRICS.get(tasks[0], 'accuracy')}",
        orderings=tuple(claims),
        near=0.003,
    )


def lambda_sweep(task: str):
    """Returns the section of accuracy against the graph's share of the vote."""
    axis = "bittransgnn.mix"
    rows: list[dict] = []
    for bits, states in (("1.58", 3), ("2.32", 5)):
        width, encoder = {"quant.bit.states": states}, f"BitTransformer {bits}"
        rows.append(dict(name=encoder, changes=METHODS["encoder"] | width, ignores=(axis,)))
        rows.append(dict(name=f"static {bits}", start=encoder, uses=SHARED, changes=METHODS["static"] | width))
    shares = tuple(i / 10 for i in range(11))
    metric = f"test_{METRICS.get(task, 'accuracy')}"
    return sweeping(name="bittransgnn_lambda", grid=((axis, shares),), rows=tuple(rows), seeds=(0, 1, 2), metric=metric)
