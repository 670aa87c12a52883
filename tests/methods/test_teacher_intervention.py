import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.methods import teacher_intervention as ti
from qtx.nn import BertClassifier, list_sites
from qtx.nn.sites import check_policy
from tests.nn import tiny

LAYERS = {"qkv": "attention/query attention/key attention/value attention/out", "ffn_1": "ffn/up", "ffn_2": "ffn/down"}
FACTORS = "attention/query/output attention/key/output attention/value/output attention/probs"


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
    assert quantized(ti.student_policy(quantize=False, published=True), sites) == expected(out=True)
    assert quantized(ti.student_policy(quantize=False, qkv=False, published=True), sites) == expected()


def test_grids(sites):
    policy = ti.student_policy()
    assert policy.spec("weight", "encoder/embeddings/word/table") == quant.ternary(
        quant.per_channel(), clip=(-2.5, 2.5)
    )
    assert policy.spec("weight", "pooler/dense/kernel") == quant.ternary(clip=(-2.5, 2.5))
    for name in ("encoder/layer_0/attention/probs", "encoder/layer_1/attention/key/output"):
        assert policy.spec("activation", name) == ti.ACTIVATIONS
        published = ti.student_policy(published=True).spec("activation", name)
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
