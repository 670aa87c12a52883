"""Checks that encoder families share; reference values in golden/families (see make_mobile.py there)."""

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers
from flax import traverse_util

from qtx import models, quant
from qtx.export.packed import load_quantized, save_quantized
from qtx.methods.calibrate import calibrate, quantized_weights
from qtx.methods.efficient_quantization import policy_of
from qtx.methods.qat import qat_phase
from qtx.models.checkpoints import abstract_params
from qtx.nn import check_policy, list_sites, policy
from qtx.nn.describe import describe
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import inputs, make_state, make_step
from tests.models.hf import write_checkpoint
from tests.nn import tiny

FILE = Path(__file__).parent.parent / "golden" / "families" / "mobile.npz"
W, A = quant.symmetric(8), quant.asymmetric(8)
CHANNELS = quant.symmetric(8, quant.per_channel())


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@functools.cache
def reference(name):
    """Reference values of one model: its configuration, state dict, inputs and outputs."""
    with np.load(FILE) as file:
        return {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}


def state(name):
    """The published state dict."""
    return {key.removeprefix("state/"): value for key, value in reference(name).items() if key.startswith("state/")}


@functools.cache
def load(name):
    """The reference model, read as a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), json.loads(str(reference(name)["config"])), state(name))
        return models.load(directory)


def module(found, **options):
    return found.family.module(config=found.config, **options)


@functools.cache
def sites(family, config):
    """Sites by name, nothing computed."""
    family = models.get_family(family)
    params = abstract_params(family, config)
    return list_sites(family.module(config=config), {"params": params}, *family.example_inputs())


def count(found, kind):
    return sum(info.kind == kind for info in found.values())


def random_params(family, config):
    """Random parameters; norm scales are around 1."""
    rng = np.random.default_rng(0)
    flat = traverse_util.flatten_dict(abstract_params(models.get_family(family), config), sep="/")
    made = {}
    for path, leaf in flat.items():
        value = rng.standard_normal(leaf.shape).astype(np.float32) * 0.3
        made[path] = jnp.asarray(value + 1 if path.endswith("scale") else value)
    return traverse_util.unflatten_dict(made, sep="/")


def check_forward(name):
    """Hidden states and logits are the published ones."""
    found, want = load(name), reference(name)
    assert found.fresh == ()
    with jax.default_matmul_precision("highest"):
        out = jax.jit(module(found).apply)({"params": found.params}, *inputs(module(found), want))
    real = want["attention_mask"] > 0
    assert not real.all() and want["token_type_ids"].any()
    np.testing.assert_allclose(out.hidden_states[-1][real], want["last_hidden_state"][real], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.logits, want["logits"], atol=1e-5, rtol=0)


def check_round_trip(name, directory):
    """What is written holds the published tensors, bit for bit, and reads the same."""
    found, want = load(name), state(name)
    models.save(directory, found.family, found.config, found.params)
    written = safetensors.numpy.load_file(directory / "model.safetensors")
    assert written.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    again = models.load(str(directory))
    assert again.config == found.config and again.family is found.family
    equal(again.params, found.params)
    config, given = transformers.AutoConfig.from_pretrained(directory), json.loads(str(reference(name)["config"]))
    ours = {"architectures", "label2id", "id2label"} | found.family.config_to_hf(found.config).keys()
    assert len(ours & given.keys()) >= 20
    assert {key: config.to_dict()[key] for key in ours & given.keys() - {"id2label"}} == {
        key: given[key] for key in ours & given.keys() - {"id2label"}
    }


@functools.cache
def calibrated(family, config):
    """A model with random parameters and all weights and activations in 8 bits, its parameters and its ranges."""
    model, params = (
        models.get_family(family).module(config=config, policy=policy(CHANNELS, A)),
        random_params(family, config),
    )
    return model, params, calibrate(model, params, [tiny.inputs()])


def check_quantization(family, config, directory):
    """W8A8: every tensor is quantized, calibrated, described, packed and read back."""
    model, params, ranges = calibrated(family, config)
    family, rules, batch = models.get_family(family), model.policy, tiny.inputs()
    found = sites(family.name, config)
    names = {path.rpartition("/")[0] for path in traverse_util.flatten_dict(ranges, sep="/")}
    assert names == {name for name, info in found.items() if info.kind != "input"}
    summary = describe(model, {"params": params}, *batch).summary
    activations, weights = count(found, "activation"), count(found, "weight")
    assert f"{activations} of {activations} activations, {weights} of {weights} weights" in summary

    save_quantized(directory, family, config, rules, params, ranges)
    packed = load_quantized(directory)
    assert packed.config == config and packed.family is family
    equal(packed.params, quantized_weights(rules, found, params, ranges))
    logits = jax.jit(packed.model.apply)(packed.variables, *batch).logits
    plain = jax.jit(family.module(config=config).apply)({"params": params}, *batch).logits
    assert 0 < np.max(np.abs(logits - plain)) < 0.3 * np.max(np.abs(plain))


def check_training_step(family, config):
    """One step with learned ranges moves every parameter and every scale that has a gradient."""
    model, params, ranges = calibrated(family, config)
    batch = dict(zip(model.inputs, tiny.inputs(), strict=True)) | {
        "labels": np.array([0, 1, 2]),
        "weights": np.ones(3, np.float32),
    }
    settings = OptimizerConfig(learning_rate=1e-2)
    phase = qat_phase("qat", model.clone(policy=None), model.policy, [inputs(model, batch)], settings)
    optimizer = make_optimizer(settings, 1)
    before = make_state(phase, {"params": params, "ranges": ranges}, optimizer, 0, batch)
    after, measured = jax.jit(make_step(phase, optimizer, seed=0))(before, batch, None)
    assert np.isfinite(measured["loss"]) and measured["grad_norm"] > 0
    still = {name for name, value in before.trained.items() if np.array_equal(value, after.trained[name])}
    # Without gradient: a constant added to all keys, a zero point when nothing is clipped, the scale of a norm's single
    # element, which is on its grid exactly.
    idle = ("key/bias", "/zero_point", "norm/scale/scale")
    assert not [name for name in still if not name.endswith(idle)]
    assert sum(name.startswith("ranges/") for name in before.trained) > len(sites(family, config)) / 2


def check_published_policies(family, config, groups):
    """Setups, mixed precision and groups reach their sites, and nothing fails for what the family does not have."""
    found, layers = sites(family, config), config.num_layers

    def specs(*args, **options):
        rules = policy_of(W, A, *args, num_layers=layers, **options)
        check_policy(rules, found)
        return {name: rules.spec(info.kind, name) for name, info in found.items() if info.kind == "activation"}

    assert set(specs().values()) == {A}
    assert {name for name, spec in specs(setup="FP_logits").items() if spec is None} == {"classifier/output"}
    changed = {name for name, spec in specs(setup="MSE_logits").items() if spec != A}
    assert changed == {"classifier/output"}
    changed = {name: spec for name, spec in specs({"y": 16, "h": "fp32", "x0": f"ng{groups}"}).items() if spec != A}
    assert changed == {
        "encoder/layer_0/attention/norm/output": quant.asymmetric(8, quant.per_group(groups)),
        **{f"encoder/layer_{i}/ffn/residual": quant.asymmetric(16) for i in range(layers)},
        **{f"encoder/layer_{i}/ffn/down/output": None for i in range(layers)},
    }
    four = {name for name, spec in specs({"L": 4}).items() if spec.bits == 4}
    assert four == {name for name in specs() if "/layer_" in name}
    for everywhere in (quant.per_embedding(), quant.per_group(groups)):
        plain = {name for name, spec in specs(everywhere=everywhere).items() if spec == A}
        heads = (
            {"classifier/output"}
            if everywhere == quant.per_embedding()
            else {"classifier/output", "pooler/dense/output"}
        )
        assert plain == {name for name in specs() if name.endswith(("/scores", "/probs", "/up/output"))} | (
            heads & set(found)
        )
    return specs
