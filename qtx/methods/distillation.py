"""Distillation: a phase whose objective compares the student with a teacher, at the sites of both.

    phase = distillation_phase(qat_phase(...), Teacher(bert, {"params": params}), LOSS_SETS["ternarybert"])

The teacher runs once in every step, in the same compiled program, without dropout and without gradients. Every loss is a
number per example, `[B]`: the mean over that example's tokens (not over padding), heads and features, summed over the
pairs of layers. An example counts by its weight in the batch, so filler rows do not.

    logits               soft cross-entropy, `-sum_c softmax(z_T / t) log softmax(z_S / t) t^2`; squared error for one output
    logits_ternarybert   the same, divided by the number of classes, as in TernaryBERT's code
    labels               ground truth: cross-entropy, or squared error for one output
    labels_published     the same, but for one output against the teacher's, as in the code of teacher intervention
    hidden_states        squared error of the embeddings and of every layer's output
    scores               squared error of the divided attention scores, of pairs of tokens
    maps                 KL divergence of the student's attention maps from the teacher's
    context              squared error of the attention context
    self_output          squared error of the attention's output projection, before dropout, residual and LayerNorm
    attention_output     squared error behind that LayerNorm; only where norms stand behind sub-layers, unlike those of a ViT
    *_relations          KL divergence of the softmax of scaled products of values with values (queries, keys), head by head

Sources: Hinton et al. 2015 (section 2), TinyBERT (Jiao et al. 2020, eq. 7-10), TernaryBERT (Zhang et al. 2020, section
3.3), MiniLMv2 (Wang et al. 2021, section 3.1), and Kim et al. 2022 and 2023 for context, self-output and maps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.nn.bert import MASKED
from qtx.nn.sites import example_inputs, list_sites
from qtx.train.phase import Batch, Forward, Phase, inputs, label_losses

Padding = Literal["ignore", "published"]
LayerRule = Literal["same", "every", "first", "last"]
Pairs = tuple[tuple[int, int], ...]
Intervene = Callable[[Forward, Mapping[str, jax.Array]], dict[str, Any]]

RELATIONS = {f"{name}_relations": f"attention/{name}/output" for name in ("query", "key", "value")}
LAYER_SITES = {  # of the losses that compare layers
    "scores": "attention/scores",
    "maps": "attention/probs",
    "context": "attention/context",
    "self_output": "attention/out/output",
    "attention_output": "attention/norm/output",
    **RELATIONS,
}
LOGIT_LOSSES = ("logits", "logits_ternarybert", "labels", "labels_published")
LOSSES = (*LOGIT_LOSSES, "hidden_states", *LAYER_SITES)
READ_BY = {  # fields of `Distillation`, with the losses that they make a difference to
    "temperature": ("logits", "logits_ternarybert"),
    "padding": ("hidden_states", "scores", "context", "self_output", "attention_output"),
    "relation_heads": tuple(RELATIONS),
}

LOSS_SETS: dict[str, dict[str, float]] = {
    "ternarybert": {"logits_ternarybert": 1.0, "hidden_states": 1.0, "scores": 1.0},
    "teacher_intervention": {"logits": 1.0, "hidden_states": 1.0, "attention_output": 1.0, "scores": 1.0},
}

# How pairs of layers are given, in errors: to the library, and in the text of a configuration.
_PAIRS = "pairs (student, teacher) from 0, such as (0, 1), (1, 3), in a configuration '0-1, 1-3'"
_PUBLISHED_FLOOR = -100.0  # published losses take scores at and below it for masked ones
_LEAST_PROBABILITY = 1e-8  # of attention maps within the logarithm


class Teacher(NamedTuple):
    """A model to learn from.

    Attributes:
      model: a classifier with sites.
      variables: its `params`, and `ranges` if it is quantized.
    """

    model: nn.Module
    variables: Mapping[str, Any]


# --- Losses of one pair of tensors: `[B]` ---


def _mean(errors: jax.Array, where: jax.Array | None) -> jax.Array:
    axes = tuple(range(1, errors.ndim))
    if where is None:
        return jnp.mean(errors, axes)
    where = jnp.broadcast_to(where, errors.shape)
    return jnp.sum(jnp.where(where, errors, 0), axes) / jnp.maximum(jnp.sum(where, axes), 1)


def squared_error(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Returns the mean squared error of each example.

    Args:
      student: `[B, ...]`.
      teacher: the same.
      where: bool, broadcastable to them: the elements that count; None: all.
    """
    dtype = jnp.promote_types(student.dtype, jnp.float32)
    return _mean(jnp.square(student.astype(dtype) - teacher.astype(dtype)), where)


def published_score_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns the mean squared error of masked scores `[B, H, Q, T]` over all entries, those at most -100 being 0."""

    def kept(scores: jax.Array) -> jax.Array:
        return jnp.where(scores <= _PUBLISHED_FLOOR, 0, scores)

    return squared_error(kept(student), kept(teacher))


def map_divergence(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Returns KL(teacher || student) of attention maps, the mean over heads and queries.

    Args:
      student: probabilities `[B, H, Q, T]`; below 1e-8 they count as that much.
      teacher: the same.
      where: bool `[B, 1, Q, T]`: pairs that count; None: all.
    """
    student, teacher = (jnp.maximum(p, _LEAST_PROBABILITY) for p in (student, teacher))
    return _divergence(jnp.log(student), jnp.log(teacher), where)


def relation_divergence(
    student: jax.Array, teacher: jax.Array, heads: int, where: jax.Array | None = None
) -> jax.Array:
    """Returns KL(teacher || student) of relations between tokens (MiniLMv2, eq. 3), the mean over heads and tokens.

    A relation is `softmax(V V^T / sqrt(d))`, with the vectors cut into `heads` parts of width d: the two models need not
    have the same width.

    Args:
      student: `[B, T, D]`.
      teacher: `[B, T, D']`.
      heads: relation heads; divides both widths.
      where: bool `[B, T, 1]`: tokens that count; None: all.
    """
    pairs = None if where is None else (where & jnp.swapaxes(where, 1, 2))[:, None]

    def relations(x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], heads, -1).astype(jnp.promote_types(x.dtype, jnp.float32))
        products = jnp.einsum("bqhd,bkhd->bhqk", x, x) / x.shape[-1] ** 0.5
        return nn.log_softmax(products if pairs is None else jnp.where(pairs, products, MASKED))

    return _divergence(relations(student), relations(teacher), pairs)


def _divergence(student: jax.Array, teacher: jax.Array, where: jax.Array | None) -> jax.Array:
    """KL divergence of log probabilities `[B, H, Q, T]`, the mean over heads and the queries that count."""
    terms = jnp.exp(teacher) * (teacher - student)
    if where is None:
        return jnp.mean(jnp.sum(terms, -1), (1, 2))
    where = jnp.broadcast_to(where, terms.shape)
    return _mean(jnp.sum(jnp.where(where, terms, 0), -1), jnp.any(where, -1))


def soft_cross_entropy(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns `-t^2 sum_c softmax(teacher / t) log softmax(student / t)` of logits `[B, C]`.

    The factor keeps the size of the gradients whatever the temperature (Hinton et al. 2015, section 2).
    """
    log_probs = nn.log_softmax(student / temperature)
    return -(temperature**2) * jnp.sum(nn.softmax(teacher / temperature) * log_probs, -1)


# --- Layers ---


def layer_pairs(rule: LayerRule | Sequence[tuple[int, int]], student: int, teacher: int) -> Pairs:
    """Returns which layer of the teacher each layer of the student learns from: pairs (student, teacher), from 0.

    Args:
      rule: `'same'`: they have equally many. `'every'`: the last of each run of n of the teacher's layers (of 12, for a
        student of 4: 2, 5, 8, 11). `'first'`, `'last'`: as many as the student has. Or the pairs themselves.
      student: its number of layers.
      teacher: likewise.

    Raises:
      UserError: if the numbers do not fit the rule.
    """
    both = f"the student has {student} layers and the teacher {teacher}"
    if not isinstance(rule, str):
        pairs = tuple((int(s), int(t)) for s, t in rule)
        for s, t in pairs:
            if not (0 <= s < student and 0 <= t < teacher):
                raise UserError(f"layers: there is no pair ({s}, {t}): {both}, counted from 0")
        if not pairs:
            raise UserError("layers: no pairs of layers were given")
        return pairs
    if rule not in get_args(LayerRule):
        raise UserError(f"layers: unknown rule {rule!r}{near_misses(rule, get_args(LayerRule))}; or give {_PAIRS}")
    if rule == "same" and student != teacher:
        raise UserError(f"layers 'same': {both}; choose 'every', 'first', 'last' or {_PAIRS}")
    if student > teacher:
        raise UserError(f"layers {rule!r}: {both}; give {_PAIRS}, or a teacher that is at least as deep")
    if rule == "every" and teacher % student:
        raise UserError(f"layers 'every': {both}, which is no multiple; choose 'first', 'last' or {_PAIRS}")
    step, start = (teacher // student, teacher // student - 1) if rule == "every" else (1, 0)
    start = teacher - student if rule == "last" else start
    return tuple((i, start + step * i) for i in range(student))


def layer_site(layer: int, role: str) -> str:
    """Returns the name of a site of a layer of the encoder."""
    return f"encoder/layer_{layer}/{role}"


class Side(NamedTuple):
    """What one of the two models has computed.

    Attributes:
      model: with the method `score_divisor`.
      outputs: with `logits` and `hidden_states`.
      captures: by site.
    """

    model: Any
    outputs: Any
    captures: Mapping[str, jax.Array]

    def at(self, layer: int, role: str) -> jax.Array:
        """Returns the tensor of a site of a layer; scores are divided as the softmax sees them."""
        value = self.captures[layer_site(layer, role)]
        if role != LAYER_SITES["scores"]:
            return value
        width = self.captures[layer_site(layer, "attention/query/output")].shape[-1] // value.shape[1]
        return value.astype(jnp.promote_types(value.dtype, jnp.float32)) / self.model.score_divisor(width)


# --- The objective ---


def check_losses(losses: Mapping[str, float]) -> None:
    """Raises a `UserError` on a loss that does not exist, or a weight that is none; and if all of them are off."""
    for name, weight in losses.items():
        if name not in LOSSES:
            raise UserError(f"unknown distillation loss {name!r}{near_misses(name, LOSSES)}")
        if not math.isfinite(weight):
            raise UserError(f"the weight {weight} of the distillation loss {name!r} is no finite number")
        if weight < 0:
            raise UserError(f"the weight {weight} of the distillation loss {name!r} is negative; 0 switches it off")
    if not any(losses.values()):
        raise UserError(f"no distillation loss has a weight above 0; choose from {', '.join(LOSSES)}")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The objective of a phase with a teacher, whose variables are the phase's `constants`.

    Attributes:
      student: the phase's model.
      teacher: module.
      losses: weight of each loss; names are those of `LOSSES`.
      layers: pairs of layers, (student, teacher).
      temperature: of the logits, above 0 and finite.
      padding: `'published'`: padding counts in squared errors as tokens do, and the scores are compared as in
        `published_score_error`.
      relation_heads: of the relations; 0: as many as the student has heads.
      intervene: makes collections for the student from the teacher's captures, see `qtx.methods.teacher_intervention`.
      collections: further ones that the student has in every step, see `qtx.nn.sites`.

    Raises:
      UserError: an unknown loss or rule, or a value out of range.
    """

    student: nn.Module
    teacher: nn.Module
    losses: Mapping[str, float]
    layers: Pairs
    temperature: float = 1.0
    padding: Padding = "ignore"
    relation_heads: int = 0
    intervene: Intervene | None = None
    collections: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_losses(self.losses)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"the temperature {self.temperature} of distillation must be above 0, and finite")
        if self.relation_heads < 0:
            raise UserError(
                f"relation_heads is {self.relation_heads}: give a number that divides both widths; 0 is the student's heads"
            )
        if self.padding not in get_args(Padding):
            raise UserError(f"unknown padding rule {self.padding!r}{near_misses(self.padding, get_args(Padding))}")

    def __call__(self, forward: Forward, batch: Batch, constants: Any) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
        """Returns the weighted losses summed over the batch, the sum of the examples' weights, and each loss summed."""
        sums = {
            name: jnp.sum(value * batch["weights"]) for name, value in self.terms(forward, batch, constants).items()
        }
        total = sum(self.losses[name] * value for name, value in sums.items())
        return total, jnp.sum(batch["weights"]), sums

    def terms(self, forward: Forward, batch: Batch, constants: Any) -> dict[str, jax.Array]:
        """Runs teacher and student, and returns each loss that has a weight, `[B]`."""
        teacher, masks = self.teach(batch, constants)
        given = {} if self.intervene is None else self.intervene(forward, teacher.captures)
        both = traverse_util.flatten_dict(self.collections) | traverse_util.flatten_dict(given)
        outputs, captures = forward(batch, capture=True, **traverse_util.unflatten_dict(both))
        student = Side(self.student, outputs, traverse_util.flatten_dict(captures, sep="/"))
        return {
            name: self._loss(name, student, teacher, masks, batch) for name, weight in self.losses.items() if weight
        }

    def teach(self, batch: Batch, variables: Any) -> tuple[Side, Mapping[str, jax.Array]]:
        """Runs the teacher; returns what it computed, and the masks of its sites."""
        outputs, found = self.teacher.apply(variables, *inputs(self.teacher, batch), mutable=["captures", "masks"])
        captures, masks = (traverse_util.flatten_dict(found.get(name, {}), sep="/") for name in ("captures", "masks"))
        return Side(self.teacher, outputs, captures), masks

    def _loss(self, name: str, student: Side, teacher: Side, masks: Mapping[str, jax.Array], batch: Batch) -> jax.Array:
        if name in LOGIT_LOSSES:
            return self._logit_loss(name, student.outputs.logits, teacher.outputs.logits, batch)
        if name == "hidden_states":
            pairs = [(0, 0), *((s + 1, t + 1) for s, t in self.layers)]
            states = [(student.outputs.hidden_states[s], teacher.outputs.hidden_states[t]) for s, t in pairs]
            tokens = self._where(masks, 0, "attention/value/output")
            return sum((squared_error(s, t, tokens) for s, t in states), jnp.zeros(()))
        return sum((self._layer_loss(name, student, teacher, masks, s, t) for s, t in self.layers), jnp.zeros(()))

    def _logit_loss(self, name: str, student: jax.Array, teacher: jax.Array, batch: Batch) -> jax.Array:
        regression, classes = student.shape[-1] == 1, student.shape[-1]
        if name == "labels" or (name == "labels_published" and not regression):
            return label_losses(student, batch["labels"])
        if regression:
            return squared_error(student, teacher)
        divisor = classes if name == "logits_ternarybert" else 1
        return soft_cross_entropy(student, teacher, self.temperature) / divisor

    def _where(self, masks: Mapping[str, jax.Array], layer: int, role: str) -> jax.Array | None:
        return None if self.padding == "published" else masks.get(layer_site(layer, role))

    def _layer_loss(
        self, name: str, student: Side, teacher: Side, masks: Mapping[str, jax.Array], s: int, t: int
    ) -> jax.Array:
        role = LAYER_SITES[name]
        ours, theirs, mask = student.at(s, role), teacher.at(t, role), masks.get(layer_site(t, role))
        if name == "maps":
            return map_divergence(ours, theirs, mask)
        if name in RELATIONS:
            heads = self.relation_heads or self.student.config.num_heads  # type: ignore[attr-defined]
            return relation_divergence(ours, theirs, heads, mask)
        if name == "scores" and self.padding == "published":
            penalty = 0.0 if mask is None else jnp.where(jnp.any(mask, -2, keepdims=True), 0.0, MASKED)
            return published_score_error(ours + penalty, theirs + penalty)
        return squared_error(ours, theirs, self._where(masks, t, role))


# --- Phases ---


@functools.lru_cache(maxsize=16)
def _shapes(model: nn.Module, args: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[dict[str, tuple[int, ...]], Any]:
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *args)
    return {name: info.shape for name, info in list_sites(model, variables, *args).items()}, outputs


def shapes(model: nn.Module, args: Sequence[Any] | None = None) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Returns the shapes of a model's sites by name, and those of its outputs; nothing is computed.

    Args:
      model: any; its policy does not matter.
      args: what it is called with, arrays or `jax.ShapeDtypeStruct`s; None: one short text, or image.
    """
    if args is None:
        args = example_inputs(model, model.config, tokens=4)  # type: ignore[attr-defined]
    abstract = tuple(jax.ShapeDtypeStruct(jnp.shape(arg), jnp.result_type(arg)) for arg in args)
    return _shapes(model.clone(policy=None), abstract)  # type: ignore[call-arg]


def check_site(what: str, name: str, side: str, model: nn.Module, sites: Collection[str]) -> None:
    """Raises a `UserError` if the model of one side does not have the site that `what` needs."""
    if name not in sites:
        kind = type(model).__name__
        raise UserError(
            f"{what} needs the site {name!r}, which the {side} ({kind}) does not have{near_misses(name, sites)}"
        )


def check_heads(what: str, student: nn.Module, teacher: nn.Module) -> None:
    """Raises a `UserError` if contexts, which are the heads' side by side, are of different heads."""
    ours, theirs = (model.config.num_heads for model in (student, teacher))  # type: ignore[attr-defined]
    if ours != theirs:
        raise UserError(
            f"{what}: the student has {ours} heads and the teacher {theirs}; a context is of heads side by side"
        )


def check_teacher(objective: Distillation, args: Sequence[Any] | None = None) -> None:
    """Raises a `UserError` that names both sides if student and teacher do not fit a loss that has a weight.

    Args:
      objective: with both.
      args: what both are called with, see `shapes`.
    """
    models = {"student": objective.student, "teacher": objective.teacher}
    found = {side: shapes(model, args) for side, model in models.items()}
    (ours, our_outputs), (theirs, their_outputs) = found["student"], found["teacher"]
    wanted = [name for name, weight in objective.losses.items() if weight]
    if our_outputs.logits.shape != their_outputs.logits.shape:
        labels = our_outputs.logits.shape[-1], their_outputs.logits.shape[-1]
        raise UserError(f"the student has {labels[0]} labels and the teacher {labels[1]}: they have different tasks")
    if "attention_output" in wanted:
        for side, model in models.items():
            _check_norm_behind(side, model)
    for name in wanted:
        pairs: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        if name == "hidden_states":
            states = [(0, 0), *((s + 1, t + 1) for s, t in objective.layers)]
            pairs = [
                (f"hidden state {s}", our_outputs.hidden_states[s].shape, their_outputs.hidden_states[t].shape)
                for s, t in states
            ]
        elif name in LAYER_SITES:
            for s, t in objective.layers:
                sites = {"student": layer_site(s, LAYER_SITES[name]), "teacher": layer_site(t, LAYER_SITES[name])}
                for side, site_name in sites.items():
                    check_site(f"loss {name!r}", site_name, side, models[side], found[side][0])
                pairs.append((sites["student"], ours[sites["student"]], theirs[sites["teacher"]]))
        for what, our_shape, their_shape in pairs:
            _check_shapes(objective, name, what, our_shape, their_shape)
        if name == "context":
            check_heads("loss 'context'", objective.student, objective.teacher)


def _check_norm_behind(side: str, model: nn.Module) -> None:
    """Raises a `UserError` if the norm of attention stands before it: behind attention there is the residual sum alone then,
    and the norm's output is of the layer before."""
    if model.norm_first:  # type: ignore[attr-defined]
        raise UserError(
            f"loss 'attention_output' is of the norm behind attention, and in the {side} ({type(model).__name__}) norms stand "
            "before their sub-layers; take 'self_output' (teacher_intervention: 'logits=1, hidden_states=1, scores=1, "
            "self_output=1')"
        )


def _check_shapes(
    objective: Distillation, name: str, what: str, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    counts = [model.config.num_heads for model in (objective.student, objective.teacher)]  # type: ignore[attr-defined]
    if name in RELATIONS:
        heads = objective.relation_heads
        if not heads and counts[0] != counts[1]:
            raise UserError(
                f"loss {name!r}: the student has {counts[0]} heads and the teacher {counts[1]}; set relation_heads"
            )
        heads = heads or counts[0]
        if ours[-1] % heads or theirs[-1] % heads:
            raise UserError(
                f"loss {name!r}: {heads} relation heads do not divide both widths, {ours[-1]} of the student and "
                f"{theirs[-1]} of the teacher"
            )
    elif ours != theirs:
        heads_differ = name in ("scores", "maps") and ours[1] != theirs[1]
        unit, sizes = ("heads", (ours[1], theirs[1])) if heads_differ else ("shape", (ours, theirs))
        remedy = ""
        if name not in ("scores", "maps") and ours[-1] != theirs[-1]:
            remedy = "; there is no learned projection between widths: compare logits, scores, maps or relations"
        raise UserError(
            f"loss {name!r} does not fit at {what}: {unit} {sizes[0]} of the student, {sizes[1]} of the teacher{remedy}"
        )


def distillation_phase(
    phase: Phase,
    teacher: Teacher,
    losses: Mapping[str, float],
    layers: LayerRule | Sequence[tuple[int, int]] = "same",
    args: Sequence[Any] | None = None,
    **options: Any,
) -> Phase:
    """Returns a phase that learns from a teacher what it would have learned from the labels.

    Args:
      phase: the student's: its model, optimizer and length, from `Phase` or `qtx.methods.qat.qat_phase`.
      teacher: module and variables.
      losses: weight of each loss, such as `LOSS_SETS['ternarybert']`.
      layers: see `layer_pairs`.
      args: what both models are called with; None: one short text, or image.
      **options: further fields of `Distillation`.

    Raises:
      UserError: the two models do not fit a loss, or an unknown name.
    """
    depths = [model.config.num_layers for model in (phase.model, teacher.model)]  # type: ignore[attr-defined]
    pairs = layer_pairs(layers, *depths)
    objective = Distillation(phase.model, teacher.model, dict(losses), pairs, **options)
    check_teacher(objective, args)
    return dataclasses.replace(phase, objective=objective, constants=teacher.variables)
