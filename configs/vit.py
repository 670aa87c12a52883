r"""A small ViT on CIFAR-10 or MNIST: full precision, ternary, and ternary with teacher intervention.

    python launch/train.py --config=configs/vit.py:cifar10 --data_dir=DATA --workdir=runs/cifar10
    python launch/quantize.py --config=configs/vit.py:cifar10 --config.model.name=runs/cifar10/model \
        --config.model.fresh_head=False --data_dir=DATA --workdir=runs/cifar10_w8a8
    python launch/train.py --config=configs/vit.py:cifar10+gradual --config.model.name=runs/cifar10/model --data_dir=DATA \
        --workdir=runs/cifar10_gradual
    python launch/evaluate.py --config=configs/vit.py:cifar10 --config.model.name=runs/cifar10_gradual/quantized \
        --config.model.fresh_head=False --data_dir=DATA
    python launch/sweep.py --config=configs/vit.py:table --data_dir=DATA --workdir=runs/vit

The argument is `cifar10` or `mnist`, for training in full precision from nothing, or one of them with a method behind a `+`;
or `table`, all methods on CIFAR-10 as a sweep over seeds; `table+small` is the same with a fifth of the images and fewer
epochs, for a CPU. A method begins with a trained model, which is its teacher, and gives
the linear layers and the attention of all layers weights of three values and 8 bits for what enters a product; patches, tokens,
positions, norms and head stay in full precision. Methods are

    ternary                   training on the labels, without a teacher
    ternarybert               distillation for as many steps (logits, hidden states, attention scores)
    output, context, map      an epoch with the teacher's tensor in place, then distillation
    gradual, inverted, stochastic  the same with one kind after the other, the other way round, or drawn
    METHOD+quarter            a quarter of the steps, those with the teacher's tensors included
    pretrained                no method: fine-tuning of a published ViT in full precision, images resized to its size

Norms stand before their sub-layers here, so hidden states are the sums of the residual stream, and the published loss on the
norm behind the attention has no counterpart and is refused: methods with a teacher share their losses and differ in the
intervention alone.
`--config.task=image_folder --config.data.train=DIR --config.data.resize=True` trains on images of one's own. `smoke` trains for
seconds.

Expected of `table+small` (test accuracy, one seed, an hour on one core): full precision 0.43, ternary on the labels 0.47, with
a teacher 0.43, whatever the intervention: all they learn is what that teacher knows. `table` was not run.
"""

from ml_collections import ConfigDict

from qtx.errors import UserError, near_misses
from qtx.experiments.config import base, changed, sweeping, without_teacher

INTERVENTIONS = ("output", "context", "map", "gradual", "inverted", "stochastic")
LOSSES = "logits=1, hidden_states=1, scores=1"
EPOCHS = {"cifar10": 10.0, "mnist": 2.0}  # of a method; three times as many in full precision
SMALL = {"patch_size": 4, "hidden_size": 128, "num_layers": 6, "num_heads": 4, "intermediate_size": 256}
TASKS = {
    "cifar10": {
        "model.sizes": ConfigDict({**SMALL, "image_size": 32, "num_channels": 3}),
        "data.crop": 4,
        "data.flip": True,
    },
    "mnist": {"model.sizes": ConfigDict({**SMALL, "image_size": 28, "num_channels": 1}), "data.crop": 2},
}
SMALL_TABLE = {
    "data.limit_train": 10_000,
    "phases.finetune.epochs": 10.0,
    "phases.intervene.epochs": 0.5,
    "phases.qat.epochs": 4.0,
}
PRETRAINED = {
    "model.name": "google/vit-base-patch16-224",
    "model.sizes": ConfigDict(),
    "data.resize": True,
    "phases.finetune.epochs": 3.0,
    "phases.finetune.optimizer.learning_rate": 5e-5,
}


def task_fields(task: str) -> dict:
    """Returns the fields of a task; raises a `UserError` on one that does not exist."""
    if task not in TASKS:
        known = (*TASKS, "table", "smoke")
        raise UserError(f"configs/vit.py: unknown task {task!r}{near_misses(task, known)}")
    epochs = {"phases.finetune.epochs": 3 * EPOCHS[task], "phases.qat.epochs": EPOCHS[task]}
    return {"task": task, **epochs, **TASKS[task]}


def methods() -> dict[str, dict]:
    """Returns the fields in which each method differs from full precision."""
    ternary = {
        "recipe": ("qat",),
        "model.fresh_head": False,
        "quant.student": "layers",
        "quant.weight_scheme": "ternary",
    }
    found = {"pretrained": PRETRAINED, "ternary": ternary, "ternarybert": ternary | {"phases.qat.losses": LOSSES}}
    for name in INTERVENTIONS:
        found[name] = found["ternarybert"] | {
            "recipe": ("intervene", "qat"),
            "phases.intervene.intervention": name,
            "phases.intervene.losses": LOSSES,
            "phases.qat.including": "intervene",
        }
    return found


def method(name: str) -> dict:
    """Returns the fields of a method with its suffix; raises a `UserError` on one that does not exist."""
    plain, *extras = name.split("+")
    known = methods()
    if plain not in known:
        raise UserError(f"configs/vit.py: unknown method {plain!r}{near_misses(plain, known)}")
    fields = dict(known[plain])
    for extra in extras:
        if extra != "quarter" or plain == "pretrained":
            raise UserError(
                f"configs/vit.py: {plain} does not go with {extra!r}; choose 'quarter' for a ternary method"
            )
        fields |= {f"phases.{phase}.share": 0.25 for phase in ("intervene", "qat")}
    return fields


def get_config(arg: str = "cifar10"):
    """Returns the configuration of a task and a method, or the sweep over all methods."""
    config = base()
    config.model.name = "vit"
    config.data.eval_batch_size = 256
    config.phases.intervene.epochs = 1.0
    for name, rate in (("finetune", 1e-3), ("intervene", 5e-4), ("qat", 5e-4)):
        config.phases[name].batch_size = 128
        config.phases[name].optimizer.update(learning_rate=rate, schedule="cosine", weight_decay=0.05)
    if arg in ("table", "table+small"):
        small = SMALL_TABLE if arg.endswith("+small") else {}
        config = changed(config, task_fields("cifar10") | small, arg)
        rows = [dict(name="full precision", changes=without_teacher())]
        names = ("ternary", "ternarybert", "output", "context", "map", "gradual", "gradual+quarter")
        for name in names:
            taught = "phases.qat.losses" in method(name)
            changes = method(name) if taught else without_teacher() | method(name)
            rows.append(dict(name=name, changes=changes, start="full precision"))
        config.sweep = sweeping(
            name="vit",
            grid=(("task", {"cifar10": {"task": "cifar10"}}),),
            rows=tuple(rows),
            seeds=(1000, 1001, 1002),
            metric="test_accuracy",
            orderings=(
                ("full precision", ">", "ternary"),
                ("ternarybert", ">", "ternary"),
                ("gradual", ">", "ternarybert"),
                ("gradual+quarter", ">=", "ternarybert"),
            ),
        )
        return config
    if arg == "smoke":
        config = changed(
            config, task_fields("mnist") | {"quant.student": "layers", "quant.weight_scheme": "ternary"}, arg
        )
        config.recipe = ("finetune", "qat")
        config.model.sizes.update(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, patch_size=7)
        config.data.update(limit_train=512, limit_eval=256)
        config.phases.finetune.update(epochs=8.0, batch_size=32)
        config.phases.qat.update(epochs=2.0, batch_size=32)
        return config
    task, _, name = arg.partition("+")
    fields = task_fields(task)
    return changed(config, fields | (method(name) if name else {}), f"configs/vit.py:{arg}")
