"""Scopes of the translation study: which weights they reach, in which models."""

import pytest

from qtx import models, quant
from qtx.errors import UserError
from qtx.experiments.config import quantization
from qtx.experiments.from_config import policy_from
from qtx.methods.compressed_transformers import PATTERNS
from qtx.methods.patterns import pattern_policy
from qtx.nn import check_policy
from qtx.nn.encoder_decoder import EncoderDecoderConfig
from tests.nn import tiny

FAMILY = models.get_family("qtx_encoder_decoder")
SITES = FAMILY.sites(EncoderDecoderConfig(20, 20, 8, num_heads=2, intermediate_size=16))
COUNTS = {"attention": 54, "attention_out": 72, "all_linear": 96, "attention_embedding": 56, "everything": 99}


def reached(policy, sites=SITES):
    check_policy(policy, sites)
    return {name for name, info in sites.items() if info.kind == "weight" and policy.spec("weight", name) is not None}


@pytest.mark.parametrize("scope", PATTERNS)
def test_scopes_of_the_base_model(scope):
    found = reached(pattern_policy(scope, quant.magnitude(4)))
    assert len(found) == COUNTS[scope]
    assert not [name for name in found if "norm" in name]
    assert ("generator/kernel" in found) == (scope == "everything")
    assert any(name.endswith("table") for name in found) == (scope in ("attention_embedding", "everything"))
    assert any(name.endswith("out/kernel") for name in found) == (scope not in ("attention", "attention_embedding"))


def test_every_scope_is_reached_from_a_configuration():
    for scope in PATTERNS:
        section = quantization()
        section.pattern, section.weight_scheme, section.weight_bits = scope, "magnitude", 4
        section.weight_rounding, section.activation_bits = "stochastic", 32
        found = policy_from(section, 6)
        assert len(reached(found)) == COUNTS[scope]
        assert found.spec("weight", "encoder/layer_0/attention/query/kernel") == quant.magnitude(4)


def test_scopes_fit_encoders_and_patterns_of_classifiers_fit_where_they_mean_something():
    bert = models.get_family("bert").sites(tiny.CONFIG)
    assert len(reached(pattern_policy("attention", quant.binary()), bert)) == 3 * tiny.CONFIG.num_layers
    assert len(reached(pattern_policy("all_linear", quant.binary()), bert)) == 6 * tiny.CONFIG.num_layers
    assert reached(pattern_policy("ALL_wo_final", quant.binary())) == reached(
        pattern_policy("all_linear", quant.binary())
    )
    assert len(reached(pattern_policy("ALL_QK", quant.binary()))) == 96 - 18
    with pytest.raises(UserError, match="'CLS'"):
        check_policy(pattern_policy("CLS_wo_final", quant.binary()), SITES)


def test_tied_models_have_no_matrix_of_the_generator():
    tied = FAMILY.sites(EncoderDecoderConfig(20, 20, 8, 1, 1, 2, 16, tied="all"))
    found = reached(pattern_policy("everything", quant.binary()), tied)
    assert {name for name in found if "layer" not in name} == {"encoder/embeddings/word/table"}


def test_unknown_scopes_are_named_with_what_is_near():
    with pytest.raises(UserError, match="'all_linear'"):
        pattern_policy("all_linears", quant.binary())
