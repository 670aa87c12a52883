"""Losses against plain NumPy in float64, who counts in them, and which models fit together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx.errors import UserError
from qtx.methods import distillation
from qtx.methods.distillation import LOSS_SETS, LOSSES, Distillation, Teacher, distillation_phase, layer_pairs
from qtx.nn import BertClassifier
from qtx.nn.sites import example_inputs
from qtx.nn.text_classifier import TextClassifier, TextClassifierConfig
from qtx.nn.vit import DeitConfig, VitClassifier, VitConfig
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Phase, make_state, make_step
from tests.methods.distilling import LENGTHS, batch_of, forward_of, other_params
from tests.nn import tiny

DEEP = dataclasses.replace(tiny.CONFIG, num_layers=4)
MODEL = BertClassifier(tiny.CONFIG)
PAIRS = ((0, 0), (1, 1))


def objective(losses, **fields):
    fields = {"student": MODEL, "teacher": MODEL, "layers": PAIRS} | fields
    return Distillation(losses=dict.fromkeys(losses, 1.0), **fields)


def terms(losses=LOSSES, batch=None, **fields):
    found = objective(losses, **fields)
    constants = {"params": tiny.params(found.teacher.config)}
    batch = batch_of() if batch is None else batch
    return found.terms(forward_of(found.student, other_params(found.student.config)), batch, constants)


@pytest.fixture(scope="module")
def sides():
    """Captures of student and teacher as float64 arrays, with their outputs."""
    found = []
    for params in (other_params(), tiny.params()):
        outputs, captures = forward_of(MODEL, params)(batch_of(), capture=True)
        flat = traverse_util.flatten_dict(captures, sep="/")
        found.append((outputs, {name: np.asarray(value, np.float64) for name, value in flat.items()}))
    return found


# NumPy


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_example(function):
    return np.array([function(b, n) for b, n in enumerate(LENGTHS)])


def layer_error(sides, role):
    """Mean squared error over the tokens that are there, summed over layers."""

    def example(b, n):
        layers = [[captures[f"encoder/layer_{i}/{role}"][b, :n] for _, captures in sides] for i in range(2)]
        return sum(np.mean((s - t) ** 2) for s, t in layers)

    return by_example(example)


def map_error(b, n, sides, of):
    """KL divergence of `[H, n, n]` probabilities, summed over layers."""
    total = 0.0
    for i in range(2):
        s, t = (of(captures, f"encoder/layer_{i}/attention/", b, n) for _, captures in sides)
        total += np.mean(np.sum(t * (np.log(t) - np.log(s)), -1))
    return total


def relation(name, heads):
    def of(captures, layer, b, n):
        x = captures[f"{layer}{name}/output"][b, :n].reshape(n, heads, -1)
        return softmax(np.einsum("qhd,khd->hqk", x, x) / np.sqrt(x.shape[-1]))

    return of


def expected(name, sides, heads=2):
    (ours, _), (theirs, _) = sides
    student, teacher = (np.asarray(outputs.logits, np.float64) for outputs in (ours, theirs))
    cross = -np.sum(softmax(teacher) * np.log(softmax(student)), -1)
    if name in ("logits", "logits_ternarybert"):
        return cross / (3 if name == "logits_ternarybert" else 1)
    if name in ("labels", "labels_published"):
        return -np.log(softmax(student))[np.arange(3), [0, 2, 1]]
    if name == "hidden_states":
        states = [[np.asarray(x, np.float64) for x in outputs.hidden_states] for outputs, _ in sides]
        return by_example(lambda b, n: sum(np.mean((s[b, :n] - t[b, :n]) ** 2) for s, t in zip(*states, strict=True)))
    if name == "scores":

        def scores(b, n):
            layers = [[c[f"encoder/layer_{i}/attention/scores"][b, :, :n, :n] for _, c in sides] for i in range(2)]
            return sum(np.mean((s - t) ** 2 / 6) for s, t in layers)

        return by_example(scores)
    if name == "maps":

        def maps(captures, layer, b, n):
            return captures[f"{layer}probs"][b, :, :n, :n]

        return by_example(lambda b, n: map_error(b, n, sides, maps))
    if name.endswith("_relations"):
        return by_example(lambda b, n: map_error(b, n, sides, relation(name.removesuffix("_relations"), heads)))
    role = {"context": "context", "self_output": "out/output", "attention_output": "norm/output"}[name]
    return layer_error(sides, f"attention/{role}")


@pytest.fixture(scope="module")
def found():
    return terms()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_numpy_without_padding(sides, found, name):
    np.testing.assert_allclose(found[name], expected(name, sides), rtol=2e-5)


def test_relation_heads_of_another_number(sides):
    found = terms(["value_relations"], relation_heads=4)
    np.testing.assert_allclose(found["value_relations"], expected("value_relations", sides, heads=4), rtol=2e-5)


def test_temperature(sides):
    student, teacher = (np.asarray(outputs.logits, np.float64) for outputs, _ in sides)
    want = -9 * np.sum(softmax(teacher / 3) * np.log(softmax(student / 3)), -1)
    np.testing.assert_allclose(terms(["logits"], temperature=3.0)["logits"], want, rtol=1e-5)


def test_one_output_is_compared_by_squared_error():
    config = dataclasses.replace(tiny.CONFIG, num_labels=1, num_layers=1)
    model = BertClassifier(config)
    batch = batch_of(labels=(0.5, 2.0, 4.0))
    found = terms(["logits", "labels", "labels_published"], batch, student=model, teacher=model, layers=((0, 0),))
    student, teacher = (
        np.asarray(forward_of(model, params)(batch)[0].logits, np.float64)[:, 0]
        for params in (other_params(config), tiny.params(config))
    )
    np.testing.assert_allclose(found["logits"], (student - teacher) ** 2, rtol=1e-5)
    np.testing.assert_allclose(found["labels_published"], (student - teacher) ** 2, rtol=1e-5)
    np.testing.assert_allclose(found["labels"], (student - np.array([0.5, 2.0, 4.0])) ** 2, rtol=1e-5)


def test_published_losses_count_padding(sides):
    found = terms(["hidden_states", "scores", "context", "maps"], padding="published")
    states = [[np.asarray(x, np.float64) for x in outputs.hidden_states] for outputs, _ in sides]
    want = sum(np.mean((s - t) ** 2, (1, 2)) for s, t in zip(*states, strict=True))
    np.testing.assert_allclose(found["hidden_states"], want, rtol=2e-5)
    scores = 0.0
    for i in range(2):
        s, t = (captures[f"encoder/layer_{i}/attention/scores"] / np.sqrt(6) for _, captures in sides)
        keys = np.arange(6)[None, None, None] < np.array(LENGTHS)[:, None, None, None]
        scores += np.mean(np.where(keys, s - t, 0) ** 2, (1, 2, 3))  # masked ones are zeros, and they count
    np.testing.assert_allclose(found["scores"], scores, rtol=2e-5)
    np.testing.assert_allclose(found["maps"], expected("maps", sides), rtol=2e-5)
    assert np.all(np.asarray(found["context"])[1:] != expected("context", sides)[1:])


def test_published_scores_drop_what_is_at_most_minus_100():
    student = jnp.array([-100.0, -99.9, 3.0, -1e4]).reshape(1, 1, 2, 2)
    teacher = jnp.array([2.0, -99.0, -200.0, -1e4]).reshape(1, 1, 2, 2)
    want = (2.0**2 + 0.9**2 + 3.0**2 + 0) / 4
    np.testing.assert_allclose(distillation.published_score_error(student, teacher), [want], rtol=1e-5)


def test_padding_and_filler_rows_change_nothing(found):
    """The same texts with more padding; and a row that does not count."""
    losses = [name for name in LOSSES if name != "labels_published"]
    longer = terms(losses, batch_of(tokens=8) | {"input_ids": jnp.pad(batch_of()["input_ids"], ((0, 0), (0, 2)))})
    for name in losses:
        np.testing.assert_allclose(longer[name], found[name], rtol=1e-4, err_msg=name)
    target, params = objective(LOSSES), {"params": tiny.params()}
    forward = forward_of(MODEL, other_params())
    filler = {k: jnp.concatenate([v, 0 * v[:1]]) for k, v in batch_of().items()}
    got, want = (target(forward, batch, params)[:2] for batch in (filler, batch_of()))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_weights_of_losses_and_examples(found):
    target = Distillation(MODEL, MODEL, {"logits": 0.5, "scores": 2.0, "context": 0.0}, PAIRS)
    weights = np.array([1.0, 0.0, 3.0])
    batch = batch_of(weights=weights)
    loss, weight, parts = target(forward_of(MODEL, other_params()), batch, {"params": tiny.params()})
    want = np.sum(weights * (0.5 * np.asarray(found["logits"]) + 2 * np.asarray(found["scores"])))
    np.testing.assert_allclose([loss, weight], [want, 4.0], rtol=1e-5)
    assert set(parts) == {"logits", "scores"}
    np.testing.assert_allclose(parts["scores"], np.sum(weights * np.asarray(found["scores"])), rtol=1e-5)


def test_equal_models_have_no_loss_but_the_entropy_of_the_labels():
    target, constants = objective(LOSSES), {"params": tiny.params()}
    found = target.terms(forward_of(MODEL, tiny.params()), batch_of(), constants)
    for name in set(LOSSES) - set(distillation.LOGIT_LOSSES):
        np.testing.assert_allclose(found[name], 0, atol=1e-6, err_msg=name)


# Which norm it is


TEXTS = TextClassifierConfig(
    vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, classifier_size=8, num_labels=3
)
IMAGES = dict(image_size=4, patch_size=2, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)


@pytest.mark.parametrize(
    "model",
    [
        BertClassifier(tiny.ONE_LAYER),
        TextClassifier(TEXTS),
        VitClassifier(VitConfig(**IMAGES)),
        VitClassifier(DeitConfig(**IMAGES)),
    ],
    ids=["bert", "text_classifier", "vit", "deit"],
)
def test_attention_output_is_of_norms_behind_attention_alone(model):
    arguments = example_inputs(model, model.config, tokens=4)
    params = jax.jit(model.init)(jax.random.key(0), *arguments)["params"]

    def outputs(scale):
        flat = traverse_util.flatten_dict(params, sep="/")
        flat["encoder/layer_0/attention/out/kernel"] *= scale
        given = {"params": traverse_util.unflatten_dict(flat, sep="/")}
        return model.apply(given, *arguments, mutable=["captures"])[1]["captures"]["encoder"]["layer_0"]["attention"]

    norm_follows = bool(np.any(outputs(1.0)["norm"]["output"] != outputs(3.0)["norm"]["output"]))
    assert norm_follows is not model.norm_first
    both = Distillation(model, model, {"attention_output": 1.0, "self_output": 1.0}, ((0, 0),))
    if norm_follows:
        distillation.check_teacher(both)
        return
    with pytest.raises(
        UserError, match="'attention_output'.* the student .*before their sub-layers; take 'self_output'"
    ):
        distillation.check_teacher(both)
    distillation.check_teacher(Distillation(model, model, {"self_output": 1.0}, ((0, 0),)))


# Layers


@pytest.mark.parametrize(
    ("rule", "sizes", "teachers"),
    [
        ("same", (3, 3), [0, 1, 2]),
        ("every", (4, 12), [2, 5, 8, 11]),  # TinyBERT
        ("every", (6, 12), [1, 3, 5, 7, 9, 11]),  # SkipBERT
        ("first", (2, 5), [0, 1]),
        ("last", (2, 5), [3, 4]),
        ("every", (3, 3), [0, 1, 2]),
    ],
)
def test_layer_rules(rule, sizes, teachers):
    assert layer_pairs(rule, *sizes) == tuple(enumerate(teachers))


def test_given_pairs():
    assert layer_pairs([[3, 10]], 4, 12) == ((3, 10),)


def test_a_smaller_student_learns_from_every_second_layer():
    teacher = BertClassifier(DEEP)
    losses = ["hidden_states", "context", "scores"]
    pairs = layer_pairs("every", 2, 4)
    found = terms(losses, teacher=teacher, layers=pairs)
    _, ours = forward_of(MODEL, other_params())(batch_of(), capture=True)
    outputs, theirs = forward_of(teacher, tiny.params(DEEP))(batch_of(), capture=True)
    want = 0.0
    for s, t in ((0, 1), (1, 3)):
        a, b = (c["encoder"][f"layer_{i}"]["attention"]["context"] for c, i in ((ours, s), (theirs, t)))
        want += np.mean(np.square(np.asarray(a)[0] - np.asarray(b)[0]))
    np.testing.assert_allclose(found["context"][0], want, rtol=1e-5)
    assert len(outputs.hidden_states) == 5


# In a train step


def phase_of(model=MODEL, **fields):
    return Phase(
        "distil", model, OptimizerConfig(warmup=0.0, schedule="constant", learning_rate=1e-2), steps=4, **fields
    )


def test_a_step_runs_the_teacher_once_without_dropout_and_trains_the_student(monkeypatch):
    config = dataclasses.replace(tiny.ONE_LAYER, hidden_dropout=0.5, attention_dropout=0.5)
    model = BertClassifier(config)
    seen = []
    teach = Distillation.teach

    def recorded(self, batch, variables):
        found = teach(self, batch, variables)
        seen.append(found)
        return found

    monkeypatch.setattr(Distillation, "teach", recorded)
    teacher = Teacher(model, {"params": tiny.params(tiny.ONE_LAYER)})
    phase = distillation_phase(phase_of(model), teacher, LOSS_SETS["teacher_intervention"])
    assert phase.constants is teacher.variables
    optimizer = make_optimizer(phase.optimizer, 4)
    variables = {"params": tiny.params(tiny.ONE_LAYER)}
    state = make_state(phase, variables, optimizer, 0, batch_of())
    step = jax.jit(make_step(phase, optimizer, seed=0))
    losses = []
    for _ in range(3):
        state, measured = step(state, batch_of(), phase.constants)
        losses.append(float(measured["loss"]))
    assert len(seen) == 1 and np.all(np.isfinite(losses)) and len(set(losses)) == 3
    moved = [
        name
        for name, value in state.trained.items()
        if np.any(value != traverse_util.flatten_dict(variables, sep="/")[name])
    ]
    assert "params/encoder/layer_0/ffn/up/kernel" in moved and "params/classifier/kernel" in moved


def test_what_a_loss_does_not_compare_may_differ():
    wide = BertClassifier(dataclasses.replace(tiny.CONFIG, hidden_size=16, num_heads=4, num_layers=4))
    losses = {"logits": 1.0, "value_relations": 1.0}
    distillation_phase(phase_of(), Teacher(wide, {}), losses, layers="last", relation_heads=4)


@pytest.mark.parametrize(
    ("losses", "options", "words"),
    [
        ({"logits": float("nan")}, {}, "weight nan .*'logits' is no finite number"),
        ({"logits": float("inf")}, {}, "weight inf .*'logits' is no finite number"),
        ({"logits": -1.0}, {}, "weight -1.0 .*'logits' is negative"),
        ({"logits": 1.0}, {"temperature": float("inf")}, "temperature inf .*finite"),
        ({"logits": 1.0}, {"temperature": float("nan")}, "temperature nan .*finite"),
        ({"value_relations": 1.0}, {"relation_heads": -4}, "relation_heads is -4: .*divides both widths"),
    ],
)
def test_weights_and_temperatures_that_are_none(losses, options, words):
    with pytest.raises(UserError, match=words):
        Distillation(MODEL, MODEL, losses, ((0, 0),), **options)
