"""Whole models of BitTransGNN: bank, interpolation, steps of training, refresh, distillation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import traverse_util

from qtx import models
from qtx.methods.bit_transformer import bit_policy
from qtx.methods.bittransgnn import GraphDistillation, distillation_losses, graph_loss, vote
from qtx.models.checkpoints import from_hf_tensors
from qtx.nn.bert import BertClassifier, BertConfig
from qtx.nn.graph import adjacency
from qtx.nn.text_graph import GraphConfig, TextGraphClassifier, mixture
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Forward, Phase, Span, label_losses, make_state, make_step

FAMILY = models.get_family("bert")
PLAIN = dict(warmup=0.0, schedule="constant", weight_decay=0.0, max_grad_norm=0.0)  # Adam and nothing else


def close(case, name: str, found: Any, atol: float | None = None) -> None:
    """Compares a result with the output of that name, at the case's tolerance."""
    expected, tolerance = case.values("outputs")[name], case.entry["tolerance"]
    np.testing.assert_allclose(
        np.asarray(found), expected, tolerance["rtol"], tolerance["atol"] if atol is None else atol, err_msg=name
    )


class Joint:
    """The tiny models of a case, its graph and its documents."""

    def __init__(self, case):
        self.given, self.sizes = case.values("inputs"), case.entry["parameters"]
        p, word = self.sizes, self.tensor("embeddings.word_embeddings.weight")
        self.labels = jnp.asarray(self.given["labels"])
        self.labels = self.labels[:, 0] if self.labels.ndim == 2 else self.labels.astype(jnp.int32)
        classes, width = self.tensor("classifier.weight", "").shape
        self.graph = adjacency(scipy.sparse.csr_array(self.given["adj_norm"]))
        self.documents = np.delete(np.arange(len(self.given["adj_norm"])), self.words)
        if word is None:
            self.config = BertConfig(1, width, 1, 1, 1, 1, num_labels=classes, pooler=False)
            return
        feed = self.tensor("encoder.layer.0.intermediate.dense.weight")
        positions = len(self.tensor("embeddings.position_embeddings.weight"))
        self.config = BertConfig(
            len(word), width, p["layers"], p["heads"], len(feed), positions, 2, p["layer_norm_eps"], num_labels=classes
        )
        self.config = FAMILY.config_from_hf(
            FAMILY.config_to_hf(self.config)
            | {"hidden_dropout_prob": p["dropout"], "attention_probs_dropout_prob": p["dropout"]}
            | {"num_labels": classes, "qtx": {"pooler": False}}
        )

    @property
    def words(self) -> slice:
        start = self.sizes["n_train"] + self.sizes["n_val"]
        return slice(start, start + self.sizes["n_word"])

    def tensor(self, name: str, part: str = "bert_model.") -> np.ndarray | None:
        names = (f"{owner}/{part}{name}" for owner in ("param", "teacher"))
        return next((self.given[each] for each in names if each in self.given), None)

    def params(self, owner: str = "param") -> dict[str, Any]:
        """Parameters by nested qtx path."""
        found, hidden = {}, {}
        for name, value in self.given.items():
            path, _, rest = name.partition("/")
            if path != owner:
                continue
            if rest.startswith("gcn."):
                layer, leaf = rest.split(".", 2)[1:]
                kind = "kernel" if leaf == "lin.weight" else "bias"
                found[f"gcn/layer_{int(layer.removeprefix('gcnconv')) - 1}/{kind}"] = value.T
            else:
                hidden[rest.removeprefix("bert_model.")] = value
        if len(hidden) == 2:  # the classifier alone; its encoder never runs
            made = jax.eval_shape(BertClassifier(self.config).init, jax.random.key(0), *FAMILY.example_inputs())
            found |= {k: np.zeros(v.shape) for k, v in traverse_util.flatten_dict(made["params"], sep="/").items()}
            found |= {"classifier/kernel": hidden["classifier.weight"].T, "classifier/bias": hidden["classifier.bias"]}
        else:
            text, extra = from_hf_tensors(FAMILY, self.config, hidden)
            assert not extra, extra
            found |= text
        return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in found.items()}, sep="/")

    def model(self, policy=None) -> TextGraphClassifier:
        """The model of the case's sizes; that of a teacher where there is one."""
        hidden = len(self.tensor("lin.weight", "gcn.gcnconv1."))
        graph = GraphConfig(self.sizes["lmbd"], hidden, dropout=self.sizes.get("dropout", 0.0))
        return TextGraphClassifier(self.config, policy=policy, graph=graph)

    def batch(self, index: Any) -> dict[str, jax.Array]:
        index = jnp.asarray(index, jnp.int32)
        found = {"labels": self.labels[index], "weights": jnp.ones(len(index)), "index": index}
        nothing = np.zeros((len(self.given["adj_norm"]), 1))
        ids, mask = (
            jnp.asarray(self.given.get(name, nothing), jnp.int32)[index] for name in ("input_ids", "attention_mask")
        )
        return found | {"input_ids": ids, "attention_mask": mask, "token_type_ids": jnp.zeros_like(ids)}

    def bank(self, model: TextGraphClassifier, params: Any) -> jax.Array:
        """Features of all documents, in evaluation mode; zero for words."""
        batch = self.batch(self.documents)
        text = BertClassifier(self.config, policy=model.policy)
        args = (batch[name] for name in text.inputs)
        features = jax.jit(text.apply)({"params": params}, *args).pooled
        nodes = len(self.given["adj_norm"])
        return jnp.zeros((nodes, features.shape[1])).at[self.documents].set(features)


def joint(case) -> None:
    """Float models: evaluation at several lambdas and temperatures, one step, one epoch of Adam, and a refresh."""
    j = Joint(case)
    model, params = j.model(), j.params()
    bank = j.bank(model, params)
    close(case, "bank_initial", bank)
    found = vote(model, {"params": params, "bank": {"features": bank}}, j.graph, j.given["eval_idx"])
    regression = j.config.num_labels == 1
    for name in case.values("outputs"):
        if name.startswith("eval/"):
            check_evaluation(case, name, found, j.sizes["lmbd"], regression)

    gradients(case, j, model, params, {"features": bank})
    epoch(case, j, model, params)


def check_evaluation(case, name: str, found, mix: float, regression: bool) -> None:
    """One of the outputs `eval/...`."""
    kind = name.removeprefix("eval/")
    if kind in ("cls_logit", "gcn_logit"):
        return close(case, name, found.text if kind == "cls_logit" else found.graph)
    kind, _, value = kind.partition("_T") if "_T" in kind else kind.partition("_lambda")
    temperature = float(value) if "_T" in name else 1.0
    if "_lambda" in name:
        mix = float(value.replace("p", "."))
    mixed = mixture(found.graph, found.text, mix, temperature)
    return close(case, name, mixed if regression else jnp.exp(mixed))


def gradients(case, j: Joint, model, params, bank) -> None:
    """`step0/...`: loss, prediction, bank and gradients of one batch."""
    batch = j.batch(j.given["batch0" if "batch0" in j.given else "batch"])
    graph = {"adjacency": j.graph}

    def loss(params):
        def run(batch, capture, **collections):
            del capture
            variables = {"params": params, "bank": bank, **collections}
            args = (batch[name] for name in model.inputs)
            return model.apply(variables, *args, deterministic=False, mutable=["bank"], rngs={})

        outputs, changed = run(batch, False, graph=graph)
        total, weight = graph_loss(Forward(run), batch, graph)
        return total / weight, (outputs, changed)

    (value, (outputs, changed)), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(case, "step0/loss", value)
    close(case, "step0/log_pred", outputs.logits)
    close(case, "step0/bank_after_forward", changed["bank"]["features"])
    compare(case, "step0/grad/", found)


def compare(case, prefix: str, params: Any, floor=None) -> None:
    """Compares parameters, or their gradients, with the outputs below a prefix."""
    flat = traverse_util.flatten_dict(params, sep="/")
    modules = FAMILY.modules(BertConfig(num_layers=9))
    for name in case.values("outputs"):
        if not name.startswith(prefix):
            continue
        stem, _, leaf = name.removeprefix(prefix).rpartition(".")
        stem = stem.removeprefix("gcn.")
        if stem.startswith("gcnconv"):
            path = f"gcn/layer_{int(stem[7]) - 1}"
        else:
            stem = stem.removeprefix("bert_model.")
            path = modules.get(stem) or modules[f"bert.{stem}"]
        kinds = ("bias",) if leaf == "bias" else ("kernel", "table", "scale")
        kind = next(kind for kind in kinds if f"{path}/{kind}" in flat)
        value = flat[f"{path}/{kind}"]
        value = value.T if kind == "kernel" else value
        close(case, name, value, None if floor is None else floor(path))


def phase_of(j: Joint, model, rates: tuple[float, float], trainable=("**",)) -> Phase:
    """A phase whose memory is the bank."""
    text, gcn = rates
    optimizer = OptimizerConfig(text, rate_factors=(("gcn/**", gcn / text),), **PLAIN)
    return Phase("joint", model, optimizer, objective=graph_loss, constants={"adjacency": j.graph}, trainable=trainable)


def steps(j: Joint, phase: Phase, variables, memory, batches) -> tuple[Any, list[float]]:
    """Takes a step for each batch; returns the state and the losses before the steps."""
    optimizer = make_optimizer(phase.optimizer, len(batches))
    state = make_state(phase, variables, optimizer, 0, j.batch([0])).replace(memory=memory)
    step = jax.jit(make_step(phase, optimizer, 0, Span(0, 0, len(batches), len(batches))))
    losses = []
    for index in batches:
        state, measured = step(state, j.batch(index), phase.constants)
        losses.append(float(measured["loss"]))
    return state, losses


def nodes_of(j: Joint, split: str) -> np.ndarray:
    p = j.sizes
    first = {"val": p["n_train"], "test": p["n_train"] + p["n_val"] + p["n_word"]}[split]
    return np.arange(first, first + p[f"n_{split}"])


def mean_loss(j: Joint, outputs, nodes) -> Any:
    return jnp.mean(label_losses(outputs.logits, j.labels[nodes]))


def epoch(case, j: Joint, model, params) -> None:
    """`epoch/...`: two steps of Adam, evaluation on the stale and on the fresh bank."""
    phase = phase_of(j, model, (j.sizes["bert_lr"], j.sizes["gcn_lr"]))
    batches = [j.given["batch0"], j.given["batch1"]]
    memory = {"bank": {"features": j.bank(model, params)}}
    state, losses = steps(j, phase, {"params": params}, memory, batches)
    rates = {"gcn": j.sizes["gcn_lr"]}

    def floor(path: str) -> float:  # what Adam does to an element whose gradient is nearly zero
        return 0.2 * rates.get(path.partition("/")[0], j.sizes["bert_lr"])

    close(case, "epoch/losses", losses)
    close(case, "epoch/bank_after", state.memory["bank"]["features"])
    variables = state.variables()
    val, test = nodes_of(j, "val"), nodes_of(j, "test")
    close(case, "epoch/val_loss_stale_bank", mean_loss(j, vote(model, variables, j.graph, val), val))
    fresh = variables | {"bank": {"features": j.bank(model, variables["params"])}}
    close(case, "epoch/bank_after_refresh", fresh["bank"]["features"])
    close(case, "epoch/val_loss_fresh_bank", mean_loss(j, vote(model, fresh, j.graph, val), val))
    found = vote(model, fresh, j.graph, test)
    close(case, "epoch/test_cls_logits", found.text)
    close(case, "epoch/test_gcn_logits", found.graph)
    compare(case, "epoch/param/", variables["params"], floor)


def static(case) -> None:
    """Two steps of Adam on the graph convolution alone, with and without the shortcut through its first product."""
    j = Joint(case)
    model, params = j.model().clone(recompute=False), j.params()
    val = nodes_of(j, "val")
    for shortcut in (False, True):
        bank = {"features": jnp.asarray(j.given["bank"])}
        if shortcut:
            everything = {"params": params, "bank": bank, "graph": {"adjacency": j.graph}}
            bank |= {"propagated": model.apply(everything, method="propagated")}
        phase = phase_of(j, model, (j.sizes["gcn_lr"],) * 2, ("gcn/**",))
        batches = [j.given["batch0"], j.given["batch1"]]
        state, losses = steps(j, phase, {"params": params}, {"bank": bank}, batches)
        close(case, "losses", losses)
        found = vote(model, state.variables(), j.graph, val)
        close(case, "val_loss", mean_loss(j, found, val))
        close(case, "val_cls_logits", found.text)
        close(case, "val_gcn_logits", found.graph)
        compare(case, "param_after/", state.variables()["params"])


def kd_losses(case) -> None:
    """Losses and gradients of logits, as intended and as published."""
    given, p = case.values("inputs"), case.entry["parameters"]
    student, graph, text = (jnp.asarray(given[f"{name}_logits"]) for name in ("student", "teacher_gcn", "teacher_cls"))
    labels = jnp.asarray(given["labels"], jnp.int32)
    batch = {"labels": labels, "weights": jnp.ones(len(labels))}
    for t in p["temperatures"]:
        tag = f"T{t}" if f"T{t}/true" in case.entry["outputs"] else f"T{t}".replace(".", "p")
        close(case, f"{tag}/teacher_soft", jnp.exp(mixture(graph, text, p["lmbd"], t)))
        close(case, f"{tag}/true", jnp.mean(label_losses(student, labels)))
        for name, target in (("original", "published"), ("corrected", "probabilities")):

            def distill(student, t=t, target=target):
                return jnp.mean(distillation_losses(student, graph, text, p["lmbd"], t, target))

            value, gradient = jax.value_and_grad(distill)(student)
            close(case, f"{name}/{tag}/distill", value)
            if name == "corrected":
                close(case, f"{name}/{tag}/dlogits", gradient)
                continue
            for alpha in p["alphas"]:
                objective = GraphDistillation(p["lmbd"], alpha, t, "published")

                def total(student, objective=objective):
                    found, weight, _ = objective.total(student, graph, text, batch)
                    return found / weight

                value, gradient = jax.value_and_grad(total)(student)
                key = f"original/T{t}_a{alpha}".replace(".", "p")
                close(case, f"{key}/total", value)
                close(case, f"{key}/dlogits", gradient)


def kd_regression(case) -> None:
    given = {name: jnp.asarray(value) for name, value in case.values("inputs").items()}
    close(case, "loss", jnp.mean(distillation_losses(given["student"], given["teacher"], given["teacher"], 0.3, 2.0)))


def kd_step(case) -> None:
    """A whole offline step: the teacher's votes, and the student's losses and gradients."""
    j, p = Joint(case), case.entry["parameters"]
    teacher, params = j.model(), j.params("teacher")
    bank = j.bank(teacher, params)
    close(case, "teacher_bank", bank)
    votes = vote(teacher, {"params": params, "bank": {"features": bank}}, j.graph, jnp.arange(p["n_train"]))
    batch = j.batch(j.given["batch"])
    soft = mixture(votes.graph, votes.text, p["lmbd"], p["temperature"])
    close(case, "teacher_soft", jnp.exp(soft)[batch["index"]])
    student = BertClassifier(j.config)
    objective = GraphDistillation(p["lmbd"], p["alpha_d"], p["temperature"], "published")

    def loss(params):
        def run(batch, capture):
            del capture
            return student.apply({"params": params}, *(batch[name] for name in student.inputs)), {}

        total, weight, parts = objective(Forward(run), batch, {"graph": votes.graph, "text": votes.text})
        return total / weight, {name: part / weight for name, part in parts.items()} | {
            "logits": run(batch, 0)[0].logits
        }

    (total, parts), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(j.params("student"))
    close(case, "total", total)
    close(case, "distill_as_published", parts["distillation"])
    close(case, "task", parts["task"])
    close(case, "student_logits", parts["logits"])
    compare(case, "grad/", found)


def quantized(case) -> None:
    """Encoder and classifier with few states; the graph convolution in full precision, or as it was run."""
    j, p = Joint(case), case.entry["parameters"]
    as_run = case.kind.endswith("_bit")
    states, bits = int(p["num_states"]), float(p["num_bits_act"])
    policy = bit_policy(states, bits, gcn_states=states if as_run else 0, gcn_activation_bits=bits)
    model, params = j.model(policy), j.params()
    bank = j.bank(model, params)
    close(case, "bank_initial", bank)
    found = vote(model, {"params": params, "bank": {"features": bank}}, j.graph, j.given["eval_idx"])
    close(case, "eval/cls_logit", found.text)
    close(case, "eval/gcn_logit", found.graph)
    close(case, "eval/pred", jnp.exp(found.logits))
    gradients(case, j, model, params, {"features": bank})


HANDLERS = {
    "joint_quantized_gcn_float": quantized,
    "joint_quantized_gcn_bit": quantized,
    "joint_classification": joint,
    "joint_regression": joint,
    "joint_static": static,
    "kd_step": kd_step,
    "kd_classes2": kd_losses,
    "kd_classes8": kd_losses,
    "kd_classes20": kd_losses,
    "kd_regression": kd_regression,
}
