"""Handlers for "Efficient transformer quantization": numeric core and layers. Whole models are in `bert_cases`."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qtx.nn as qnn
from qtx import quant
from qtx.methods import layer_rounding
from qtx.methods.calibrate import calibrate
from qtx.methods.layer_rounding import AdaRound, temperature
from qtx.nn.bert import ACTIVATIONS
from qtx.quant import grid, rounding, rows, search
from qtx.quant.policy import Policy
from tests.conformance import bert_cases

SCHEMES = {"sym": quant.symmetric, "asym": quant.asymmetric}
SCHEMES |= {"symmetric_uniform": quant.symmetric, "asymmetric_uniform": quant.asymmetric}


def granularity(p) -> quant.Granularity:
    kind = p.get("granularity", "per_tensor")
    axis = p.get("axis")
    return {
        "per_tensor": lambda: quant.per_tensor(),
        "per_channel": lambda: quant.per_channel(p.get("channel_axis", 0)),
        "per_axis": lambda: quant.Granularity(axis),
        "per_group": lambda: quant.per_group(p["n_groups"], axis=axis),
    }[kind]()


def spec_of(p, **options) -> quant.Spec:
    scheme = SCHEMES[p["scheme"]]
    return scheme(p["n_bits"], granularity(p), scale_domain=p.get("scale_domain", "linear"), **options)


def near_ties(x, scale) -> np.ndarray:
    ratio = np.abs(x / scale)
    return np.abs(ratio % 1 - 0.5) <= 4 * 1.2e-7 * np.maximum(1, ratio)


def check_on_grid(got, want, x, scale, step=None):
    """Exact to float error, one step of slack at near ties."""
    got, want = np.asarray(got), np.asarray(want)
    step = scale if step is None else step
    slack = np.where(near_ties(x, scale), step * 1.000001, 0)
    limit = 1e-6 * np.abs(want) + 1e-7 * step + slack
    assert np.all(np.abs(got - want) <= limit), f"off by {np.max(np.abs(got - want) / np.maximum(step, 1e-30))} steps"


def fake_quant_given_range(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    spec, x = spec_of(p), jnp.asarray(given["x"])
    params = quant.qparams(spec, given["x_min"], given["x_max"])
    flat = {name: np.asarray(value).reshape(-1) for name, value in want.items()}
    np.testing.assert_allclose(np.ravel(params.scale), flat["delta"], rtol=1e-6)
    scale = quant.effective_scale(spec, params.scale)
    np.testing.assert_allclose(np.ravel(scale), flat["scale"], rtol=1e-6)
    zero = quant.effective_zero_point(spec, params.zero_point)
    np.testing.assert_array_equal(np.ravel(zero), np.broadcast_to(flat["zero_point"], np.ravel(zero).shape))
    if "zero_float" in want:
        np.testing.assert_allclose(np.ravel(params.zero_point), flat["zero_float"], rtol=1e-6, atol=1e-30)
    if "signed" in want:
        assert bool(params.signed) == bool(want["signed"])
    low, high = grid.limits(spec, params.signed)
    assert (float(low), float(high)) == (float(want["int_min"]), float(want["int_max"]))
    integers, step, offset = quant.quantize(spec, x, params)
    ends = [np.broadcast_to(step * (end - offset), np.shape(want["x_lo"])) for end in (low, high)]
    np.testing.assert_allclose(ends[0], want["x_lo"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(ends[1], want["x_hi"], rtol=1e-6, atol=1e-12)
    check_on_grid(integers, want["x_int"], given["x"], np.asarray(step), step=1.0)
    check_on_grid(quant.fake_quant(spec, x, params), want["x_q"], given["x"], np.asarray(step))
    np.testing.assert_array_equal(quant.dequantize(integers, step, offset), quant.fake_quant(spec, x, params))


def learned_range_grad(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    spec, x, g = spec_of(p, range="learned"), jnp.asarray(given["x"]), jnp.asarray(given["g"])
    shape = () if p["granularity"] == "per_tensor" else (-1,)
    delta = jnp.asarray(given["delta"]).reshape(shape)
    zero = jnp.asarray(given.get("zero_float", np.zeros_like(given["delta"]))).reshape(shape)
    signed = jnp.asarray(bool(given.get("signed", False)))

    def forward(x, delta, zero):
        return quant.fake_quant(spec, x, quant.QParams(delta, zero, signed))

    y, pull = jax.vjp(forward, x, delta, zero)
    dx, d_delta, d_zero = pull(g)
    scale = np.asarray(rows.expand(quant.effective_scale(spec, delta), spec.granularity, x.shape))
    check_on_grid(y, want["x_q"], given["x"], scale)
    tie = near_ties(given["x"], scale)
    np.testing.assert_allclose(np.where(tie, 0, dx), np.where(tie, 0, want["dx"]), rtol=1e-6)
    limit = dict(rtol=2e-5, atol=1e-6 * float(np.abs(given["g"]).sum()))
    np.testing.assert_allclose(np.ravel(d_delta), np.ravel(want["d_delta"]), **limit)
    if "d_zero_float" in want:
        np.testing.assert_allclose(np.ravel(d_zero), np.ravel(want["d_zero_float"]), **limit)


def range_estimator(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    over = {"current_minmax": "current", "allminmax": "all", "running_minmax": "running"}[p["estimator"]]
    how = quant.MinMax(
        over,
        momentum=p.get("momentum", 0.9),
        percentile=p.get("percentile") or 0.0,
        ends="lower" if p["granularity"] == "per_tensor" else "both",
    )
    spec = quant.asymmetric(8, granularity(p), estimator=how)
    state = None
    for i in range(len(given)):
        x = jnp.asarray(given[f"batch{i}"])
        state = quant.observe(spec, state, x)
        for end, name in zip(quant.estimated_range(spec, state), ("xmin", "xmax"), strict=True):
            spread = np.ravel(rows.expand(end, spec.granularity, x.shape))
            # The moving average has two roundings, in either order of the sum.
            np.testing.assert_allclose(spread, np.ravel(want[f"{name}{i}"]), rtol=1e-6, atol=0)


def range_estimator_search(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    how = quant.Search(
        loss={"MSE": "mse", "cross_entropy": "cross_entropy"}[p["estimator"]],
        method={"grid": "grid", "golden_section": "brent"}[p["opt_method"]],
        candidates=p["num_candidates"],
        margin=p["range_margin"],
        extent="tensor",
    )
    spec = spec_of(p, estimator=how)
    assert search.max_shift(spec) == p["max_int_skew"]
    run = jax.jit(quant.observe, static_argnums=0)
    state = None
    for i in range(len(given)):
        x = jnp.asarray(given[f"batch{i}"])
        state = run(spec, state, x)
        assert bool(state.one_sided) == bool(want["one_sided"])
        np.testing.assert_allclose(np.max(search.extent(how, state)[0]), want["search_range"], rtol=1e-6)
        low, high = (np.ravel(end) for end in quant.estimated_range(spec, state))
        by_row = rows.to_rows(x, spec.granularity)
        loss = search.row_losses(spec, by_row, None, jnp.asarray(low), jnp.asarray(high))
        if how.method == "brent":
            reference = np.ravel(want[f"final_loss{i}"])
            assert np.all(loss <= reference * (1 + 2e-3) + 1e-10), (loss, reference)
            continue
        gaps = np.ravel(p.get("runner_up_gap", [1.0]))
        decided = np.broadcast_to(gaps >= 1e-5, low.shape)
        ends = (np.ravel(want[f"xmin{i}"]), np.ravel(want[f"xmax{i}"]))
        if i == len(given) - 1:
            for got, end in zip((low, high), ends, strict=True):
                np.testing.assert_allclose(got[decided], end[decided], rtol=1e-5, atol=1e-7)
    if how.method == "grid":
        losses = np.asarray(state.losses)
        reference = want["loss_array"][:, 1:].reshape(losses.shape[0], -1)
        # The original rounds x_q before it subtracts x, a fused multiply-subtract does not: d(error^2) <= 2 |error| eps |x|.
        norm = np.sqrt(sum(float(np.square(batch).sum()) for batch in given.values()))
        slack = 1.2e-7 * norm * np.sqrt(np.abs(reference)) if p["estimator"] == "MSE" else 0
        difference = np.abs(losses[:, : reference.shape[1]] - reference)
        assert np.all(difference <= 2e-5 * np.abs(reference) + slack + 1e-12), np.max(difference / np.abs(reference))


FUNCTIONS = {
    "(z-0.37)^2+1": lambda z: (z - 0.37) ** 2 + 1,
    "0": lambda z: jnp.zeros_like(z),
    "sin(5z)+0.3z": lambda z: jnp.sin(5 * z) + 0.3 * z,
    "z": lambda z: z,
    "|z-0.8|+0.1z": lambda z: jnp.abs(z - 0.8) + 0.1 * z,
}


def bounded_scalar_minimiser(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    name, _, factor = p["function"].partition(", z = ")
    factor = float(factor.partition("*")[0] or 1)
    with jax.enable_x64(True):
        found = quant.minimize_bounded(
            lambda x: FUNCTIONS[name](factor * x),
            jnp.float64(given["lo"]),
            jnp.float64(given["hi"]),
            tolerance=p["xatol"],
            max_evaluations=p["maxiter"],
            keep_points=True,
        )
    assert int(found.evaluations) == int(want["nfev"])
    np.testing.assert_allclose(found.points[: int(want["nfev"])], want["points"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(found.x, want["x"], atol=1e-9)
    np.testing.assert_allclose(found.fun, want["fun"], atol=1e-9)


def check_peg(spec, x, group, want_low, want_high, want_q):
    params = quant.estimate(spec, x, group=group)
    low, high = quant.estimated_range(spec, quant.observe(spec, None, x, group=group))
    for got, end in ((low, want_low), (high, want_high)):
        spread = np.ravel(rows.expand(got, spec.granularity, x.shape, group))
        np.testing.assert_allclose(np.broadcast_to(spread, end.shape), end, rtol=1e-6)
    _, scale, _ = quant.quantize(spec, x, params)
    check_on_grid(quant.fake_quant(spec, x, params), want_q, np.asarray(x), np.asarray(scale))
    return params


def peg(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    axis, k = p["axis"] - 3, p["n_groups"]
    kept = quant.per_embedding() if k is None else quant.per_group(k, p["permute"], axis)
    spec = quant.asymmetric(p["n_bits"], kept)
    x, group = jnp.asarray(given["x"]), None
    if p["permute"]:
        last = max(name for name in given if name.startswith("range_batch"))
        low, high = rows.extremes(jnp.asarray(given[last]), axis)
        np.testing.assert_allclose(high - low, want["ranges"], rtol=1e-5)
        group = quant.groups_by_range(high - low, k)
        width = x.shape[axis] // k
        np.testing.assert_array_equal(np.asarray(group)[want["order"]], np.arange(x.shape[axis]) // width)
    params = check_peg(spec, x, group, want["xmin"], want["xmax"], want["x_q"])
    affine = grid.affine(spec, params, x.shape)
    np.testing.assert_allclose(np.broadcast_to(affine.scale, want["delta"].shape), want["delta"], rtol=1e-6)
    x_eval = jnp.asarray(given["x_eval"])
    check_on_grid(quant.fake_quant(spec, x_eval, params), want["x_eval_q"], given["x_eval"], np.asarray(affine.scale))


def peg_shared(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    spec = quant.asymmetric(p["n_bits"], quant.per_group(p["n_groups"], permute=True))
    low, high = rows.extremes(jnp.asarray(given[p["source"]]), p["axis"])
    np.testing.assert_allclose(high - low, want[f"{p['source']}_own_ranges"], rtol=1e-5)
    group = quant.groups_by_range(high - low, p["n_groups"])
    np.testing.assert_array_equal(np.asarray(group)[want["order"]], np.sort(np.asarray(group)))
    for name in given:
        check_peg(spec, jnp.asarray(given[name]), group, want[f"{name}_min"], want[f"{name}_max"], want[f"{name}_q"])


class OneSite(nn.Module):
    """A model that is one quantizer."""

    policy: Policy | None = None

    @nn.compact
    def __call__(self, x):
        return qnn.site(self, "output", x)


def quantization_manager(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    how = quant.MinMax("running", momentum=p["momentum"])
    model = OneSite(policy=qnn.policy(activations=SCHEMES[p["scheme"]](p["n_bits"], estimator=how)))
    batches = {name: jnp.asarray(value) for name, value in given.items()}

    def estimating(collections, batch):
        return model.apply(collections, batches[batch], mutable=["ranges", "observers"])

    est0, state = estimating({}, "batch0")
    est1, state = estimating(state, "batch1")
    fixed2 = model.apply(state, batches["batch2"])
    train2, state = estimating(state, "batch2")
    eval0 = model.apply(state, batches["batch0"])
    reset1, fresh = estimating({}, "batch1")
    got = dict(est0=est0, est1=est1, fixed2=fixed2, train2=train2, eval0=eval0, reset1=reset1)
    source = dict(est0=0, est1=1, fixed2=2, train2=2, eval0=0, reset1=1)
    for name, value in got.items():
        scale = float((fresh if name == "reset1" else state)["ranges"]["output"]["scale"])
        x = given[f"batch{source[name]}"]
        # The scale in force differs between the steps; a tie can fall either way, by at most one step.
        close = np.abs(np.asarray(value) - want[name]) <= 1e-6 * np.abs(want[name]) + 1e-7 * scale
        assert np.mean(close) >= 0.98 and np.all(np.abs(np.asarray(value) - want[name]) <= 1.01 * scale), (
            name,
            x.shape,
        )


def check_slack(got, want, step, share=0.01):
    """One step of slack on a small share of the elements."""
    difference = np.abs(np.asarray(got) - want)
    assert np.mean(difference > 1e-5 + 1e-5 * np.abs(want)) <= share, "too many elements differ"
    assert np.all(difference <= step * 1.001 + 1e-5), "an element differs by more than one step"


def quant_linear(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    weights = SCHEMES[p["weight_scheme"]](p["n_bits"], quant.per_channel() if p["per_channel"] else quant.per_tensor())
    outputs = SCHEMES[p["act_scheme"]](p["n_bits_act"])
    act = None if p["activation"] == "none" else ACTIVATIONS[p["activation"]]
    model = qnn.Dense(want["fp"].shape[-1], act)
    params = {"kernel": jnp.asarray(given["weight"].T), "bias": jnp.asarray(given["bias"])}
    x = jnp.asarray(given["x"])

    def run(policy):
        quantized = model.clone(policy=policy)
        ranges = calibrate(quantized, params, [(x,)])
        return quantized.apply({"params": params, "ranges": ranges}, x), ranges

    plain = model.apply({"params": params}, x)
    np.testing.assert_allclose(plain, want["fp"], rtol=1e-5, atol=1e-5)
    w_only, ranges = run(qnn.policy(weights=weights))
    np.testing.assert_allclose(w_only, want["w_only"], rtol=1e-5, atol=1e-5)
    stored = quant.QParams(**ranges["kernel"])
    w_q = quant.fake_quant(weights.at(-1, 2), params["kernel"], stored)
    scale = np.ravel(stored.scale)
    check_on_grid(w_q.T, want["w_q"], given["weight"], scale[:, None] if scale.size > 1 else scale)
    a_only, ranges = run(qnn.policy(activations=outputs))
    step = float(ranges["output"]["scale"])
    check_slack(a_only, want["a_only"], step)
    both, ranges = run(qnn.policy(weights, outputs))
    step = float(ranges["output"]["scale"])
    check_slack(both, want["wa"], step)
    low, high = quant.estimated_range(outputs, quant.observe(outputs, None, w_only))
    np.testing.assert_allclose([low, high], [want["act_min"], want["act_max"]], rtol=1e-5, atol=1e-5)


def quant_layernorm(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    weights = SCHEMES[p["weight_scheme"]](p["n_bits"], quant.per_channel() if p["per_channel"] else quant.per_tensor())
    model = qnn.LayerNorm(p["eps"], policy=qnn.policy(weights, quant.asymmetric(p["n_bits_act"])))
    params = {"scale": jnp.asarray(given["weight"]), "bias": jnp.asarray(given["bias"])}
    x = jnp.asarray(given["x"])
    ranges = calibrate(model, params, [(x,)])
    stored = quant.QParams(**ranges["scale"])
    w_q = quant.fake_quant(weights.at(0, 1), params["scale"], stored)
    check_on_grid(w_q, want["w_q"], given["weight"], np.asarray(stored.scale))
    y = model.apply({"params": params, "ranges": ranges}, x)
    check_slack(y, want["y"], float(ranges["output"]["scale"]))


def quant_embedding(case):
    p, given, want = case.entry["params"], case.inputs(), case.expected()
    table = jnp.asarray(given["weight"])
    model = qnn.Embed(*table.shape, policy=qnn.policy(SCHEMES[p["weight_scheme"]](p["n_bits"])))
    ids = jnp.asarray(given["ids"].astype(np.int32))
    ranges = calibrate(model, {"table": table}, [(ids,)])
    y = model.apply({"params": {"table": table}, "ranges": ranges}, ids)
    check_on_grid(y, want["y"], given["weight"][given["ids"]], float(ranges["table"]["scale"]))


def adaround_functions(case):
    given, want = case.inputs(), case.expected()
    alpha, p = jnp.asarray(given["alpha"]), jnp.asarray(given["p"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(rounding.rectified_sigmoid(alpha), want["hard_sigmoid"])
    close(jax.grad(lambda a: jnp.sum(rounding.rectified_sigmoid(a)))(alpha), want["d_hard_sigmoid"])
    close(rounding.rectified_logit(p), want["hard_logit"])
    close(rounding.logit(p), want["logit"])


def temp_decay(case):
    p = case.entry["params"]
    options = AdaRound(
        iterations=p["t_max"],
        warmup=p["warmup"],
        annealing=(p["start"], p["end"]),
        decay=p["decay_type"],
        decay_shape=p["decay_shape"],
        decay_start=p["decay_start"],
    )
    np.testing.assert_allclose(temperature(options, case.inputs()["t"]), case.expected()["b"], rtol=1e-9)


def adaround_run(case):
    """Both layers with the stored inputs, targets and mini-batches; searched scales are searched anew.

    In float64: without clipped weights the first gradients are rounding noise, which Adam makes into steps of full size.
    """
    p, given, want, tolerance = case.entry["params"], case.inputs(), case.expected(), case.entry["tolerance"]
    options = AdaRound(
        solver="relaxation",
        mode=p["mode"],
        init=p["init"],
        iterations=p["iters"],
        learning_rate=p["lr"],
        annealing=tuple(p["annealing"]),
        warmup=p["warmup"],
        decay=p["decay"],
        sum_over="axis_1",
    )
    spec = SCHEMES[p["meth"]](p["wb"])
    with jax.enable_x64(True):
        given = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in given.items()}
        full = jnp.asarray(given["x"])  # what reaches the layer in the full-precision network
        for name, function in (("fc1", ACTIVATIONS["gelu"]), ("fc2", None)):
            weight, others = jnp.asarray(given[f"{name}.weight"].T), {"bias": jnp.asarray(given[f"{name}.bias"])}
            module = qnn.Dense(weight.shape[1], function, dtype=jnp.float64)
            layer = layer_rounding.Layer(module if p["include_act"] else module.clone(activation=None), "kernel")
            data = layer_rounding.Data(jnp.asarray(given[f"{name}.inputs"]), jnp.asarray(given[f"{name}.targets"]))
            scale, zero = (np.reshape(given.get(f"{name}.{key}", 0.0), ()) for key in ("delta", "zero_float"))
            params = quant.QParams(
                jnp.asarray(scale), jnp.asarray(zero), jnp.asarray(given.get(f"{name}.signed", False))
            )
            np.testing.assert_allclose(layer(others, weight, full), data.targets, rtol=1e-4, atol=1e-5)
            if p["init"] != "range_estimator":
                source = data._replace(inputs=full) if p["init"] == "mse_out" else data
                error = functools.partial(layer_rounding.column_errors, layer, others, data=source)
                if p["init"] == "mse":
                    error = functools.partial(lambda w, q: jnp.square(q - w), weight)
                found = layer_rounding.search_scale(spec, weight, error, "tensor")
                np.testing.assert_allclose(found.scale, params.scale, rtol=1e-5)
            temperatures = temperature(options, np.arange(1, p["iters"] + 1))
            trace = want[f"{name}.trace"]
            np.testing.assert_allclose(temperatures, trace[:, 2], rtol=1e-9)
            batches = jnp.asarray(given[f"{name}.batch_idx"].astype(np.int32))
            relaxed = layer_rounding.optimise(
                layer, spec, options, weight, others, params, data, batches, jnp.asarray(temperatures)
            )
            for part, rtol in ((50, tolerance["trace_rtol_first50"]), (None, tolerance["trace_rtol_all"])):
                np.testing.assert_allclose(relaxed.trace[:part], trace[:part, :2], rtol=rtol[name], err_msg=name)
            above = (relaxed.alpha >= 0).astype(weight.dtype)
            codes = rounding.codes_above_floor(spec, weight, params, above)
            agreement = float(np.mean(np.asarray(codes).T == want[f"{name}.w_int"]))
            assert agreement >= tolerance["w_int_min_agreement"][name], f"{name}: {agreement}"
            rounded = rounding.weights_above_floor(spec, weight, params, above)
            nearest = quant.fake_quant(spec, weight, params)
            for quantized, key in ((rounded, "loss_hard_full"), (nearest, "loss_rtn_full")):
                loss = jnp.mean(jnp.square(layer(others, quantized, data.inputs) - data.targets))
                np.testing.assert_allclose(loss, want[f"{name}.{key}"], rtol=tolerance["loss_hard_full_rtol"][name])
            full = module.apply({"params": {"kernel": weight, **others}}, full)


HANDLERS = {
    function.__name__: function
    for function in (
        fake_quant_given_range,
        learned_range_grad,
        range_estimator,
        range_estimator_search,
        bounded_scalar_minimiser,
        peg,
        peg_shared,
        quantization_manager,
        quant_linear,
        quant_layernorm,
        quant_embedding,
        adaround_functions,
        temp_decay,
        adaround_run,
    )
} | bert_cases.HANDLERS
