"""The catalogue of bad input: each gives one clear line that names the thing and the remedy, before training starts."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qtx import data, models, quant
from qtx.analysis import curvature, landscape
from qtx.analysis.layer_errors import layer_errors
from qtx.analysis.losses import of_some, stack
from qtx.data import pair_tokenizer
from qtx.errors import UserError
from qtx.experiments import run
from qtx.experiments.analyze import analyze
from qtx.experiments.augment import augment
from qtx.experiments.compare import compare
from qtx.experiments.config import analysis, base, changed, quantization, sweeping, unknown_field
from qtx.experiments.from_config import policy_from, suppression_from
from qtx.experiments.graph import build as build_graph
from qtx.experiments.plan import parse_axis, parse_range, parse_seeds
from qtx.experiments.sweep import sweep
from qtx.methods import norm_migration, outlier_suppression
from qtx.methods.calibrate import calibrate
from qtx.methods.distillation import Teacher, distillation_phase
from qtx.methods.teacher_intervention import Interventions, check_interventions, intervention_phase, two_steps
from qtx.nn import BertClassifier, policy
from qtx.nn.graph import GCN, adjacency, propagate
from qtx.train.phase import Phase
from tests.data.test_images import write_mnist
from tests.nn import tiny

ROOT = Path(__file__).parents[1]


def message(entry, *args, **kwargs) -> str:
    """Runs `entry`, which must fail, and returns its one line."""
    with pytest.raises(UserError) as caught:
        entry(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
    """Whatever is wrong must be found before training starts."""

    def fit(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr(run, "fit", fit)


def train(config, tmp_path):
    return message(run.train_and_evaluate, config, tmp_path / "run")


def test_unknown_task(tiny_config, tmp_path):
    tiny_config.task = "rtee"
    assert "'rtee'" in (text := train(tiny_config, tmp_path)) and "'rte'" in text


def test_unknown_phase(tiny_config, tmp_path):
    tiny_config.recipe = ("finetun",)
    assert "'finetun'" in (text := train(tiny_config, tmp_path)) and "'finetune'" in text


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("weight_bits", 1, "quant.weight_bits is 1: uniform grids take 2 to 16 bits"),
        ("weight_bits", 17, "quant.weight_bits is 17"),
        ("weight_scheme", "symetric", "'symmetric'"),
        ("weight_estimator", "msee", "'mse'"),
        ("weight_options", {"momentun": 0.5}, "'momentum'"),
        ("weight_granularity", "chanel", "'channel'"),
        ("activation_granularity", "5", "5 groups do not divide its width 16"),
        ("activation_range", "statik", "'static'"),
        ("scale_domain", "logg", "'log'"),
        ("setup", "FP_logit", "'FP_logits'"),
        ("overrides", "yy=16", "'yy'"),
        ("overrides", "y:16", "name=value"),
        ("overrides", "y=sixteen", "'sixteen'"),
        ("overrides", "y7=16", "layer 7"),
        ("overrides", "p=ng4", "no feature axis"),
        ("overrides", "**/residual=16", "is a pattern"),
        ("overrides", "res_output_bottleneck=16", "matches no site"),
    ],
)
def test_quantization_section(tiny_config, tmp_path, field, value, named):
    tiny_config.recipe = ("finetune", "qat")
    if isinstance(value, dict):
        value = tiny_config.quant[field].__class__(value)
    tiny_config.quant[field] = value
    assert named in train(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"phases.finetune.evaluate_every": -0.5}, "every -0.5 epochs"),
        ({"phases.finetune.evaluate_every": 1.0, "phases.finetune.patience": -1}, "patience of -1"),
        ({"phases.finetune.patience": 2}, "'finetune': keep_best and patience"),
        ({"phases.finetune.keep_best": True}, "set evaluate_every"),
        ({"evaluate_test": True}, "task 'table' has no labelled test split"),
    ],
)
def test_evaluation_while_training(tiny_config, tmp_path, fields, named):
    tiny_config.update_from_flattened_dict(fields)
    assert named in train(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pattern": "ALL_QKV"}, "'ALL_QK'"),
        ({"pattern": "ALL"}, "quant.activation_bits=32"),
        ({"weight_scheme": "ir_net", "weight_bits": 4}, "'ir_net' has 1 bit, not 4"),
        ({"weight_scheme": "binary", "weight_gradient": "clip"}, "'clipped'"),
        ({"weight_scheme": "magnitude", "weight_bits": 17}, "1 to 15 bits, not 17"),
        ({"weight_scheme": "loss_aware", "weight_bits": 9}, "2 to 8 bits, not 9"),
        ({"weight_scheme": "absmean"}, "quant.bit.states"),
        ({"bit": {"states": 6}}, "states=2 to 5, not 6"),
        ({"bit": {"states": 3, "activation_bits": 4.0}}, "choose from 1, 1.58, 2, 2.32, 8 and 32"),
        ({"bit": {"states": 3, "weight_scale": "channel"}}, "weight_scale 'channel'"),
        ({"bit": {"states": 3}, "pattern": "ALL"}, "leave quant.pattern empty"),
    ],
)
def test_patterns_and_codebooks(tiny_config, tmp_path, fields, named):
    tiny_config.recipe = ("qat",)
    tiny_config.quant.update(fields)
    assert named in train(tiny_config, tmp_path)


def test_method_that_does_not_exist(tmp_path):
    from tests.experiments.test_launch import get_config

    assert "'w3'" in message(get_config, "agnews", "w3")
    assert "'latent'" in message(get_config, "agnews", "w4+latnet")


def test_quantized_phase_without_quantization(tiny_config, tmp_path):
    tiny_config.recipe = ("qat",)
    tiny_config.quant.weight_bits = tiny_config.quant.activation_bits = 32
    assert "full precision" in train(tiny_config, tmp_path)


def test_row_that_changes_an_unknown_field(tiny_config, tmp_path):
    tiny_config.rows = ({"name": "broken", "weight_bit": 4},)
    assert "'broken'" in (text := message(compare, tiny_config, tmp_path)) and "weight_bit" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"overrides": "y9=16"}, "y9"), ({"adaround": True}, "layers '**/kernell' matches no weight")],
)
def test_row_that_does_not_fit_the_model(tiny_config, tmp_path, changes, named):
    tiny_config.rows = ({"name": "broken", **changes},)
    tiny_config.adaround.layers = ("**/kernell",)
    assert named in message(compare, tiny_config, tmp_path)
    tiny_config.sweep = sweeping(
        rows=(
            {"name": "good"},
            {
                "name": "bad",
                "entry": "quantize",
                "start": "good",
                "changes": {f"quant.{key}": value for key, value in changes.items()},
            },
        )
    )
    assert named in message(sweep, tiny_config, tmp_path)


RATE = "phases.finetune.optimizer.learning_rate"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "nothing to sweep over"),
        ({"grid": (("task", ()),)}, "'task' has no values"),
        ({"grid": ("task",)}, "not a pair"),
        ({"grid": (("task", "rte"),)}, "must be a tuple"),
        ({"grid": (("tsk", ("rte", "mrpc")),)}, "'task'"),
        ({"grid": (("data.seed", ("one", 2)),)}, "data.seed cannot be 'one'"),
        ({"grid": (("seed", (1, 2)),)}, "sweep.seeds"),
        ({"rows": ({"name": "a"}, {"name": "b", "start": "a", "changes": {"model.name": "x"}})}, "starts from 'a'"),
        ({"grid": (("data.seed", (0, 0)),)}, "'seed=0/seed_1000'"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "'seed_1'"),
        ({"rows": ({"name": "a", "changes": {"quant.weight_bit": 4}}, {"name": "b"})}, "'quant.weight_bits'"),
        ({"rows": ({"name": "a", "change": {}}, {"name": "b"})}, "'changes'"),
        ({"rows": ({"name": "a"}, {"changes": {}})}, "needs a name"),
        ({"rows": ({"name": "a"}, {"name": "a"})}, "called 'a'"),
        ({"rows": ({"name": "a b"}, {"name": "a_b"})}, "'a_b/seed_1000'"),
        ({"rows": ({"name": "a"}, {"name": "b", "start": "aa"})}, "'aa'"),
        ({"rows": ({"name": "a", "entry": "evaluate"}, {"name": "b", "start": "a"})}, "trains no model"),
        ({"rows": ({"name": "a"}, {"name": "b", "entry": "trian"})}, "'train'"),
        ({"rows": ({"name": "a"}, {"name": "b", "at": ("rte",)})}, "'rte'"),
        ({"seeds": (1, 2), "columns": "task"}, "no axis"),
        ({"seeds": (1, 2), "rows": ({"name": "a"},), "orderings": (("a", "<", "a"),)}, "one of >, ~, >="),
        ({"seeds": (1, 2), "rows": ({"name": "a"},), "orderings": (("a", ">", "b"),)}, "no row 'b'"),
        ({"sampler": "tpee", "ranges": ((RATE, 0.1, 1.0),)}, "'tpe'"),
        ({"sampler": "tpe"}, "needs sweep.ranges"),
        ({"ranges": ((RATE, 0.1, 1.0),)}, "sampler 'grid' draws nothing"),
        ({"sampler": "tpe", "ranges": ((RATE, 1.0, 0.1),)}, "low below high"),
        ({"sampler": "tpe", "ranges": ((RATE, 0.0, 0.1, "log"),)}, "positive"),
        ({"sampler": "tpe", "ranges": ((RATE, ()),)}, "at least one value"),
        ({"sampler": "tpe", "ranges": (("phases.finetune.rate", 0.1, 1.0),)}, "'phases.finetune.rate'"),
    ],
)
def test_sweep_section(tmp_path, fields, named):
    config = base()
    config.sweep = sweeping(**fields)
    assert named in message(sweep, config, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_sweep_without_a_section_or_with_an_unknown_field(tmp_path):
    assert "section `sweep`" in message(sweep, base(), tmp_path)
    assert "'seeds'" in message(sweeping, seed=(1, 2))


@pytest.mark.parametrize("name", ["analyses", "analysis.memory.tokens", "sweep.seeds", "rows"])
def test_a_section_that_other_configurations_have(name):
    section, said = name.partition(".")[0], unknown_field(base(), name)
    assert f"no {section!r}" in said
    file = re.search(r"configs/(\w+)\.py", said)
    text = (ROOT / file[0]).read_text()
    assert f"config.{section} = " in text or f"config.{section}, " in text


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/directory/a.db", "nosuch://base", "postgresql://me:secret@host/base", "a.db"]
)
def test_storage_that_cannot_be_opened(tmp_path, url):
    config = base()
    config.sweep = sweeping(seeds=(1, 2))
    text = message(sweep, config, tmp_path, storage=url)
    assert "cannot be opened" in text and url.replace("secret", "***") in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant.overrides": "yy=16"}, "bad: unknown"),
        (
            {"quant.weight_bits": 32, "quant.activation_bits": 32},
            "bad: phase 'qat' is quantized, but `quant` keeps everything in full precision",
        ),
        ({"recipe": ("qatt",)}, "'qat'"),
        (
            {"quant.student": "layers", "quant.weight_scheme": "ternary", "teacher.padding": "published"},
            "bad: teacher.padding is 'published', but no phase of the recipe has losses",
        ),
        ({"phases.qat.losses": "ternarybret"}, "bad: phases.qat.losses: unknown set of losses 'ternarybret'"),
        ({"phases.qat.losses": "logit=1"}, "bad: unknown distillation loss 'logit'"),
        ({"phases.qat.intervention": "map"}, "bad: phase 'qat': an intervention 'map' needs a teacher"),
        ({"phases.qat.intervention": "mop", "phases.qat.losses": "logits=1"}, "bad: unknown intervention 'mop'"),
        ({"phases.qat.optimizer.schedule": "liner"}, "bad: unknown schedule 'liner'"),
        ({"phases.qat.keep_best": True}, "bad: phase 'qat': keep_best and patience choose"),
        ({"phases.qat.share": 2.0}, "bad: phases.qat.share is 2.0"),
        ({"phases.qat.including": "finetune"}, "bad: phase 'qat' includes 'finetune', which is no earlier phase"),
        ({"recipe": ("finetune", "qat"), "phases.qat.batch_size": 3}, "bad: the phases of a recipe share one stream"),
    ],
)
def test_row_of_a_sweep_that_would_fail_after_the_training_of_another(tiny_config, tmp_path, changes, named):
    bad = {"name": "bad", "start": "good", "changes": {"recipe": ("qat",), **changes}}
    tiny_config.sweep = sweeping(rows=({"name": "good"}, bad))
    assert named in message(sweep, tiny_config, tmp_path)
    tiny_config.model.name = str(tmp_path / "nothing")
    assert "good: no such checkpoint" in message(sweep, tiny_config, tmp_path)


def test_a_recipe_is_looked_at_before_data_and_model(tiny_config, tmp_path):
    tiny_config.model.name = tiny_config.data.train = str(tmp_path / "nothing")
    tiny_config.phases.finetune.optimizer.schedule = "liner"
    assert "unknown schedule 'liner'" in message(run.train_and_evaluate, tiny_config, tmp_path)


def test_a_policy_is_looked_at_before_data(tiny_config, tmp_path):
    tiny_config.data.train = str(tmp_path / "nothing")
    tiny_config.recipe = ("qat",)
    tiny_config.quant.overrides = "encoder/nothing=16"
    for entry in (run.train_and_evaluate, run.quantize):
        assert "encoder/nothing" in message(entry, tiny_config, tmp_path)


def test_what_there_is_to_do(tiny_config, tmp_path):
    tiny_config.recipe = ()
    assert "the recipe has no phases" in message(run.train_and_evaluate, tiny_config, tmp_path)
    tiny_config.model.name = "text_classifier"
    for entry in (run.quantize, run.evaluate):
        assert "'text_classifier' is a model from nothing" in message(entry, tiny_config, tmp_path)


def test_sweep_of_trials_that_do_not_exist(tmp_path):
    config = base()
    config.sweep = sweeping(seeds=(1, 2))
    assert "'seed_1'" in message(sweep, config, tmp_path, only=["seed1"])


def test_sweep_on_the_command_line():
    assert "FIELD=VALUE" in message(parse_axis, "task") and "FIELD=LOW:HIGH" in message(parse_range, "x=1")
    assert "1000,1001" in message(parse_seeds, ["one"])


def test_pattern_that_matches_nothing(tiny_checkpoint):
    loaded = models.load(str(tiny_checkpoint))
    ids = jnp.ones((2, 6), jnp.int32)
    model = loaded.family.module(
        config=loaded.config, policy=policy(activations={"**/ffn/residul": quant.asymmetric(8)})
    )
    text = message(calibrate, model, loaded.params, [(ids, ids, ids)])
    assert "'**/ffn/residul'" in text and "ffn/residual" in text
    assert "'zz'" in message(policy, weights={"zz": quant.symmetric(8)})


def test_no_such_checkpoint(tiny_config, tmp_path):
    tiny_config.model.name = str(tmp_path / "nothing")
    assert "nothing" in train(tiny_config, tmp_path)


def test_checkpoint_of_another_architecture(tiny_config, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "gpt2"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tiny_config.model.name = str(checkpoint)
    assert "'gpt2'" in (text := train(tiny_config, tmp_path)) and "bert" in text


@pytest.mark.parametrize("kind", ["xlnet", "robertta", "gpt2"])
def test_unsupported_families(tiny_config, checkpoint, tmp_path, kind):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": kind}))
    tiny_config.model.name = str(checkpoint)
    assert f"{kind!r} is not supported" in (text := train(tiny_config, tmp_path)) and "roberta" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num 2 is not supported"),
        ({"model_type": "albert", "num_hidden_groups": 0}, "give 1 to 1"),
        ({"model_type": "albert", "num_hidden_groups": 3}, "num_hidden_groups is 3"),
        (
            {"model_type": "distilbert", "activation": "gelou"},
            "activation 'gelou' is not supported; did you mean 'gelu'",
        ),
        ({"model_type": "roberta", "max_position_embeddings": 16, "pad_token_id": 1}, "the model's 14 positions"),
        ({"model_type": "roberta", "max_position_embeddings": 32, "pad_token_id": 1}, "do not belong to a roberta"),
        ({"model_type": "mobilebert", "normalization_type": "nonorm"}, "'no_norm'"),
        ({"model_type": "mobilebert", "num_feedforward_networks": 0}, "num_feedforward_networks"),
        ({"model_type": "mobilebert", "intra_bottleneck_size": 15}, "2 heads do not divide the width 15"),
        ({"model_type": "mobilebert", "key_query_shared_bottleneck": False}, "key_query_shared_bottleneck"),
        ({"model_type": "squeezebert", "k_groups": 3}, "k_groups 3 does not divide the width 16"),
        ({"model_type": "squeezebert", "num_attention_heads": 3}, "3 heads do not divide the width 16"),
        ({"model_type": "squeezebert", "embedding_size": 8}, "embedding_size 8"),
    ],
)
def test_families_and_configurations_that_do_not_fit(tiny_config, checkpoint, tmp_path, change, named):
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(config))
    tiny_config.model.name = str(checkpoint)
    assert named in train(tiny_config, tmp_path)


def damage(checkpoint, change):
    path = checkpoint / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_missing_tensor(tiny_config, checkpoint, tmp_path):
    damage(checkpoint, lambda tensors: tensors.pop("bert.encoder.layer.0.output.dense.weight"))
    tiny_config.model.name = str(checkpoint)
    assert "encoder/layer_0/ffn/down" in train(tiny_config, tmp_path)


def test_extra_tensor(tiny_config, checkpoint, tmp_path):
    damage(checkpoint, lambda t: t.update({"bert.encoder.layer.9.output.dense.weight": np.zeros((2, 2), np.float32)}))
    tiny_config.model.name = str(checkpoint)
    assert "layer.9" in train(tiny_config, tmp_path)


def test_truncated_checkpoint(tiny_config, checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    tiny_config.model.name = str(checkpoint)
    assert "truncated" in (text := train(tiny_config, tmp_path)) and "model.safetensors" in text


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"sizes.num_layer": 1}, "has no field 'num_layer'; did you mean 'num_layers'"),
        ({"sizes.hidden_size": 20}, "8 heads do not divide the width 20"),
        ({"sizes.num_labels": 3}, "num_labels is the task's"),
        ({"sizes.pooling": "mean"}, "place of its own, model.pooling"),
        ({"sizes.vocab_size": 10}, "the model's embedding only 10 rows"),
        ({"sizes.max_positions": 8}, "data.max_length 16 exceeds the model's 8 positions"),
        ({"tokenizer": "./nowhere"}, "no such checkpoint directory: ./nowhere"),
        ({"tokenizer": "tests"}, "tests holds no tokenizer"),
        ({"start": "TINY"}, "has hidden_size 16, the model that is to start from it has 512"),
        ({"start": "TINY", "sizes.hidden_size": 16}, "the model that is to start from it has 30522"),
        ({"amplify.sites": ("x",), "sizes.hidden_size": 16}, "not the parameters of a post-LayerNorm encoder"),
        ({"name": "text_clasifier"}, "made from nothing: text_classifier"),
        ({"name": "TINY", "start": "TINY"}, "is a checkpoint"),
        ({"name": "TINY", "sizes.num_layers": 3}, "num_layers 3, but the checkpoint"),
        ({"name": "TINY", "sizes.mask": "published"}, "has no such field"),
    ],
)
def test_models_from_nothing(tiny_config, tiny_checkpoint, tmp_path, model, named):
    tiny_config.model.name, tiny_config.model.tokenizer = "text_classifier", str(tiny_checkpoint)
    for field, value in model.items():
        section, _, name = field.rpartition(".")
        target = tiny_config.model[section] if section else tiny_config.model
        target[name] = str(tiny_checkpoint) if value == "TINY" else value
    assert named in train(tiny_config, tmp_path)


def test_compare_and_sweep_of_a_model_from_nothing(tiny_config, tiny_checkpoint, tmp_path):
    tiny_config.model.name, tiny_config.model.tokenizer = "text_classifier", str(tiny_checkpoint)
    tiny_config.rows = ({"name": "a", "overrides": "y5=16"},)
    assert "layers 0 to 1" in message(compare, tiny_config, tmp_path)
    del tiny_config.rows
    changes = {"recipe": ("finetune", "qat"), "quant.overrides": "P=16"}
    tiny_config.sweep = sweeping(rows=({"name": "good"}, {"name": "bad", "changes": changes}))
    assert "'P'" in (text := message(sweep, tiny_config, tmp_path)) and "matches no site" in text


def test_tokenizer_that_does_not_fit(tiny_config, checkpoint, tmp_path):
    from transformers import BertTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"word{i}" for i in range(200)]
    BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(checkpoint)
    tiny_config.model.name = str(checkpoint)
    assert "tokenizer" in train(tiny_config, tmp_path)


def test_length_beyond_the_positions(tiny_config, tmp_path):
    tiny_config.data.max_length = 64
    assert "32 positions" in train(tiny_config, tmp_path)


def test_tsv_with_a_wrong_column_count(tiny_config, tmp_path):
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = ["index\tsentence1\tsentence2\tlabel", "0\ta film\ta plot\tentailment", "1\tonly two"]
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    tiny_config.task, tiny_config.data.dir = "rte", str(tmp_path)
    assert "train.tsv" in (text := train(tiny_config, tmp_path)) and "3" in text


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('"1","no description"', "train.csv, line 9: expected 3 columns"),
        ('"1","a","b","c"', "train.csv, line 9: expected 3 columns"),
        ('"5","a","b"', "train.csv, line 9: unknown label '5'"),
        ('"Sports","a","b"', "train.csv, line 9: unknown label 'Sports'"),
        ('"1",""," "', "train.csv, line 9: column 'text' is empty"),
    ],
)
def test_ag_news_row(tiny_config, tmp_path, row, named):
    rows = [f'"{1 + i % 4}","a film {i}","a plot"' for i in range(8)]
    for file in ("train", "test"):
        (tmp_path / f"{file}.csv").write_text("\n".join([*rows, row]) + "\n")
    tiny_config.task, tiny_config.data.dir = "ag_news", str(tmp_path)
    assert named in train(tiny_config, tmp_path)


def test_ag_news_file_with_a_header(tiny_config, tmp_path):
    for file in ("train", "test"):
        (tmp_path / f"{file}.csv").write_text('"Class Index","Title","Description"\n"1","a film","a plot"\n')
    tiny_config.task, tiny_config.data.dir = "ag_news", str(tmp_path)
    assert "train.csv, line 1: unknown label 'Class Index'" in (said := train(tiny_config, tmp_path))
    assert "a header line is to be removed" in said


def test_ag_news_file_that_is_empty_or_truncated(tiny_config, tmp_path):
    rows = "".join(f'"{1 + i % 4}","a film {i}","a plot"\n' for i in range(40))
    (tmp_path / "train.csv").write_text(rows)
    tiny_config.task, tiny_config.data.dir = "ag_news", str(tmp_path)
    assert "missing file" in (text := train(tiny_config, tmp_path)) and "test.csv" in text
    (tmp_path / "test.csv").write_text("")
    assert "test.csv holds no examples" in train(tiny_config, tmp_path)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(rows.encode())[:-20])
    assert "cut short" in (text := train(tiny_config, tmp_path)) and "test.csv.gz" in text


def test_empty_split(tiny_config, tmp_path):
    (tmp_path / "empty.csv").write_text("text,label\n")
    tiny_config.data.validation = str(tmp_path / "empty.csv")
    assert "empty.csv" in train(tiny_config, tmp_path)


def test_missing_column(tiny_config, tmp_path):
    tiny_config.data.label_column = "lable"
    assert "'lable'" in (text := train(tiny_config, tmp_path)) and "label" in text


@pytest.mark.parametrize("task", ["rte", "ag_news"])
def test_no_data_directory(tiny_config, tmp_path, monkeypatch, task):
    monkeypatch.delenv("QTX_DATA_DIR", raising=False)
    monkeypatch.setattr(data.reading, "_require_network", lambda url: (_ for _ in ()).throw(OSError("offline")))
    tiny_config.task, tiny_config.data.dir = task, str(tmp_path / "nowhere")
    assert "nowhere" in train(tiny_config, tmp_path)
    tiny_config.data.dir = None
    assert "QTX_DATA_DIR" in train(tiny_config, tmp_path)


@pytest.fixture
def parallel_files(tmp_path):
    """The files of a translation task, to be damaged."""
    for split in ("train", "validation"):
        for language, text in (("en", "A dog runs.\nA dog sleeps.\n"), ("de", "Ein Hund läuft.\nEin Hund schläft.\n")):
            (tmp_path / f"{split}.{language}").write_text(text)
    return {split: (tmp_path / f"{split}.en", tmp_path / f"{split}.de") for split in ("train", "validation")}


ENGLISH_GERMAN = data.TranslationTask("own", "en", "de")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("train.en", b"A dog runs.\n", "train.en has 1 lines"),
        ("validation.de", b"Ein Hund\nl\xe4uft.\n", "validation.de, line 2: not UTF-8"),
        ("validation.de", b"", "validation.de is empty"),
        ("validation.de", None, "validation.de"),
        ("train.en", b"\n \n", "train.en is empty"),
    ],
)
def test_parallel_files(parallel_files, tmp_path, name, content, named):
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    assert named in message(data.load_parallel, ENGLISH_GERMAN, parallel_files)


def test_wrong_languages(tmp_path):
    (tmp_path / "multi30k").mkdir()
    (tmp_path / "multi30k" / "train.en").write_text("A dog.\n")
    assert "'en_de'" in (text := message(data.get_translation_task, "multi30k", "en_de")) and "en-de" in text
    assert "'multi30'" in (text := message(data.get_translation_task, "multi30")) and "'multi30k'" in text
    assert "holds en" in (text := message(data.load_pairs, "multi30k", tmp_path)) and "en-de" in text
    (tmp_path / "empty").mkdir()
    assert "multi30k/train.en" in message(data.load_pairs, "multi30k", tmp_path / "empty")


def test_translation_tokenizer_that_does_not_fit(parallel_files, tmp_path):
    pairs = data.load_parallel(ENGLISH_GERMAN, parallel_files).splits["train"]
    assert "'words'" in message(pair_tokenizer.fit, "word", pairs, ENGLISH_GERMAN)
    assert "100" in message(pair_tokenizer.fit, "subwords", pairs, ENGLISH_GERMAN, 100)
    tokenizer = pair_tokenizer.fit("words", pairs, ENGLISH_GERMAN)
    assert "target vocabulary 100" in message(tokenizer.check_sizes, tokenizer.source_vocab_size, 100)
    assert "none of 2 pairs" in message(data.encode_pairs, tokenizer, pairs, 1)
    encoded = data.encode_pairs(tokenizer, pairs)
    assert "at least" in message(data.PairBatches, encoded, 2, data.bucket_shapes(encoded))
    tokenizer.save_pretrained(tmp_path)
    assert "en-de" in (text := message(pair_tokenizer.load, tmp_path, "de-en")) and "de-en" in text
    path = tmp_path / pair_tokenizer.FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert "cut short" in (text := message(pair_tokenizer.load, tmp_path)) and str(path) in text
    path.unlink()
    assert pair_tokenizer.FILE in message(pair_tokenizer.load, tmp_path)


def test_zero_calibration_batches(tiny_config, tmp_path):
    tiny_config.recipe, tiny_config.calibration.batches = ("qat",), 0
    assert "calibration" in train(tiny_config, tmp_path)


def test_calibration_batch_larger_than_the_data(tiny_config, tmp_path):
    tiny_config.recipe, tiny_config.calibration.batch_size = ("qat",), 1000
    assert "1000" in train(tiny_config, tmp_path)


def test_nan_in_calibration_names_the_site(tiny_checkpoint):
    loaded = models.load(str(tiny_checkpoint))
    ids = jnp.ones((2, 6), jnp.int32)
    found = policy_from(quantization(), 2)
    broken = dict(loaded.params, classifier={"kernel": jnp.ones((16, 2)), "bias": jnp.array([0.0, jnp.nan])})
    model = loaded.family.module(config=loaded.config, policy=found)
    text = message(calibrate, model, broken, [(ids, ids, ids)])
    assert "classifier/output" in text and "NaN" in text
    broken = dict(loaded.params, classifier={"kernel": jnp.full((16, 2), jnp.nan), "bias": jnp.zeros(2)})
    assert "classifier/kernel" in message(calibrate, model, broken, [(ids, ids, ids)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(outlier_suppression="os++"), ("'os++'", "'os+'")),
        (dict(outlier_suppression="os", activation_bits=5), ("8, 6 and 4 bits", "not 5")),
        (dict(outlier_suppression="os", weight_bits=4), ("quant.weight_bits to 8", "not 4")),
        (dict(outlier_suppression="os", overrides="x=16"), ("quant.overrides",)),
        (dict(outlier_suppression="os", adaround=True), ("quant.adaround",)),
        (dict(activation_options={"token_quantile": 0.0}), ("token_quantile 0.0",)),
        (dict(activation_options={"deviations": -1.0}), ("deviations -1.0",)),
        (dict(activation_options={"deviations": 3.0, "percentile": 1.0}), ("set one of them",)),
        (dict(weight_granularity="channel", weight_options={"token_quantile": 0.9}), ("per_tensor()",)),
        (dict(activation_estimator="mse", activation_options={"over": "mean"}), ("'brent'",)),
        (dict(activation_estimator="cross_entropy", activation_options={"sample": 9}), ("sample=9",)),
    ],
)
def test_outlier_suppression_and_its_estimators(fields, words):
    section = quantization()
    section.update(fields)
    text = message(policy_from, section, 2)
    assert all(word in text for word in words)


def test_learning_that_goes_backwards(tiny_config):
    tiny_config.quant.outlier_suppression = "os"
    tiny_config.outlier_suppression.epochs = -1
    assert "epochs -1" in message(suppression_from, tiny_config.quant, tiny_config.outlier_suppression)


def test_norms_that_cannot_migrate():
    family = models.get_family("mobilebert")
    text = message(norm_migration.links, family.config_from_hf({}))
    assert "MobileBert" in text and "os+_as_published" in text
    model = BertClassifier(tiny.CONFIG)
    assert "calibration batches" in message(
        outlier_suppression.suppress, model, {}, [], outlier_suppression.OutlierSuppression()
    )


def test_quantizing_a_model_without_a_trained_head(tiny_config, checkpoint, tmp_path):
    damage(checkpoint, lambda tensors: [tensors.pop(name) for name in ("classifier.weight", "classifier.bias")])
    tiny_config.model.name, tiny_config.model.fresh_head = str(checkpoint), False
    assert "no trained classifier" in message(run.quantize, tiny_config, tmp_path / "out")


@pytest.fixture
def analysis_config(tiny_config, tmp_path, monkeypatch):
    """Analyses of the tiny model, of which none may start."""
    tiny_config.model.fresh_head = False
    tiny_config.analyses = ("sensitivity", "outliers", "weights", "memory")
    tiny_config.analysis = analysis()
    for name in ("sensitivity.measure", "outliers.collect", "memory.weight_memory"):
        monkeypatch.setattr(f"qtx.experiments.analyze.{name}", lambda *a, **k: pytest.fail("an analysis started"))
    return tiny_config


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("analyses", ("sensitivty",), "'sensitivity'"),
        ("analyses", (), "sensitivity, outliers, weights, memory"),
        ("analysis.sensitivity.groups", ("**/ffn/residul",), "ffn/residual"),
        ("analysis.sensitivity.groups", ("y", "x9"), "'x9' matches no quantized site"),
        ("analysis.sensitivity.groups", (), "no groups"),
        ("analysis.sensitivity.tables", ("leave",), "'leave_out'"),
        ("analysis.sensitivity.calibration", "variants", "'variant'"),
        ("analysis.outliers.k", 0.0, "above 0"),
        ("analysis.outliers.k", -6.0, "-6.0"),
        ("analysis.outliers.batches", 0, "at least one"),
        ("analysis.outliers.sites", ("s",), "leave it out"),
        ("analysis.outliers.sites", ("hh",), "'hh'"),
        ("analysis.weights.bins", 1, "at least 2"),
        ("analysis.memory.tokens", 1000, "1 to 32 tokens"),
        ("calibration.permutation", "published", "calibration.permutation"),
        ("quant.weight_bits", 32, "full precision"),
    ],
)
def test_analysis_settings(analysis_config, tmp_path, field, value, named):
    analysis_config.quant.activation_bits = 32 if field == "quant.weight_bits" else 8
    analysis_config.update_from_flattened_dict({field: value})
    assert named in message(analyze, analysis_config, tmp_path / "out")


@pytest.fixture
def loss_config(tiny_config):
    """Analyses that compare models, at sizes that the tiny data have."""
    tiny_config.model.fresh_head = False
    tiny_config.analyses = ("curvature", "landscape", "layer_errors")
    tiny_config.analysis = analysis()
    tiny_config.analysis.layer_errors.batches = 1
    return tiny_config


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("analyses", ("landscap",), "'landscape'"),
        ("analysis.models", ("quantised",), "'quantized'"),
        ("analysis.models", (), "full_precision, quantized"),
        ("analysis.also", (("a",),), "(name, directory)"),
        ("analysis.also", (("quantized", None),), "two models are called 'quantized'"),
        ("analysis.curvature.params", ("encoder/layer_9/**",), "'encoder/layer_9/**' matches no parameter"),
        ("analysis.curvature.batches", 100, "validation has 48"),
        ("analysis.curvature.steps", -1, "steps is -1"),
        ("analysis.curvature.runs", 0, "runs is 0"),
        ("analysis.curvature.tolerance", float("nan"), "tolerance is nan"),
        ("analysis.curvature.eigenvalues", 100_000, "parameters have no more eigenvalues"),
        ("analysis.landscape.split", "validaton", "'validation'"),
        ("analysis.landscape.directions", 3, "1 for a curve or 2"),
        ("analysis.landscape.reach", float("nan"), "a reach above 0"),
        ("analysis.landscape.still", ("**/position/tables",), "position/table"),
        ("analysis.landscape.shared_norms", "input", "'inputs'"),
        ("analysis.landscape.together", 0, "at least 1 point"),
        ("analysis.layer_errors.quantities", ("hidden",), "'hidden_states'"),
        ("teacher.layers", "evry", "'every'"),
    ],
)
def test_settings_of_analyses_that_compare_models(loss_config, tmp_path, field, value, named):
    if field == "analysis.also":
        value = tuple(tuple(part or loss_config.model.name for part in pair) for pair in value)
    loss_config.update_from_flattened_dict({field: value})
    assert named in message(analyze, loss_config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_analyzing_a_model_with_nan(loss_config, checkpoint, tmp_path):
    def spoil(tensors):
        tensors["classifier.bias"] = np.full_like(tensors["classifier.bias"], np.nan)

    damage(checkpoint, spoil)
    loss_config.model.name = str(checkpoint)
    for name in loss_config.analyses:
        loss_config.analyses = (name,)
        assert "classifier/bias holds NaN" in message(analyze, loss_config, tmp_path / "out")


def test_errors_of_layers_of_a_model_against_itself(loss_config, tmp_path):
    loss_config.analyses, loss_config.analysis.models = ("layer_errors",), ("full_precision",)
    assert "against itself are zero" in message(analyze, loss_config, tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (("rotten", "fresh"), ["('rotten', 'fresh')", "('fresh', 'rotten')", "in another order"]),
        (("bad", "good"), ["('bad', 'good')", "(others)"]),
    ],
)
def test_a_teacher_with_other_labels(tiny_config, checkpoint, tmp_path, labels, named):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict(enumerate(labels))}))
    tiny_config.recipe, tiny_config.phases.qat.losses = ("qat",), "logits=1"
    for teacher in (str(checkpoint), ""):  # a teacher of its own, or the model itself
        tiny_config.teacher.name = teacher
        if not teacher:
            tiny_config.model.name, tiny_config.model.fresh_head = str(checkpoint), False
        text = train(tiny_config, tmp_path)
        assert all(word in text for word in (*named, str(checkpoint), "id2label"))


def test_layers_that_cannot_be_kept(tiny_config, tmp_path):
    tiny_config.model.layers = (0, 1)
    assert "layers (0, 1) to keep of 1" in train(tiny_config, tmp_path)
    tiny_config.model.name = "text_classifier"
    assert "model.layers is for checkpoints" in train(tiny_config, tmp_path)


def test_analyzing_a_model_without_a_trained_head(analysis_config, checkpoint, tmp_path):
    damage(checkpoint, lambda tensors: [tensors.pop(name) for name in ("classifier.weight", "classifier.bias")])
    analysis_config.model.name = str(checkpoint)
    assert "no trained classifier" in message(analyze, analysis_config, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("steps", -1, "no steps"),
        ("accumulate", 3, "3 equal parts"),
        ("trainable", ("nothing/**",), "nothing/**"),
        ("optimizer.rate_factors", (("poller/**", 10.0),), "poller/**"),
        ("optimizer.rate_factors", (("pooler/**", -1.0),), "positive factor"),
        ("optimizer.name", "bert-adam", "'bert_adam'"),
        ("optimizer.cycles", 3.0, "no effect on schedule 'linear'"),
        ("optimizer.milestones", (5.0,), "shares of the epochs"),
        ("optimizer.milestone_factor", 0.0, "milestone_factor is positive"),
    ],
)
def test_phase_settings(tiny_config, tmp_path, monkeypatch, field, value, named):
    monkeypatch.undo()
    tiny_config.phases.finetune.update_from_flattened_dict({field: value})
    tiny_config.phases.finetune.epochs = 0.0
    assert named in train(tiny_config, tmp_path)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.phases.finetune.epoch=2", "'phases.finetune.epoch'; did you mean 'phases.finetune.epochs'"),
        ("--config.model.sizes.num_layers=2", "model.sizes=\"{'num_layers': ...}\""),
        ("--config.task=rtee", "'rtee'"),
        ("--config=configs/qat.py:w9", "'w9'"),
        ("--config=configs/nothing.py", "nothing.py"),
        ("surplus", "surplus"),
    ],
)
def test_launcher_ends_with_one_line_and_status_1(tmp_path, argument, named):
    command = [sys.executable, "launch/train.py", f"--workdir={tmp_path}", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1, done.stderr[-2000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and named in line
    assert "Traceback" not in done.stderr


def test_help_shows_the_flags_of_all_launchers_and_where_fields_are_explained():
    expected = {
        "quantize": ("--config:", "--workdir:", "--data_dir:", "qtx/experiments/config.py"),
        "translate": ("--model:", "--output: File to write when everything is translated"),
    }
    for name, words in expected.items():
        command = [sys.executable, f"launch/{name}.py", "--help"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert all(each in done.stdout for each in words), done.stdout


@pytest.fixture
def translation_config(parallel_files):
    """The default experiment on sentence pairs."""
    config = base()
    config.task = "parallel"
    config.data.pairs = {split: tuple(map(str, files)) for split, files in parallel_files.items()}
    config.model.name = "encoder_decoder"
    config.model.sizes = dict(hidden_size=16, num_heads=2, num_layers=1, decoder_layers=1, intermediate_size=16)
    config.translation.tokenizer = "words"
    config.recipe = ("finetune",)
    return config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data.direction": "english-german"}, ["'english-german'", "en-de"]),
        ({"task": "multi3k"}, ["'multi3k'"]),
        ({"task": "multi30k", "data.dir": "."}, ["multi30k", "train"]),
        ({"model.sizes": {"source_vocab_size": 10}}, ["source_vocab_size", "translation.vocabulary"]),
        ({"model.sizes": {"max_positions": 50}}, ["data.max_length 128", "50 positions"]),
        ({"model.sizes": {"tied": "both"}}, ["'both'", "'all'"]),
        ({"translation.tokenizer": "bpe"}, ["'bpe'", "words"]),
        ({"translation.label_smoothing": 1.5}, ["label_smoothing 1.5"]),
        ({"translation.divisor": "sentences"}, ["'sentences'", "'tokens'"]),
        ({"translation.beam": 0}, ["beam", "at least 1"]),
        ({"phases.finetune.batch_size": 4}, ["4 tokens", "phases.*.batch_size", "use at least"]),
        ({"model.sizes": {"tied": "all"}}, ["tied='all'", "'words'", "--config.model.sizes.tied=target"]),
        (
            {"model.sizes": {"tied": "all"}, "translation.tokenizer": "subwords", "translation.joint": False},
            ["tied='all'", "translation.joint=False", "--config.model.sizes.tied=target"],
        ),
        ({"data.pairs": {"validation": ("a.en", "")}}, ["data.pairs.validation", "target file is missing"]),
        ({"data.pairs": {"test": ("", "a.de")}}, ["data.pairs.test", "source file is missing"]),
        ({"data.plan": "random"}, ["'random'", "buckets"]),
        ({"model.amplify.sites": ("x",)}, ["model.amplify"]),
        ({"recipe": ("qat",), "quant.evaluation_rounding": "dice"}, ["'dice'", "'drawn'"]),
        ({"recipe": ("qat",), "quant.pattern": "attentoin"}, ["'attentoin'", "attention"]),
    ],
)
def test_translation(translation_config, tmp_path, fields, named):
    found = train(changed(translation_config, fields, "test"), tmp_path)
    assert all(word in found for word in named), found
    assert not (tmp_path / "run").exists()  # nothing is left that a later run would have to fit


def test_a_model_and_a_task_of_different_kinds(tiny_config, translation_config, tmp_path):
    checkpoint = tiny_config.model.name
    tiny_config.model.name = "encoder_decoder"
    assert "needs a model that classifies" in (text := train(tiny_config, tmp_path)) and "--config.task" in text
    translation_config.model.name, translation_config.model.sizes = checkpoint, {}
    assert "is no encoder-decoder" in train(translation_config, tmp_path)


# Teacher and student


def student(**changes):
    """A phase of a tiny model, and a teacher that differs from it by these sizes."""
    model, other = (BertClassifier(dataclasses.replace(tiny.CONFIG, **fields)) for fields in ({}, changes))
    return Phase("distil", model, steps=10), Teacher(other, {})


@pytest.mark.parametrize(
    ("losses", "changes", "options", "named"),
    [
        ({"scores": 1.0}, {"num_heads": 3}, {}, "'scores'.*heads 2 of the student, 3 of the teacher"),
        ({"maps": 1.0}, {"num_heads": 3}, {}, "'maps'.*heads 2 of the student, 3 of the teacher"),
        ({"context": 1.0}, {"hidden_size": 16}, {}, r"'context'.*\(1, 4, 12\) of the student, \(1, 4, 16\)"),
        ({"hidden_states": 1.0}, {"hidden_size": 16}, {}, r"hidden state 0.*12\) of the student.*16\) of the teacher"),
        ({"value_relations": 1.0}, {"num_heads": 3}, {}, "student has 2 heads and the teacher 3; set relation_heads"),
        ({"value_relations": 1.0}, {"hidden_size": 16}, {"relation_heads": 3}, "3 relation heads.*12 of.*16 of"),
        ({"logits": 1.0}, {"num_labels": 2}, {}, "the student has 3 labels and the teacher 2"),
        ({"logits": 1.0}, {"num_layers": 4}, {}, "2 layers and the teacher 4; choose 'every'"),
        ({"logits": 1.0}, {"num_layers": 5}, {"layers": "every"}, "2 layers and the teacher 5, which is no multiple"),
        ({"logits": 1.0}, {"num_layers": 1}, {"layers": "first"}, "2 layers and the teacher 1"),
        ({"logits": 1.0}, {}, {"layers": "evry"}, "'every'"),
        ({"logits": 1.0}, {}, {"layers": [(0, 2)]}, r"\(0, 2\).*2 layers and the teacher 2"),
        ({"logits": 1.0}, {}, {"layers": []}, "no pairs"),
        ({"score": 1.0}, {}, {}, "'scores'"),
        ({"scores": -1.0}, {}, {}, "negative"),
        ({"scores": 0.0}, {}, {}, "no distillation loss"),
        ({"logits": 1.0}, {}, {"temperature": 0.0}, "temperature 0.0"),
        ({"logits": 1.0}, {}, {"padding": "publishd"}, "'published'"),
    ],
)
def test_distillation(losses, changes, options, named):
    assert re.search(named, message(distillation_phase, *student(**changes), losses, **options))


@pytest.mark.parametrize(
    ("schedule", "changes", "named"),
    [
        ("gradul", {}, "'gradual'"),
        ("map+outputs", {}, "'output'"),
        (
            "map",
            {"num_heads": 3},
            r"'map': .* of the student has the shape \(1, 2, 4, 4\), .* of the teacher \(1, 3, 4, 4\)",
        ),
        ("context", {"hidden_size": 16}, r"'context': .*\(1, 4, 12\), .*\(1, 4, 16\)"),
    ],
)
def test_intervention(schedule, changes, named):
    assert re.search(named, message(intervention_phase, *student(**changes), schedule, {"logits": 1.0}))


def test_an_intervention_on_a_site_that_does_not_exist():
    interventions = Interventions.named("map", ((0, 2),))
    model = BertClassifier(tiny.CONFIG)
    text = message(check_interventions, interventions, model, model)
    assert "'map' needs the site 'encoder/layer_2/attention/probs', which the teacher (BertClassifier)" in text


@pytest.mark.parametrize("first", [0, 10, 60])
def test_a_first_step_that_is_longer_than_the_run(first):
    text = message(two_steps, *student(), "gradual", first=first, steps=10)
    assert f"'distil': a first step of {first} steps does not fit into a run of 10" in text


KERNEL = {"kernel": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (lambda: curvature.top_eigenvalues(squares, KERNEL, jnp.ones(1), jax.random.key(0), 5), "5 eigenvalues"),
        (lambda: curvature.top_eigenvalues(squares, KERNEL, jnp.ones(1), jax.random.key(0), 0), "count=0"),
        (lambda: curvature.trace(squares, KERNEL, jnp.ones(1), jax.random.key(0), 0), "samples=0"),
        (lambda: curvature.plot_eigenvalues({"a": np.array([np.nan])}, "x.png"), "no finite eigenvalue"),
        (
            lambda: curvature.plot_densities({"a": curvature.Density(np.array([[np.nan]]), np.ones((1, 1)))}, "x.png"),
            "no density to plot",
        ),
        (lambda: of_some(squares, KERNEL, ("kernl",)), "'kernel'"),
        (lambda: of_some(squares, KERNEL, ()), "no patterns"),
        (lambda: stack([]), "no batches"),
        (lambda: stack([{"x": np.zeros(2)}, {"x": np.zeros(3)}]), "batch 1"),
        (lambda: landscape.directions(jax.random.key(0), KERNEL, still=("kernl",)), "'kernel'"),
        (lambda: landscape.directions(jax.random.key(0), KERNEL, norms="input"), "'inputs'"),
        (lambda: landscape.evaluate(squares, KERNEL, jnp.ones(1), [KERNEL], [[0.0], [1.0]]), "1 directions and 2 axes"),
        (lambda: landscape.evaluate(squares, KERNEL, jnp.ones(1), [KERNEL], [[1.0, 0.0]]), "rising order"),
        (lambda: landscape.evaluate(squares, KERNEL, jnp.ones(1), [KERNEL], [[0.0]], together=0), "together=0"),
        (lambda: landscape.plot_contours({"a": CURVE}, "x.png"), "draw curves"),
        (
            lambda: landscape.plot_curves({"a": landscape.Landscape((np.ones(2),) * 2, np.ones((2, 2)))}, "x"),
            "contours",
        ),
        (lambda: layer_errors(TINY, TINY, []), "no batches"),
        (lambda: layer_errors(TINY, TINY, [{}], ["hiden_states"]), "'hidden_states'"),
        (lambda: layer_errors(TINY, TINY, [{}], []), "no quantities"),
        (lambda: layer_errors(TINY, SHALLOW, [{}]), "2 layers and the teacher 1"),
    ],
)
def test_curvature_landscape_and_errors_of_layers(entry, named):
    assert named in message(entry)


@pytest.mark.parametrize(
    ("fields", "given", "named"),
    [
        ({"task": "multi30k"}, {}, "task 'multi30k' has no texts with labels"),
        ({"task": "rtee"}, {}, "did you mean 'rte'"),
        ({"data.augmented": "runs/x"}, {}, "data.augmented is for training"),
        ({}, {"masked_lm": ""}, "give --masked_lm"),
        ({}, {"masked_lm": "./none"}, "no such checkpoint directory: ./none"),
        ({}, {}, "no trained masked-LM head"),
        ({}, {"vectors": ""}, "give --vectors"),
        ({}, {"vectors": "none.txt"}, "no such file of word vectors: none.txt; fetch"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_augmentation(tiny_config, tiny_checkpoint, tmp_path, fields, given, named):
    (tmp_path / "vectors.txt").write_text("cat 1 2\ndog 2 1\n")
    usual = {"masked_lm": str(tiny_checkpoint), "vectors": str(tmp_path / "vectors.txt")}
    assert named in message(augment, changed(tiny_config, fields, "test"), tmp_path / "run", **usual | given)


def test_augmented_data_that_are_not_there(tiny_config, tmp_path):
    tiny_config.data.augmented = str(tmp_path / "none")
    assert "no augmented training data at" in train(tiny_config, tmp_path)


def squares(params, batch):
    return batch * jnp.sum(params["kernel"] ** 2)


CURVE = landscape.Landscape((np.ones(1),), np.ones(1))
TINY, SHALLOW = (Teacher(BertClassifier(config), {}) for config in (tiny.CONFIG, tiny.ONE_LAYER))


def graph(config, tmp_path):
    return message(build_graph, config, str(tmp_path / "graph"))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("adj_type", "no_docs", "'no_doc'"),
        ("doc_doc_nodes", "published", "'as_published'"),
        ("inference", "inductiv", "'inductive'"),
        ("words", "clean", "'cleaned'"),
        ("window", 1, "at least 2"),
        ("neighbours", 0, "at least 1"),
        ("neighbours", 144, "145 documents, and there are 144"),
        ("tokenizer", "/no/such", "/no/such"),
    ],
)
def test_a_text_graph_that_cannot_be_built(tiny_config, tmp_path, field, value, named):
    tiny_config.graph.tokenizer = ""
    tiny_config.graph[field] = value
    assert named in graph(tiny_config, tmp_path)


def test_a_text_graph_of_what_has_no_graph(tiny_config, tmp_path):
    tiny_config.task = "multi30k"
    assert "translation" in graph(tiny_config, tmp_path)
    tiny_config.task, tiny_config.graph.words, tiny_config.data.dir = "rte", "cleaned", str(tmp_path)
    (tmp_path / "RTE").mkdir()
    rows = [f"{i}\tOne.\tTwo.\tentailment" for i in range(20)]
    for name in ("train", "dev"):
        (tmp_path / "RTE" / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]))
    assert "pairs of texts" in (text := graph(tiny_config, tmp_path)) and "'basic'" in text


def test_a_text_graph_of_other_data(tiny_config, tmp_path):
    tiny_config.graph.tokenizer = ""
    build_graph(tiny_config, str(tmp_path / "graph"))
    tiny_config.data.validation, before = tiny_config.data.train, tiny_config.data.validation
    assert "data.validation" in graph(tiny_config, tmp_path)  # the directory says so
    (tmp_path / "graph" / "config.json").unlink()
    assert "other data" in graph(tiny_config, tmp_path)  # and the graph itself
    tiny_config.data.validation = before
    whole = (tmp_path / "graph" / "graph.npz").read_bytes()
    (tmp_path / "graph" / "graph.npz").write_bytes(whole[:-100])
    assert "no whole graph" in graph(tiny_config, tmp_path)


def test_textgcn_files_that_do_not_fit(tiny_config, tmp_path):
    tiny_config.task, tiny_config.data.dir = "r8", str(tmp_path)
    assert "textgcn/R8.txt" in train(tiny_config, tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "R8.txt").write_text("0\ttrain\tearn\n1\ttest\tearns\n")
    (tmp_path / "corpus" / "R8.txt").write_text("One\nTwo\n")
    assert "line 2" in (text := train(tiny_config, tmp_path)) and "'earns'" in text and "'earn'" in text
    (tmp_path / "R8.txt").write_text("0\ttrain\tearn\n1\ttest\tearn\n")
    assert "empty after cleaning" in train(tiny_config, tmp_path)  # words that are rare in the corpus go


def test_label_order_of_other_classes(tiny_config, tmp_path):
    (tmp_path / "labels.txt").write_text("fresh\nroten\n")
    tiny_config.data.label_order = str(tmp_path / "labels.txt")
    assert "line 2" in (text := train(tiny_config, tmp_path)) and "'rotten'" in text


@pytest.fixture
def digits(tiny_config, tmp_path):
    """The default experiment on a tiny MNIST and a ViT from nothing."""
    write_mnist(tmp_path)
    tiny_config.task, tiny_config.data.dir, tiny_config.model.name = "mnist", str(tmp_path), "vit"
    sizes = dict(image_size=6, patch_size=3, num_channels=1, hidden_size=8, num_layers=1, num_heads=2)
    tiny_config.model.sizes = tiny_config.model.sizes.__class__(sizes)
    return tiny_config


def test_a_missing_file_of_images(digits, tmp_path):
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "t10k-labels-idx1-ubyte[.gz]; put the official file there" in train(digits, tmp_path)


def test_a_file_of_images_that_is_cut_short(digits, tmp_path):
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    assert "has 1439 values where its header says 1440; fetch it again" in train(digits, tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "train-images-idx3-ubyte.gz" in (text := train(digits, tmp_path)) and "cut short" in text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model.sizes.image_size": 12}, "set data.resize=True"),
        ({"model.sizes.num_heads": 3}, "3 heads do not divide the width 8"),
        ({"data.crop": -1}, "crop -1 is negative"),
        ({"task": "image_folder", "data.train": "nowhere"}, "no such directory: nowhere"),
        ({"task": "minst"}, "'mnist'"),
    ],
)
def test_images_that_do_not_fit(digits, tmp_path, fields, named):
    digits.update_from_flattened_dict(fields)
    assert named in train(digits, tmp_path)


def test_images_for_a_model_of_texts(digits, tiny_checkpoint, tmp_path):
    digits.model.name, digits.model.sizes = str(tiny_checkpoint), digits.model.sizes.__class__()
    assert "configs/vit.py" in train(digits, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(layout="bucket"), "did you mean 'buckets'"),
        (dict(matrix=np.ones((2, 3))), "a row and a column for every node"),
        (dict(matrix=np.triu(np.ones((3, 3)))), "not symmetric"),
        (dict(matrix=np.full((2, 2), np.inf)), "no finite numbers"),
    ],
)
def test_graphs(change, named):
    change = {"matrix": np.eye(2), "layout": None} | change
    assert named in message(adjacency, change["matrix"], change["layout"])


def test_graphs_of_jraph_without_weights_and_no_layers():
    edges = adjacency(np.eye(2), "edges")
    for broken in (None, np.ones((2, 1))):
        assert "one weight, [E]" in message(propagate, edges._replace(edges=broken), jnp.ones((2, 3)))
    assert "at least one layer" in message(GCN(2, 0).init, jax.random.key(0), edges, jnp.ones((2, 3)))
