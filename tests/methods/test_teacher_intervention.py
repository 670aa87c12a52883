"""What interventions replace, which gradients they cut, when they are on, and what they cost in compilations."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import policy, quant, symmetric, ternary
from qtx.data.batching import Batches, Encoded
from qtx.errors import UserError
from qtx.methods import teacher_intervention as ti
from qtx.methods.distillation import LOSS_SETS, Distillation, Teacher, distillation_phase
from qtx.methods.teacher_intervention import (
    KINDS,
    Interventions,
    detach,
    intervene,
    intervention_phase,
    two_steps,
    with_teacher,
)
from qtx.nn import BertClassifier, list_sites
from qtx.nn.sites import check_policy
from qtx.train.logging import read_metrics
from qtx.train.loop import Saving, fit
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Phase, Span, make_state, make_step
from qtx.train.sharding import make_mesh
from tests.methods.distilling import batch_of, forward_of, other_params
from tests.nn import tiny

# The student

LAYERS = {"qkv": "attention/query attention/key attention/value attention/out", "ffn_1": "ffn/up", "ffn_2": "ffn/down"}
FACTORS = "attention/query/output attention/key/output attention/value/output attention/probs_dropped"


@pytest.fixture(scope="module")
def sites():
    return list_sites(BertClassifier(tiny.CONFIG), {"params": tiny.params()}, *tiny.inputs())


def quantized(policy, sites):
    check_policy(policy, sites)
    return {name for name, info in sites.items() if policy.spec(info.kind, name) is not None}


def expected(*switches, factors=True, out=False):
    """Names of quantized sites, by the specification's table."""
    roles = [role for switch in switches for role in LAYERS.get(switch, "").split()] + ["attention/out"] * out
    found = {f"encoder/layer_{i}/{role}/{part}" for i in (0, 1) for role in roles for part in ("kernel", "input")}
    found |= {f"encoder/layer_{i}/{name}" for i in (0, 1) for name in FACTORS.split() if factors}
    found |= {"encoder/embeddings/word/table"} if "emb" in switches else set()
    return found | ({"pooler/dense/kernel", "pooler/dense/input"} if "cls" in switches else set())


ALL = ("emb", "qkv", "ffn_1", "ffn_2", "cls")


def test_which_sites(sites):
    assert quantized(ti.student_policy(), sites) == expected(*ALL)
    for switch in ALL:
        rest = [other for other in ALL if other != switch]
        policy = ti.student_policy(**{switch: False})
        assert quantized(policy, sites) == expected(*rest, factors=switch != "qkv")
        policy = ti.student_policy(**{switch: False}, published=True)
        assert quantized(policy, sites) == expected(*rest)
    assert quantized(ti.student_policy(quantize=False), sites) == set()
    kernels = {name for name in expected(*ALL, factors=False) if not name.endswith("/input")}
    for published in (False, True):
        assert quantized(ti.student_policy(activations=None, published=published), sites) == kernels
    assert quantized(ti.student_policy(quantize=False, published=True), sites) == expected(out=True)
    assert quantized(ti.student_policy(quantize=False, qkv=False, published=True), sites) == expected()


def test_grids(sites):
    policy = ti.student_policy()
    assert policy.spec("weight", "encoder/embeddings/word/table") == quant.ternary(
        quant.per_channel(), clip=(-2.5, 2.5)
    )
    assert policy.spec("weight", "pooler/dense/kernel") == quant.ternary(clip=(-2.5, 2.5))
    for kind, name in (
        ("input", "encoder/layer_0/attention/probs_dropped"),
        ("activation", "encoder/layer_1/attention/key/output"),
    ):
        assert policy.spec(kind, name) == ti.ACTIVATIONS
        published = ti.student_policy(published=True).spec(kind, name)
        assert (published.estimator.padding, ti.ACTIVATIONS.estimator.padding) == ("include", "ignore")


def test_ranges_leave_padding_out_unless_published():
    params = tiny.params(tiny.ONE_LAYER)
    ids, mask, types = tiny.inputs()
    other = np.where(mask, ids, 7)  # another token where there is padding
    for published, same in ((False, True), (True, False)):
        model = BertClassifier(tiny.ONE_LAYER, policy=ti.student_policy(published=published))
        logits = [model.apply({"params": params}, given, mask, types).logits for given in (ids, other)]
        assert np.allclose(*logits, atol=1e-6) == same


def test_the_padding_row_is_looked_up_and_not_trained():
    params, batch = tiny.params(tiny.ONE_LAYER), tiny.inputs()
    model = BertClassifier(tiny.ONE_LAYER, policy=ti.student_policy(published=True))

    def loss(params, extra):
        outputs = model.apply({"params": params, **extra}, *batch)
        return sum(jnp.sum(state**3) for state in outputs.hidden_states)

    free, kept = (jax.value_and_grad(loss)(params, extra) for extra in ({}, ti.untrained_padding(tiny.ONE_LAYER)))
    assert free[0] == kept[0]
    free, kept = (found[1]["encoder"]["embeddings"]["word"]["table"] for found in (free, kept))
    assert np.any(free[0]) and not np.any(kept[0])
    np.testing.assert_array_equal(free[1:], kept[1:])


# Gradients

PAIRS = ((0, 0), (1, 1))
POLICY = policy(weights={"**/kernel": ternary(), "wC": None}, inputs=symmetric(8, range="dynamic"))
TEACHER = BertClassifier(tiny.CONFIG)
STUDENT = BertClassifier(tiny.CONFIG, policy=POLICY)
INTERNAL = ("context", "self_output", "maps", "value_relations")

# Linear layers of an attention block that a loss trains in each mode (specification, section 4.2).
SCRIPT = LOSS_SETS["teacher_intervention"]
BRANCH = {"query", "key", "value", "out"}
TRAINED = {
    (): {"script": BRANCH, "logits": BRANCH},
    ("map",): {"script": BRANCH, "scores": {"query", "key"}, "logits": {"value", "out"}},
    ("context",): {
        "script": {"query", "key", "out"},
        "scores": {"query", "key"},
        "logits": {"out"},
        "context": {"query", "key", "value"},
        "self_output": {"out"},
        "value_relations": {"value"},
    },
    ("output",): {"script": {"query", "key"}, "scores": {"query", "key"}, "logits": set(), "self_output": BRANCH},
    ("map", "context"): {"script": {"query", "key", "out"}},
    ("map", "context", "output"): {"script": {"query", "key"}},
}


@functools.cache
def gradient_function():
    """Gradients, flat by path, of the losses with traced weights and gates: one program for all cases."""
    names = (*SCRIPT, *INTERNAL)
    constants = {"params": tiny.params()}

    def total(params, weights, gates):
        target = Distillation(
            STUDENT,
            TEACHER,
            dict.fromkeys(names, 1.0),
            PAIRS,
            intervene=lambda _, captures: intervene(gates, captures, PAIRS),
        )
        terms = target.terms(forward_of(STUDENT, params), batch_of(), constants)
        return sum(weights[name] * jnp.sum(terms[name]) for name in names)

    gradient = jax.jit(jax.grad(total))

    def run(losses, kinds):
        weights = {name: jnp.float32(name in losses) for name in names}
        found = gradient(other_params(), weights, {kind: jnp.asarray(kind in kinds) for kind in KINDS})
        return traverse_util.flatten_dict(found, sep="/")

    return run


def trained_layers(grads, layer):
    """The linear layers of an attention block with a gradient, kernels and biases alike."""
    found = {}
    for name, leaf in itertools.product(sorted(BRANCH), ("kernel", "bias")):
        found[name, leaf] = bool(np.any(np.asarray(grads[f"encoder/layer_{layer}/attention/{name}/{leaf}"]) != 0))
    for name in BRANCH:
        assert found[name, "kernel"] == found[name, "bias"], name
    return {name for name in BRANCH if found[name, "kernel"]}


@pytest.mark.parametrize(("kinds", "name"), [(kinds, name) for kinds, by_loss in TRAINED.items() for name in by_loss])
def test_gradients_are_exactly_zero_where_the_rule_says(kinds, name):
    losses = SCRIPT if name == "script" else (name,)
    grads = gradient_function()(losses, kinds)
    assert trained_layers(grads, 0) == trained_layers(grads, 1) == TRAINED[kinds][name]
    beyond = (
        "encoder/embeddings/word/table",
        "encoder/layer_0/ffn/down/kernel",
        "encoder/layer_0/attention/norm/scale",
    )
    # Where the inputs of a branch have no gradient, what is compared within it trains nothing else.
    within = bool(kinds) and name not in ("script", "logits")
    for path in beyond:
        assert np.any(np.asarray(grads[path]) != 0) != within, path
    assert np.any(np.asarray(grads["classifier/kernel"]) != 0) == (name in ("script", "logits"))


# Values


@pytest.fixture(scope="module")
def captures():
    """The teacher's tensors, by site."""
    return traverse_util.flatten_dict(forward_of(TEACHER, tiny.params())(batch_of(), capture=True)[1], sep="/")


def apply(model, params, collections=None, **options):
    args = [batch_of()[name] for name in model.inputs]
    return model.apply({"params": params, **(collections or {})}, *args, **options)


def test_without_gates_it_is_the_plain_model_bit_for_bit(captures):
    def outputs(collections):
        return apply(STUDENT, other_params(), collections)

    want = jax.jit(outputs)({})
    off = intervene(dict.fromkeys(KINDS, jnp.asarray(False)), captures, PAIRS)
    got = jax.jit(outputs)(off)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_layer_is_replaced_and_the_students_own_tensors_are_captured(captures):
    args = other_params(), intervene({"output": True}, captures, PAIRS)
    outputs, found = apply(STUDENT, *args, mutable=["captures"])
    plain, own = apply(STUDENT, other_params(), mutable=["captures"])
    first = "encoder/layer_0/attention/out/output"
    flat, flat_own = (traverse_util.flatten_dict(c["captures"], sep="/") for c in (found, own))
    np.testing.assert_array_equal(flat[first], flat_own[first])
    residual = flat["encoder/layer_0/attention/residual"]
    np.testing.assert_allclose(residual, captures[first] + outputs.hidden_states[0], rtol=1e-6)
    second = flat["encoder/layer_1/attention/residual"]
    theirs = captures["encoder/layer_1/attention/out/output"]
    np.testing.assert_allclose(second, theirs + outputs.hidden_states[1], rtol=1e-6)
    assert np.any(np.asarray(outputs.logits) != np.asarray(plain.logits))


def test_replaced_maps_go_through_dropout_and_then_the_grid(captures):
    """The grid of the product's input sees what dropout left: its largest value is larger than a probability."""
    config = dataclasses.replace(tiny.ONE_LAYER, attention_dropout=0.5)
    model = BertClassifier(config, policy=policy(inputs={"**/probs_dropped": symmetric(8, range="dynamic")}))
    site = "encoder/layer_0/attention/probs"
    given = intervene({"map": True}, {site: jnp.full_like(captures[site], 1.0)}, ((0, 0),))
    _, found = apply(
        model,
        tiny.params(tiny.ONE_LAYER),
        given,
        deterministic=False,
        mutable=["captures"],
        rngs={"dropout": jax.random.key(1)},
    )
    flat = traverse_util.flatten_dict(found["captures"], sep="/")
    assert float(flat[site].max()) <= 1 and set(np.unique(flat[f"{site}_dropped"])) == {0.0, 2.0}


def test_layers_of_a_deeper_teacher():
    given = intervene(
        {"map": True}, {f"encoder/layer_{i}/attention/probs": jnp.full((1,), i) for i in range(4)}, ((0, 1), (1, 3))
    )
    values = [given["teacher"]["encoder"][f"layer_{i}"]["attention"]["probs"]["value"] for i in range(2)]
    assert [int(v[0]) for v in values] == [1, 3]


def test_the_gradient_rule_alone():
    """Without signals of a teacher the values are the student's own, and the gradients are cut all the same."""
    given = detach({"map": True}, [0, 1])
    want, got = (apply(STUDENT, other_params(), c) for c in ({}, given))
    np.testing.assert_array_equal(got.logits, want.logits)
    flags = given["detach"]["encoder"]["layer_0"]["attention"]
    assert {name: bool(flag["input"]) for name, flag in flags.items()} == {"query": True, "key": True, "value": False}


# Schedules


def kinds_on(schedule, length, key=None):
    found = Interventions.named(schedule, PAIRS)
    steps = range(length)
    keys = [None] * length if key is None else [jax.random.fold_in(key, step) for step in steps]
    return ["+".join(k for k, on in found.gates(step, length, keys[step]).items() if on) for step in steps]


def test_schedules_by_step():
    assert kinds_on("gradual", 60) == ["output"] * 10 + ["context"] * 10 + ["map"] * 40
    assert kinds_on("gradual", 50)[:18] == ["output"] * 9 + ["context"] * 8 + ["map"]
    assert kinds_on("inverted", 60) == ["map"] * 20 + ["context"] * 20 + ["output"] * 20
    assert kinds_on("map+output", 2) == ["map+output"] * 2


@pytest.mark.parametrize(("name", "words"), [("map+map", "'map' twice"), ("gradual+map", "'gradual' is a schedule")])
def test_schedules_that_make_no_sense(name, words):
    with pytest.raises(UserError, match=words):
        Interventions.named(name, PAIRS)


def test_a_drawn_schedule_has_one_kind_a_step_each_as_often():
    found = kinds_on("stochastic", 90, jax.random.key(0))
    counts = [found.count(kind) for kind in KINDS]
    assert sum(counts) == 90 and min(counts) > 15
    assert kinds_on("stochastic", 10, jax.random.key(0)) == found[:10]


def phase_of(model=STUDENT, **fields):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=0.0, schedule="constant", weight_decay=0.0)
    return Phase("distil", model, optimizer, **fields)


def test_a_context_is_of_as_many_heads_on_both_sides():
    more = BertClassifier(dataclasses.replace(tiny.CONFIG, num_heads=2 * tiny.CONFIG.num_heads))
    words = f"the student has {tiny.CONFIG.num_heads} heads and the teacher {more.config.num_heads}"
    with pytest.raises(UserError, match=f"loss 'context': {words}"):
        distillation_phase(phase_of(), Teacher(more, {}), {"context": 1.0})
    with pytest.raises(UserError, match=f"intervention 'context': {words}"):
        ti.intervention_phase(phase_of(), Teacher(more, {}), "context", {"logits": 1.0})
    ti.intervention_phase(phase_of(), Teacher(more, {}), "output", {"logits": 1.0})


def test_one_compiled_step_for_all_kinds_of_a_schedule():
    """What moves with each step tells which kind was on: projections without gradient stay where they are."""
    config = tiny.ONE_LAYER
    teacher = Teacher(BertClassifier(config), {"params": tiny.params(config)})
    phase = intervention_phase(phase_of(BertClassifier(config, policy=POLICY), steps=12), teacher, "gradual")
    optimizer = make_optimizer(phase.optimizer, 12)
    step, traces = make_step(phase, optimizer, seed=0, span=Span(0, 5, 12, 12)), []

    def counted(*args):
        traces.append(1)
        return step(*args)

    compiled = jax.jit(counted)
    state = make_state(phase, {"params": other_params(config)}, optimizer, 5, batch_of())
    moved = []
    for _ in range(6):
        before = state.trained
        state, _ = compiled(state, batch_of(), phase.constants)
        path = "params/encoder/layer_0/attention/{}/kernel"
        moved.append([bool(np.any(state.trained[path.format(n)] != before[path.format(n)])) for n in ("out", "value")])
    assert len(traces) == 1
    # Two steps each of output and context, then the map: what was not trained yet has no momentum either.
    assert moved == [[False, False]] * 2 + [[True, False]] * 2 + [[True, True]] * 2


def test_parts_of_a_batch_share_one_draw(monkeypatch):
    seen = []
    gates = Interventions.gates

    def recorded(self, taken, length, key=None):
        found = gates(self, taken, length, key)
        jax.debug.callback(lambda **on: seen.append(tuple(k for k, v in on.items() if v)), **found)
        return found

    monkeypatch.setattr(Interventions, "gates", recorded)
    config = tiny.ONE_LAYER
    model, params = BertClassifier(config), {"params": tiny.params(config)}
    phase = phase_of(model, steps=8, accumulate=2)
    phase = intervention_phase(phase, Teacher(model, params), "stochastic", {"scores": 1.0})
    optimizer = make_optimizer(phase.optimizer, 8)
    batch = batch_of(lengths=(6, 4, 2, 5), labels=(0, 1, 2, 0))
    state = make_state(phase, params, optimizer, 0, batch)
    step = jax.jit(make_step(phase, optimizer, 0, Span(0, 0, 8, 8)))
    drawn = []
    for _ in range(6):
        seen.clear()
        state, _ = step(state, batch, phase.constants)
        jax.effects_barrier()
        assert len(seen) == 2 and seen[0] == seen[1] and len(seen[0]) == 1
        drawn.append(seen[0])
    assert len(set(drawn)) > 1


# Recipes and evaluation


def test_the_two_steps():
    teacher = Teacher(TEACHER, {"params": tiny.params()})
    first, second = two_steps(phase_of(), teacher, "gradual", first=3, steps=10)
    assert (first.name, first.steps, second.name, second.steps) == ("distil_step_1", 3, "distil", 7)
    assert first.objective.intervene.stages[0].kinds == ("output",)
    assert second.objective.intervene is None and first.constants is second.constants
    assert first.objective.losses == second.objective.losses == SCRIPT
    baseline = distillation_phase(phase_of(steps=10), teacher, LOSS_SETS["ternarybert"])
    assert baseline.steps == first.steps + second.steps


def test_a_run_of_both_steps(tmp_path):
    """The first step leaves the value and output projections alone; every loss is logged."""
    model, params = BertClassifier(tiny.ONE_LAYER, policy=POLICY), tiny.params(tiny.ONE_LAYER)
    teacher = Teacher(BertClassifier(tiny.ONE_LAYER), {"params": params})
    rows, length = 8, 5
    ids = np.random.default_rng(0).integers(1, 50, rows * length).astype(np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), length * np.arange(rows + 1), np.arange(rows) % 3)
    batches = Batches(encoded, 4, (6,), shuffle=True, epochs=None)
    recipe = two_steps(phase_of(model), teacher, "output", first=2, steps=5)
    kept = {}

    def after(phase, variables, step, history):
        kept[phase.name] = step, jax.tree.map(np.asarray, variables["params"])

    fit(recipe, batches, {"params": params}, make_mesh(), tmp_path, saving=Saving(log_every=1), after_phase=after)
    assert {name: step for name, (step, _) in kept.items()} == {"distil_step_1": 2, "distil": 5}

    def block(found):
        return found["encoder"]["layer_0"]["attention"]

    for name in ("value", "out"):
        first, last = (block(kept[phase][1])[name]["kernel"] for phase in ("distil_step_1", "distil"))
        np.testing.assert_array_equal(first, block(params)[name]["kernel"])
        assert np.any(last != first)
    assert np.any(block(kept["distil_step_1"][1])["query"]["kernel"] != block(params)["query"]["kernel"])
    lines = read_metrics(tmp_path)
    parts = [sum(line[f"distil_step_1/loss_{name}"] for name in SCRIPT) for line in lines[:2]]
    np.testing.assert_allclose(parts, [line["distil_step_1/loss"] for line in lines[:2]], rtol=1e-5)


def test_evaluation_with_the_teachers_tensors(captures):
    params = {"params": other_params()}
    teacher = Teacher(TEACHER, {"params": tiny.params()})
    phase = intervention_phase(phase_of(steps=3), teacher, "gradual")
    args = [batch_of()[name] for name in STUDENT.inputs]
    for kinds in ("output", "map+context"):
        model, variables = with_teacher(phase, params, kinds)
        hash(model)
        given = intervene(dict.fromkeys(kinds.split("+"), True), captures, PAIRS)
        want = apply(STUDENT, other_params(), given).logits
        np.testing.assert_array_equal(model.apply(variables, *args).logits, want)
    assert model.inputs == STUDENT.inputs and model.policy is POLICY
