"""The published tables of "Efficient transformer quantization" (Bondarenko, Nagel, Blankevoort, EMNLP 2021), as sweeps.

    python launch/sweep.py --config=configs/efficient_transformer_quantization.py:table1 --data_dir=DATA --workdir=runs/table1
    python launch/sweep.py --config=configs/efficient_transformer_quantization.py:minilm --data_dir=DATA --workdir=runs/minilm

The argument is a table. Those of the paper take BERT-base (`--config.model.name=DIRECTORY` for a local copy), the eight tasks
of GLUE's average, smallest first, seeds 1000 to 1004, and show medians with the paper's numbers beside them (`cells.md`):

    table1   full precision, W8A8, W32A8, W8A32: weights are harmless at 8 bits, activations are not
    mixed    16 bits for the residual sum, then for input and output of the FFN, then (STS-B) for pooler and logits
    peg      ranges for each embedding dimension, and for groups of them, on everything and on the FFN alone
    main     full precision against W8A8 by plain calibration, mixed precision, PEG and training
    low_bit  6 and 4 bits for weights, 2 for the word embeddings

`minilm` puts the rows of `main` and `low_bit` on MiniLM and the four smallest tasks, three seeds, which a CPU can do; its
training settings are its own. `smoke` is two rows in seconds; its scores mean nothing.

Every row but the first starts from the full-precision model of its task and seed, which is trained once. (In `minilm` RTE
itself starts from a model of MNLI.) As published:
symmetric weights per tensor with ranges of least squared error by bounded search; activations by the minimum and maximum of one
sentence (one batch of one), or of 16 sentences before training; training for 6 epochs in batches of 8 with learned ranges,
10 % warm-up, no dropout, no weight decay, no clipping. Other than published: padding does not count in ranges, and the
channel groups of PEG come from the full-precision model (see `calibration.permutation`).

Expected of `minilm`, for CoLA, STS-B and MRPC: full precision 0.32, 0.87, 0.84; W8A8 0.30, 0.83, 0.83; mixed precision and PEG
0.33, 0.83, 0.83; W4A32 0.25, 0.42, 0.22, with AdaRound 0.20, 0.81, 0.82; W8A8 QAT 0.32, 0.87, 0.83; W4A8 QAT 0.28, 0.85, 0.84.
With whole ranges of weights (`min-max weights`), for STS-B, MRPC and RTE: full precision 0.87, 0.84, 0.64; W8A8 0.79, 0.78,
0.60; mixed precision 0.86, 0.84, 0.63; PEG 0.86, 0.85, 0.64. An hour a task and seed on one core, and half an hour once for the
model of MNLI. The paper's tables were not run.
"""

from qtx.errors import UserError, near_misses
from qtx.experiments.config import base, sweeping

# Tasks by size, smallest first, with the fields in which each differs. Only RTE's settings are published: they are the
# default of all.
TASKS: dict[str, dict] = {
    "rte": {},  # 2,490 training examples
    "mrpc": {},  # 3,668
    "stsb": {},  # 5,749
    "cola": {},  # 8,551
    "sst2": {},  # 67,349
    "qnli": {},  # 104,743
    "qqp": {},  # 363,846
    "mnli": {},  # 392,702
}
FFN = "x=16, h=16, y=16"
LOGITS = {"quant.overrides": f"{FFN}, P=16, C=16", "quant.setup": "MSE_logits"}


def percent(**scores: float) -> dict[str, float]:
    """Returns published scores, in percent, as the fractions that the tables show."""
    return {name: score / 100 for name, score in scores.items()}


def full_precision(**published: float) -> dict:
    """Returns the row that all others start from."""
    return dict(name="FP32", published=percent(**published))


def ptq(name: str, published: dict[str, float] | None = None, changes_at: dict | None = None, **quant) -> dict:
    """Returns a row without training, with some fields of `quant` changed."""
    changes = {f"quant.{field}": value for field, value in quant.items()}
    if "ngp" in quant.get("overrides", ""):
        changes["calibration.share_permutation"] = "ffn/down/output"
    return dict(
        name=name,
        entry="quantize",
        start="FP32",
        changes=changes,
        changes_at=changes_at or {},
        published=percent(**(published or {})),
    )


def qat(name: str, published: dict[str, float] | None = None, **quant) -> dict:
    """Returns a row with quantization-aware training, with some fields of `quant` changed."""
    changes = {
        "recipe": ("qat",),
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        "calibration.batch_size": 16,
        **{f"quant.{field}": value for field, value in quant.items()},
    }
    return dict(name=name, entry="train", start="FP32", changes=changes, published=percent(**(published or {})))


FP32 = full_precision(
    cola=57.27, sst2=93.12, mrpc=88.36, stsb=89.09, qqp=89.72, mnli=84.91, qnli=91.58, rte=70.40, GLUE=83.06
)
MIXED = ptq("W8A{8,16} mixed PTQ", {"GLUE": 82.43}, {"stsb": LOGITS}, overrides=FFN)
PEG = ptq("W8A8 PEG PTQ, K=6, permuted", {"GLUE": 82.45}, overrides="x=ngp6, h=ngp6, y=ngp6")
W8A8_QAT = qat("W8A8 QAT", {"GLUE": 83.26})
W4A32 = ptq("W4A32 PTQ, nearest", weight_bits=4, activation_bits=32)
W4A32_ADAROUND = ptq("W4A32 PTQ, AdaRound", {"GLUE": 81.46}, weight_bits=4, activation_bits=32, adaround=True)
W4A8_QAT = qat("W4A8 QAT", {"GLUE": 82.64}, weight_bits=4)
W4A8_E2_QAT = qat("W4A8 QAT, 2-bit embeddings", {"GLUE": 82.29}, weight_bits=4, overrides="Et=2")

W8A8 = dict(cola=54.74, sst2=92.55, mrpc=88.53, stsb=81.02, qqp=83.81, mnli=50.31, qnli=52.32, rte=64.98, GLUE=71.03)
W32A8 = dict(cola=56.70, sst2=92.43, mrpc=86.98, stsb=82.87, qqp=84.70, mnli=52.80, qnli=52.44, rte=53.07, GLUE=70.25)
W8A32 = dict(cola=58.63, sst2=92.55, mrpc=88.74, stsb=89.05, qqp=89.72, mnli=84.58, qnli=91.43, rte=71.12, GLUE=83.23)


def amplified(name: str, overrides: str = "", **quant) -> dict:
    """Returns a row on the same function with outliers made to order (`qtx.analysis.amplify`).

    In every layer one channel of x and h is shifted by 600 times the size of x, which no range of 8 bits for a whole tensor
    holds. Weights per channel: such a shift amplifies their rounding, too; AdaRound makes up for it.
    """
    weights = dict(weight_granularity="channel", weight_estimator="mse")
    row = ptq(f"outliers x600: {name}", overrides=overrides, **weights, **quant)
    row["changes"] |= {"model.amplify.sites": ("x",), "model.amplify.factor": 600.0, "calibration.batch_size": 16}
    row["changes"]["quant.weight_options"] = {"relative_margin": True, "extent": "row"}
    return row


# 2,490 examples teach a small encoder little about entailment: RTE begins with a model of MNLI's, as is usual for it, with a
# head of its own. One serves all seeds.
MNLI = dict(
    name="MNLI (accuracy of what RTE begins with)",
    entry="train",
    at=("rte",),
    ignores=("seed",),
    changes={"task": "mnli", "phases.finetune.epochs": 2.0},
)
AFTER_MNLI = {"start_at": {"rte": MNLI["name"]}, "changes_at": {"rte": {"model.fresh_head": True}}}


def on_16(row: dict) -> dict:
    """Returns a row for STS-B alone, calibrated on 16 sentences: one says little about the range of a score."""
    changes = row["changes"] | {"calibration.batch_size": 16}
    return row | {"name": f"{row['name']}, 16 sentences", "at": ("stsb",), "changes": changes}


def unclipped(row: dict) -> dict:
    """Returns a row with whole ranges of weights (per channel), calibrated on 16 sentences.

    Ranges of least squared error clip the few large weights that make the outliers of activations, and so hide them.
    """
    weights = {"quant.weight_estimator": "current_minmax", "quant.weight_options": {}}
    weights |= {"quant.weight_granularity": "channel", "calibration.batch_size": 16}
    return row | {"name": f"min-max weights: {row['name']}", "changes": row["changes"] | weights}


AMPLIFIED = (
    amplified("W8A8 PTQ"),
    amplified("W8A{8,16} mixed PTQ", FFN),
    amplified("W8A8 PEG PTQ, K=6, permuted", "x=ngp6, h=ngp6, y=ngp6"),
    amplified("W8A8 PEG PTQ, K=96, permuted", "x=ngp96, h=ngp96, y=ngp96"),
    amplified("W8A{8,16} mixed PTQ, AdaRound", FFN, adaround=True),
    amplified("W8A8 PEG PTQ, K=96, permuted, AdaRound", "x=ngp96, h=ngp96, y=ngp96", adaround=True),
)


def _peg(name: str, value: str) -> dict:
    return ptq(name, overrides=f"x={value}, h={value}, y={value}")


ROWS = {
    "table1": (
        FP32,
        ptq("W8A8", W8A8),
        ptq("W32A8", W32A8, weight_bits=32),
        ptq("W8A32", W8A32, activation_bits=32),
    ),
    "mixed": (
        FP32,
        ptq("W8A8 PTQ", dict(stsb=79.78, mnli=45.60, qnli=51.73, rte=64.98)),
        ptq("16-bit y", dict(stsb=85.41, mnli=82.20, qnli=88.38, rte=66.43), overrides="y=16"),
        ptq("16-bit y, x, h", dict(stsb=85.27, mnli=82.67, qnli=90.41, rte=68.95), overrides=FFN),
        # Elsewhere this row is the one before.
        ptq("16-bit y, x, h, P, C, MSE logits", dict(stsb=88.00), {"stsb": LOGITS}) | {"at": ("stsb",)},
    ),
    "peg": (
        FP32,
        ptq("K=1"),
        ptq("K=768", activation_granularity="embedding"),
        _peg("K=768, FFN only", "per_embd"),
        _peg("K=6, FFN only", "ng6"),
        _peg("K=3, FFN only", "ng3"),
        _peg("K=6, FFN only, permuted", "ngp6") | {"published": percent(GLUE=82.45)},
        _peg("K=3, FFN only, permuted", "ngp3"),
    ),
    "main": (FP32, ptq("W8A8 PTQ", W8A8), MIXED, PEG, W8A8_QAT),
    "low_bit": (
        FP32,
        ptq("W6A32 PTQ", {"GLUE": 81.41}, weight_bits=6, activation_bits=32),
        W4A32,
        W4A32_ADAROUND,
        qat("W4A32 QAT", {"GLUE": 82.95}, weight_bits=4, activation_bits=32),
        W4A8_QAT,
        W4A8_E2_QAT,
    ),
    "minilm": (
        MNLI,
        full_precision() | AFTER_MNLI,
        ptq("W8A8 PTQ"),
        MIXED,
        PEG,
        *map(on_16, (ptq("W8A8 PTQ"), MIXED, PEG)),
        W4A32,
        W4A32_ADAROUND,
        W8A8_QAT,
        W4A8_QAT,
        W4A8_E2_QAT,
        *map(unclipped, (ptq("W8A32 PTQ", activation_bits=32), ptq("W8A8 PTQ"), MIXED, PEG)),
        *AMPLIFIED,
    ),
    "smoke": (full_precision(), ptq("W8A8 PTQ")),
}


def get_config(arg: str = "minilm"):
    """Returns the sweep of one table."""
    if arg not in ROWS:
        raise UserError(f"configs/efficient_transformer_quantization.py: unknown table {arg!r}{near_misses(arg, ROWS)}")
    config = base()
    config.save_models = False  # but for the models that rows start from
    if arg != "smoke":
        config.quant.update(weight_estimator="mse_brent", weight_options=dict(relative_margin=False, extent="tensor"))
    config.calibration.update(batches=1, batch_size=1)
    for phase, rate, epochs, warmup in (("finetune", 3e-5, 3.0, 0.0), ("qat", 5e-5, 6.0, 0.1)):
        config.phases[phase].update(batch_size=8, epochs=epochs)
        config.phases[phase].optimizer.update(learning_rate=rate, warmup=warmup, weight_decay=0.0, max_grad_norm=0.0)
    rows, tasks, seeds = ROWS[arg], TASKS, range(1000, 1005)
    if arg in ("minilm", "smoke"):
        config.model.pooling = "mean"  # as the sentence encoder was trained
        config.model.hidden_dropout = config.model.attention_dropout = 0.0
        config.data.buckets = 2
        for phase, rate, epochs in (("finetune", 1e-4, 3.0), ("qat", 5e-5, 1.0)):
            config.phases[phase].update(batch_size=16, epochs=epochs)
            config.phases[phase].optimizer.update(learning_rate=rate, warmup=0.1)
        rows = tuple({**row, "published": {}} for row in rows)  # the paper has BERT-base alone
        tasks = {task: TASKS[task] for task in ("cola", "stsb", "mrpc", "rte")}  # by the number of their tokens
        seeds = range(1000, 1003)
    else:
        config.model.name = "bert-base-uncased"
    grid = (("task", {task: {"task": task, **changes} for task, changes in tasks.items()}),)
    config.sweep = sweeping(name=arg, grid=grid, rows=rows, seeds=tuple(seeds), columns="task", mean="GLUE")
    if arg == "minilm":
        config.sweep.mean = "mean"
    if arg == "smoke":
        config.data.update(limit_train=64, limit_eval=32, buckets=1, max_length=16)
        config.phases.finetune.steps = 2
        config.sweep.update(grid=(), columns="", seeds=(1000,))
    return config
