"""SqueezeBERT against the published one, and its sites."""

import dataclasses

import pytest

from qtx import models, quant
from qtx.errors import UserError
from qtx.models import squeezebert
from qtx.nn import BertConfig, check_policy, policy
from qtx.nn.squeezebert import SqueezeBertConfig
from tests.models.hf import write_checkpoint
from tests.nn import published

NAMES = ("squeezebert", "squeezebert_groups")
CONFIG = SqueezeBertConfig(50, 16, 1, 2, 32, 8, num_labels=3, hidden_dropout=0.0, attention_dropout=0.0, k_groups=2)
WIDE = dataclasses.replace(CONFIG, num_layers=3)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_published_one(name):
    published.check_forward(name)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    published.check_round_trip(name, tmp_path)


def test_groups_of_the_reference_are_read():
    found = published.load("squeezebert_groups").config
    fields = ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups")
    assert [getattr(found, field) for field in fields] == [2, 8, 1, 4, 16, 2]
    layer = published.load("squeezebert_groups").params["encoder"]["layer_1"]
    assert layer["attention"]["key"]["kernel"].shape == (4, 32)
    assert layer["ffn"]["up"]["kernel"].shape == (2, 64) and layer["ffn"]["down"]["kernel"].shape == (32, 32)


def test_defaults_are_the_published_ones():
    assert squeezebert.config_from_hf({"model_type": "squeezebert"}) == SqueezeBertConfig()


def test_sites_are_those_of_bert():
    found = published.sites("squeezebert", WIDE)
    plain = published.sites("bert", BertConfig(50, 16, 3, 2, 32, 8))
    assert {name: info.kind for name, info in found.items()} == {name: info.kind for name, info in plain.items()}
    assert (published.count(found, "activation"), published.count(found, "weight")) == (13 * 3 + 5, 8 * 3 + 6)


def test_quantization(tmp_path):
    published.check_quantization("squeezebert", CONFIG, tmp_path)


def test_training_step_moves_everything():
    published.check_training_step("squeezebert", CONFIG)


def test_published_policies():
    published.check_published_policies("squeezebert", WIDE, groups=4)


def test_short_names():
    rules = policy(
        weights={"MHA": quant.symmetric(4), "FFN1": quant.symmetric(2), "Et": quant.symmetric(3)},
        activations={"s": quant.asymmetric(8), "y2": quant.asymmetric(16)},
    )
    found = published.sites("squeezebert", WIDE)
    check_policy(rules, found)
    bits = {name: spec.bits for name, info in found.items() if (spec := rules.spec(info.kind, name))}
    heads = ("query", "key", "value", "out")
    assert bits == {
        "encoder/embeddings/word/table": 3,
        "encoder/layer_2/ffn/residual": 16,
        "encoder/layer_1/ffn/up/kernel": 2,
        "encoder/layer_1/ffn/down/kernel": 2,
        **{f"encoder/layer_{i}/attention/{head}/kernel": 4 for i in range(3) for head in heads},
        **{f"encoder/layer_{i}/attention/scores": 8 for i in range(3)},
    }


# Errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_groups": 3}, "q_groups 3 does not divide the width 16"),
        ({"output_groups": 0}, "output_groups 0 does not divide"),
        ({"intermediate_size": 24, "intermediate_groups": 16}, "intermediate_groups 16 does not divide the width 24"),
        ({"num_heads": 3}, "3 heads do not divide the width 16"),
    ],
)
def test_sizes_that_do_not_go_together(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_a_checkpoint_with_narrow_embeddings(tmp_path):
    write_checkpoint(tmp_path, {"model_type": "squeezebert", "embedding_size": 128}, {})
    with pytest.raises(UserError, match="embedding_size 128 differs from hidden_size 768"):
        models.load(str(tmp_path))
