"""Whole models of "Teacher Intervention": teacher, student, interventions, losses, schedules and training.

Everything runs in float64, as the references did: there a rounding decision is that of the reference, and values agree to
what they were stored with. In float32, where the modes run once more, one flipped decision is allowed for. Gates and weights
of losses are traced, so that one program serves all modes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx import models
from qtx.methods import distillation
from qtx.methods import teacher_intervention as ti
from qtx.methods.distillation import Distillation, Side, layer_pairs
from qtx.models.checkpoints import from_hf_tensors
from qtx.nn.bert import Attention, BertClassifier, BertConfig, Block
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Forward, Phase, Span, label_losses, make_state, make_step

FAMILY = models.get_family("bert")
STRICT = {"float64": {"rtol": 1e-9, "atol": 1e-9}, "float32": {"rtol": 2e-6, "atol": 2e-7}}  # by what was stored
FLIP = 0.02  # what one rounding decision that float32 takes otherwise can do
FLAGS = {"map": "teacher_attnmap", "context": "teacher_context", "output": "teacher_output"}
KINDS = {"MI": "map", "CI": "context", "OI": "output"}
SWITCHES = {
    "emb_q": "emb",
    "qkv_q": "qkv",
    "ffn_q_1": "ffn_1",
    "ffn_q_2": "ffn_2",
    "cls_q": "cls",
    "quantize": "quantize",
}
TERMS = {"cls": "logits", "rep": "hidden_states", "output": "attention_output", "attscore": "scores"}
OPTIONS = TERMS | {
    "gt_ce": "labels",
    "context_mse": "context",
    "self_output_mse": "self_output",
    "attention_map_kl": "maps",
}
TERM_OPTIONS = {  # of the original's command line, with the loss
    "gt_loss": "labels",
    "pred_distill": "logits",
    "rep_distill": "hidden_states",
    "attn_distill": "scores",
    "output_distill": "attention_output",
}
SETS = {
    "script": ("cls", "rep", "output", "attscore"),
    "all": ("gt_ce", "cls", "rep", "output", "attscore"),
    "argparse_default": ("rep", "attscore"),
    "ternarybert": ("cls", "rep", "attscore"),
}


def config_of(case) -> BertConfig:
    return FAMILY.config_from_hf(
        case.manifest["model"]["config"] | {"num_labels": case.manifest["model"]["num_labels"]}
    )


def student_policy(case, **switches):
    """The published student, clipped as the case says."""
    limit = case.manifest["model"]["config"].get("clip_val", ti.CLIP[1])
    return policy_of(float(limit), **switches)


@functools.cache
def policy_of(limit: float, **switches):
    grids = {"weights": ti.WEIGHTS, "table": ti.TABLE, "activations": ti.ACTIVATIONS}
    grids = {name: dataclasses.replace(spec, clip=(-limit, limit)) for name, spec in grids.items()}
    return ti.student_policy(**grids, **switches, published=True)


def kinds_of(mode: str | None) -> tuple[str, ...]:
    """Kinds of a mode such as `MI_CI`; none of `none`."""
    return tuple(KINDS[part] for part in (mode or "none").replace("+", "_").split("_") if part != "none")


def tensors(case, prefix: str) -> dict[str, np.ndarray]:
    """Arrays below a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in case.file().items() if key.startswith(prefix)}


def flat_params(case, prefix: str) -> dict[str, np.ndarray]:
    """Arrays with Hugging Face names below a prefix, by qtx path."""
    found, extra = from_hf_tensors(FAMILY, config_of(case), tensors(case, prefix))
    assert found and not extra, extra
    return found


def params_of(case, side: str, dtype=jnp.float64) -> dict[str, Any]:
    flat = {path: jnp.asarray(value, dtype) for path, value in flat_params(case, f"model/{side}/").items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def paths_of(case, names) -> dict[str, str]:
    """qtx paths of Hugging Face parameter names."""
    config, found = config_of(case), {}
    for name in names:
        converted, extra = from_hf_tensors(FAMILY, config, {name: np.zeros((1, 1))})
        assert not extra, name
        found[name] = next(iter(converted))
    return found


def batch_of(case) -> dict[str, jax.Array]:
    given = tensors(case, "model/")
    rows = len(given["labels"])
    batch = {name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    return {name: jnp.asarray(value) for name, value in batch.items()} | {"weights": jnp.ones(rows)}


def model_of(config: BertConfig, policy=None, dtype=jnp.float64) -> BertClassifier:
    return BertClassifier(config, dtype, policy)


def gates_of(flags) -> dict[str, jax.Array]:
    return {kind: jnp.asarray(bool(flags[name])) for kind, name in FLAGS.items()}


def close(got, want, name="", **tolerance):
    limit = STRICT[str(want.dtype)] | tolerance
    np.testing.assert_allclose(np.asarray(got), want, **limit, err_msg=name)


def check_scores(got, want, name):
    """Masked scores are compared with each other alone: they lose their digits in float32."""
    seen = np.abs(want) < 100
    np.testing.assert_array_equal(np.abs(got) < 100, seen)
    close(np.where(seen, got, 0), np.where(seen, want, 0), name)


def check_captures(side: Side, mask, want: dict[str, np.ndarray]):
    """Compares what a model computed with arrays in the layout of the manifest."""
    layers = range(len(want.get("scores", ())))
    heads = side.model.config.num_heads

    def by_head(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def stacked(role, change=lambda x: x):
        return np.stack([np.asarray(change(side.at(i, role))) for i in layers])

    got = {
        "logits": lambda: side.outputs.logits,
        "hidden": lambda: np.stack(side.outputs.hidden_states),
        "scores": lambda: stacked("attention/scores", lambda s: s + np.where(mask[:, None, None] > 0, 0, -10000)),
        "probs": lambda: stacked("attention/probs"),
        "context": lambda: stacked("attention/context", by_head),
        "attention_output": lambda: stacked("attention/norm/output"),
        "self_output": lambda: stacked("attention/out/output"),
    }
    for name, value in want.items():
        if name in got:
            (check_scores if name == "scores" else close)(got[name](), value, name)


def apply(model, params, batch, **collections) -> Side:
    args = [batch[name] for name in model.inputs]
    outputs, found = model.apply({"params": params, **collections}, *args, mutable=["captures"])
    return Side(model, outputs, traverse_util.flatten_dict(found["captures"], sep="/"))


# --- Forward passes, losses and gradients ---


def program(case, dtype=jnp.float64):
    """One compiled program for all modes: outputs, loss terms, and gradients of their weighted sum."""
    return _program(config_of(case), student_policy(case), dtype)


@functools.cache
def _program(config: BertConfig, policy, dtype):
    student, teacher = model_of(config, policy, dtype), model_of(config, dtype=dtype)
    pairs = layer_pairs("same", config.num_layers, config.num_layers)

    def run(params, teacher_params, batch, replaced, detached, weights):
        kept: dict[str, Side] = {}

        def forward(batch, capture, **collections):
            kept["student"] = apply(student, params_of_run[0], batch, **collections)
            return kept["student"].outputs, traverse_util.unflatten_dict(kept["student"].captures, sep="/")

        def intervene(_, captures):
            kept["teacher"] = captures
            return ti.intervene(replaced, captures, pairs) | ti.detach(detached, range(config.num_layers))

        params_of_run: list[Any] = []

        def total(params):
            params_of_run[:] = [params]
            objective = Distillation(
                student,
                teacher,
                dict.fromkeys(OPTIONS.values(), 1.0),
                pairs,
                padding="published",
                intervene=intervene,
                collections=ti.untrained_padding(config),
            )
            found = objective.terms(Forward(forward), batch, {"params": teacher_params})
            means = {name: jnp.mean(found[loss]) for name, loss in OPTIONS.items()}
            side = kept["student"]
            theirs = teacher.apply({"params": teacher_params}, *(batch[n] for n in teacher.inputs)).logits
            squared = jnp.mean(distillation.squared_error(side.outputs.logits, theirs))
            means |= {"cls_regression_mse": squared, "gt_regression_mse_vs_teacher": squared}
            means |= {name: sum(means[part] for part in parts) for name, parts in SETS.items()}
            weighted = sum(weights[loss] * means[name] for name, loss in OPTIONS.items())
            return weighted, (means, side.outputs, side.captures)

        grads, (means, outputs, captures) = jax.grad(total, has_aux=True)(params)
        return means, outputs, captures, traverse_util.flatten_dict(grads, sep="/")

    compiled = jax.jit(run)

    def call(case, replaced, detached, losses, params=None):
        weights = {loss: jnp.asarray(loss in losses, dtype) for loss in OPTIONS.values()}
        params = params_of(case, "student", dtype) if params is None else params
        means, outputs, captures, grads = compiled(
            params, params_of(case, "teacher", dtype), batch_of(case), replaced, detached, weights
        )
        return means, Side(student, outputs, captures), grads

    return call


def in_float64(handler):
    @functools.wraps(handler)
    def run(case):
        with jax.enable_x64(True):
            handler(case)

    return run


def check_gradients(case, grads, want: dict[str, np.ndarray]):
    """Within 1e-3 of each array's largest element is asked for; float64 gives the stored digits."""
    converted, extra = from_hf_tensors(FAMILY, config_of(case), want)
    assert converted and not extra
    for path, value in converted.items():
        largest = np.max(np.abs(value))
        np.testing.assert_allclose(grads[path], value, rtol=0, atol=2e-6 * largest, err_msg=path)


def zero_names(case, grads) -> set[str]:
    names = tensors(case, "model/student/")
    return {name for name, path in paths_of(case, names).items() if not np.any(np.asarray(grads[path]))}


@in_float64
def fp_teacher_forward(case):
    side = apply(model_of(config_of(case)), params_of(case, "teacher"), batch_of(case))
    check_captures(side, np.asarray(batch_of(case)["attention_mask"]), tensors(case, f"{case.id}/"))


@in_float64
def student_forward_with_intervention(case):
    run, gates, want = program(case), gates_of(case.entry["flags"]), tensors(case, f"{case.id}/")
    means, side, grads = run(case, gates, gates, [TERMS[name] for name in SETS["script"]])
    check_captures(side, np.asarray(batch_of(case)["attention_mask"]), want)
    for name, value in zip(case.entry["loss_names"], want["losses"], strict=True):
        close(means[name], value, name)
    check_gradients(case, grads, tensors(case, f"{case.id}/grad/"))
    assert zero_names(case, grads) == set(case.entry["zero_grad_params"])
    by_term = case.manifest["zero_grad_by_loss_term"].get(case.id.rpartition("/")[2], {})
    for option, names in by_term.items():
        _, _, grads = run(case, gates, gates, [TERM_OPTIONS[option]])
        assert zero_names(case, grads) == set(names), option
    with jax.enable_x64(False):
        run, gates = program(case, jnp.float32), gates_of(case.entry["flags"])
        means, side, _ = run(case, gates, gates, [])
        np.testing.assert_allclose(side.outputs.logits, want["logits"], atol=FLIP)
        got = [means[name] for name in case.entry["loss_names"]]
        np.testing.assert_allclose(got, want["losses"], rtol=FLIP, atol=FLIP)


@in_float64
def flag_without_teacher_signals(case):
    run, gates = program(case), gates_of(case.entry["flags"])
    off = {kind: jnp.asarray(False) for kind in gates}
    _, side, grads = run(case, off, gates, [TERMS[name] for name in SETS["script"]])
    close(side.outputs.logits, tensors(case, f"{case.id}/")["logits"], "logits")
    check_gradients(case, grads, tensors(case, f"{case.id}/grad/"))


@in_float64
def loss_extension(case):
    kinds = kinds_of(case.entry["mode"])
    gates = {kind: jnp.asarray(kind in kinds) for kind in FLAGS}
    run, key = program(case), "zero_grad_params_of_self_output_mse"
    means, _, grads = run(case, gates, gates, ["self_output"])
    for name, value in zip(case.entry["value_names"], case.file()[case.entry["outputs"][0]], strict=True):
        close(means[name], value, name)
    if key in case.entry:
        assert zero_names(case, grads) == set(case.entry[key])


@in_float64
def partial_quantization(case):
    switches = {SWITCHES[name]: value for name, value in case.entry["config"].items()}
    model = model_of(config_of(case), student_policy(case, **switches))
    side = jax.jit(lambda params, batch: apply(model, params, batch)._replace(model=None))(
        params_of(case, "student"), batch_of(case)
    )
    check_captures(side._replace(model=model), None, tensors(case, f"{case.id}/"))


# --- One attention block ---


class Nested(Block):
    """An attention block under the path that it has in a model, so that the policy of the model reaches it."""

    path_names: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, mask):
        name, *rest = self.path_names
        if rest:
            return self.part(Nested, name, path_names=tuple(rest))(x, mask)
        return self.part(Attention, name)(x, mask, mask[:, :, None], True)


@functools.cache
def block_program(config: BertConfig, policy, layer: int):
    model = Nested(config, jnp.float64, policy, ("encoder", f"layer_{layer}", "attention"))

    def run(params, x, mask, captures, gates, g_output, g_scores):
        def outputs(params, x):
            given = ti.intervene(gates, captures, ((layer, layer),))
            out, found = model.apply({"params": params, **given}, x, mask, mutable=["captures"])
            return Side(model, out, traverse_util.flatten_dict(found["captures"], sep="/"))

        def weighted(params, x, which):
            side = outputs(params, x)
            scores = side.at(layer, "attention/scores")
            return jnp.sum(g_output * side.outputs) if which == "output" else jnp.sum(g_scores * scores)

        side = outputs(params, x)
        found = {role: side.at(layer, f"attention/{role}") for role in ("scores", "probs", "context", "out/output")}
        grads = {which: jax.grad(weighted, (0, 1))(params, x, which) for which in ("output", "scores")}
        return side.outputs, found, grads

    return jax.jit(run)


@in_float64
def attention_block(case):
    config, layer = config_of(case), case.entry["layer"]
    given, want = case.file(), tensors(case, f"{case.id}/")
    path, mask = f"encoder/layer_{layer}/attention", np.asarray(batch_of(case)["attention_mask"]) > 0
    params = traverse_util.flatten_dict(params_of(case, "student"), sep="/")
    params = {name: value for name, value in params.items() if name.startswith(f"{path}/")}
    context = given["teacher/context"][layer].astype(np.float64).transpose(0, 2, 1, 3)
    captures = {
        f"{path}/probs": given["teacher/probs"][layer].astype(np.float64),
        f"{path}/context": context.reshape(*context.shape[:2], -1),
        f"{path}/out/output": given["teacher/self_output"][layer].astype(np.float64),
    }
    root = "/".join(case.id.split("/")[:-1])
    x, g_output, g_scores = (
        jnp.asarray(given[f"{root}/{name}"], jnp.float64) for name in ("x", "g_attention_output", "g_scores")
    )
    out, found, grads = block_program(config, student_policy(case), layer)(
        traverse_util.unflatten_dict(params, sep="/"), x, jnp.asarray(mask), captures, gates_of(case.entry["flags"]),
        g_output, g_scores,
    )  # fmt: skip
    heads = config.num_heads
    # The teacher's tensors were stored in float32, and this is all that the block sees of them.
    loose = {"rtol": 1e-5, "atol": 2e-6}
    close(out, want["attention_output"], "attention_output", **loose)
    check_scores(found["scores"] + np.where(mask[:, None, None], 0, -10000), want["scores"], "scores")
    close(found["probs"], want["probs"], "probs")
    per_head = np.asarray(found["context"]).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    close(per_head, want["context"], "context", **loose)
    close(found["out/output"], want["self_output"], "self_output", **loose)
    order = paths_of(case, [f"bert.encoder.layer.{layer}.attention.{name}" for name in case.entry["param_order"]])
    for which, name in (("output", "attention_output"), ("scores", "scores")):
        by_params, by_x = grads[which]
        close(by_x, want[f"dx_from_{name}"], f"dx_from_{name}", rtol=1e-4, atol=1e-5)
        flat = traverse_util.flatten_dict(by_params, sep="/")
        norms = np.array([np.linalg.norm(flat[path]) for path in order.values()])
        expected = want[f"dparam_norms_from_{name}"]
        np.testing.assert_allclose(norms, expected, rtol=1e-5, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(norms == 0, expected == 0)


# --- Schedules, losses alone, training ---


def intervention_schedule(case):
    e, want = case.entry, tensors(case, f"{case.id}/")
    assert e["starting_flags"] == "all off"
    schedule = ti.Interventions.named(e["schedule"], ())
    for step, (mode, flags) in enumerate(zip(want["mode"], want["flags"], strict=True)):
        gates = schedule.gates(step, e["total_steps"])
        on = {kind for kind, gate in gates.items() if gate}
        assert on == {KINDS[e["encoding"][str(mode)]]}, step
        assert [kind in on for kind in FLAGS] == [bool(flag) for flag in flags], step


def loss_functions(case):
    given, limit = tensors(case, "loss/"), case.entry["tol"]["default"]
    logits, teacher, labels = (jnp.asarray(given[name]) for name in ("s_logits", "t_logits", "labels"))
    scores, wanted = jnp.asarray(given["s_scores"]), jnp.asarray(given["t_scores"])

    def score_loss(scores):
        return sum(jnp.mean(distillation.published_score_error(s, t)) for s, t in zip(scores, wanted, strict=True))

    soft = distillation.soft_cross_entropy(logits, teacher)
    got = {
        "attention_score": score_loss(scores),
        "ce": jnp.mean(label_losses(logits, labels)),
        "mse": jnp.mean(distillation.squared_error(logits, teacher)),
        "soft_ce_sum_classes": jnp.mean(soft),
        "soft_ce_ternarybert_mean_all": jnp.mean(soft) / logits.shape[-1],
    }
    for name, value in zip(case.entry["value_names"], given["values"], strict=True):
        np.testing.assert_allclose(got[name], value, rtol=limit["rtol"], atol=limit["atol"], err_msg=name)
    gradient = jax.grad(score_loss)(scores)
    np.testing.assert_allclose(gradient, given["d_s_scores"], rtol=limit["rtol"], atol=limit["atol"])


@in_float64
def training_trajectory(case):
    e, config, want = case.entry, config_of(case), tensors(case, f"{case.id}/")
    steps, tolerance = e["steps"], e["tol"]["fp64"]
    student, teacher = model_of(config, student_policy(case)), model_of(config)
    pairs = layer_pairs("same", config.num_layers, config.num_layers)
    modes = [kinds_of(mode) for mode in e["intervention_by_step"]]
    schedule, name = None, case.id.rpartition("/")[2]
    if any(modes):
        stages, end = [], 0
        for kinds, members in itertools.groupby(modes):
            end += len(list(members))
            stages.append(ti.Stage(Fraction(end, steps), kinds))
        named = name in ti.SCHEDULES and name != "stochastic"  # what is drawn is drawn otherwise here
        schedule = ti.Interventions.named(name, pairs) if named else ti.Interventions(tuple(stages), pairs)
    objective = Distillation(
        student,
        teacher,
        distillation.LOSS_SETS["teacher_intervention"],
        pairs,
        padding="published",
        intervene=schedule,
        collections=ti.untrained_padding(config),
    )
    settings = OptimizerConfig(e["lr"], name="bert_adam", warmup=0.1, eps=1e-6, weight_decay=0.01)
    phase = Phase(case.id, student, settings, steps=steps, objective=objective)
    optimizer, start = make_optimizer(settings, steps), params_of(case, "student")
    batch, constants = batch_of(case), {"params": params_of(case, "teacher")}
    state = make_state(phase, {"params": start}, optimizer, 0, batch)
    step = jax.jit(make_step(phase, optimizer, 0, Span(0, 0, steps, steps)))
    for number in range(steps):
        gates = {kind: jnp.asarray(kind in modes[number]) for kind in FLAGS}
        means, _, _ = program(case)(case, gates, gates, (), state.variables()["params"])
        state, measured = step(state, batch, constants)
        got = [means["script" if name == "total" else name] for name in e["loss_columns"]]
        np.testing.assert_allclose(measured["loss"], means["script"], rtol=1e-9)
        np.testing.assert_allclose(got, want["losses"][number], **tolerance["losses"], err_msg=f"step {number}")
    for path, value in flat_params(case, f"{case.id}/param/").items():
        np.testing.assert_allclose(state.trained[f"params/{path}"], value, rtol=0, **tolerance["param"], err_msg=path)
    before = traverse_util.flatten_dict(start, sep="/")
    order = paths_of(case, e["param_order"])
    moved = [np.linalg.norm(state.trained[f"params/{path}"] - before[path]) for path in order.values()]
    np.testing.assert_allclose(moved, want["delta_norms"], rtol=1e-5, atol=1e-9)
    counts = paths_of(case, e["optimizer_step_count_by_param"])
    got = {name: int(state.opt_state.counts[f"params/{path}"]) for name, path in counts.items()}
    assert got == e["optimizer_step_count_by_param"]


HANDLERS = {
    function.__name__: function
    for function in (
        fp_teacher_forward,
        student_forward_with_intervention,
        flag_without_teacher_signals,
        loss_extension,
        partial_quantization,
        attention_block,
        intervention_schedule,
        loss_functions,
        training_trajectory,
    )
}
