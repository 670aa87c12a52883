"""Every family against its published implementation (golden/families), and through all that is generic."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from qtx import asymmetric, models, per_embedding, per_group, policy, symmetric
from qtx.errors import UserError
from qtx.export.packed import load_quantized, save_quantized
from qtx.methods.calibrate import calibrate
from qtx.methods.efficient_quantization import policy_of
from qtx.methods.qat import training_policy
from qtx.nn import check_policy, list_sites
from qtx.nn.aliases import ALIASES
from qtx.nn.describe import describe
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from qtx.train.phase import Phase, make_state, make_step
from tests.models.hf import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden" / "families"
NAMES = ("roberta", "distilbert", "albert")
every_family = pytest.mark.parametrize("name", NAMES)

W, A = symmetric(8), asymmetric(8)
Y = "encoder/layer_0/ffn/residual"


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def inputs(name):
    return tuple(golden(name)[key] for key in ("input_ids", "attention_mask", "token_type_ids"))


def state(name):
    return {key.removeprefix("state/"): value for key, value in golden(name).items() if key.startswith("state/")}


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """Loads a family's model, written as a checkpoint."""

    @functools.cache
    def loaded(name):
        directory = tmp_path_factory.mktemp(name)
        write_checkpoint(directory, json.loads(str(golden(name)["config"])), state(name))
        return models.load(str(directory))

    return loaded


def sites_of(found):
    return list_sites(
        found.family.module(config=found.config), {"params": found.params}, *found.family.example_inputs()
    )


@every_family
def test_it_is_the_published_model(load, name):
    found, want = load(name), golden(name)
    out = found.family.module(config=found.config).apply({"params": found.params}, *inputs(name))
    real = want["attention_mask"] > 0
    assert found.fresh == () and found.family.name == name
    np.testing.assert_allclose(out.hidden_states[-1][real], want["hidden"][real], atol=1e-5, rtol=0)
    np.testing.assert_allclose(out.logits, want["logits"], atol=1e-5, rtol=0)
    assert len(out.hidden_states) == found.config.num_layers + 1
    assert np.ptp(want["hidden"][real], axis=0).min() > 0.1 and np.ptp(want["logits"], axis=0).min() > 0.1


@every_family
def test_checkpoints_go_there_and_back(load, name, tmp_path):
    found = load(name)
    models.save(tmp_path, found.family, found.config, found.params)
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert written.keys() == state(name).keys()
    for key, value in state(name).items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    again = models.load(str(tmp_path))
    assert again.config == found.config
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@every_family
def test_transformers_reads_the_configuration(load, name, tmp_path):
    import transformers

    found, theirs = load(name), json.loads(str(golden(name)["config"]))
    models.save(tmp_path, found.family, found.config, found.params)
    hf = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    hf["id2label"] = {str(number): label for number, label in hf["id2label"].items()}
    of_the_file = ("_name_or_path", "dtype", "transformers_version")
    assert {k: v for k, v in hf.items() if k in theirs.keys() - of_the_file} == {
        k: v for k, v in theirs.items() if k not in of_the_file
    }


@every_family
def test_defaults_are_those_of_transformers(name):
    import transformers

    family = models.get_family(name)
    theirs = {k: v for k, v in transformers.AutoConfig.for_model(name).to_dict().items() if k != "architectures"}
    assert family.config_from_hf({}) == family.config_from_hf(theirs)


@every_family
def test_own_fields_and_rates_survive(load, name):
    family, config = load(name).family, load(name).config
    changed = config.__class__(
        vocab_size=9, num_labels=1, classifier_dropout=0.3, hidden_dropout=0.4, pooling="mean", logit_range=(0.0, 5.0)
    )
    hf = json.loads(json.dumps(family.config_to_hf(changed)))
    assert family.config_from_hf(hf) == changed and hf["problem_type"] == "regression"


@every_family
def test_encoders_without_a_head_get_a_fresh_one(load, name, tmp_path):
    found = load(name)
    prefix = found.family.prefix
    bare = {key.removeprefix(prefix): value for key, value in state(name).items() if key.startswith(prefix)}
    ignored = {found.family.ignored[0] + "bias": np.zeros(3, np.float32)}
    write_checkpoint(tmp_path, json.loads(str(golden(name)["config"])), bare | ignored)
    again = models.load(str(tmp_path), num_labels=5)
    assert set(again.fresh) == {"classifier"} | ({"pooler/dense"} if name != "albert" else set())
    jax.tree.map(np.testing.assert_array_equal, again.params["encoder"], found.params["encoder"])
    assert again.params["classifier"]["kernel"].shape == (32, 5)


@every_family
def test_a_missing_tensor_is_named(name, tmp_path):
    values = state(name)
    dropped = next(key for key in values if key.endswith(("ffn.lin2.bias", "ffn_output.bias", "0.output.dense.bias")))
    write_checkpoint(
        tmp_path, json.loads(str(golden(name)["config"])), {k: v for k, v in values.items() if k != dropped}
    )
    with pytest.raises(UserError, match="lacks 'encoder/layer_0/ffn/down'"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_token_types_without_meaning_are_ignored(load, name):
    found, (ids, mask, types) = load(name), inputs(name)
    model = found.family.module(config=found.config)
    out = model.apply({"params": found.params}, ids, mask, types)
    assert types.any()
    np.testing.assert_array_equal(out.logits, model.apply({"params": found.params}, ids, mask, types * 0).logits)


@every_family
def test_filler_rows_are_finite(load, name):
    found, (ids, mask, types) = load(name), inputs(name)
    ids, mask = ids.copy(), mask.copy()
    ids[1], mask[1] = found.config.pad_token_id, 0
    out = found.family.module(config=found.config).apply({"params": found.params}, ids, mask, types)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    rest = [0, 2, 3]
    np.testing.assert_allclose(out.logits[rest,], golden(name)["logits"][rest], atol=1e-5)


# Sites and policies

COUNTS = {  # activations and weights, counted in the published models: L layers, G sets of parameters
    "roberta": lambda layers, sets: (13 * layers + 5, 8 * sets + 6),
    "distilbert": lambda layers, sets: (13 * layers + 4, 8 * sets + 5),  # neither table nor sum of token types
    "albert": lambda layers, sets: (13 * layers + 6, 8 * sets + 7),  # the projection of the embeddings
}


def names(found, kind):
    return {site for site, info in sites_of(found).items() if info.kind == kind}


@every_family
def test_every_tensor_is_a_site(load, name):
    found = load(name)
    sets = found.config.num_groups if name == "albert" else found.config.num_layers
    assert (len(names(found, "activation")), len(names(found, "weight"))) == COUNTS[name](found.config.num_layers, sets)
    parameters = {path for path in _flat(found.params) if not path.endswith("/bias")}
    assert names(found, "weight") == parameters, "every parameter but biases and shifts is a site, and it alone"


def _flat(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@every_family
def test_published_policies_fit(load, name):
    found, layers = load(name), load(name).config.num_layers

    def specs(**options):
        made = policy_of(W, A, num_layers=layers, **options)
        check_policy(made, sites_of(found))
        return {site: made.spec(i.kind, site) for site, i in sites_of(found).items() if i.kind != "input"}

    plain = specs()
    assert set(plain.values()) == {W, A}, "nothing is left out"
    assert specs(setup="FP_logits") == plain | {"classifier/output": None}
    changed = {site for site, spec in specs(setup="MSE_logits").items() if spec != plain[site]}
    assert changed == {"classifier/output"}
    last = layers - 1
    changed = specs(quant_dict={f"y{last}": 16, "h": "ng4", "e": 16, "P": "fp32", "wP": 4, "Et": 2})
    assert changed[f"encoder/layer_{last}/ffn/residual"].bits == 16
    assert changed["encoder/layer_0/ffn/residual"] == A and changed["pooler/dense/output"] is None
    assert all(changed[f"encoder/layer_{i}/ffn/down/output"].granularity == per_group(4) for i in range(layers))
    assert changed["encoder/embeddings/sum_position"].bits == 16 and changed["pooler/dense/kernel"].bits == 4
    grouped = specs(everywhere=per_embedding())
    assert grouped["encoder/embeddings/norm/output"].granularity == per_embedding()
    assert grouped["encoder/layer_0/attention/scores"] == A
    with pytest.raises(UserError, match=f"names layer {layers}"):
        policy_of(W, A, {f"y{layers}": 16}, layers)
    with pytest.raises(UserError, match="matches no site"):
        check_policy(policy(activations={f"y{layers}": A}), sites_of(found))


@every_family
def test_every_short_name_reaches_something(load, name):
    sites = sites_of(load(name))
    for short in (name for name in ALIASES["activation"] if "_" not in name):  # the long ones are MobileBERT's
        check_policy(policy(activations={short: A}), sites)
    for short in ALIASES["weight"]:
        check_policy(policy(weights={short: W}), sites)


# Calibration, training, the packed artifact


def shortened(found):
    """The same model with as few layers as show everything, two of ALBERT's: compiling is what takes time here."""
    albert = found.family.name == "albert"
    fewer = dict(num_layers=2, num_groups=1) if albert else dict(num_layers=1)
    encoder = {part: value for part, value in found.params["encoder"].items() if part in ("embeddings", "layer_0")}
    config = dataclasses.replace(found.config, **fewer)
    return dataclasses.replace(found, config=config, params=found.params | {"encoder": encoder})


@every_family
def test_calibrated_trained_a_step_packed_and_loaded(load, name, tmp_path):
    found, args = shortened(load(name)), inputs(name)
    rules = policy_of(W, A, {"y": "ngp4", "h": 16}, found.config.num_layers)
    model = found.family.module(config=found.config, policy=rules)
    ranges = calibrate(model, found.params, [args])

    # Few sites, for compiling takes the longer the more there are; what is calibrated must fit them as well.
    few = policy(weights={"MHA": W, "Et": W}, activations={"e": A, "y": rules.spec("activation", Y), "P": A, "C": A})
    phase = Phase("qat", model.clone(policy=training_policy(few, "learned")), OptimizerConfig(1e-3), steps=2)
    optimizer = make_optimizer(phase.optimizer, 2)
    batch = dict(
        zip(found.family.module.inputs, args, strict=True),
        labels=np.array([0, 1, 2, 0]),
        weights=np.ones(4, np.float32),
    )
    before = make_state(phase, {"params": found.params, "ranges": ranges}, optimizer, 1, batch)
    after, measured = jax.jit(make_step(phase, optimizer, 0))(before, batch, None)
    assert np.isfinite(measured["loss"])
    # Every parameter and every learned scale. A zero point has no gradient where nothing is clipped.
    still = [key for key in before.trained if np.array_equal(before.trained[key], after.trained[key])]
    assert all(key.endswith("/zero_point") for key in still), still
    scales = {key.removeprefix("ranges/").removesuffix("/scale") for key in before.trained if key.endswith("/scale")}
    learned = {site for site, info in sites_of(found).items() if few.spec(info.kind, site) is not None}
    assert learned == {site for site in scales if not site.startswith("params/")}

    trained = after.variables()
    save_quantized(tmp_path, found.family, found.config, rules, trained["params"], trained["ranges"])
    loaded = load_quantized(tmp_path)
    assert loaded.config == found.config and loaded.family is found.family and loaded.original == rules
    want = model.apply(trained, *args)
    np.testing.assert_array_equal(loaded.model.apply(loaded.variables, *args).logits, want.logits)
    plain = model.clone(policy=None).apply({"params": trained["params"]}, *args)
    assert 1e-4 < np.abs(want.logits - plain.logits).max() < 1.0
    head = np.asarray(want.pooled / trained["ranges"]["pooler"]["dense"]["output"]["scale"])
    np.testing.assert_allclose(head, np.round(head), atol=1e-3)


@every_family
def test_described(load, name):
    found = load(name)
    model = found.family.module(config=found.config, policy=policy(W, A))
    text = describe(model, {"params": found.params}, *found.family.example_inputs())
    layers = found.config.num_layers
    activations, weights = (len(names(found, kind)) for kind in ("activation", "weight"))
    assert f"{activations} of {activations} activations, {weights} of {weights} weights" in text.summary
    assert f"encoder/layer_{{0..{layers - 1}}}/ffn/residual" in str(text)
