"""The training loop: phases, resuming, sharding, accumulation."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.experimental.compilation_cache import compilation_cache

from qtx.errors import UserError
from qtx.experiments.run import make_recipe, train_and_evaluate
from qtx.experiments.setup import setup
from qtx.train.checkpoint import Checkpoints
from qtx.train.logging import read_metrics
from qtx.train.loop import fit
from qtx.train.optimizer import make_optimizer
from qtx.train.phase import inputs, make_state, make_step, task_loss
from tests.conftest import FEWER_SITES, eight_devices

ROOT = Path(__file__).parents[2]


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def run_steps(config, count, **changes):
    """Takes a few steps of the first phase without `fit`; returns the state, the losses and the compiled step."""
    import dataclasses

    experiment = setup(config)
    recipe, _ = make_recipe(experiment)
    phase = dataclasses.replace(recipe[0], **changes)
    section = config.phases[config.recipe[0]]
    batches = experiment.batches("train", section.batch_size, shuffle=True, epochs=None, seed=0)
    variables = dict(experiment.variables)
    if phase.prepare is not None:
        variables["ranges"] = phase.prepare(phase.model, variables["params"])
    optimizer = make_optimizer(phase.optimizer, count)
    state = make_state(phase, variables, optimizer, 0, batches[0])
    step = jax.jit(make_step(phase, optimizer, seed=0))
    losses = []
    for i in range(count):
        state, measured = step(state, {k: jnp.asarray(v) for k, v in batches[i].items()}, None)
        losses.append(float(measured["loss"]))
    return state, losses, step, batches


def test_training_learns_the_task(tiny_config, tmp_path):
    tiny_config.phases.finetune.steps = 60
    tiny_config.phases.finetune.optimizer.learning_rate = 5e-3
    result = train_and_evaluate(tiny_config, tmp_path)
    assert result["metrics"]["finetune"]["accuracy"] > 0.9
    lines = read_metrics(tmp_path)
    assert lines[0]["finetune/loss"] > 2 * lines[-1]["finetune/loss"]
    assert lines[0]["finetune/accuracy"] < 0.9 < lines[-1]["finetune/accuracy"] <= 1
    for name in (
        "config.json",
        "report.md",
        "report.csv",
        "result_finetune.json",
        "model/model.safetensors",
        "tensorboard",
    ):
        assert (tmp_path / name).exists(), name


def test_nothing_is_compiled_after_the_first_epoch(tiny_config):
    tiny_config.data.buckets = 2
    experiment = setup(tiny_config)
    per_epoch = experiment.batches("train", 8, True, None).batches_per_epoch
    traced = []

    def objective(forward, batch, constants):
        traced.append(batch["input_ids"].shape[-1])
        return task_loss(forward, batch, constants)

    *_, batches = run_steps(tiny_config, 3 * per_epoch, objective=objective)
    assert len(batches.buckets) == 2 and sorted(traced) == sorted(batches.buckets)


def test_seeds_share_their_compiled_programs(tiny_config, tmp_path):
    tiny_config.model.hidden_dropout = 0.1
    tiny_config.phases.finetune.steps = 3
    options = {"jax_compilation_cache_dir": str(tmp_path / "cache"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    weights = []
    try:
        for seed in (1, 2):
            for name, value in options.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            experiment = setup(tiny_config)
            batches = experiment.batches("train", 8, shuffle=True, epochs=None, seed=0)
            recipe, _ = make_recipe(experiment)
            found = fit(recipe, batches, experiment.variables, experiment.mesh, tmp_path / f"run_{seed}", seed)
            weights.append(flat(found["params"])["classifier/kernel"])
            programs = sorted(path.name for path in (tmp_path / "cache").glob("jit_train_step-*-cache"))
            assert len(programs) == 1
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert np.any(weights[0] != weights[1])  # the seed is that of dropout alone


def test_accumulation_equals_the_whole_batch(tiny_config):
    whole, losses, *_ = run_steps(tiny_config, 3)
    parts, same, *_ = run_steps(tiny_config, 3, accumulate=4)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    for name, value in whole.trained.items():
        if name.endswith("key/bias"):
            continue  # its gradient is zero but for rounding, which Adam scales up
        np.testing.assert_allclose(value, parts.trained[name], atol=2e-5, err_msg=name)


def test_dropout_depends_on_the_step_and_the_seed(tiny_config):
    _, without, *_ = run_steps(tiny_config, 2)
    tiny_config.model.hidden_dropout = tiny_config.model.attention_dropout = 0.1
    _, with_dropout, *_ = run_steps(tiny_config, 2)
    _, again, *_ = run_steps(tiny_config, 2)
    assert with_dropout == again and with_dropout != without


def test_frozen_parameters_do_not_move(tiny_config):
    state, *_ = run_steps(tiny_config, 2, trainable=("encoder/*/ffn/**", "classifier/**"))
    before = flat(setup(tiny_config).pretrained.params)
    assert {name.split("/")[1] for name in state.trained} == {"encoder", "classifier"}
    moved = {name for name, value in before.items() if np.any(flat(state.variables()["params"])[name] != value)}
    assert moved and all(name.startswith(("encoder/layer_0/ffn/", "classifier/")) for name in moved)


def test_bfloat16_compute_keeps_float32_masters(tiny_config):
    _, exact, *_ = run_steps(tiny_config, 3)
    tiny_config.model.dtype = "bfloat16"
    state, losses, *_ = run_steps(tiny_config, 3)
    assert all(value.dtype == jnp.float32 for value in state.trained.values())
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert losses != exact


@pytest.mark.parametrize(("rule", "moves"), [("learned", True), ("fixed", False), ("updated", True)])
def test_ranges_in_training(tiny_config, rule, moves):
    tiny_config.recipe = ("qat",)
    tiny_config.phases.qat.ranges = rule
    experiment = setup(tiny_config)
    phase = make_recipe(experiment)[0][0]
    before = flat(phase.prepare(phase.model, experiment.pretrained.params))
    if rule == "updated":
        sites = traverse_util.unflatten_dict({k: v for k, v in before.items()}, sep="/")
        apply = jax.jit(functools.partial(phase.model.apply, mutable=["ranges", "observers"]))
        batch = inputs(phase.model, experiment.batches("train", 8, True, None)[0])
        _, changed = apply({"params": experiment.pretrained.params, "ranges": sites}, *batch)
        assert np.any(changed["ranges"]["classifier"]["output"]["scale"] != before["classifier/output/scale"])
        return
    state, *_ = run_steps(tiny_config, 3)
    after = flat(state.variables()["ranges"])
    for name in ("encoder/layer_0/ffn/residual/scale", "encoder/layer_0/ffn/up/kernel/scale"):
        assert bool(np.any(after[name] != before[name])) == moves
    assert not any(name.endswith("kernel/zero_point") for name in state.trained), "symmetric grids have no zero point"
    assert any(name.endswith("residual/zero_point") for name in state.trained) == moves


def test_updated_ranges_run_to_the_end(tiny_config, tmp_path):
    tiny_config.recipe = ("qat",)
    tiny_config.phases.qat.ranges = "updated"
    result = train_and_evaluate(tiny_config, tmp_path)
    assert np.isfinite(result["metrics"]["qat"]["score"])
    assert (tmp_path / "quantized" / "model.qtx.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
    tiny_config.phases.finetune.optimizer.learning_rate = 1e30
    tiny_config.phases.finetune.optimizer.warmup = 0.0
    tiny_config.phases.finetune.steps = 20
    with pytest.raises(UserError, match="learning rate"):
        train_and_evaluate(tiny_config, tmp_path)


def test_checkpoint_of_a_longer_run(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path)
    tiny_config.phases.finetune.steps = 2
    with pytest.raises(UserError, match="another workdir"):
        train_and_evaluate(tiny_config, tmp_path)


def command(config_fixture, workdir, **overrides):
    c = config_fixture
    fields = {
        "task": "table",
        "model.name": c.model.name,
        "data.train": c.data.train,
        "data.validation": c.data.validation,
        "data.max_length": 16,
        "data.buckets": 1,
        "data.eval_buckets": 1,
        "model.hidden_dropout": 0.1,
        "model.attention_dropout": 0.0,
        "calibration.batch_size": 8,
        "calibration.batches": 1,
        "phases.finetune.batch_size": 8,
        "phases.finetune.steps": 6,
        "phases.qat.batch_size": 8,
        "phases.qat.steps": 60,
        "phases.qat.optimizer.name": "muon",  # whose state has arrays for some of the parameters alone
        "checkpoint_every": 4,
        "log_every": 4,
        "quant.overrides": FEWER_SITES,
    }
    changes = [f"--config.{name}={value}" for name, value in (fields | overrides).items()]
    return [sys.executable, "launch/train.py", "--config=configs/qat.py:w8a8", f"--workdir={workdir}", *changes]


def test_a_killed_run_resumes_to_the_same_bits(tiny_config, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    options = dict(cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = subprocess.run(command(tiny_config, tmp_path / "whole", checkpoint_every=0), **options)
    assert whole.returncode == 0, whole.stderr[-2000:]

    killed = subprocess.Popen(command(tiny_config, tmp_path / "killed"), **options)
    with Checkpoints(tmp_path / "killed" / "checkpoints") as checkpoints:
        deadline = time.time() + 120
        while (checkpoints.latest_step() or 0) < 12:  # in the second phase
            assert killed.poll() is None, killed.stderr.read()[-2000:]
            assert time.time() < deadline
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed.stderr.close()
        left = checkpoints.latest_step()
    assert left < 66, "the run was over before it was killed"
    assert not (tmp_path / "killed" / "model").exists()

    resumed = subprocess.run(command(tiny_config, tmp_path / "killed"), **options)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for file in ("model/model.safetensors", "quantized/model.qtx.safetensors"):
        a, b = (safetensors.numpy.load_file(tmp_path / run / file) for run in ("whole", "killed"))
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    steps = [line["step"] for line in read_metrics(tmp_path / "killed")]
    assert steps == sorted(set(steps)) and steps[-1] == 66


SHARDED = """
import sys, json, jax, numpy as np
from flax import traverse_util
from jax.sharding import AxisType
from qtx.experiments.config import base
from qtx.experiments.run import make_recipe
from qtx.experiments.setup import setup
from qtx.train.loop import Saving, fit
from qtx.train.logging import read_metrics

config = base()
for name, value in json.loads(sys.argv[1]).items():
    config.update_from_flattened_dict({name: value})
config.recipe = ("finetune", "qat")
assert jax.device_count() == 8
experiment = setup(config)
recipe, _ = make_recipe(experiment)
batches = experiment.batches("train", 8, True, None)
auto = (AxisType.Auto,) * 2
meshes = {
    "single": jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1], axis_types=auto),
    "both": jax.make_mesh((4, 2), ("data", "model"), axis_types=auto),
}
for name, mesh in meshes.items():
    workdir = f"{sys.argv[2]}/{name}"
    found = fit(recipe, batches, experiment.variables, mesh, workdir, 0, Saving(0, 1))
    losses = [line[key] for line in read_metrics(workdir) for key in line if key.endswith("/loss")]
    params = {k: v for k, v in traverse_util.flatten_dict(found, sep="/").items() if v is not None}
    split = [k for k, v in params.items() if not v.sharding.is_fully_replicated]
    assert bool(split) == (name == "both"), split
    np.savez(f"{sys.argv[2]}/{name}.npz", losses=losses, **{k: np.asarray(v) for k, v in params.items()})
"""


def test_eight_devices_give_the_loss_and_parameters_of_one(tiny_config, tmp_path):
    import json

    # A key's bias has no influence: its gradient is rounding alone, which Adam scales up and a quantized key then shows.
    trainable = ("**/kernel", "**/table", "**/norm/*", "**/query/bias", "**/value/bias", "**/out/bias", "**/ffn/*/bias")
    changes = {
        "task": "table",
        "phases.finetune.trainable": trainable,
        "phases.qat.trainable": trainable,
        "model.name": tiny_config.model.name,
        "model.hidden_dropout": 0.0,
        "model.attention_dropout": 0.0,
        "data.train": tiny_config.data.train,
        "data.validation": tiny_config.data.validation,
        "data.max_length": 16,
        "data.buckets": 1,
        "calibration.batch_size": 8,
        "phases.finetune.steps": 3,
        "phases.finetune.optimizer.name": "muon",  # which needs whole kernels
        "phases.qat.steps": 3,
    }
    env = os.environ | eight_devices()
    arguments = [sys.executable, "-c", SHARDED, json.dumps(changes), str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    single, both = (np.load(tmp_path / f"{name}.npz") for name in ("single", "both"))
    assert len(single["losses"]) == 6
    np.testing.assert_allclose(both["losses"], single["losses"], rtol=1e-5)
    assert set(both.files) == set(single.files)
    for name in single.files:
        np.testing.assert_allclose(both[name], single[name], atol=3e-5, rtol=1e-4, err_msg=name)


def test_a_batch_that_does_not_divide(tiny_config, tmp_path):
    experiment = setup(tiny_config)
    recipe, _ = make_recipe(experiment)
    with pytest.raises(UserError, match="no phases"):
        fit([], experiment.batches("train", 8, True, None), experiment.variables, experiment.mesh, tmp_path)
    assert recipe[0].name == "finetune"
