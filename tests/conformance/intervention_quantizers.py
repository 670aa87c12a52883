"""Quantizers, quantized layers and the optimizer of "Teacher Intervention"."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qtx import quant
from qtx.methods import teacher_intervention as ti
from qtx.nn import policy
from qtx.nn.bert import BertConfig
from qtx.nn.layers import Dense, Embed
from qtx.quant.spec import Granularity, Spec
from qtx.train.optimizer import OptimizerConfig, learning_rate, make_optimizer

SCHEMES = {"TwnQuantizer": "ternary", "TwnQuantizer_mx": "twn", "SymQuantizer": "narrow", "AsymQuantizer": "offset"}
SCHEDULES = {
    "warmup_linear": "linear",
    "warmup_cosine": "cosine",
    "warmup_constant": "constant",
    "none": "constant",
    "cosine_hard_restarts": "hard_restarts",
    "cosine_warmup_restarts": "warm_restarts",
}


def values(case, part: str) -> dict[str, np.ndarray]:
    """Arrays by the last part of their names."""
    return {key.rpartition("/")[2]: case.file()[key] for key in case.entry[part]}


def close(case, got, name: str):
    tolerance = case.entry["tol"]
    limit = tolerance.get(name, tolerance.get("default"))
    want = values(case, "outputs")[name]
    np.testing.assert_allclose(got, want, rtol=limit["rtol"], atol=limit["atol"], err_msg=f"{case.id} {name}")


def granularity(ndim: int, layerwise: bool) -> Granularity:
    """One range, or one for each index of all axes but the last; of four axes, for each index of the first two."""
    if layerwise:
        return quant.per_tensor()
    return Granularity((0, 1) if ndim == 4 else tuple(range(ndim - 1)))


def check_spec(case, spec: Spec):
    given = values(case, "inputs")
    params = None if spec.is_codebook else quant.estimate(spec, given["x"])
    y, back = jax.vjp(lambda x: quant.fake_quant(spec, x, params), jnp.asarray(given["x"]))
    close(case, y, "y")
    close(case, back(jnp.asarray(given["g"]))[0], "dx")


def quantizer(case):
    e = case.entry
    ndim = values(case, "inputs")["x"].ndim
    shared = granularity(ndim, e["layerwise"])
    check_spec(case, Spec(e["bits"], SCHEMES[e["quantizer"]], shared, range="dynamic", clip=tuple(e["clip"])))


def quantizer_extension(case):
    bits, ndim = case.entry["bits"], values(case, "inputs")["x"].ndim
    shared = granularity(ndim, case.entry["layerwise"])
    check_spec(case, quant.binary(shared) if bits == 1 else quant.loss_aware(bits, shared))


def clipped(case, spec: Spec) -> Spec:
    """A grid of the student, clipped as the case says."""
    limit = case.manifest["model"]["config"].get("clip_val", ti.CLIP[1])
    return dataclasses.replace(spec, clip=tuple(case.entry.get("clip", (-limit, limit))))


def quantize_linear(case):
    given = {name: jnp.asarray(value) for name, value in values(case, "inputs").items()}
    weights, inputs = (clipped(case, spec) for spec in (ti.WEIGHTS, ti.ACTIVATIONS))
    layer = Dense(given["weight"].shape[0], policy=policy(weights=weights, inputs=inputs))

    def run(x, weight, bias):
        return layer.apply({"params": {"kernel": weight.T, "bias": bias}}, x)

    y, back = jax.vjp(run, given["x"], given["weight"], given["bias"])
    close(case, y, "y")
    for name, gradient in zip(("dx", "dweight", "dbias"), back(given["g"]), strict=True):
        close(case, gradient, name)


def quantize_embedding(case):
    given = {name: jnp.asarray(value) for name, value in values(case, "inputs").items()}
    rows, width = given["weight"].shape
    layer = Embed(rows, width, policy=policy(weights=clipped(case, ti.TABLE)))
    detach = ti.untrained_padding(BertConfig(vocab_size=rows))["detach"]["encoder"]["embeddings"]["word"]
    ids = given["ids"].astype(jnp.int32)
    y, back = jax.vjp(lambda table: layer.apply({"params": {"table": table}, "detach": detach}, ids), given["weight"])
    close(case, y, "y")
    gradient = back(given["g"])[0]
    close(case, gradient, "dweight")
    assert not np.any(gradient[0])


def documented_original_behaviour(case):
    """Where the original has a NaN of its own making there are zeros; where it hides one it stays."""
    given, want = values(case, "inputs"), values(case, "outputs")
    symmetric = ti.ACTIVATIONS
    asymmetric = dataclasses.replace(symmetric, scheme="offset")

    def run(spec, name):
        x = jnp.asarray(given[name])
        return np.asarray(quant.fake_quant(spec, x, None if spec.is_codebook else quant.estimate(spec, x)))

    for spec, name in ((symmetric, "sym8_tensor_is_nan"), (ti.WEIGHTS, "twn_tensor_is_nan")):
        assert want[name].all()
        np.testing.assert_array_equal(run(spec, "zero_tensor"), 0)
    np.testing.assert_array_equal(run(asymmetric, "zero_tensor"), want["asym8_tensor"])
    np.testing.assert_allclose(
        run(dataclasses.replace(ti.TABLE, granularity=quant.per_channel(0)), "zero_row"),
        np.nan_to_num(want["twn_row"]),
        rtol=2e-6,
    )
    missing = np.isnan(given["nan_input"])
    assert np.isfinite(want["nan_sym8"]).all()
    for spec in (symmetric, asymmetric, ti.WEIGHTS):
        assert np.isnan(run(spec, "nan_input")[missing]).all()


def lr_multiplier(case):
    e = case.entry
    steps, want = e["t_total"], next(iter(values(case, "outputs").values()))
    fields = {"cycles": float(e["cycles"])} if "cycles" in e else {}
    warmup = 0.0 if e["schedule"] == "none" else e["warmup"]
    config = OptimizerConfig(name="bert_adam", schedule=SCHEDULES[e["schedule"]], warmup=warmup, **fields)
    limit = e["tol"]["default"]
    with jax.enable_x64(True):
        got = learning_rate(config, steps)(np.arange(len(want)))
        np.testing.assert_allclose(got, want, rtol=limit["rtol"], atol=limit["atol"])


def bert_adam(case):
    e, given = case.entry, values(case, "inputs")
    decay = e["weight_decay"]
    assert decay["b"] == 0
    config = OptimizerConfig(
        e["lr"],
        name="bert_adam",
        warmup=e["warmup"],
        b1=e["betas"][0],
        b2=e["betas"][1],
        eps=e["eps"],
        max_grad_norm=e["max_grad_norm"],
        weight_decay=decay["w"],
    )
    optimizer = make_optimizer(config, e["t_total"])
    trained = {"params/kernel": jnp.asarray(given["w0"]), "params/bias": jnp.asarray(given["b0"])}
    state, found = optimizer.init(trained), []
    update = jax.jit(optimizer.update)
    for step, (gw, gb) in enumerate(zip(given["gw"], given["gb"], strict=True)):
        gb = np.zeros_like(gb) if step in e["steps_without_b_gradient"] else gb
        updates, state = update({"params/kernel": gw, "params/bias": gb}, state, trained)
        trained = {name: value + updates[name] for name, value in trained.items()}
        found.append(trained)
    close(case, np.stack([each["params/kernel"] for each in found]), "w")
    close(case, np.stack([each["params/bias"] for each in found]), "b")
    assert int(state.counts["params/bias"]) == len(found) - len(e["steps_without_b_gradient"])


HANDLERS = {
    "quantizer": quantizer,
    "quantizer_extension": quantizer_extension,
    "quantize_linear": quantize_linear,
    "quantize_embedding": quantize_embedding,
    "documented_original_behaviour": documented_original_behaviour,
    "lr_multiplier": lr_multiplier,
    "bert_adam": bert_adam,
}
