"""Sets of quantizers switched in one compiled program, against models whose policy has those sets only."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import quant
from qtx.analysis import sensitivity
from qtx.analysis.sensitivity import ALL, FULL, Cost, make_groups, measure, plot, quantized_sites, summary, variants
from qtx.errors import UserError
from qtx.methods import calibrate as calibration
from qtx.nn import BertClassifier, list_sites, policy
from qtx.quant.policy import Policy, Rule
from tests.nn import tiny

RULES = policy(quant.symmetric(8), quant.asymmetric(8))
MODEL = BertClassifier(tiny.CONFIG, policy=RULES)
PARAMS = tiny.params()
BATCHES = [tiny.inputs(1)]
SITES = list_sites(MODEL, {"params": PARAMS}, *BATCHES[0])
TARGET = MODEL.clone(policy=None).apply({"params": PARAMS}, *tiny.inputs(9)).logits

_apply = jax.jit(lambda model, variables: model.apply(variables, *tiny.inputs(9)).logits, static_argnums=0)


def evaluate(model, variables):
    """The score is minus the distance to the logits of full precision."""
    return {"score": -float(jnp.linalg.norm(_apply(model, variables) - TARGET))}


def only(names):
    """A policy with the quantizers of some sites of `RULES` alone."""
    rules = {"weight": [], "activation": []}
    for name in names:
        kind = SITES[name].kind
        rules[kind].append(Rule(name, RULES.spec(kind, name)))
    return Policy(tuple(rules["weight"]), tuple(rules["activation"]))


# Groups


def test_groups_by_name_are_a_partition():
    groups = make_groups(("name",), RULES, SITES)
    assert sorted(name for names in groups.values() for name in names) == sorted(quantized_sites(RULES, SITES))
    assert groups["y"] == ("encoder/layer_0/ffn/residual", "encoder/layer_1/ffn/residual")
    assert groups["e"] == ("encoder/embeddings/sum_position", "encoder/embeddings/sum_token_type")
    assert groups["Et"] == ("encoder/embeddings/word/table",)
    assert len(groups["MHA"]) == 8 and len(groups["FFN"]) == 4
    assert groups["encoder/layer_*/ffn/norm/scale"][1] == "encoder/layer_1/ffn/norm/scale"
    assert {"s", "p", "c", "g", "u", "x", "h", "z", "q", "k", "v", "i", "P", "C", "wP", "wC"} < set(groups)


def test_groups_by_layer_site_and_pattern():
    groups = make_groups(("layer", "y0+y1", "h1", "encoder/layer_*/attention/**"), RULES, SITES)
    assert set(groups) == {
        "embeddings", "layer_0", "layer_1", "pooler", "classifier", "y0+y1", "h1", "encoder/layer_*/attention/**"
    }  # fmt: skip
    assert len(groups["layer_0"]) == 13 + 8
    assert groups["h1"] == ("encoder/layer_1/ffn/down/output",) and len(groups["y0+y1"]) == 2
    assert any("kernel" in name for name in groups["encoder/layer_*/attention/**"])
    each = make_groups(("site",), RULES, SITES)
    assert set(each) == set(quantized_sites(RULES, SITES)) and all(names == (name,) for name, names in each.items())


def test_what_is_not_quantized_is_in_no_group():
    rules = policy(activations={"**": quant.asymmetric(8), "y": None})
    assert "y" not in make_groups(("name",), rules, SITES)
    with pytest.raises(UserError, match="'y' matches no quantized site"):
        make_groups(("y",), rules, SITES)


@pytest.mark.parametrize(
    ("by", "rules", "words"),
    [
        (("**/ffn/residul",), RULES, "ffn/residual"),
        (("y+y7",), RULES, "'y\\+y7' matches no quantized site"),
        (("yy",), RULES, "unknown activation site 'yy'"),
        ((), RULES, "no groups"),
        (("name",), policy(), "quantizes no site"),
    ],
)
def test_groups_that_are_refused(by, rules, words):
    with pytest.raises(UserError, match=words):
        make_groups(by, rules, SITES)


def test_variants():
    names, matrix = variants({"a": ("1", "3"), "b": ("2",)}, ["1", "2", "3"])
    assert names == [FULL, ALL, "all but a", "all but b", "only a", "only b"]
    assert matrix.astype(int).tolist() == [[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 1], [0, 1, 0]]
    assert variants({"a": ("1",)}, ["1"], ["only"])[0] == [FULL, ALL, "only a"]


# Measuring

GROUPS = {name: make_groups(("name",), RULES, SITES)[name] for name in ("y", "s", "Et")}


@pytest.fixture(scope="module")
def paper():
    return measure(MODEL, PARAMS, BATCHES, GROUPS, evaluate, calibration="variant")


def test_a_variant_is_the_model_with_the_policy_of_its_quantizers(paper):
    """Calibration per variant, as in the paper: each row has the ranges and the values of a policy of its own."""
    seen = []

    def look(model, variables):
        seen.append(variables)
        return evaluate(model, variables)

    assert measure(MODEL, PARAMS, BATCHES, GROUPS, look, calibration="variant") == paper
    quantized = list(quantized_sites(RULES, SITES))
    names, matrix = variants(GROUPS, quantized)
    assert list(paper) == names and paper[FULL]["score"] == pytest.approx(0, abs=1e-4)
    name = "all but y"
    row, variables = matrix[names.index(name)], seen[names.index(name)]
    own = MODEL.clone(policy=only([site for site, on in zip(quantized, row, strict=True) if on]))
    ranges = traverse_util.flatten_dict(calibration.calibrate(own, PARAMS, BATCHES), sep="/")
    given = traverse_util.flatten_dict(variables["ranges"], sep="/")
    for field, value in ranges.items():
        # Compiled otherwise, a value may round to the next step of its grid.
        np.testing.assert_allclose(
            np.float32(given[field]), np.float32(value), rtol=0.01, atol=1.0 * field.endswith("point")
        )
    for name in names:
        on = [site for site, flag in zip(quantized, matrix[names.index(name)], strict=True) if flag]
        want = MODEL.clone(policy=only(on)).apply({"params": PARAMS, "ranges": variables["ranges"]}, *tiny.inputs(9))
        got = MODEL.apply(seen[names.index(name)] | {"ranges": variables["ranges"]}, *tiny.inputs(9))
        np.testing.assert_array_equal(got.logits, want.logits, err_msg=name)


def test_one_program_for_all_variants(paper):
    """All that was compiled for these variants serves others, of other groups and calibrations."""
    before = _apply._cache_size(), calibration._observe._cache_size()
    more = {"h": make_groups(("h",), RULES, SITES)["h"]}
    for mode in sensitivity.CALIBRATIONS:
        measure(MODEL, PARAMS, BATCHES, more, evaluate, calibration=mode)
    assert (_apply._cache_size(), calibration._observe._cache_size()) == before


def test_calibration_in_full_precision_is_shared(paper):
    """The ranges are those of the full-precision activations, whatever is on."""
    seen = []

    def look(model, variables):
        seen.append(variables["ranges"]["encoder"]["layer_1"]["ffn"]["residual"]["scale"])
        return evaluate(model, variables)

    scores = {}
    for mode in sensitivity.CALIBRATIONS:
        seen.clear()
        scores[mode] = measure(MODEL, PARAMS, BATCHES, GROUPS, look, calibration=mode, tables=["leave_out"])
        assert len(set(map(float, seen))) == (len(scores[mode]) if mode == "variant" else 1)
        if mode == "full_precision":
            _, found = MODEL.clone(policy=None).apply({"params": PARAMS}, *BATCHES[-1], mutable=["captures"])
            x = found["captures"]["encoder"]["layer_1"]["ffn"]["residual"][BATCHES[-1][1] > 0]
            assert float(seen[0]) == pytest.approx(float((x.max() - x.min()) / 255), rel=1e-4)
    assert scores["quantized"][ALL] == paper[ALL] != scores["full_precision"][ALL]


def test_permuted_groups_can_be_switched():
    rules = policy(activations={"y": quant.asymmetric(4, quant.per_group(3, permute=True)), "h": quant.asymmetric(4)})
    groups = make_groups(("name",), rules, SITES)
    scores = measure(MODEL.clone(policy=rules), PARAMS, BATCHES, groups, evaluate)
    assert scores["all but y"] == scores["only h"] != scores["only y"] == scores["all but h"]
    assert max(value["score"] for name, value in scores.items() if name != FULL) < -1e-3


def test_done_variants_are_read(tmp_path):
    path, calls = tmp_path / "sensitivity.jsonl", []

    def counting(model, variables):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(model, variables)

    with pytest.raises(KeyboardInterrupt):
        measure(MODEL, PARAMS, BATCHES, GROUPS, counting, path=path)
    assert [json.loads(line)["variant"] for line in path.read_text().splitlines()] == [FULL, ALL, "all but y"]
    scores = measure(MODEL, PARAMS, BATCHES, GROUPS, counting, path=path)
    assert len(calls) == 4 + 5 and len(scores) == 8
    assert measure(MODEL, PARAMS, BATCHES, GROUPS, counting, path=path) == scores and len(calls) == 9
    assert scores == measure(MODEL, PARAMS, BATCHES, GROUPS, evaluate)


def test_bad_arguments():
    with pytest.raises(UserError, match="'variant'"):
        measure(MODEL, PARAMS, BATCHES, GROUPS, evaluate, calibration="variants")
    with pytest.raises(UserError, match="'leave_out'"):
        measure(MODEL, PARAMS, BATCHES, GROUPS, evaluate, tables=["leaveout"])
    with pytest.raises(UserError, match="no table"):
        measure(MODEL, PARAMS, BATCHES, GROUPS, evaluate, tables=[])
    with pytest.raises(UserError, match="at least one"):
        measure(MODEL, PARAMS, [], GROUPS, evaluate)


# The table

SCORES = {
    FULL: {"score": 0.9, "error": 0.0}, ALL: {"score": 0.5, "error": 0.8},
    "all but s": {"score": 0.55, "error": 0.7}, "all but y": {"score": 0.8, "error": 0.2},
    "all but g": {"score": 0.45, "error": 0.1}, "only s": {"score": 0.9, "error": 0.0},
    "only y": {"score": 0.6, "error": 0.5}, "only g": {"score": 0.88, "error": 0.6},
}  # fmt: skip
THREE = {"s": "ab", "y": "cde", "g": "f"}


def test_the_culprit_stands_first(tmp_path):
    found = summary(SCORES, THREE)
    assert [cost.group for cost in found.costs] == ["y", "s", "g"]
    np.testing.assert_allclose(dataclasses.astuple(found.costs[0])[2:], [0.3, 0.3, 0.2, 0.5])
    assert found.culprit == (
        "Full precision 0.9000, everything quantized 0.5000. The culprit is y (3 sites): without it 0.3000 (75% of what is "
        "lost) is won back. By the error of the logits it is g: from 0.8000 to 0.1000 without it."
    )
    lines = found.table().markdown().splitlines()
    assert "0.8000" in lines[4] and "0.6000" in lines[4] and lines[4].startswith("| y ")
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_one_table_alone(tmp_path):
    only = summary({name: value for name, value in SCORES.items() if "but" not in name}, THREE)
    assert [cost.group for cost in only.costs] == ["y", "g", "s"]
    assert (
        "The culprit is y (3 sites): alone it loses 0.3000. By the error of the logits it is g: to 0.6" in only.culprit
    )
    plot(only, tmp_path / "plot.png")
    without = summary({name: {"score": value["score"]} for name, value in SCORES.items() if "only" not in name}, THREE)
    assert without.costs[0] == Cost("y", 3, 0.8 - 0.5, None, None, None) and "logits" not in without.culprit


def test_no_culprit_where_nothing_is_lost():
    found = summary(dict.fromkeys(SCORES, {"score": 0.9}), THREE)
    assert found.culprit.endswith("No group changes the score for the worse.")
    better = summary({**SCORES, ALL: {"score": 0.95}, "all but y": {"score": 0.96}}, {"y": "a"})
    assert "y (1 sites): without it 0.0100 is won back" in better.culprit


def test_a_real_culprit_is_found():
    """One site with 2 bits among sites with 8 is what the table names."""
    names = {name: quant.asymmetric(8) for name in ("c0", "y1", "z0", "h0")}
    rules = policy(activations=names | {"c1": quant.asymmetric(2)})
    model = MODEL.clone(policy=rules)
    groups = make_groups(("c1", "c0", "y1", "z0", "h0"), rules, SITES)
    found = summary(measure(model, PARAMS, BATCHES, groups, evaluate), groups)
    assert found.costs[0].group == "c1" and "The culprit is c1 (1 sites)" in found.culprit
