"""Kinds of cases of "Compressed Transformers": its quantizers, and the encoder-decoder, plain, quantized and binarized."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qtx import models, quant
from qtx.methods.agnews_study import without_quantized_biases
from qtx.methods.patterns import pattern_policy
from qtx.methods.translation import TranslationLoss
from qtx.models.checkpoints import abstract_params, from_hf_tensors
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qtx.nn.layers import LayerNorm, sinusoids
from qtx.quant import Spec, codebook, grid
from tests.conformance import agnews_quantizers
from tests.conformance.agnews_quantizers import PUBLISHED_WEIGHTS, draws

FAMILY = models.get_family("qtx_encoder_decoder")
SMOOTHING = 0.1  # of the labels in every case with a whole model


def close(got, want, tolerance, name=""):
    np.testing.assert_allclose(got, want, rtol=tolerance["rtol"], atol=tolerance.get("atol", 0), err_msg=name)


# --- Quantizers ---


def weight_quantize_report_formula(case):
    given, want, levels = case.values("inputs"), case.values("outputs"), case.entry["params"]["levels"]
    bits = levels.bit_length()
    assert levels == 2**bits - 1
    spec, w = quant.magnitude(bits, scale="norm"), jnp.asarray(given["w"])
    with jax.enable_x64(True):  # a difference of numbers that are close
        exact = jnp.asarray(given["w"], jnp.float64)
        low, scale = codebook.codes(spec, exact, noise=jnp.ones_like(exact))
        close(jnp.abs(exact) / scale - jnp.abs(low), want["prob"], case.entry["tolerance"])
    for noise in (draws(given["mask"]), jnp.asarray(given["u"])):
        close(grid.fake_quant(spec, w, noise=noise), want["dequant"], case.entry["tolerance"])


def weight_quantize_mean(case):
    want, p, tolerance = case.values("outputs"), case.entry["params"], case.entry["tolerance"]
    w = jnp.asarray(case.values("inputs")["w"])
    noise = jax.random.uniform(jax.random.key(0), (p["draws"], *w.shape))
    spec = Spec(p["bits"], **PUBLISHED_WEIGHTS)
    mean = jnp.mean(jax.vmap(lambda u: grid.fake_quant(spec, w, noise=u))(noise), 0)
    close(codebook.codes(spec, w)[1], want["step"], {"rtol": 1e-6})
    close(mean, want["mean"], tolerance)
    close(mean, w, tolerance)


def positional_table(case):
    want, p = case.values("outputs"), case.entry["params"]
    table = sinusoids(p["table_rows"], p["model_dimension"])
    close(table[: p["rows"]], want["first_rows"], case.entry["tolerance"])
    rows = {name: int(found[1]) for name in want if (found := re.fullmatch(r"row_(\d+)", name))}
    assert rows
    for name, row in rows.items():
        close(table[row], want[name], case.entry["tolerance"], name)


def layer_norm(case):
    given = {name: jnp.asarray(value) for name, value in case.values("inputs").items()}
    params = {"scale": given["weight"], "bias": given["bias"]}
    y = LayerNorm(case.entry["params"]["eps"]).apply({"params": params}, given["x"])
    close(y, case.values("outputs")["y"], case.entry["tolerance"])


# --- Models ---


def inputs(case) -> dict[str, Any]:
    """The inputs of a case, with the state and the batch that it shares with others."""
    own = case.values("inputs")
    shared: dict[str, Any] = {}
    wanted = {"same_state_as": "state:", "other_state_from": "state:", "same_batch_as": ("src", "trg")}
    for key, prefix in wanted.items():
        if key in own:
            entry = next(entry for entry in case.manifest["cases"] if entry["id"] == own[key])
            other = type(case)(case.project, entry, case.manifest, case.directory, case.section)
            shared |= {name: value for name, value in inputs(other).items() if name.startswith(prefix)}
    return shared | {name: value for name, value in own.items() if name not in wanted}


def config_of(p, **changes) -> EncoderDecoderConfig:
    """The sizes in a case's params, without dropout unless the case has some."""
    rate = p.get("dropout", 0.0)
    return EncoderDecoderConfig(
        source_vocab_size=p["vs"],
        target_vocab_size=p["vt"],
        hidden_size=p["d"],
        num_heads=p["h"],
        num_layers=p["L"],
        decoder_layers=p["L"],
        intermediate_size=p.get("width_mult", 4) * p["d"],
        hidden_dropout=rate,
        attention_dropout=rate,
        **changes,
    )


def model_of(p, policy=None, **changes) -> EncoderDecoder:
    return EncoderDecoder(config_of(p, **changes), policy=policy)


def named(p, tensors, prefix) -> dict[str, np.ndarray]:
    """Arrays of the manifest, such as `state:...` or `grad:...`, as a flat dict by qtx path."""
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    found, extra = from_hf_tensors(FAMILY, config_of(p), given)
    assert not extra, extra
    return found


def params_of(p, given) -> dict[str, Any]:
    """The nested parameters of a case's state."""
    flat = named(p, given, "state:")
    expected = traverse_util.flatten_dict(abstract_params(FAMILY, config_of(p)), sep="/")
    assert {path: value.shape for path, value in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
    return traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in flat.items()}, sep="/")


def batch_of(source, target) -> dict[str, jax.Array]:
    """A batch of pairs from the padded rows of both languages."""
    source, target = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    rows = len(source)
    return {
        "source_ids": source,
        "target_ids": target[:, :-1],
        "labels": target[:, 1:],
        "weights": jnp.ones(rows),
        "index": jnp.arange(rows),
    }


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, batch, collections=None):
    """Loss as published, outputs, captured tensors, and the flat gradients by all parameters.

    Calls with the same model and shapes share one compiled program.
    """

    def run(params):
        kept: dict[str, Any] = {}

        def forward(batch):
            variables = {"params": params, **(collections or {})}
            kept["out"], kept["seen"] = model.apply(
                variables, batch["source_ids"], batch["target_ids"], mutable=["captures"]
            )
            return kept["out"], {}

        total, rows = TranslationLoss(SMOOTHING, "rows", model.config.pad_token_id)(forward, batch)
        return total / rows, (kept["out"], traverse_util.flatten_dict(kept["seen"]["captures"], sep="/"))

    (loss, (out, seen)), grads = jax.value_and_grad(run, has_aux=True)(params)
    return loss, out, seen, traverse_util.flatten_dict(grads, sep="/")


def log_probs(out):
    """Log probabilities, one row for each target token, `[B T, V]`."""
    return jax.nn.log_softmax(out.logits).reshape(-1, out.logits.shape[-1])


def check_gradients(p, grads, want, tolerance):
    for path, value in named(p, want, "grad:").items():
        close(grads[path], value, tolerance["grad"], path)


def encoder_decoder_forward(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    model, batch = model_of(p), batch_of(given["src"], given["trg"])
    loss, out, seen, grads = loss_and_gradients(model, params_of(p, given), batch)
    got = {"encoder_output": out.encoded, "log_probs": log_probs(out), "loss": loss}
    for i in range(p["L"]):
        got |= {f"encoder_layer{i}": out.encoder_states[i + 1], f"decoder_layer{i}": out.decoder_states[i + 1]}
        got[f"encoder{i}_attention"] = seen[f"encoder/layer_{i}/attention/probs"]
        for name in ("self_attention", "cross_attention"):
            got[f"decoder{i}_{name}"] = seen[f"decoder/layer_{i}/{name}/probs"]
    plain = {name: value for name, value in want.items() if not name.startswith("grad:")}
    assert plain.keys() <= got.keys(), plain.keys() - got.keys()
    for name, value in plain.items():
        close(got[name], value, tolerance, name)
    assert named(p, want, "grad:").keys() == grads.keys()
    check_gradients(p, grads, want, tolerance)


def policy_of(p, scope, spec, replaced):
    """The policy of a scope, which reaches exactly the layers that the original replaced."""
    policy, config = pattern_policy(scope, spec), config_of(p)
    paths = {f"{FAMILY.modules(config)[name]}/kernel" for name in replaced}
    sites = FAMILY.sites(config)
    assert {name for name in sites if policy.spec("weight", name) is not None} == paths
    return policy


def encoder_decoder_quantized(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    scope = "all_linear" if p["quantize_all_linear"] else "attention"
    policy = policy_of(p, scope, Spec(p["bits"], **PUBLISHED_WEIGHTS), p["quantized_layers"])
    paths, params = FAMILY.modules(config_of(p)), params_of(p, given)
    batch = batch_of(given["src"], given["trg"])
    _, out, _, _ = loss_and_gradients(model_of(p), params, batch)
    close(log_probs(out), want["log_probs_train_call_1"], tolerance)

    def noise(prefix):
        flat = {f"{paths[name]}/kernel": draws(given[f"{prefix}:{name}"]).T for name in p["quantized_layers"]}
        return {"noise": traverse_util.unflatten_dict(flat, sep="/")}

    model = model_of(p, policy)
    loss, out, _, grads = loss_and_gradients(model, params, batch, noise("mask_train"))
    close(log_probs(out), want["log_probs_train_call_2"], tolerance)
    close(loss, want["loss_train_call_2"], tolerance)
    check_gradients(p, grads, want, tolerance)
    _, out, _, _ = loss_and_gradients(model, without_quantized_biases(params, policy), batch, noise("mask_eval"))
    close(log_probs(out), want["log_probs_eval"], tolerance)


def encoder_decoder_binarized(case):
    p, given, want, tolerance = case.entry["params"], inputs(case), case.values("outputs"), case.entry["tolerance"]
    scope = "all_linear" if p["binarize_all_linear"] else "attention"
    policy = policy_of(p, scope, Spec(1, "sign", range="dynamic"), p["replaced_layers"])
    scores = {"25*head_dimension": "25d", "sqrt(head_dimension)": "sqrt"}[p["score_divisor"]]
    batch = batch_of(given["src"], given["trg"])
    loss, out, _, grads = loss_and_gradients(model_of(p, policy, scores=scores), params_of(p, given), batch)
    close(log_probs(out), want["log_probs"], tolerance)
    close(loss, want["loss"], tolerance)
    check_gradients(p, grads, want, tolerance)


def parameter_count(case):
    want = case.values("outputs")
    flat = traverse_util.flatten_dict(abstract_params(FAMILY, config_of(case.entry["params"])), sep="/")

    def count(pattern):
        return sum(int(np.prod(leaf.shape)) for path, leaf in flat.items() if re.search(pattern, path))

    got = {
        "total": count(""),
        "embeddings": count("/embeddings/"),
        "attention": count("attention/(query|key|value|out)/"),
        "qkv": count("attention/(query|key|value)/"),
        "feed_forward": count("/ffn/(up|down)/"),
        "generator": count("^generator/"),
        "layer_norms": count("/norm/"),
    }
    assert {name: got[name] for name in want} == pytest.approx(want)


HANDLERS = {
    name: agnews_quantizers.HANDLERS[name] for name in ("weight_quantize", "quantized_linear", "binarized_linear")
} | {
    function.__name__: function
    for function in (
        weight_quantize_report_formula,
        weight_quantize_mean,
        positional_table,
        layer_norm,
        parameter_count,
        encoder_decoder_forward,
        encoder_decoder_quantized,
        encoder_decoder_binarized,
    )
}
