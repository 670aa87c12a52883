"""Packed files of modules that are no model of qtx. What is in a file is tested with whole models in test_packed.py."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import qtx
from qtx.export.packed import WEIGHTS_FILE, load_quantized


class Mixed(nn.Module):
    """Has sites of every kind, one of them in a layer of its own making."""

    policy: qtx.Policy | None = None

    @nn.compact
    def __call__(self, ids):
        x = qtx.nn.Embed(11, 6, policy=self.policy, name="table")(ids)
        gain = qtx.site(self, "gain", self.param("gain", nn.initializers.ones, (6,)), kind="weight")
        x = qtx.nn.Dense(5, policy=self.policy, name="dense")(x * gain)
        return qtx.site(self, "end", nn.Dense(2, name="plain")(x))


IDS = jax.random.randint(jax.random.key(0), (3, 4), 0, 11)
PARAMS = Mixed().init(jax.random.key(1), IDS)["params"]
POLICIES = {
    "4 bits": qtx.policy(weights=qtx.symmetric(4), activations=qtx.asymmetric(8)),
    "by channel, ternary": qtx.policy(
        weights={"**": qtx.ternary(qtx.per_channel()), "/gain": qtx.asymmetric(3)},
        activations={"/end": qtx.symmetric(5)},
    ),
    "dynamic": qtx.policy(weights={"dense/kernel": qtx.binary()}, activations=qtx.asymmetric(8, range="dynamic")),
    "weights alone": qtx.policy(weights={"dense/kernel": qtx.symmetric(2)}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_module_of_ones_own(tmp_path, name):
    model = Mixed(POLICIES[name])
    variables = {"params": PARAMS, "ranges": qtx.calibrate(model, PARAMS, [(IDS,)])}
    path = tmp_path / "made" / "mixed.safetensors"
    size = qtx.save_packed(path, model, variables, IDS)
    packed = qtx.load_packed(path)
    assert packed.original == POLICIES[name] and not packed.policy.weights and packed.config == {}
    again = Mixed(packed.policy).apply(packed.variables, IDS)
    np.testing.assert_array_equal(again, model.apply(variables, IDS))
    assert size < path.stat().st_size
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))


def test_grid_values_give_the_same_file(tmp_path):
    model = Mixed(POLICIES["4 bits"])
    variables = {"params": PARAMS, "ranges": qtx.calibrate(model, PARAMS, [(IDS,)])}
    qtx.save_packed(tmp_path / "a", model, variables, IDS)
    packed = qtx.load_packed(tmp_path / "a")
    qtx.save_packed(tmp_path / "b", model, {**variables, "params": packed.variables["params"]}, IDS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(qtx.UserError, match="without a policy"):
        qtx.save_packed(tmp_path / "a", Mixed(), {"params": PARAMS}, IDS)
    with pytest.raises(qtx.UserError, match="no range yet; calibrate"):
        qtx.save_packed(tmp_path / "a", Mixed(POLICIES["4 bits"]), {"params": PARAMS}, IDS)
    with pytest.raises(qtx.UserError, match="denze"):
        policy = qtx.policy(weights={"denze/kernel": qtx.symmetric(4)})
        qtx.save_packed(tmp_path / "a", Mixed(policy), {"params": PARAMS}, IDS)
    model = Mixed(POLICIES["dynamic"])
    for name in ("a:scale", "ranges"):
        with pytest.raises(qtx.UserError, match="rename the module"):
            qtx.save_packed(tmp_path / "a", model, {"params": {**PARAMS, name: PARAMS["plain"]}}, IDS)
    assert not list(tmp_path.iterdir())


def test_it_is_no_model_of_qtx(tmp_path):
    qtx.save_packed(tmp_path / WEIGHTS_FILE, Mixed(POLICIES["dynamic"]), {"params": PARAMS}, IDS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(qtx.UserError, match="read it with qtx.load_packed"):
        load_quantized(tmp_path)
