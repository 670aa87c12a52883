"""Quantizers of the AG_NEWS study: weights, signs, soft signs, running activation ranges.

Weights and signs are those of "Compressed Transformers", too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qtx import quant
from qtx.nn import policy as rules
from qtx.nn.layers import Dense
from qtx.quant import codebook, grid
from qtx.quant.spec import Spec

PUBLISHED_WEIGHTS = dict(scheme="magnitude_int8", range="dynamic", rounding="stochastic")


def inputs(case):
    return {name: jnp.asarray(value) for name, value in case.values("inputs").items()}


def close(case, got, want, key=None, **kwargs):
    limit = case.entry["tolerance"]
    limit = limit.get(key, limit) if key else limit
    np.testing.assert_allclose(np.asarray(got), want, rtol=limit["rtol"], atol=limit["atol"], **kwargs)


def draws(mask):
    """Uniform numbers below the probability where the draw was 1, and not where it was 0."""
    return 1.0 - jnp.asarray(mask)


def weight_quantize(case):
    given, want = inputs(case), case.values("outputs")
    bits = case.entry["params"]["bits"]
    for noise in (draws(given["mask"]), given["u"]):
        for scheme, code, value in (
            ("magnitude", "code_unwrapped", "dequant_unwrapped"),
            ("magnitude_int8", "code_int8", "dequant"),
        ):
            spec = Spec(bits, scheme, range="dynamic", rounding="stochastic")
            codes, step = codebook.codes(spec, given["w"], noise)
            np.testing.assert_array_equal(codes, want[code])
            close(case, step, want["step"])
            close(case, grid.fake_quant(spec, given["w"], noise=noise), want[value])


def bias_quantize_eval(case):
    """Codes of 32 bits in a signed byte leave next to nothing of a bias: at evaluation it is left out."""
    given, want = inputs(case), case.values("outputs")
    limit = case.entry["tolerance"]
    assert not want["expected_effective_bias"].any() and want["dequant_abs_max"] < limit["atol"]
    features = len(given["b"])
    layer = Dense(features, policy=None)
    params = {"kernel": jnp.zeros((2, features)), "bias": given["b"]}
    from qtx.methods.agnews_study import without_quantized_biases

    policy = rules(weights={"**/kernel": Spec(8, **PUBLISHED_WEIGHTS)})
    found = without_quantized_biases(params, policy)
    np.testing.assert_array_equal(layer.apply({"params": found}, jnp.ones((1, 2))), np.zeros((1, features)))


def weight_fake_quant_backward(case):
    given, want = inputs(case), case.values("outputs")
    spec = Spec(case.entry["params"]["bits"], **PUBLISHED_WEIGHTS)
    y, back = jax.vjp(lambda w: grid.fake_quant(spec, w, noise=draws(given["mask"])), given["w"])
    close(case, y, want["out"])
    close(case, back(given["upstream"])[0], want["grad_w"])


def dense(case, spec, given, noise=None, progress=None, bias=True):
    """Output of a layer, and the gradients for the upstream gradient, in the layout of the original."""
    features = given["weight"].shape[0]
    policy = None if spec is None else rules(weights={"**/kernel": spec})
    bias = given["bias"] if bias and "bias" in given else jnp.zeros(features)
    extra = {} if noise is None else {"noise": {"kernel": noise.T}}
    extra |= {} if progress is None else {"schedule": {"progress": jnp.float32(progress)}}

    def apply(x, weight, bias):
        layer = Dense(features, policy=policy)
        return layer.apply({"params": {"kernel": weight.T, "bias": bias}, **extra}, x)

    y, back = jax.vjp(apply, given["x"], given["weight"], bias)
    return y, *back(given["upstream"])


def quantized_linear(case):
    given, want = inputs(case), case.values("outputs")
    spec = Spec(case.entry["params"]["bits"], **PUBLISHED_WEIGHTS)
    close(case, dense(case, None, given)[0], want["train_call_1"])
    y, d_x, d_weight, d_bias = dense(case, spec, given, draws(given["mask_train"]))
    close(case, y, want["train_call_2"])
    close(case, d_x, want["grad_x"])
    close(case, d_weight, want["grad_weight"])
    close(case, d_bias, want["grad_bias"])
    close(case, dense(case, spec, given, draws(given["mask_eval"]), bias=False)[0], want["eval_call"])
    if "eval_call_with_bias" in want:
        close(case, dense(case, spec, given, draws(given["mask_eval"]))[0], want["eval_call_with_bias"])


def binarized_linear(case):
    given, want = inputs(case), case.values("outputs")
    for got, name in zip(
        dense(case, Spec(1, "sign", range="dynamic"), given), ("y", "grad_x", "grad_weight", "grad_bias"), strict=True
    ):
        close(case, got, want[name], err_msg=name)


def ir_linear(case):
    given, want, p = inputs(case), case.values("outputs"), case.entry["params"]
    spec, progress = Spec(1, "tanh", range="dynamic"), p["epoch"] / p["epochs"]
    t, k = codebook.error_decay(progress, "tanh")
    np.testing.assert_allclose([t, k], [p["t"], p["k"]], rtol=1e-5)
    close(case, codebook.standardized(given["weight"], spec.granularity), want["weight_norm"])
    close(case, grid.fake_quant(spec, given["weight"], progress=progress), want["weight_effective"])
    for got, name in zip(
        dense(case, spec, given, progress=progress), ("y", "grad_x", "grad_weight", "grad_bias"), strict=True
    ):
        close(case, got, want[name], err_msg=name)


def ir_linear_paper(case):
    given, want, p = inputs(case), case.values("outputs"), case.entry["params"]
    progress = p["epoch"] / p["epochs"]
    spec = quant.ir_net(quant.per_channel(0))
    close(case, codebook.standardized(given["weight"], spec.granularity), want["standardised"])
    codes, scale = codebook.codes(spec, given["weight"])
    close(case, scale, want["shift_scale"])
    close(case, codes * scale, want["weight_binary"])
    y, d_x, d_weight, _ = dense(case, quant.ir_net().at(1, 2), given, progress=progress)
    close(case, y, want["y"])
    close(case, d_x, want["grad_x"])
    close(case, d_weight, want["grad_weight"])


def ir_schedule(case):
    want, epochs = case.values("outputs"), case.entry["params"]["epochs"]
    progress = np.arange(epochs) / epochs
    for scheme, names in (("tanh", ("t", "k")), ("binary", ("t_paper", "k_paper"))):
        with jax.enable_x64(True):
            for got, name in zip(codebook.error_decay(jnp.asarray(progress, jnp.float64), scheme), names, strict=True):
                close(case, got, want[name], err_msg=name)


def activation_quantize_sequence(case):
    given, want, p = inputs(case), case.values("outputs"), case.entry["params"]
    how = quant.MinMax("restarting", momentum=p["ema_mu"], from_zero=p["fixed_min"])
    published = Spec(p["bits"], "shifted", estimator=how, rounding="truncate")
    corrected = quant.Spec(p["bits"], "offset", estimator=how)
    state, found = None, []
    for i in range(p["training_steps"]):
        x = given[f"x{i}"]
        state = quant.observe(published, state, x)
        found.append(np.stack(quant.estimated_range(published, state)))
        for spec, name in ((published, f"y{i}"), (corrected, f"corrected_y{i}")):
            params = quant.qparams(spec, *quant.estimated_range(spec, state))
            close(case, grid.fake_quant(spec, x, params), want[name], err_msg=name)
    np.testing.assert_allclose(found, want["ranges_after_step"], rtol=1e-6)
    params = quant.qparams(published, *quant.estimated_range(published, state))
    close(case, grid.fake_quant(published, given["x_eval"], params), want["y_eval"])
    if "corrected_y_eval" in want:
        close(case, grid.fake_quant(corrected, given["x_eval"], params), want["corrected_y_eval"])
    last = given[f"x{p['training_steps'] - 1}"]
    _, back = jax.vjp(lambda x: grid.fake_quant(published, x, params), last)
    close(case, back(given["upstream"])[0], want["grad_x"])


def ema_weight_shadow(case):
    given, want, limit = inputs(case), case.values("outputs"), case.entry["tolerance"]
    spec = Spec(case.entry["params"]["bits"], "shifted", rounding="floor")
    got = grid.fake_quant(spec, given["w"], quant.estimate(spec, given["w"]))
    wrong = ~np.isclose(got, want["shadow"], rtol=limit["rtol"], atol=limit["atol"])
    assert wrong.mean() <= limit["max_mismatch_fraction"]


HANDLERS = {
    "weight_quantize": weight_quantize,
    "bias_quantize_eval": bias_quantize_eval,
    "weight_fake_quant_backward": weight_fake_quant_backward,
    "quantized_linear": quantized_linear,
    "binarized_linear": binarized_linear,
    "ir_linear": ir_linear,
    "ir_linear_paper": ir_linear_paper,
    "ir_schedule": ir_schedule,
    "activation_quantize_sequence": activation_quantize_sequence,
    "ema_weight_shadow": ema_weight_shadow,
}
