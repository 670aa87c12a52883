import dataclasses

import pytest

from qtx.errors import UserError
from qtx.methods.bittransgnn_paths import Settings, directory, starting_point

STUDENT = Settings("kd", states=5, bits_act=1, quantize_attention=False, dataset="mr", joint_training=False)


def test_every_part_of_a_name():
    path = (
        "distill/bittransgnn/full/train/transductive/weight_emb_quant/bert-base-uncased_QAT_student_static_5_state_mr"
    )
    assert directory(STUDENT, "results") == f"results/{path}_quant_act"
    only_graph = dataclasses.replace(STUDENT, kind="bittransgnn", quantize_bert=False, quantize_gcn=True, bits_act=8)
    assert "/".join(directory(only_graph).split("/")[1:3]) == "transbitgnn/full"
    assert Settings(quantize_gcn=True).model_type == "bittransbitgnn"
    with pytest.raises(UserError, match="6 states"):
        Settings(states=6)
    with pytest.raises(UserError, match="'bittransgnn'"):
        Settings("bittransgn")
    with pytest.raises(UserError, match="'logits'"):
        directory(STUDENT, "logit")


def test_what_a_student_starts_from():
    assert starting_point(STUDENT) == (
        "model_ckpts/bitbert/train/qat/weight_emb_quant/bert-base-uncased_5_state_mr_quant_act"
    )
    late = dataclasses.replace(STUDENT, quant_type="PTQ")
    assert starting_point(late) == "model_ckpts/bitbert/train/full_prec/bert-base-uncased_mr_full_act"
