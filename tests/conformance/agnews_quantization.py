"""Kinds of cases of the AG_NEWS study: the text classifier, plain and quantized, its norm, Adam, counts and names."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from qtx import models
from qtx.analysis.memory import activation_elements, parameter_counts
from qtx.methods.agnews_study import input_policy, without_quantized_biases
from qtx.methods.patterns import pattern_policy
from qtx.models.checkpoints import abstract_params, from_hf_tensors, parameter_name
from qtx.models.text_classifier import started_modules
from qtx.nn import list_sites
from qtx.nn import policy as rules
from qtx.nn.bert import BertConfig
from qtx.nn.layers import DeviationNorm, sinusoids
from qtx.nn.text_classifier import TextClassifier, TextClassifierConfig
from qtx.quant import MinMax, Spec
from qtx.train.logging import running_means
from qtx.train.loop import Phase, make_state, make_step
from qtx.train.optimizer import OptimizerConfig, make_optimizer
from tests.conformance import agnews_quantizers
from tests.conformance.agnews_quantizers import draws

FAMILY = models.get_family("qtx_text_classifier")


def inputs(case):
    """The inputs of a case, with the state and the batch that it shares with others."""
    own = case.values("inputs")
    shared = {}
    for key, wanted in (("same_state_as", ("state:",)), ("same_batch_as", ("tokens", "mask", "labels"))):
        if key in own:
            shared |= {n: v for n, v in inputs(other_case(case, own.pop(key))).items() if n.startswith(wanted)}
    return shared | own


def other_case(case, name):
    return type(case)(
        case.project,
        next(entry for entry in case.manifest["cases"] if entry["id"] == name),
        case.manifest,
        case.directory,
        case.section,
    )


def config_of(p, **changes):
    """The sizes in a case's params, with what the published code did; without dropout unless the case says so."""
    rate = p.get("dropout", 0.0)
    fields = dict(
        vocab_size=p["vocab"],
        hidden_size=p["d"],
        num_heads=p["h"],
        num_layers=p["L"],
        intermediate_size=p["ff"],
        classifier_size=p["hid"],
        max_positions=p["maxlen"],
        num_labels=p["n_class"],
        hidden_dropout=rate,
        attention_dropout=rate,
        mask="published",
        embedding="twice",
        first_token_only=False,
    )
    return TextClassifierConfig(**fields | changes)


def named(config, tensors, prefix):
    """Arrays of the manifest, such as `state:...` or `grad:...`, as a flat dict by qtx path."""
    found, extra = from_hf_tensors(
        FAMILY, config, {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    )
    assert not extra, extra
    return found


def params_of(config, given):
    """The nested parameters of a case's state."""
    flat = named(config, given, "state:")
    expected = traverse_util.flatten_dict(abstract_params(FAMILY, config), sep="/")
    assert {path: value.shape for path, value in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    return traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in flat.items()}, sep="/")


def arguments(given, suffix=""):
    """What the model is called with."""
    ids = jnp.asarray(given[f"tokens{suffix}"], jnp.int32)
    return ids, jnp.asarray(given[f"mask{suffix}"], jnp.int32), jnp.zeros_like(ids)


def close(got, want, tolerance, name=""):
    np.testing.assert_allclose(got, want, rtol=tolerance["rtol"], atol=tolerance.get("atol", 0), err_msg=name)


def loss_of(model, params, args, labels, **options):
    """Cross-entropy and what else the model returned."""
    out, seen = model.apply({"params": params}, *args, mutable=["captures"], **options)
    return optax.softmax_cross_entropy_with_integer_labels(out.logits, jnp.asarray(labels)).mean(), (out, seen)


def classifier_forward(case):
    given, want, tolerance = inputs(case), case.values("outputs"), case.entry["tolerance"]
    config = config_of(case.entry["params"])
    model, params, args = TextClassifier(config), params_of(config, given), arguments(given)
    if "state:input_encodings.pe" in given:
        table = given["state:input_encodings.pe"][0]
        np.testing.assert_allclose(sinusoids(*table.shape), table, atol=1e-6)
    run = jax.jit(jax.value_and_grad(lambda params: loss_of(model, params, args, given["labels"]), has_aux=True))
    (loss, (out, seen)), grads = run(params)
    captures = traverse_util.flatten_dict(seen["captures"], sep="/")
    got = {
        "logits": out.logits,
        "loss": loss,
        "logits_no_mask": model.apply({"params": params}, args[0], jnp.ones_like(args[1]), args[2]).logits,
        "embeddings": captures["encoder/embeddings/sum_position"],
        "encodings": captures["encoder/embeddings/sum_sinusoid"],
    }
    for i in range(config.num_layers):
        layer = f"encoder/layer_{i}"
        got[f"after_attention{i}"] = captures[f"{layer}/attention/residual"]
        got[f"after_ffn{i}"] = captures[f"{layer}/ffn/residual"]
        got[f"attention_probs{i}"] = captures[f"{layer}/attention/probs"]
    gradients = named(config, want, "grad:")
    plain = {name: value for name, value in want.items() if not name.startswith("grad:")}
    assert plain.keys() <= got.keys(), plain.keys() - got.keys()
    for name, value in plain.items():
        close(got[name], value, tolerance, name)
    flat = traverse_util.flatten_dict(grads, sep="/")
    assert gradients.keys() == flat.keys()
    for path, value in gradients.items():
        close(flat[path], value, tolerance["grad"], path)


def classifier_forward_true_mask(case):
    given = inputs(case)
    if "tokens" not in given:  # only the state is named, though the batch is that case's, too
        given = inputs(other_case(case, case.entry["inputs"]["same_state_as"]["value"])) | given
    config = config_of(case.entry["params"], mask="exact")
    out = TextClassifier(config).apply({"params": params_of(config, given)}, *arguments(given))
    close(out.logits, case.values("outputs")["logits"], case.entry["tolerance"])


def layer_norm(case):
    given, want, tolerance = inputs(case), case.values("outputs"), case.entry["tolerance"]
    norm = DeviationNorm(case.entry["params"]["eps"])
    params = {"scale": jnp.asarray(given["scale"]), "bias": jnp.asarray(given["shift"])}
    y, pull = jax.vjp(lambda x: norm.apply({"params": params}, x), jnp.asarray(given["x"]))
    close(y, want["y"], tolerance)
    close(pull(jnp.asarray(given["upstream"]))[0], want["grad_x"], tolerance["grad"])


def pretrained_name_map(case):
    layers = case.entry["params"]["n_layers"]
    bert, config = BertConfig(num_layers=layers), TextClassifierConfig(num_layers=layers)
    started = started_modules(config)
    back = {path: theirs for theirs, path in FAMILY.modules(config).items()}
    norm = {"weight": "a_2", "bias": "b_2"}
    pairs = []
    for name in inputs(case)["bert_names_in_checkpoint_order"]:
        path = parameter_name(models.get_family("bert"), bert, name)
        module = path.rpartition("/")[0] if path else None
        if module in started:
            leaf = name.rpartition(".")[2]
            pairs.append([f"{back[module]}.{norm[leaf] if module.endswith('norm') else leaf}", name])
            assert parameter_name(FAMILY, config, pairs[-1][0]) == path
    assert pairs == case.values("outputs")["pairs"]


def parameter_count(case):
    p, want = case.entry["params"], case.values("outputs")
    config = TextClassifierConfig(
        vocab_size=p["vocab"],
        hidden_size=p["d_model"],
        num_layers=p["n_layers"],
        num_heads=p["h"],
        intermediate_size=p["d_ff"],
        classifier_size=p["d_hidden"],
        max_positions=p["maxlen"],
        num_labels=p["n_class"],
    )
    counts = parameter_counts(abstract_params(FAMILY, config))
    theirs = {"embeddings": "input_embeddings", "attention": "sublayer_attention", "ffn": "sublayer_ffn"}
    got = {theirs.get(name, name): count for name, count in counts.items()} | {"total": sum(counts.values())}
    rest = got["total"] - got["input_embeddings"]
    assert got == want["parameters"]
    assert {name: 4 * count for name, count in got.items()} == want["bytes_fp32"]
    assert rest == want["non_embedding"]
    for name, part in want["share_of_non_embedding"].items():
        assert got[name] / rest == pytest.approx(part, rel=1e-12)


def activation_element_count(case):
    columns = case.entry["params"]["columns"]
    fields = {"d_model": "hidden_size", "heads": "num_heads", "layers": "num_layers", "classes": "num_labels"}
    for row, want in zip(inputs(case)["rows"], case.values("outputs")["elements"], strict=True):
        size = dict(zip(columns, map(int, row), strict=True))
        config = BertConfig(**{ours: size[theirs] for theirs, ours in fields.items()})
        got = [activation_elements(config, size["batch"], size["length"], embeddings=flag) for flag in (True, False)]
        assert got == list(want)


def running_mean(case):
    given = inputs(case)
    got = running_means(given["batch_values"], given["batch_sizes"])
    close(got, case.values("outputs")["running_mean"], case.entry["tolerance"])


def adam_steps(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    config = config_of(p)
    name = re.sub(r"_\d+$", "", case.id.rpartition("/")[2])  # such as basic_ALL_wo_final, or baseline
    method, _, pattern = name.partition("_")
    policy = pattern_policy(pattern, PUBLISHED[method]) if pattern else None
    settings = OptimizerConfig(
        learning_rate=p["lr"],
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        b1=p["betas"][0],
        b2=p["betas"][1],
        eps=p["eps"],
        max_grad_norm=0.0,
    )
    phase, optimizer = (
        Phase("train", TextClassifier(config, policy=policy), settings),
        make_optimizer(settings, p["steps"]),
    )
    step, state, losses = jax.jit(make_step(phase, optimizer, seed=0)), None, []
    for i in range(p["steps"]):
        batch = dict(zip(("input_ids", "attention_mask", "token_type_ids"), arguments(given, i), strict=True))
        labels = jnp.asarray(given[f"labels{i}"], jnp.int32)
        batch |= {"labels": labels, "weights": jnp.ones(len(labels))}
        if state is None:
            state = make_state(phase, {"params": params_of(config, given)}, optimizer, 0, batch)
        state, measured = step(state, batch, None)
        losses.append(float(measured["loss"]))
    np.testing.assert_allclose(losses, want["losses"], rtol=tolerance["losses"]["rtol"])
    after, reliable = named(config, want, "after:"), named(config, want, "reliable:")
    got = traverse_util.flatten_dict(state.variables()["params"], sep="/")
    assert after.keys() == got.keys()
    for path, value in after.items():
        counts = reliable[path] == 1
        close(np.asarray(got[path])[counts], value[counts], tolerance, path)


PUBLISHED = {
    "basic": Spec(1, "sign", range="dynamic"),
    "ir": Spec(1, "tanh", range="dynamic"),
}


def check_gradients(config, grads, want, tolerance):
    flat = traverse_util.flatten_dict(grads, sep="/")
    for path, gradient in named(config, want, "grad:").items():
        close(flat[path], gradient, tolerance["grad"], path)


def classifier_binarized(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    config = config_of(p)
    spec, replaced = PUBLISHED[p["method"]], {f"{FAMILY.modules(config)[name]}/kernel" for name in p["replaced_layers"]}
    # The original knows its last layer by its four outputs, and does not spare one that has another number.
    chosen = (
        pattern_policy(p["pattern"], spec) if config.num_labels == 4 else rules(weights=dict.fromkeys(replaced, spec))
    )
    model = TextClassifier(config, policy=chosen)
    sites = list_sites(model, {"params": abstract_params(FAMILY, config)}, *arguments(given))
    assert {name for name in sites if model.policy.spec("weight", name) is not None} == replaced
    progress = 0.0 if p["t"] is None else np.log10(p["t"] / 0.1) / np.log(100)
    params, schedule = params_of(config, given), {"progress": jnp.float32(progress)}

    def loss(params):
        out = model.apply({"params": params, "schedule": schedule}, *arguments(given))
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, jnp.asarray(given["labels"])).mean(), out

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    close(out.logits, want["logits"], tolerance)
    close(value, want["loss"], tolerance)
    check_gradients(config, grads, want, tolerance)


def classifier_quantized(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    config, paths = config_of(p), FAMILY.modules(config_of(p))
    spec = Spec(p["bits"], "magnitude_int8", range="dynamic", rounding="stochastic")
    plain, model = TextClassifier(config), TextClassifier(config, policy=pattern_policy("ALL", spec))
    params, args, labels = params_of(config, given), arguments(given), jnp.asarray(given["labels"])
    close(plain.apply({"params": params}, *args).logits, want["logits_train_call_1"], tolerance)

    def noise(prefix):
        flat = {f"{paths[name]}/kernel": draws(given[f"{prefix}:{name}"]).T for name in p["quantized_layers"]}
        return traverse_util.unflatten_dict(flat, sep="/")

    def loss(params):
        out = model.apply({"params": params, "noise": noise("mask_train")}, *args)
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean(), out

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    close(out.logits, want["logits_train_call_2"], tolerance)
    close(value, want["loss_train_call_2"], tolerance)
    check_gradients(config, grads, want, tolerance)
    evaluated = without_quantized_biases(params, model.policy)
    out = model.apply({"params": evaluated, "noise": noise("mask_eval")}, *args)
    close(out.logits, want["logits_eval"], tolerance)


SITES = {
    r"mha(\d+)_q": "encoder/layer_{}/attention/query/input",
    r"mha(\d+)_k": "encoder/layer_{}/attention/key/input",
    r"mha(\d+)_v": "encoder/layer_{}/attention/value/input",
    r"mha(\d+)": "encoder/layer_{}/attention/out/input",
    r"ffn(\d+)_input": "encoder/layer_{}/ffn/up/input",
    r"ffn(\d+)_output": "encoder/layer_{}/ffn/down/input",
    "classifier": "classifier/hidden/input",
}


def site_of(name):
    return next(path.format(*found.groups()) for key, path in SITES.items() if (found := re.fullmatch(key, name)))


def classifier_fully_quantized(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    config = config_of(p, classifier_relu=False)
    how = MinMax("restarting", padding="include")
    policy = input_policy(Spec(p["bits"], "shifted", estimator=how, rounding="truncate"))
    model, params = TextClassifier(config, policy=policy), params_of(config, given)
    state: dict = {}
    steps = len(want["ranges"])
    for step in range(steps):
        out, state = model.apply({"params": params} | state, *arguments(given, step), mutable=["ranges", "observers"])
        close(out.logits, want[f"logits{step}"], tolerance)
        seen = traverse_util.flatten_dict(state["observers"], sep="/")
        ends = [[float(end[0]) for end in seen[site_of(name)][:2]] for name in p["sites"]]
        np.testing.assert_allclose(ends, want["ranges"][step], rtol=1e-4, atol=1e-5)

    def loss(params):
        out = model.apply({"params": params, "ranges": state["ranges"]}, *arguments(given, steps - 1))
        labels = jnp.asarray(given[f"labels{steps - 1}"])
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(params)
    close(value, want[f"loss{steps - 1}"], tolerance)
    check_gradients(config, grads, want, tolerance)
    out = model.apply({"params": params, "ranges": state["ranges"]}, *arguments(given, "_eval"))
    close(out.logits, want["logits_eval"], tolerance)


HANDLERS = agnews_quantizers.HANDLERS | {
    function.__name__: function
    for function in (
        classifier_forward,
        classifier_forward_true_mask,
        classifier_binarized,
        classifier_quantized,
        classifier_fully_quantized,
        layer_norm,
        pretrained_name_map,
        parameter_count,
        activation_element_count,
        running_mean,
        adam_steps,
    )
}
