"""Evaluation while training, the best model, early stopping, schedules and random rounding, on a model of one weight."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.data import Encoded
from qtx.data.batching import Batches
from qtx.errors import UserError
from qtx.nn.sites import site
from qtx.quant.policy import Policy
from qtx.train.checkpoint import Checkpoints
from qtx.train.evaluation import PUBLISHED_STARTS, Evaluation, published_choice
from qtx.train.logging import read_metrics
from qtx.train.loop import Saving, fit, predict
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Phase, Span, inputs, make_state, make_step, scheduled
from qtx.train.sharding import make_mesh
from tests.conftest import eight_devices

ROOT = Path(__file__).parents[2]
EXAMPLES, BATCH = 24, 8
PER_EPOCH = EXAMPLES // BATCH
RATE = 0.01


class Outputs(NamedTuple):
    logits: jax.Array


class Tiny(nn.Module):
    """Logits `[B, 4]`: the token's number times the only weight, progress, and a draw of each random stream."""

    policy: Policy | None = None
    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    @nn.compact
    def __call__(self, ids, mask, types, deterministic=True):
        x = ids[:, 0] * self.param("weight", nn.initializers.zeros, ())
        x = site(self, "output", x)
        progress = self.scope.root.get_variable("schedule", "progress", jnp.float32(-1))

        def draw(stream):
            return jax.random.uniform(self.make_rng(stream), x.shape) if self.has_rng(stream) else jnp.zeros(x.shape)

        return Outputs(jnp.stack([x, jnp.broadcast_to(progress, x.shape), draw("dropout"), draw("rounding")], -1))


def falling(forward, batch, constants):
    """The weight falls by about `RATE` at every step; by how much depends on the batch and on what is drawn."""
    x, _, *draws = jnp.moveaxis(forward(batch)[0].logits, -1, 0)
    return jnp.sum(x * (1 + sum(draws)) * batch["weights"]), jnp.sum(batch["weights"])


def progress_as_loss(forward, batch, constants):
    x, progress, *_ = jnp.moveaxis(forward(batch)[0].logits, -1, 0)
    weight = jnp.sum(batch["weights"])
    return progress[0] * weight + 0 * jnp.sum(x), weight


def make_batches(shuffle=True, epochs=None):
    ids = np.arange(1, EXAMPLES + 1, dtype=np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), np.arange(EXAMPLES + 1), np.zeros(EXAMPLES, np.int32))
    return Batches(encoded, BATCH, (1,), shuffle=shuffle, epochs=epochs)


def near(target):
    """An evaluation that is best where the weight is nearest to a target."""
    return lambda phase, variables: {"score": -abs(float(variables["params"]["weight"]) - target), "other": 1.0}


def phase(name="first", run=None, steps=0, objective=falling, schedule="none", **evaluation):
    options = {"warmup": 0.0, "schedule": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
    found = Evaluation(run, **evaluation) if run else None
    optimizer = OptimizerConfig(RATE, **options)
    return Phase(name, Tiny(), optimizer, 2.0, steps, objective, evaluation=found, schedule=schedule)


class Run(NamedTuple):
    weights: list[float]  # after each phase
    steps: list[int]
    histories: list
    variables: dict
    lines: list


def train(recipe, workdir, every=2) -> Run:
    ends = []

    def after(phase, variables, step, history):
        ends.append((float(variables["params"]["weight"]), step, list(history)))

    start = {"params": {"weight": jnp.float32(0)}}
    variables = fit(recipe, make_batches(), start, make_mesh(), workdir, 0, Saving(every, 1), after)
    return Run(*map(list, zip(*ends, strict=True)), variables, read_metrics(workdir))


def without_speed(lines):
    return [{name: v for name, v in line.items() if "per_second" not in name} for line in lines]


def history(*scores):
    return [{"step": i + 1, "epoch": (i + 1) / 2, "score": score} for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("every", "expected"), [(1, {3, 6, 7}), (0.5, {2, 3, 4, 6, 7}), (0.01, set(range(1, 8))), (9, {7})]
)
def test_when_a_phase_is_evaluated(every, expected):
    assert Evaluation(print, every).steps(7, 3) - {0} == expected


def test_what_follows_from_a_history():
    keep, patient = Evaluation(print, keep_best=True), Evaluation(print, patience=2)
    found = history(math.nan, 0.5, 0.75, 0.75, 0.25)
    assert keep.best(found)["step"] == 3, "strictly greater"
    assert keep.best(history(math.nan))["step"] == 1
    assert [patient.is_over(found[:i]) for i in range(6)] == [False, False, False, False, False, True]
    assert not keep.is_over(found)
    assert keep.summary(found, 2) == {"last_score": 0.25, "best_epoch": 1.5}
    assert patient.summary(found, 2) == {"best_score": 0.75, "best_epoch": 1.5}
    later = [{**record, "step": record["step"] + 10} for record in found]  # a phase after one of 10 steps
    assert keep.summary(later, 2)["best_epoch"] == 6.5, "since the beginning of the run"


def test_patience_that_begins_at_a_number_and_the_best_that_does_not():
    negative = Evaluation(print, patience=2, start=0.0)
    found = history(-0.5, -0.3, -0.1, 0.2)
    assert [negative.is_over(found[:i]) for i in range(5)] == [False, False, True, True, False]
    assert negative.best(found[:3])["step"] == 3
    assert not Evaluation(print, patience=2).is_over(found)


def test_what_published_early_stopping_makes_of_a_metric():
    values = [-5.0, -3.0, 0.0, 2.0]
    assert published_choice(values, 2) == (1, None, 0.0)
    assert published_choice(values, 2, PUBLISHED_STARTS["cola"]) == (1, 0, 0.0)
    assert published_choice([0.0, 0.0], 5, PUBLISHED_STARTS["encoder"]) == (None, 0, 0.0)
    assert published_choice([1.0, 3.0, 3.0], 5) == (None, 1, 3.0)
    assert published_choice([], 5) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("fields", "named"), [({"every": 0}, "every 0"), ({"every": math.nan}, "nan"), ({"patience": -1}, "-1 evaluations")]
)
def test_evaluations_that_cannot_be(fields, named):
    with pytest.raises(UserError, match=named):
        Evaluation(print, **fields)


def test_an_unknown_metric_stops_at_the_first_evaluation(tmp_path):
    with pytest.raises(UserError, match="'first'.*'scor'; did you mean 'score'"):
        train([phase(run=near(0), metric="scor", every=0.3)], tmp_path)


def test_evaluations_are_logged_with_their_epoch_and_change_nothing(tmp_path, capsys):
    seen = []

    def run(phase, variables):
        seen.append(phase.name)
        return near(0)(phase, variables)

    with_it = train([phase(run=run, every=1.5), phase("second")], tmp_path / "with")
    without = train([phase(), phase("second")], tmp_path / "without")
    assert with_it.weights == without.weights and with_it.steps == [6, 12]
    lines = [line for line in with_it.lines if "first/eval/score" in line]
    assert [(line["step"], line["first/eval/epoch"]) for line in lines] == [(4, 4 / 3), (6, 2.0)]
    assert [line["first/eval/score"] for line in lines] == [record["score"] for record in with_it.histories[0]]
    assert seen == ["first", "first"] and with_it.histories[1] == [] == without.histories[0]
    assert "score -0.0" in capsys.readouterr().err
    assert not (tmp_path / "with" / "best").exists()


# At -0.025 and -0.095 the weight is after about 2.5 and 9.5 steps.
FIRST = dict(run=near(-0.022), every=1 / 3, keep_best=True)


def test_a_phase_ends_with_its_best_model_and_the_next_one_starts_there(tmp_path):
    seen = {}

    def run(phase, variables):
        seen[phase.name, len(seen)] = float(variables["params"]["weight"])
        return near(-0.022)(phase, variables)

    found = train([phase(run=run, every=1 / 3, keep_best=True), phase("second", steps=1)], tmp_path)
    weights = list(seen.values())
    assert found.weights[0] == weights[1] and len(weights) == 6
    assert found.steps == [6, 7], "the data go on where they were"
    assert found.weights[1] == pytest.approx(weights[1] - RATE, rel=1e-3)
    assert [record["step"] for record in found.histories[0]] == [1, 2, 3, 4, 5, 6]
    again = train([phase(run=None, steps=6), phase("second", steps=1)], tmp_path / "last")
    assert again.weights[0] == weights[-1]


RECIPE = (
    dict(name="first", patience=3, **FIRST),  # stops after five of its six steps
    dict(name="second", run=near(-0.053), every=2 / 3, keep_best=True, schedule="step"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    found = train([phase(**fields) for fields in RECIPE], tmp_path_factory.mktemp("whole"))
    best = [phase(**fields).evaluation.best(h)["step"] for fields, h in zip(RECIPE, found.histories, strict=True)]
    assert found.steps == [5, 11] and best == [2, 9] and len(found.histories[1]) == 3
    return found


class Killed(Exception):
    pass


# Evaluations 1 to 5 follow steps 1 to 5, evaluations 6 to 8 steps 7, 9 and 11; the best so far are those of 1, 2, 7 and 9.
@pytest.mark.parametrize(
    ("when", "at", "every", "goes_on_from"),
    [
        ("evaluation", 1, 4, None),
        ("evaluation", 4, 1, 3),  # after one that was not the best
        ("evaluation", 5, 4, 4),
        ("evaluation", 5, 0, 4),  # every evaluation is followed by a checkpoint, the best or not
        ("evaluation", 6, 1, 6),
        ("evaluation", 8, 0, 9),
        ("saving", 1, 4, None),  # there is a best model already
        ("saving", 2, 0, 1),
        ("saving", 5, 0, 4),  # where patience ends the phase
        ("saving", 7, 0, 5),  # the first phase is over, the second has a best model
    ],
)
def test_a_run_that_is_killed_resumes_to_the_same_bits(
    whole, tmp_path, monkeypatch, capsys, when, at, every, goes_on_from
):
    evaluations = 0
    save = Checkpoints.save

    def saving(self, step, state, meta):
        if when == "saving" and self.directory.name == "checkpoints" and step == at:
            raise Killed
        save(self, step, state, meta)

    def killing(run):
        def evaluate(phase, variables):
            nonlocal evaluations
            evaluations += 1
            if when == "evaluation" and evaluations == at:
                raise Killed
            return run(phase, variables)

        return evaluate

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", saving)
        train([phase(**fields | {"run": killing(fields["run"])}) for fields in RECIPE], tmp_path, every)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == goes_on_from
    for _ in range(2):  # the second time there is nothing left to do
        capsys.readouterr()
        resumed = train([phase(**fields) for fields in RECIPE], tmp_path, every)
        assert (f"{tmp_path} goes on from step {goes_on_from}\n" in capsys.readouterr().err) == (
            goes_on_from is not None
        )
        count = len(resumed.steps)  # a phase that was over is not reported again
        assert count == (2 if (goes_on_from or 0) <= 5 else 1)
        assert resumed[:3] == tuple(values[-count:] for values in whole[:3])
        assert resumed.variables == whole.variables
        assert without_speed(resumed.lines) == without_speed(whole.lines)
        goes_on_from = 11


def test_a_recipe_that_does_not_reach_its_checkpoint(tmp_path):
    recipe = [phase(), phase("second", steps=1)]
    train(recipe, tmp_path)
    with pytest.raises(UserError, match="step 7.*phase 2; use another workdir"):
        train(recipe[:1], tmp_path)
    assert train([*recipe, phase("third")], tmp_path).steps == [7, 13], "a longer recipe goes on"


def test_progress_follows_the_step(tmp_path):
    seen = []

    def run(phase, variables):
        seen.append(float(variables["schedule"]["progress"]))
        return {"score": -float(len(seen))}

    def losses(found, name):
        return [line[f"{name}/loss"] for line in found.lines if f"{name}/loss" in line]

    options = dict(objective=progress_as_loss, run=run, every=0.5)
    recipe = [
        phase("plain", steps=2, objective=progress_as_loss),
        phase("steps", steps=7, schedule="step", **options),
        phase("epochs", steps=7, schedule="epoch", keep_best=True, **options),
    ]
    found = train(recipe, tmp_path)
    by_step = [float(np.float32(i) / np.float32(7)) for i in range(7)]
    by_epoch = [float(np.float32(i // PER_EPOCH) / np.float32(3)) for i in range(7)]
    assert losses(found, "plain") == [-1, -1]
    assert losses(found, "steps") == by_step and losses(found, "epochs") == by_epoch
    after = [1, 2, 3, 5, 6]  # period 1.5: steps 2, 3, 4, 6, 7
    assert seen == [by_step[i] for i in after] + [by_epoch[i] for i in after]
    assert float(found.variables["schedule"]["progress"]) == by_epoch[1], "of the best model"
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        stored = json.loads((tmp_path / "checkpoints" / "16" / "meta" / "metadata").read_text())
        assert checkpoints.latest_step() == 16 and not any("schedule" in name for name in stored["leaves"])


def test_a_schedule_is_not_compiled_again():
    batches, tiny = make_batches(), phase(schedule="epoch", objective=progress_as_loss)
    optimizer = make_optimizer(tiny.optimizer, 6)
    state = make_state(tiny, {"params": {"weight": jnp.float32(0)}}, optimizer, 4, batches[0])
    step = jax.jit(make_step(tiny, optimizer, 0, Span(1, 4, 6, PER_EPOCH)))
    losses = []
    for i in range(6):
        state, measured = step(state, batches[i], None)
        losses.append(float(measured["loss"]))
    assert losses == [0, 0, 0, 0.5, 0.5, 0.5] and step._cache_size() == 1
    with pytest.raises(ValueError, match="span"):
        scheduled(tiny, None, 0)
    with pytest.raises(UserError, match="'first': unknown schedule 'epochs'; did you mean 'epoch'"):
        phase(schedule="epochs")


def test_dropout_and_rounding_draw_from_streams_of_their_own():
    drawn = {}

    def objective(forward, batch, constants):
        logits = forward(batch)[0].logits
        jax.debug.callback(lambda x: drawn.update(dropout=np.asarray(x[:, 2]), rounding=np.asarray(x[:, 3])), logits)
        return jnp.sum(logits[:, 0]), jnp.sum(batch["weights"])

    batches, tiny = make_batches(), phase(objective=objective)
    optimizer = make_optimizer(tiny.optimizer, 6)
    variables = {"params": {"weight": jnp.float32(0)}}
    state = make_state(tiny, variables, optimizer, 5, batches[0])
    jax.block_until_ready(jax.jit(make_step(tiny, optimizer, seed=3))(state, batches[0], None))
    jax.effects_barrier()
    key = jax.random.fold_in(jax.random.key(3, impl="rbg"), 5)
    alone = jax.jit(
        lambda key: tiny.model.apply(variables, *inputs(tiny.model, batches[0]), rngs={"dropout": key}).logits
    )(key)
    np.testing.assert_array_equal(drawn["dropout"], alone[:, 2])
    assert not np.intersect1d(drawn["dropout"], drawn["rounding"]).size and len(set(drawn["rounding"])) == BATCH


def test_evaluation_draws_when_it_is_given_a_seed():
    def draws(seed=None):
        variables = {"params": {"weight": jnp.float32(1)}, "ranges": {}}
        logits = predict(Tiny(), variables, make_batches(shuffle=False, epochs=1), make_mesh(), seed)
        np.testing.assert_array_equal(logits[:, 0], np.arange(1, EXAMPLES + 1))
        return logits[:, 3]

    assert not draws().any()
    assert len(set(draws(7))) == EXAMPLES, "every batch has a key of its own"
    np.testing.assert_array_equal(draws(7), draws(7))
    assert not np.intersect1d(draws(7), draws(8)).size


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
from qtx.train.loop import Saving, fit, predict
from tests.train.test_evaluation import make_batches, phase

assert jax.device_count() == 8

def fitted(mesh, workdir):
    def run(phase, variables):
        logits = predict(phase.model, variables, make_batches(shuffle=False, epochs=1), mesh, rounding_seed=0)
        scores.append(-abs(float(logits[:, 0].sum()) / 300 + 0.022))
        return {"score": scores[-1]}
    scores = []
    recipe = [phase(run=run, every=1 / 3, keep_best=True, schedule="step")]
    found = fit(recipe, make_batches(), {"params": {"weight": jnp.float32(0)}}, mesh, workdir, 0, Saving(0, 1))
    return [*scores, float(found["params"]["weight"]), float(found["schedule"]["progress"])]

auto = (AxisType.Auto,) * 2
one = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1], axis_types=auto)
eight = jax.make_mesh((8, 1), ("data", "model"), axis_types=auto)
found = [fitted(mesh, f"{sys.argv[1]}/{i}") for i, mesh in enumerate((one, eight))]
np.testing.assert_allclose(*found, rtol=1e-5)
assert found[0][-1] == np.float32(1) / np.float32(6)
"""


def test_eight_devices_choose_the_best_model_that_one_chooses(tmp_path):
    env = os.environ | eight_devices() | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
