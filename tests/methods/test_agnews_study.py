"""The AG_NEWS study on any encoder, by configuration alone, and how it was evaluated."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qtx
from qtx import quant
from qtx.errors import UserError
from qtx.experiments.config import changed
from qtx.experiments.plan import plan
from qtx.experiments.run import train_and_evaluate
from qtx.experiments.setup import setup
from qtx.experiments.sweep import check_models
from qtx.methods.agnews_study import PATTERNS, input_policy, replaced_layers, without_quantized_biases
from qtx.methods.patterns import pattern_policy
from qtx.nn import BertClassifier, check_policy, list_sites
from qtx.quant.spec import Spec
from qtx.train.loop import Phase
from tests.experiments.test_launch import get_config, on_tiny
from tests.nn import tiny


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_bert(pattern):
    sites = list_sites(BertClassifier(tiny.CONFIG), {"params": tiny.params()}, *tiny.inputs())
    check_policy(pattern_policy(pattern, quant.binary()), sites)
    check_policy(input_policy(quant.asymmetric(8)), sites)


def test_biases_of_quantized_layers_alone_are_left_out():
    params = jax.tree.map(lambda x: jnp.ones_like(x), tiny.params())
    found = without_quantized_biases(params, pattern_policy("FFN", quant.symmetric(8)))
    layer = found["encoder"]["layer_0"]
    assert not np.any(layer["ffn"]["up"]["bias"]) and np.all(layer["ffn"]["up"]["kernel"] == 1)
    assert np.all(layer["ffn"]["norm"]["bias"] == 1) and np.all(layer["attention"]["out"]["bias"] == 1)


def shrunk(argument, tiny_config):
    """A method of the study on the tiny BERT, for two epochs of three steps."""
    config = on_tiny(get_config("agnews", argument), tiny_config)
    config.data.limit_eval, config.data.buckets, config.evaluate_test = 16, 1, False
    config.data.limit_train = 24
    for phase in (config.phases.finetune, config.phases.qat):
        phase.update(batch_size=8, epochs=2.0)
    return config


def test_binarized_with_a_latent_epoch_on_another_encoder(tiny_config, tmp_path):
    config = shrunk("ir_net_ALL_wo_final+latent", tiny_config)
    config.phases.finetune.epochs = 1.0
    result = train_and_evaluate(config, tmp_path)
    assert list(result["metrics"]) == ["finetune", "qat"]
    kernel = result["params"]["encoder"]["layer_0"]["ffn"]["up"]["kernel"]
    header = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert header["model_type"] == "bert" and kernel.dtype == jnp.float32
    rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert any(row.startswith("finetune") for row in rows) and any(row.startswith("qat") for row in rows)


@pytest.mark.parametrize("rule", ["uniform", "normal"])
def test_quantized_layers_begin_anew_and_others_do_not(rule):
    layer = {"up": {"kernel": jnp.ones((256, 64)), "bias": jnp.ones(64)}, "out": {"kernel": jnp.ones((64, 4))}}
    before = dict.fromkeys(("first", "second", "kept"), layer) | {"norm": {"scale": jnp.ones(3)}}
    policy = qtx.policy(weights={"*/up/kernel": quant.binary()})
    found = replaced_layers(before, policy, rule, jax.random.key(0), kept=("kept/up",))
    kernel, bias = found["first"]["up"]["kernel"], found["first"]["up"]["bias"]
    reach = 256**-0.5
    if rule == "uniform":
        assert reach * 0.95 < jnp.max(jnp.abs(kernel)) <= reach and 0 < jnp.max(jnp.abs(bias)) <= reach
        np.testing.assert_allclose(jnp.std(kernel), reach / 3**0.5, rtol=0.03)
    else:
        assert not np.any(bias) and jnp.max(jnp.abs(kernel)) > 3 * reach
        np.testing.assert_allclose(jnp.std(kernel), reach, rtol=0.03)
    assert np.any(kernel != found["second"]["up"]["kernel"])
    for name in ("kept/up", "first/out", "norm"):
        at = functools.reduce(lambda tree, part: tree[part], name.split("/"), found)
        assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(at))
    with pytest.raises(UserError, match="quant.replaced_layers 'normla'.*'normal'"):
        replaced_layers(before, policy, "normla", jax.random.key(0))


def test_published_methods_begin_as_published_by_config(tiny_config):
    config = shrunk("published_binary_FFN", tiny_config)
    config.model.name, config.model.tokenizer = "text_classifier", config.model.name
    config.model.sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "classifier_size": 32}
    own = setup(config).pretrained.params
    plain = setup(changed(config, {"quant.replaced_layers": ""}, "test")).pretrained.params
    ffn, plain_ffn = (params["encoder"]["layer_0"]["ffn"]["up"]["kernel"] for params in (own, plain))
    assert np.any(ffn != plain_ffn) and 0.8 < np.std(ffn) * 32**0.5 < 1.2
    query, plain_query = (params["encoder"]["layer_0"]["attention"]["query"]["kernel"] for params in (own, plain))
    np.testing.assert_array_equal(query, plain_query)
    with pytest.raises(UserError, match="quant.replaced_layers is 'normal', but the recipe begins with 'finetune'"):
        train_and_evaluate(changed(config, {"recipe": ("finetune", "qat")}, "test"), "nowhere")
    assert get_config("agnews", "published_w8").quant.replaced_layers == "uniform"
    assert get_config("agnews", "published_w8+latent").quant.replaced_layers == ""
    assert get_config("agnews", "w8").quant.replaced_layers == ""
    assert get_config("translation", "published_binary_all").quant.replaced_layers == "normal"
    assert get_config("translation", "published_all_4+warm").quant.replaced_layers == ""


def test_signs_go_on_from_one_epoch_in_the_small_orderings():
    config = get_config("agnews", "orderings+small")
    trials = {trial.name.split("/")[1]: trial for trial in plan(config) if trial.seeds == (1000,)}
    rows = {trial.row.name: trial for trial in trials.values()}
    assert {name for claim in config.sweep.orderings for name in claim[::2]} <= set(rows)
    # Beside them, rows begun from a pre-trained encoder, as in the sweep that is about these.
    of_minilm = {trial.row.name: trial for trial in plan(get_config("agnews", "minilm+small"))}
    assert {f"wide {name}" for name in of_minilm} == {name for name in rows if name.startswith("wide ")}
    for name, trial in of_minilm.items():
        found = rows.pop(f"wide {name}").config
        for part in ("model", "quant", "phases", "recipe"):
            assert found[part] == trial.config[part]
    signs = [name for name in rows if name.endswith("+latent")]
    assert len(signs) == 6
    first = rows[rows[signs[0]].row.start]
    for name, trial in rows.items():
        phases, steps = trial.config.phases, 0.0
        for run in (first, trial) if name in signs else (trial,):
            steps += run.config.phases[run.config.recipe[0]].epochs
        assert len(trial.config.recipe) == 1 and (trial is first or steps == 3)
        rate = phases[trial.config.recipe[0]].optimizer.learning_rate
        assert rate == (1e-4 if name.startswith(("binary", "ir_net")) else 5e-4)
        if name in signs:
            assert trial.needs() == (first.name,) and not trial.config.model.fresh_head
    check_models(list(trials.values()))
    # At the published sizes every row begins from nothing and has the rate of the configuration, the published one by default.
    config = get_config("agnews", "orderings")
    for rate in (1e-4, 2e-4):
        config.phases.qat.optimizer.learning_rate = rate
        for trial in plan(config):
            assert not trial.row.start and trial.config.phases.qat.optimizer.learning_rate == rate


def test_rows_begin_from_bert_by_their_name_and_not_by_the_field():
    config = get_config("agnews", "latent")
    config.model.start = "a copy"
    starts = {trial.row.name: trial.config.model.start for trial in plan(config)}
    assert starts == {name: "a copy" if "+bert" in name else None for name in starts} and len(set(starts.values())) == 2
    assert get_config("agnews", "w8+bert+latent").model.start.startswith("google/")


def test_the_first_epoch_is_one_of_those_that_are_asked_for():
    config = get_config("agnews", "latent")
    config.phases.qat.epochs = 3.0
    for trial in plan(config):
        includes = trial.config.phases.qat.including
        assert trial.config.phases.qat.epochs == 3 and includes == ("finetune" if "+latent" in trial.row.name else "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full_precision+latent", "does not go with 'latent'; choose from 'bert'"),
        ("w8+bert+small", "does not go with 'bert'; choose from 'latent'"),
        ("w8+small+latent", "does not go with 'small'; choose from 'latent', 'bert'; 'small' comes last"),
        ("w8+latent+latent", "says one thing twice"),
        ("latent+small", "no BERT is as narrow as latent+small; choose minilm+small"),
    ],
)
def test_methods_that_cannot_be(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        get_config("agnews", name)


def test_a_sweep_is_no_experiment():
    with pytest.raises(UserError, match="a sweep over rows: give it to launch/sweep.py"):
        setup(get_config("agnews", "orderings"))


def test_progress_reaches_the_grid_by_the_epoch_and_soft_signs_are_not_packed(tiny_config, tmp_path, capsys):
    config = shrunk("published_ir_net_FFN", tiny_config)
    config.model.sizes = {}
    result = train_and_evaluate(config, tmp_path)
    assert float(result["schedule"]["progress"]) in (0.0, 0.5)
    assert not (tmp_path / "quantized").exists() and (tmp_path / "model").is_dir()
    assert f"no {tmp_path / 'quantized'} is written" in capsys.readouterr().err


def test_activation_ranges_follow_the_data_and_evaluation_as_published(tiny_config, tmp_path):
    config = changed(shrunk("fully4", tiny_config), {"quant.weight_rounding": "stochastic"}, "test")
    result = train_and_evaluate(config, tmp_path)
    ends = result["ranges"]["encoder"]["layer_0"]["ffn"]["up"]["input"]
    assert float(ends["scale"]) > 0
    # What is evaluated as published has other logits: rounding is drawn, biases are gone.
    experiment = setup(config)
    phase = Phase("p", experiment.model.clone(policy=pattern_policy("ALL", Spec(2, "magnitude", range="dynamic"))))
    variables = {"params": result["params"]}
    plain = experiment.logits(phase.model, variables)["validation"]
    config.quant.published_evaluation = True
    published = experiment.logits(phase.model, variables)["validation"]
    assert np.abs(plain - published).max() > 1e-4
