"""Outlier suppression: quantizers, token-wise clipping, learned steps, gamma migration, the search of OS+."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qtx import quant
from qtx.methods.norm_migration import Reader, folded, search_scale, thresholds
from qtx.nn.layers import Dense, LayerNorm
from qtx.quant import estimators
from qtx.quant.spec import MinMax, Spec, asymmetric, per_channel


def close(case, got, want, name=""):
    limit = case.entry["tolerance"]
    np.testing.assert_allclose(np.asarray(got), want, rtol=limit["rtol"], atol=limit["atol"], err_msg=name)


def counted(x, lengths):
    """Mask `[B, T, 1]` of the first tokens of every row."""
    return (np.arange(x.shape[1]) < np.asarray(lengths)[:, None])[..., None]


def os_fake_quant(case):
    given, want = case.values("inputs"), case.values("outputs")
    where = counted(given["x"], given["lengths"])
    for bits in sorted(int(name.removeprefix("weight")) for name in want if name.removeprefix("weight").isdigit()):
        spec = Spec(bits, "full", per_channel(0))
        params = quant.estimate(spec, given["w"])
        close(case, params.scale, want[f"weight{bits}/scale"])
        close(case, quant.fake_quant(spec, given["w"], params), want[f"weight{bits}"])
        spec, state = asymmetric(bits, estimator=MinMax("mean")), None
        for factor in (0.7, 1.4, 2.1):
            state = quant.observe(spec, state, given["x"] * np.float32(factor), where)
        low, high = quant.estimated_range(spec, state)
        close(case, low, want[f"act{bits}/min"])
        close(case, high, want[f"act{bits}/max"])
        params = quant.qparams(spec, low, high)
        close(case, quant.effective_scale(spec, params.scale), want[f"act{bits}/scale"])
        close(case, quant.effective_zero_point(spec, params.zero_point), want[f"act{bits}/zero_point"])
        close(case, quant.fake_quant(spec, given["x"], params), want[f"act{bits}"])


def os_token_clipping(case):
    given, want = case.values("inputs"), case.values("outputs")
    where = counted(given["x"], given["lengths"])
    for quantile in case.entry["parameters"]["percentiles"]:
        expected = want["p" + str(quantile).replace(".", "p")]
        low, high = estimators.pruned_range(*estimators.token_extremes(given["x"], where), quantile)
        close(case, np.stack([low, high]), expected)
        spec = asymmetric(4, estimator=MinMax(token_quantile=quantile))
        close(case, quant.estimated_range(spec, quant.observe(spec, None, given["x"], where)), expected)


def os_lsq_plus(case):
    given, want = case.values("inputs"), case.values("outputs")
    spec = asymmetric(case.entry["parameters"]["bit"], range="learned", range_gradient="lsq")

    def apply(x, scale, zero_point):
        return quant.fake_quant(spec, x, quant.QParams(scale, zero_point, jnp.asarray(False)))

    y, back = jax.vjp(apply, *(jnp.asarray(given[name]) for name in ("x", "scale", "zero_point")))
    d_x, d_scale, d_zero = back(jnp.asarray(given["g"]))
    close(case, y, want["y"])
    close(case, d_x, want["dx"])
    close(case, d_scale[None], want["dscale"])
    close(case, d_zero[None], want["dzero_point"])


def os_gamma_migration(case):
    given, want = case.values("inputs"), case.values("outputs")
    x, w, gamma, beta = (jnp.asarray(given[name]) for name in ("x", "w", "gamma", "beta"))
    norm, dense = LayerNorm(case.entry["parameters"]["eps"]), Dense(w.shape[0])
    params = {"kernel": w.T, "bias": jnp.zeros(w.shape[0])}
    split = norm.apply({"params": {"scale": gamma / gamma, "bias": beta / gamma}}, x)
    close(case, split, want["split_ln"])
    close(case, dense.apply({"params": folded(params, gamma, jnp.zeros_like(gamma))}, split), want["next_out"])
    plain = norm.apply({"params": {"scale": gamma, "bias": beta}}, x)
    close(case, dense.apply({"params": params}, plain), want["reference"])
    close(case, want["next_out"], want["reference"])


def osplus_scale_search(case):
    given, want = case.values("inputs"), case.values("outputs")
    x, w, shift, mask = given["x"], given["w"], given["shift"], given["mask"] > 0
    low, high = x[mask].min(0) - shift, x[mask].max(0) - shift
    params = {"kernel": jnp.asarray(w.T), "bias": jnp.zeros(w.shape[0])}
    reader = Reader(Dense(w.shape[0]))
    bits = case.entry["parameters"]["bit"]
    found = search_scale(reader, bits, params, x, mask, shift, (low, high), thresholds(low, high))
    close(case, found, want["scale"])


HANDLERS = {
    handler.__name__: handler
    for handler in (os_fake_quant, os_token_clipping, os_lsq_plus, os_gamma_migration, osplus_scale_search)
}
