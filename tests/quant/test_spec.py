"""What a spec accepts, says and resolves to."""

import dataclasses

import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.quant.spec import ESTIMATORS, Granularity, MinMax, Search, Spec


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: quant.symmetric(1), "2 to 16"),
        (lambda: quant.symmetric(17), "2 to 16"),
        (lambda: quant.symmetric(True), "whole number"),
        (lambda: quant.symmetric(8.0), "whole number"),
        (lambda: Spec(scheme="symetric"), "did you mean 'symmetric'"),
        (lambda: quant.symmetric(8, range="statik"), "did you mean 'static'"),
        (lambda: quant.symmetric(8, scale_domain="exp"), "choose from: linear, log, softplus"),
        (lambda: Spec(2, "ternary"), "use range='dynamic'"),
        (lambda: Spec(3, "ternary", range="dynamic"), "takes bits=2"),
        (lambda: Spec(2, "binary", range="dynamic"), "takes bits=1"),
        (lambda: quant.loss_aware(9), "takes bits=2 to 8"),
        (lambda: quant.absmean(6), "takes states=2 to 5, not 6"),
        (lambda: Spec(3, "absmean", range="dynamic", states=4), "4 states take bits=2, not 3; use qtx.absmean(4)"),
        (lambda: quant.symmetric(2, states=3), "use scheme='absmean'"),
        (lambda: quant.loss_aware(iterations=0), "at least one"),
        (lambda: quant.ternary(iterations=3), "not 'ternary'"),
        (lambda: quant.ternary(clip=(2.5, -2.5)), "such as (-2.5, 2.5)"),
        (lambda: quant.symmetric(8, clip=2.5), "such as (-2.5, 2.5)"),
        (lambda: Granularity("chanel"), "did you mean 'channel'"),
        (lambda: Granularity(None, groups=2), "use per_group"),
        (lambda: quant.per_group(0), "at least one group"),
        (lambda: Granularity(-1, permute=True), "per_group(K, permute=True)"),
        (lambda: MinMax("runing"), "did you mean 'running'"),
        (lambda: MinMax(momentum=1.0), "outside [0, 1)"),
        (lambda: MinMax(percentile=50.0), "outside [0, 50)"),
        (lambda: MinMax(percentile=-0.1), "outside [0, 50)"),
        (lambda: MinMax(padding="skip"), "choose from: ignore, include"),
        (lambda: Search("mae"), "did you mean 'mse'"),
        (lambda: Search(method="golden"), "choose from: grid, brent"),
        (lambda: Search(candidates=0), "at least one candidate"),
        (lambda: Search(margin=-0.5), "negative"),
        (lambda: quant.estimator("ms"), "did you mean 'mse'"),
        (lambda: quant.estimator("mse", momentum=0.5), "no option 'momentum'"),
        (lambda: quant.estimator("running_minmax", momentun=0.5), "did you mean 'momentum'"),
        (lambda: quant.symmetric(8, quant.per_channel(), estimator=Search("cross_entropy")), "per_tensor()"),
    ],
)
def test_wrong_values_are_one_line_errors(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_specs_are_values():
    one, same = quant.asymmetric(4, quant.per_group(6)), quant.asymmetric(4, quant.per_group(6))
    assert one == same and hash(one) == hash(same)
    assert one != quant.asymmetric(4, quant.per_group(3))
    assert {one: 1}[same] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.bits = 8
    assert hash(quant.ternary(clip=[-1, 2])) == hash(quant.ternary(clip=(-1.0, 2.0)))


def test_at_resolves_symbolic_axes():
    assert quant.symmetric(8, quant.per_channel()).at(0, 2).granularity.axis == 0
    assert quant.symmetric(8, quant.per_channel()).at(-1, 2).granularity.axis == -1
    assert quant.symmetric(8, quant.per_token()).at(-1, 3).granularity.axis == (0, 1)
    for granularity in (quant.per_tensor(), quant.per_embedding(), quant.per_group(2, permute=True)):
        spec = quant.symmetric(8, granularity)
        assert spec.at(-1, 3) is spec


def test_at_keeps_groups_along_the_channel():
    spec = quant.symmetric(8, Granularity(0, groups=4))
    assert spec.at(-1, 2).granularity == Granularity(0, groups=4)


def test_factories():
    assert quant.symmetric(4) == Spec(4, "symmetric")
    assert quant.asymmetric(4, range="learned") == Spec(4, "asymmetric", range="learned")
    assert quant.ternary() == Spec(2, "ternary", range="dynamic")
    assert quant.binary(quant.per_channel()) == Spec(1, "binary", quant.per_channel(), range="dynamic")
    assert quant.per_position().axis == -2 and quant.per_embedding().axis == -1 and quant.per_token().axis == "token"
    assert quant.ternary().is_codebook and quant.binary().is_codebook and not quant.symmetric(2).is_codebook


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_by_name(name):
    assert quant.estimator(name) == ESTIMATORS[name]
    assert quant.estimator(name, padding="include") == dataclasses.replace(ESTIMATORS[name], padding="include")


def test_names_for_people():
    assert (
        str(quant.asymmetric(4, quant.per_group(6, permute=True)))
        == "4-bit asymmetric, 6 groups on axis -1, permuted, static"
    )
    assert str(quant.ternary(quant.per_channel())) == "ternary, per channel"
    assert str(quant.ternary(clip=(-2.5, 2.5))) == "ternary, per tensor, clip -2.5..2.5"
    assert str(quant.loss_aware(4)) == "4-bit loss_aware, per tensor"
    assert str(quant.symmetric(8, Granularity(1))) == "8-bit symmetric, per index of axis 1, static"
    assert [str(g) for g in (quant.per_tensor(), quant.per_embedding(), quant.per_position(), quant.per_token())] == [
        "per tensor", "per embedding", "per position", "per token"
    ]  # fmt: skip


def test_states():
    specs = {states: quant.absmean(states) for states in (2, 3, 4, 5)}
    assert [spec.bits for spec in specs.values()] == [1, 2, 2, 3]
    assert [round(spec.storage_bits, 2) for spec in specs.values()] == [1, 1.58, 2, 2.32]
    assert [spec.is_ternary for spec in specs.values()] == [False, True, False, False]
    assert str(specs[5]) == "5-state absmean, per channel"
