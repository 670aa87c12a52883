"""What can happen at a site, and that nothing happens without being asked."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import quant
from qtx.errors import UserError
from qtx.nn import BertClassifier, BertConfig, Dense, Embed, check_policy, list_sites, policy, site
from qtx.nn.sites import SiteInfo, running_as
from qtx.quant.policy import Policy, Rule
from tests.nn import tiny


class Small(nn.Module):
    """Two linear layers with a site between them."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x, where=None):
        x = Dense(4, policy=self.policy, name="first")(x, where)
        x = site(self, "middle", 2 * x, where=where)
        return Dense(2, policy=self.policy, name="last")(x, where)


rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
PARAMS = {
    "first": {"kernel": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32), "bias": jnp.arange(4.0)},
    "last": {"kernel": jnp.asarray(rng.standard_normal((4, 2)), jnp.float32), "bias": jnp.arange(2.0)},
}
GIVEN = jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)
EVERYTHING = policy(quant.symmetric(4), quant.asymmetric(4), quant.asymmetric(4))
DYNAMIC = policy(activations=quant.asymmetric(3, range="dynamic"))


def linear(name, x):
    return x @ PARAMS[name]["kernel"] + PARAMS[name]["bias"]


def run(rules=None, x=X, params=PARAMS, mutable=False, **collections):
    return Small(rules).apply({"params": params, **collections}, x, mutable=mutable)


def calibrated(rules, x=X):
    return run(rules, x, mutable=["ranges", "observers"])[1]["ranges"]


def equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Counts and names


def test_bert_base_has_161_activation_and_102_weight_quantizers():
    model = BertClassifier(BertConfig(), policy=policy(quant.symmetric(8), quant.asymmetric(8)))
    sites = list_sites(model, {"params": tiny.shapes(model)}, *tiny.inputs())
    check_policy(model.policy, sites)
    counts = {}
    for name, info in sites.items():
        if model.policy.spec(info.kind, name) is not None:
            counts[info.kind] = counts.get(info.kind, 0) + 1
    assert counts == {"activation": 161, "weight": 102}


def test_quantized_tensors_are_the_listed_ones():
    """Calibration fills one range for every listed site of a quantized kind: the list is not just a list."""
    model = BertClassifier(tiny.CONFIG, policy=policy(quant.symmetric(8), quant.asymmetric(8)))
    variables = {"params": tiny.params()}
    _, updated = jax.eval_shape(lambda: model.apply(variables, *tiny.inputs(), mutable=["ranges", "observers"]))
    filled = {name.rpartition("/")[0] for name in traverse_util.flatten_dict(updated["ranges"], sep="/")}
    listed = {name: info.kind for name, info in list_sites(model, variables, *tiny.inputs()).items()}
    assert filled == {name for name, kind in listed.items() if kind != "input"}
    counts = [list(listed.values()).count(kind) for kind in ("activation", "weight", "input")]
    assert counts == [13 * 2 + 5, 8 * 2 + 6, 10 * 2 + 2]


def test_list_sites():
    shapes = jax.eval_shape(lambda: PARAMS)
    found = list_sites(Small(EVERYTHING), {"params": shapes}, jnp.zeros((7, 3)))
    assert found == list_sites(Small(), {"params": PARAMS}, jnp.zeros((7, 3)))
    assert list(found) == sorted(found)
    assert found["middle"] == SiteInfo("activation", (7, 4), -1, True)
    assert found["first/kernel"] == SiteInfo("weight", (3, 4), -1, True)
    assert found["first/input"] == SiteInfo("input", (7, 3), -1, True)
    assert set(found) == {"middle"} | {
        f"{m}/{role}" for m in ("first", "last") for role in ("kernel", "input", "output")
    }


def test_scores_and_probabilities_have_no_feature_axis_and_tables_count_rows():
    model = BertClassifier(tiny.CONFIG)
    sites = list_sites(model, {"params": tiny.params()}, *tiny.inputs())
    without = {name for name, info in sites.items() if not info.features}
    assert without == {
        f"encoder/layer_{i}/attention/{role}" for i in range(2) for role in ("scores", "probs", "probs_dropped")
    }
    rows = {name for name, info in sites.items() if info.channel_axis == 0}
    assert rows == {name for name in sites if name.endswith(("/table", "norm/scale"))}


# Without a policy


@pytest.mark.parametrize("rules", [EVERYTHING, DYNAMIC, Policy()], ids=["everything", "dynamic", "empty"])
def test_parameters_do_not_depend_on_the_policy(rules):
    plain, quantized = (Small(r).init(jax.random.key(3), X) for r in (None, rules))
    assert set(quantized) == {"params"}, "init creates parameters and nothing else"
    equal_trees(plain, quantized)


def test_bert_parameters_do_not_depend_on_the_policy():
    model = BertClassifier(tiny.CONFIG)
    quantized = model.clone(policy=policy(quant.symmetric(2), quant.asymmetric(4)))
    assert tiny.shapes(model) == tiny.shapes(quantized)
    ids = jnp.zeros((1, 4), jnp.int32)
    assert set(jax.eval_shape(quantized.init, jax.random.key(0), ids, ids, ids)) == {"params"}


def test_nothing_quantized_is_the_plain_model_bit_for_bit():
    model, variables = BertClassifier(tiny.CONFIG), {"params": tiny.params()}
    want = model.apply(variables, *tiny.inputs())
    keeps = policy({"**": None}, {"**": None}, {"**": None})
    for rules in (Policy(), keeps):
        equal_trees(model.clone(policy=rules).apply(variables, *tiny.inputs()), want)
    np.testing.assert_array_equal(run(), linear("last", 2 * linear("first", X)))


# Capture


def test_captures_are_full_precision_values_under_the_site_names():
    _, found = run(mutable=["captures"])
    flat = traverse_util.flatten_dict(found["captures"], sep="/")
    assert set(flat) == set(list_sites(Small(), {"params": PARAMS}, X))
    np.testing.assert_array_equal(flat["first/output"], linear("first", X))
    np.testing.assert_array_equal(flat["middle"], 2 * linear("first", X))
    np.testing.assert_array_equal(flat["first/kernel"], PARAMS["first"]["kernel"])
    np.testing.assert_array_equal(flat["first/input"], X)


def test_captures_of_a_quantized_model_are_the_values_before_the_grid():
    ranges = calibrated(EVERYTHING)
    out, found = run(EVERYTHING, mutable=["captures"], ranges=ranges)
    flat = traverse_util.flatten_dict(found["captures"], sep="/")
    np.testing.assert_array_equal(flat["first/kernel"], PARAMS["first"]["kernel"])
    # The output site's value is before its own grid; afterwards it is on it.
    assert np.any(np.asarray(flat["last/output"]) != np.asarray(out))
    spec = EVERYTHING.spec("activation", "last/output")
    np.testing.assert_array_equal(
        out, quant.fake_quant(spec, flat["last/output"], quant.QParams(**ranges["last"]["output"]))
    )
    np.testing.assert_array_equal(out, run(EVERYTHING, ranges=ranges))


# Replacement


def test_a_teacher_replaces_a_value():
    np.testing.assert_array_equal(run(teacher={"middle": GIVEN}), linear("last", GIVEN))
    np.testing.assert_array_equal(
        run(teacher={"last": {"kernel": GIVEN[:4, :2]}}),
        2 * linear("first", X) @ GIVEN[:4, :2] + PARAMS["last"]["bias"],
    )


@pytest.mark.parametrize("gate", [True, False])
def test_a_traced_gate_chooses(gate):
    def outputs(params, gate):
        return run(params=params, teacher={"middle": {"value": GIVEN, "gate": gate}})

    out = jax.jit(outputs)(PARAMS, jnp.asarray(gate))
    np.testing.assert_allclose(out, linear("last", GIVEN) if gate else run(), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(outputs(*a) ** 2)))(PARAMS, jnp.asarray(gate))
    assert np.all(np.asarray(gradient["first"]["kernel"]) == 0) == gate
    assert np.any(np.asarray(gradient["last"]["kernel"]) != 0)


def test_a_gate_per_example():
    gate = jnp.array([True, False, True, False, False])[:, None]
    out = run(teacher={"middle": {"value": GIVEN, "gate": gate}})
    np.testing.assert_allclose(out, np.where(gate, linear("last", GIVEN), run()), rtol=1e-6)


def test_no_gradient_through_what_is_replaced():
    gradient = jax.grad(lambda p: jnp.sum(run(params=p, teacher={"middle": GIVEN}) ** 2))(PARAMS)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient["first"]))
    assert np.any(np.asarray(gradient["last"]["kernel"]) != 0)


def test_a_replaced_value_is_quantized_and_its_capture_is_the_students():
    rules = policy(activations={"middle/**": None, "*iddle*": quant.asymmetric(3, range="dynamic")})
    out, found = run(rules, mutable=["captures"], teacher={"middle": GIVEN})
    spec = rules.spec("activation", "middle")
    np.testing.assert_array_equal(out, linear("last", quant.fake_quant(spec, GIVEN, quant.estimate(spec, GIVEN))))
    np.testing.assert_array_equal(found["captures"]["middle"], 2 * linear("first", X))


def test_replacement_takes_the_dtype_of_the_site():
    out = run(teacher={"middle": GIVEN.astype(jnp.bfloat16)})
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("flag", [True, False])
def test_detach_keeps_the_value_and_cuts_the_gradient(flag):
    def loss(params, flag):
        out = run(params=params, detach={"middle": flag})
        return jnp.sum(out**2), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(PARAMS, jnp.asarray(flag))
    np.testing.assert_allclose(out, run(), rtol=1e-6)
    assert np.all(np.asarray(gradient["first"]["kernel"]) == 0) == flag
    assert np.any(np.asarray(gradient["last"]["kernel"]) != 0)


# Ranges


def test_a_missing_range_names_the_site():
    with pytest.raises(UserError) as error:
        run(policy(activations={"last/*": quant.asymmetric(8)}))
    assert str(error.value) == (
        "site 'last/output' has no range yet; calibrate the model first, or give it range='dynamic'"
    )
    with pytest.raises(UserError, match="site 'first/kernel' has no range"):
        run(policy(weights=quant.symmetric(8)))


def test_ranges_change_only_while_observers_are_mutable():
    ranges = calibrated(EVERYTHING)
    other = 5 * X
    _, updated = run(EVERYTHING, other, mutable=["ranges"], ranges=ranges)
    equal_trees(updated["ranges"], ranges)
    _, updated = run(EVERYTHING, other, mutable=["ranges", "captures"], ranges=ranges)
    equal_trees(updated["ranges"], ranges)
    _, updated = run(EVERYTHING, other, mutable=["ranges", "observers"], ranges=ranges)
    assert float(updated["ranges"]["middle"]["scale"]) > 2 * float(ranges["middle"]["scale"])
    # Weights stay.
    equal_trees(updated["ranges"]["first"]["kernel"], ranges["first"]["kernel"])
    with pytest.raises(UserError, match="has no range"):
        run(EVERYTHING, mutable=["ranges"])


def test_quantized_values_by_hand():
    ranges = calibrated(EVERYTHING)
    w, a = quant.symmetric(4), quant.asymmetric(4)

    def on_grid(spec, value):
        return quant.fake_quant(spec, value, quant.estimate(spec, value))

    def layer(name, x):
        return on_grid(a, on_grid(a, x) @ on_grid(w, PARAMS[name]["kernel"]) + PARAMS[name]["bias"])

    want = layer("last", on_grid(a, 2 * layer("first", X)))
    np.testing.assert_array_equal(run(EVERYTHING, ranges=ranges), want)


def test_calibration_ignores_what_where_excludes():
    where = jnp.array([True, True, False, True, False])[:, None]
    rules = policy(activations=quant.asymmetric(8))

    def ranges(x):
        return Small(rules).apply({"params": PARAMS}, x, where, mutable=["ranges", "observers"])[1]["ranges"]

    equal_trees(ranges(X), ranges(jnp.where(where, X, 100.0)))
    assert float(calibrated(rules, jnp.where(where, X, 100.0))["middle"]["scale"]) > float(ranges(X)["middle"]["scale"])


def test_dynamic_ranges_need_no_calibration_and_follow_the_tensor():
    small, large = run(DYNAMIC), run(DYNAMIC, 100 * X)
    assert np.all(np.isfinite(small)) and np.abs(large).max() > 10 * np.abs(small).max()
    out, updated = run(DYNAMIC, mutable=["ranges", "observers"])
    assert not updated.get("ranges") and not updated.get("observers")
    assert len(np.unique(np.asarray(out))) <= 8


def test_learned_ranges_get_a_gradient_and_static_ones_do_not():
    ranges = calibrated(policy(quant.symmetric(3), quant.asymmetric(3)))
    scales = {"middle": ranges["middle"]["scale"], "kernel": ranges["first"]["kernel"]["scale"]}

    def loss(scales, rule):
        rules = policy(quant.symmetric(3, range=rule), quant.asymmetric(3, range=rule))
        first = ranges["first"] | {"kernel": ranges["first"]["kernel"] | {"scale": scales["kernel"]}}
        mine = ranges | {"first": first, "middle": ranges["middle"] | {"scale": scales["middle"]}}
        return jnp.sum(run(rules, 1.5 * X, ranges=mine) ** 2)

    learned, static = (jax.grad(loss)(scales, rule) for rule in ("learned", "static"))
    assert all(float(value) != 0 for value in learned.values())
    assert all(float(value) == 0 for value in static.values())


def test_masters_keep_their_gradient():
    ranges = calibrated(EVERYTHING)
    gradient = jax.grad(lambda p: jnp.sum(run(EVERYTHING, params=p, ranges=ranges) ** 2))(PARAMS)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))


# Switches


@pytest.mark.parametrize(
    ("name", "kind"), [("first/kernel", "weights"), ("first/input", "inputs"), ("last/output", "activations")]
)
def test_a_site_that_is_switched_off_is_as_without_a_rule(name, kind):
    own = getattr(EVERYTHING, kind) + (Rule(name, None),)
    without = dataclasses.replace(EVERYTHING, **{kind: own})
    ranges = calibrated(EVERYTHING)
    outputs = jax.jit(lambda switches: run(EVERYTHING, ranges=ranges, switches=switches))

    def switches(flag):
        return traverse_util.unflatten_dict({name: jnp.asarray(flag)}, sep="/")

    on, off = outputs(switches(True)), outputs(switches(False))
    assert outputs._cache_size() == 1
    np.testing.assert_allclose(on, run(EVERYTHING, ranges=ranges), rtol=1e-5)
    np.testing.assert_allclose(off, run(without, ranges=ranges), rtol=1e-5)
    assert np.any(np.abs(on - off) > 1e-3)
    # In calibration, too: what comes later sees the plain value.
    _, updated = run(EVERYTHING, mutable=["ranges", "observers"], switches=switches(False))
    found = traverse_util.flatten_dict(updated["ranges"], sep="/")
    want = traverse_util.flatten_dict(calibrated(without), sep="/")
    fields = ("scale", "zero_point", "signed", "group")
    assert set(found) - set(want) == {f"{name}/{field}" for field in fields}
    equal_trees({field: found[field] for field in want}, want)


def test_a_switched_table_is_looked_up_plainly():
    ids, table = jnp.array([[1, 2, 2]]), {"params": {"table": jnp.arange(12.0).reshape(4, 3) ** 2}}
    embed = Embed(4, 3, policy=policy(weights=quant.symmetric(3, range="dynamic")))
    plain, quantized = Embed(4, 3).apply(table, ids), embed.apply(table, ids)
    assert np.any(plain != quantized)
    np.testing.assert_array_equal(embed.apply(table | {"switches": {"table": False}}, ids), plain)
    np.testing.assert_array_equal(embed.apply(table | {"switches": {"table": True}}, ids), quantized)


# Policies that do not fit


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (policy(activations={"s": quant.asymmetric(8, quant.per_embedding())}), "has no feature axis"),
        (policy(activations={"p0": quant.asymmetric(8, quant.per_group(2))}), "'encoder/layer_0/attention/probs'"),
        (policy(activations={"y": quant.asymmetric(8, quant.per_position())}), "use range='dynamic'"),
        (policy(activations={"y": quant.asymmetric(8, quant.per_token())}), "use range='dynamic'"),
        (policy(activations={"y": quant.asymmetric(8, quant.per_group(5))}), "5 groups do not divide its width 12"),
        (policy(weights={"FFN": quant.symmetric(8, quant.per_group(7))}), "7 groups do not divide its width"),
        (policy(activations={"y3": quant.asymmetric(8)}), "matches no site"),
    ],
)
def test_check_policy(rules, words):
    sites = list_sites(BertClassifier(tiny.CONFIG), {"params": tiny.params()}, *tiny.inputs())
    with pytest.raises(UserError) as error:
        check_policy(rules, sites)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_check_policy_lets_the_sensible_ones_pass():
    sites = list_sites(BertClassifier(tiny.CONFIG), {"params": tiny.params()}, *tiny.inputs())
    check_policy(
        policy(
            quant.symmetric(8, quant.per_channel()),
            {
                "y": quant.asymmetric(8, quant.per_group(6, permute=True)),
                "x": quant.asymmetric(8, quant.per_embedding()),
                "h": quant.asymmetric(8, quant.per_token(), range="dynamic"),
                "s": quant.asymmetric(8, quant.per_position(), range="dynamic"),
            },
        ),
        sites,
    )


def test_policies_are_static_attributes():
    """A model with a policy is hashable and comparable, so it can be a static argument."""
    model = BertClassifier(tiny.CONFIG, policy=EVERYTHING)
    assert hash(model) == hash(BertClassifier(tiny.CONFIG, policy=dataclasses.replace(EVERYTHING)))


# Modules that run several times


class Inner(nn.Module):
    policy: Policy | None = None

    @nn.compact
    def __call__(self, x):
        return site(self, "twice", Dense(3, policy=self.policy, name="dense")(x) * 2)


class Outer(nn.Module):
    """`a` and `b` share parameters, and so, within each of them, do `x` and `y`."""

    policy: Policy | None = None
    fail: bool = False

    @nn.compact
    def __call__(self, x):
        shared = Middle(self.policy, self.fail, name="a")
        return running_as(shared, "b")(running_as(shared, "a")(x))


class Middle(nn.Module):
    policy: Policy | None = None
    fail: bool = False

    @nn.compact
    def __call__(self, x):
        shared = Inner(self.policy, name="x")
        for name in ("x", "y"):
            x = running_as(shared, name)(x)
        if self.fail:
            raise RuntimeError
        return site(self, "end", x)


def test_runs_of_a_shared_module_have_sites_of_their_own():
    rules = policy(quant.symmetric(8), {"**": quant.asymmetric(8), "b/y/twice": None})
    model, x = Outer(rules), X
    params = model.init(jax.random.key(0), x)["params"]
    assert set(traverse_util.flatten_dict(params, sep="/")) == {"a/x/dense/kernel", "a/x/dense/bias"}
    found = list_sites(model, {"params": params}, x)
    runs = {f"{outer}/{inner}" for outer in "ab" for inner in "xy"}
    assert {name for name, info in found.items() if info.kind == "weight"} == {"a/x/dense/kernel"}
    assert {name for name, info in found.items() if info.kind == "activation"} == {"a/end", "b/end"} | {
        f"{run}/{role}" for run in runs for role in ("twice", "dense/output")
    }
    _, updated = model.apply({"params": params}, x, mutable=["ranges", "observers", "captures"])
    ranged = {name.rpartition("/")[0] for name in traverse_util.flatten_dict(updated["ranges"], sep="/")}
    assert ranged == {name for name, info in found.items() if info.kind != "input"} - {"b/y/twice"}
    captured = traverse_util.flatten_dict(updated["captures"], sep="/")
    assert len({np.asarray(captured[f"{run}/twice"]).tobytes() for run in runs}) == 4
    # A run reads what it wrote: with these ranges the model is the calibrated one.
    out = model.apply({"params": params, "ranges": updated["ranges"]}, x)
    lost = {name: value for name, value in updated["ranges"].items() if name != "b"}
    with pytest.raises(UserError, match="'b/x/dense/output' has no range"):
        model.apply({"params": params, "ranges": lost}, x)
    assert np.all(np.isfinite(out))


def test_a_run_that_fails_leaves_no_name_behind():
    model = Outer()
    variables = {"params": model.init(jax.random.key(0), X)["params"]}
    with pytest.raises(RuntimeError):
        Outer(fail=True).apply(variables, X)
    before = list_sites(Middle(), {"params": variables["params"]["a"]}, X)
    assert {name.partition("/")[0] for name in before} == {"x", "y", "end"}
