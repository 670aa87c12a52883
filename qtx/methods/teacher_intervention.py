"""Teacher intervention: ternary transformers that learn from their own full-precision version.

    first, second = two_steps(phase, Teacher(bert, {"params": params}), "gradual", first=60, steps=540)

Kim et al. 2023, "Teacher Intervention: Improving Convergence of Quantization Aware Training for Ultra-Low Precision
Transformers". The student is that of TernaryBERT (Zhang et al. 2020): ternary weights, a ternary row for every word, and 8 bits
for what enters a product (`student_policy`).

An intervention replaces one tensor of every layer by the teacher's for the same input, at the sites that the student has
anyway (collection `teacher` of `qtx.nn.sites`), and cuts the gradient at the inputs of the branch that computes it
(collection `detach`). Both belong together, and neither is part of the model: there is nothing to switch off at inference.

    kind      letters  replaced site of a layer   inputs without gradient   linear layers that nothing behind the branch trains
    map       MI       attention/probs            query, key                query, key
    context   CI       attention/context          query, key, value         query, key, value
    output    OI       attention/out/output       query, key, value         query, key, value, out

What is compared within the branch trains them all the same: the scores reach query and key, and losses on the student's own
context or projection, which the published recipe does not have, value and out. With several kinds each replaces at its own
place; the value's input keeps its gradient if the map is among them. A replaced tensor goes through the student's own dropout
and quantizers.

Which kinds are on is a function of the step within the phase (`Interventions`), computed inside the compiled step: a
schedule costs no compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.distillation import (
    LAYER_SITES,
    LOSS_SETS,
    Distillation,
    Pairs,
    Teacher,
    check_heads,
    check_site,
    distillation_phase,
    layer_site,
    shapes,
)
from qtx.nn.aliases import policy
from qtx.nn.bert import BertConfig
from qtx.quant.policy import Policy
from qtx.quant.spec import Spec, per_channel, ternary
from qtx.train.phase import Forward, Phase

# --- The student ---

CLIP = (-2.5, 2.5)
WEIGHTS = ternary(clip=CLIP)
TABLE = ternary(per_channel(), clip=CLIP)
ACTIVATIONS = Spec(8, "narrow", range="dynamic", clip=CLIP)
PARTS = ("emb", "qkv", "ffn_1", "ffn_2", "cls")
"""Switches of `student_policy`, by their published names."""

_TABLE = "encoder/embeddings/word/table"
PARTS_OF_SOME = {"emb": _TABLE, "cls": "pooler/dense/kernel"}
"""Parts that not every model has, with their weights: images have no words, and a head can do without a pooler."""
_ATTENTION = "encoder/layer_*/attention/"


def student_policy(
    weights: Spec = WEIGHTS,
    table: Spec = TABLE,
    activations: Spec | None = ACTIVATIONS,
    *,
    emb: bool = True,
    qkv: bool = True,
    ffn_1: bool = True,
    ffn_2: bool = True,
    cls: bool = True,
    quantize: bool = True,
    published: bool = False,
) -> Policy:
    """Returns the policy of the student, by the published switches.

    Weights and inputs of the chosen linear layers are on grids, and query, key, value and the attention map with `qkv`.
    Position and token-type tables, norms, biases and the classifier stay in full precision.

    Args:
      weights: grid of the matrices.
      table: grid of the word table.
      activations: grid of the inputs of linear layers and of what enters the products of attention; None: full precision.
      emb: the word table.
      qkv: the four linear layers of attention.
      ffn_1: the first linear layer of the perceptron.
      ffn_2: its second one.
      cls: the pooler's linear layer (not the classifier).
      quantize: False: nothing is quantized.
      published: ranges of activations include padding; `quantize` does not reach attention's output projection, and no switch
        query, key, value and the map, which are always on their grids.
    """
    if published and activations is not None:
        estimator = dataclasses.replace(activations.estimator, padding="include")
        activations = dataclasses.replace(activations, estimator=estimator)
    layers = {
        _ATTENTION + "query": qkv and quantize,
        _ATTENTION + "key": qkv and quantize,
        _ATTENTION + "value": qkv and quantize,
        _ATTENTION + "out": qkv and (quantize or published),
        "encoder/layer_*/ffn/up": ffn_1 and quantize,
        "encoder/layer_*/ffn/down": ffn_2 and quantize,
        "pooler/dense": cls and quantize,
    }
    chosen = [layer for layer, on in layers.items() if on]
    kernels: dict[str, Spec | None] = {f"{layer}/kernel": weights for layer in chosen}
    entering: dict[str, Spec | None] = {}
    outputs: dict[str, Spec | None] = {}
    if activations is not None:
        entering = {f"{layer}/input": activations for layer in chosen}
    if activations is not None and (published or (qkv and quantize)):
        outputs = {f"{_ATTENTION}{name}/output": activations for name in ("query", "key", "value")}
        entering[_ATTENTION + "probs_dropped"] = activations
    return policy(weights=kernels | ({_TABLE: table} if emb and quantize else {}), activations=outputs, inputs=entering)


def untrained_padding(config: BertConfig) -> dict[str, Any]:
    """Returns the collection that keeps the gradient off the padding row of the word table, to be given to `apply`.

    The row is looked up as ever. Published students have this where their table is quantized: `published_collections`.

    Returns:
      `{"detach": ...}` with bool `[V, 1]` at the table.
    """
    row = jnp.arange(config.vocab_size)[:, None] == config.pad_token_id
    return {"detach": {"encoder": {"embeddings": {"word": {"table": row}}}}}


def published_collections(policy: Policy | None, config: Any) -> dict[str, Any]:
    """Returns the collections that a published student has in every step: `untrained_padding` where its word table is on a
    grid, which a model of images does not have; with the table in full precision the padding row is trained.

    Args:
      policy: of the student; None: full precision.
      config: of its model.
    """
    if policy is None or policy.spec("weight", _TABLE) is None:
        return {}
    return untrained_padding(config)


# --- What an intervention is ---

KINDS = {
    "map": LAYER_SITES["maps"],
    "context": LAYER_SITES["context"],
    "output": LAYER_SITES["self_output"],
}
Gates = Mapping[str, Any]  # kind: whether it is on, a bool or a traced one


def detached_inputs(gates: Gates) -> dict[str, Any]:
    """Returns which inputs of an attention block have no gradient: `{"query": flag, "key": flag, "value": flag}`."""
    on = {kind: jnp.asarray(gates.get(kind, False)) for kind in KINDS}
    later = on["context"] | on["output"]
    return {"query": later | on["map"], "key": later | on["map"], "value": later & ~on["map"]}


def detach(gates: Gates, layers: Iterable[int]) -> dict[str, Any]:
    """Returns the collection `detach` for these layers of the student: the gradient rule alone."""
    flags = detached_inputs(gates)
    flat = {layer_site(layer, f"attention/{name}/input"): flag for layer in layers for name, flag in flags.items()}
    return {"detach": traverse_util.unflatten_dict(flat, sep="/")}


def intervene(gates: Gates, captures: Mapping[str, jax.Array], layers: Pairs) -> dict[str, Any]:
    """Returns the collections that put a teacher's tensors into the student.

    Args:
      gates: the kinds that are on; one that is missing is off.
      captures: of the teacher, by site.
      layers: pairs of layers, (student, teacher).
    """
    flat: dict[str, Any] = {}
    for student, teacher in layers:
        for kind, gate in gates.items():
            name = layer_site(student, KINDS[kind])
            flat |= {f"{name}/value": captures[layer_site(teacher, KINDS[kind])], f"{name}/gate": gate}
    return {"teacher": traverse_util.unflatten_dict(flat, sep="/"), **detach(gates, [pair[0] for pair in layers])}


# --- Which kinds are on, step by step ---


class Stage(NamedTuple):
    """A part of a schedule.

    Attributes:
      until: where it ends, as a share of the phase.
      kinds: that are on.
    """

    until: Fraction
    kinds: tuple[str, ...]


SCHEDULES = {
    "gradual": (
        Stage(Fraction(1, 6), ("output",)),
        Stage(Fraction(1, 3), ("context",)),
        Stage(Fraction(1), ("map",)),
    ),
    "inverted": (
        Stage(Fraction(1, 3), ("map",)),
        Stage(Fraction(2, 3), ("context",)),
        Stage(Fraction(1), ("output",)),
    ),
    "stochastic": tuple(Stage(Fraction(1), (kind,)) for kind in ("output", "context", "map")),
}


@dataclasses.dataclass(frozen=True)
class Interventions:
    """Which kinds are on in which step of a phase, and in which layers.

    Attributes:
      stages: one after the other, or those that are drawn from.
      layers: pairs of layers, (student, teacher).
      drawn: every step draws one of the stages, each as often, for the whole batch and all layers.
    """

    stages: tuple[Stage, ...]
    layers: Pairs
    drawn: bool = False

    @classmethod
    def named(cls, name: str, layers: Pairs) -> Interventions:
        """Returns a schedule by its name: a key of `SCHEDULES`, or kinds that are always on, such as `'map+output'`.

        Raises:
          UserError: an unknown name, a kind that is named twice, or a schedule that is combined.
        """
        if name in SCHEDULES:
            return cls(SCHEDULES[name], layers, drawn=name == "stochastic")
        kinds = tuple(name.split("+"))
        if schedule := next((kind for kind in kinds if kind in SCHEDULES), None):
            raise UserError(
                f"intervention {name!r}: {schedule!r} is a schedule of its own, which nothing is combined with"
            )
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise UserError(f"intervention {name!r} names {twice!r} twice; name each kind once, as in 'map+output'")
        for kind in kinds:
            if kind not in KINDS:
                known = (*SCHEDULES, *KINDS)
                raise UserError(
                    f"unknown intervention {kind!r}{near_misses(kind, known)}; combine kinds as 'map+output'"
                )
        return cls((Stage(Fraction(1), kinds),), layers)

    def gates(self, taken: Any, length: int, key: jax.Array | None = None) -> dict[str, Any]:
        """Returns the kinds that may be on, each with whether it is in this step.

        Args:
          taken: steps of the phase before this one; int or int32 scalar.
          length: steps of the phase.
          key: for the draw.
        """
        if len(self.stages) == 1:
            return dict.fromkeys(self.stages[0].kinds, True)
        if self.drawn:
            assert key is not None, "a drawn schedule needs a key"
            stage = jax.random.randint(key, (), 0, len(self.stages))
        else:
            # Shares are exact: a stage ends with the first step that is not below its share of the length.
            over = [taken * s.until.denominator >= s.until.numerator * length for s in self.stages[:-1]]
            stage = jnp.sum(jnp.asarray(over))
        found: dict[str, Any] = {}
        for number, (_, kinds) in enumerate(self.stages):
            for kind in kinds:
                found[kind] = found.get(kind, False) | (stage == number)
        return found

    def __call__(self, forward: Forward, captures: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns the collections for the student in one step (`qtx.methods.distillation.Distillation.intervene`)."""
        return intervene(self.gates(forward.taken, forward.length, forward.key), captures, self.layers)


def check_interventions(
    interventions: Interventions, student: nn.Module, teacher: nn.Module, args: Sequence[Any] | None = None
) -> None:
    """Raises a `UserError` that names both sides if a tensor of the teacher does not fit its place in the student.

    Args:
      interventions: what is replaced, and where.
      student: module.
      teacher: module.
      args: what both are called with; None: one short text, or image.
    """
    models = {"student": student, "teacher": teacher}
    sites = {side: shapes(model, args)[0] for side, model in models.items()}
    for kind in dict.fromkeys(kind for stage in interventions.stages for kind in stage.kinds):
        for pair in interventions.layers:
            names = dict(zip(models, (layer_site(layer, KINDS[kind]) for layer in pair), strict=True))
            for side, name in names.items():
                check_site(f"intervention {kind!r}", name, side, models[side], sites[side])
            ours, theirs = (sites[side][name] for side, name in names.items())
            if ours != theirs:
                raise UserError(
                    f"intervention {kind!r}: {names['student']!r} of the student has the shape {ours}, "
                    f"{names['teacher']!r} of the teacher {theirs}"
                )
        if kind == "context":
            check_heads("intervention 'context'", student, teacher)


# --- Phases ---


def intervention_phase(
    phase: Phase,
    teacher: Teacher,
    schedule: str,
    losses: Mapping[str, float] = LOSS_SETS["teacher_intervention"],
    layers: Any = "same",
    args: Sequence[Any] | None = None,
    **options: Any,
) -> Phase:
    """Returns a phase that learns from a teacher, with its tensors in place.

    Args:
      phase: the student's, see `distillation_phase`.
      teacher: module and variables.
      schedule: see `Interventions.named`.
      losses: weight of each loss.
      layers: see `qtx.methods.distillation.layer_pairs`.
      args: what both models are called with; None: one short text, or image.
      **options: further fields of `Distillation`.

    Raises:
      UserError: the two models do not fit a loss or an intervention, or an unknown name.
    """
    found = distillation_phase(phase, teacher, losses, layers, args, **options)
    assert isinstance(found.objective, Distillation)
    interventions = Interventions.named(schedule, found.objective.layers)
    check_interventions(interventions, phase.model, teacher.model, args)
    return dataclasses.replace(found, objective=dataclasses.replace(found.objective, intervene=interventions))


def two_steps(
    phase: Phase,
    teacher: Teacher,
    schedule: str,
    first: int,
    steps: int,
    losses: Mapping[str, float] = LOSS_SETS["teacher_intervention"],
    **options: Any,
) -> tuple[Phase, Phase]:
    """Returns the published recipe: interventions in the first steps, then as many without as make up the run.

    The second phase has a fresh optimizer, as every phase has, with the schedule of its own length; ranges stay.

    Args:
      phase: the student's; its name is that of the second one, `NAME_step_1` that of the first.
      teacher: module and variables.
      schedule: of the interventions.
      first: steps of the first phase; 60 as published, 120 for CoLA and four-layer TinyBERTs.
      steps: of both phases together, above `first`.
      losses: of both phases.
      **options: further arguments of `intervention_phase`.

    Raises:
      UserError: the first step is not shorter than the run; see also `intervention_phase`.
    """
    if not 0 < first < steps:
        raise UserError(
            f"phase {phase.name!r}: a first step of {first} steps does not fit into a run of {steps}; it must be above 0 "
            "and below the run"
        )
    start = dataclasses.replace(phase, name=f"{phase.name}_step_1", steps=first)
    rest = dataclasses.replace(phase, steps=steps - first, prepare=None)
    return (
        intervention_phase(start, teacher, schedule, losses, **options),
        distillation_phase(rest, teacher, losses, **options),
    )


# --- Evaluation as published ---


@dataclasses.dataclass(frozen=True)
class WithTeacher:
    """A student that is evaluated with the teacher's tensors in place, as the published scores of the first step are.

    It stands in for a model wherever one is evaluated (`qtx.train.loop.predict`), with the variables of `with_teacher`.
    They are not the scores of a model that can be used: those come from the student itself.

    Attributes:
      student: module.
      teacher: module.
      kinds: that are on.
      layers: pairs of layers, (student, teacher).
    """

    student: nn.Module
    teacher: nn.Module
    kinds: tuple[str, ...]
    layers: Pairs

    collection: ClassVar[str] = "teacher_variables"

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the student is called with."""
        return self.student.inputs  # type: ignore[attr-defined]

    @property
    def policy(self) -> Any:
        """The student's."""
        return self.student.policy  # type: ignore[attr-defined]

    def apply(self, variables: Mapping[str, Any], *args: Any, rngs: Any = None) -> Any:
        """Runs the teacher, then the student; returns the student's outputs."""
        own = {name: value for name, value in variables.items() if name != self.collection}
        _, found = self.teacher.apply(variables[self.collection], *args, mutable=["captures"])
        captures = traverse_util.flatten_dict(found["captures"], sep="/")
        given = intervene(dict.fromkeys(self.kinds, True), captures, self.layers)
        return self.student.apply(own | given, *args, rngs=rngs)


def with_teacher(phase: Phase, variables: Mapping[str, Any], kinds: str) -> tuple[WithTeacher, dict[str, Any]]:
    """Returns what evaluates the student of a phase with the teacher's tensors: a stand-in for its model, and variables.

    Args:
      phase: from `intervention_phase`.
      variables: of the student.
      kinds: such as `'map'`, with which a gradual schedule ends.
    """
    objective = phase.objective
    assert isinstance(objective, Distillation)
    stage = Interventions.named(kinds, objective.layers).stages[-1]
    model = WithTeacher(phase.model, objective.teacher, stage.kinds, objective.layers)
    return model, {**variables, WithTeacher.collection: phase.constants}
