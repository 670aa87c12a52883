"""Ternary and binary grids against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qtx import quant

ELEMENTS = st.floats(-100, 100, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
TENSORS = hnp.arrays(np.float32, (3, 8), elements=ELEMENTS)
AXES = {"tensor": (quant.per_tensor(), None), "rows": (quant.per_channel(0), 1), "columns": (quant.per_channel(-1), 0)}


def reference(scheme, x, axis):
    x = x.astype(np.float64)
    magnitude = np.abs(x)
    mean = magnitude.mean(axis, keepdims=True)
    if scheme == "binary":
        return np.where(x >= 0, 1, -1), np.broadcast_to(mean, x.shape), np.full(x.shape, np.inf)
    keep = magnitude > 0.7 * mean
    scale = (magnitude * keep).sum(axis, keepdims=True) / np.maximum(keep.sum(axis, keepdims=True), 1)
    return np.sign(x) * keep, np.broadcast_to(scale, x.shape), np.abs(magnitude - 0.7 * mean)


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
@settings(max_examples=30, deadline=None)
@given(x=TENSORS)
def test_against_numpy(scheme, kind, x):
    granularity, axis = AXES[kind]
    spec = getattr(quant, scheme)(granularity)
    codes, scale, distance = reference(scheme, x, axis)
    if np.any((distance > 0) & (distance < 1e-5 * np.abs(x).max(initial=0))):
        return  # float32 may decide otherwise about the threshold
    integers, step, zero = quant.quantize(spec, x)
    if np.all(distance > 0) or scheme == "binary":
        np.testing.assert_array_equal(integers, codes)
        np.testing.assert_allclose(quant.fake_quant(spec, x), codes * scale, rtol=1e-5, atol=1e-6)
    assert set(np.unique(integers)) <= ({-1, 1} if scheme == "binary" else {-1, 0, 1})
    assert np.all(np.asarray(zero) == 0)
    np.testing.assert_array_equal(quant.dequantize(integers, step, zero), quant.fake_quant(spec, x))


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_rows_of_zeros_stay_zeros(scheme):
    spec = getattr(quant, scheme)(quant.per_channel(0))
    x = jnp.array([[0.0, 0.0, -0.0], [1.0, -2.0, 0.1]])
    y = np.asarray(quant.fake_quant(spec, x))
    np.testing.assert_array_equal(y[0], [0, 0, 0])
    np.testing.assert_allclose(
        y[1], [1.5, -1.5, 0] if scheme == "ternary" else np.array([1, -1, 1]) * 3.1 / 3, rtol=1e-6
    )


def test_binary_sign_of_zero_is_plus():
    np.testing.assert_array_equal(quant.quantize(quant.binary(), jnp.array([0.0, -0.0, -1.0]))[0], [1, 1, -1])


def test_ternary_scale_is_the_mean_of_what_is_kept():
    x = jnp.array([1.0, -0.5, 0.3, -3.0])  # threshold 0.84
    np.testing.assert_array_equal(quant.quantize(quant.ternary(), x)[0], [1, 0, 0, -1])
    np.testing.assert_allclose(quant.fake_quant(quant.ternary(), x), [2, 0, 0, -2])


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_gradient_is_the_identity(scheme):
    spec = getattr(quant, scheme)(quant.per_channel(0))
    x, g = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    y, pull = jax.vjp(lambda x: quant.fake_quant(spec, x), x)
    np.testing.assert_array_equal(pull(g)[0], g)
    assert np.any(np.asarray(y) != x)


@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_sixteen_bit_input_keeps_its_dtype(scheme):
    spec, x = getattr(quant, scheme)(), jnp.asarray([1.0, -0.7, 0.01], jnp.bfloat16)
    y = quant.fake_quant(spec, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, quant.fake_quant(spec, x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("scheme", ["ternary", "binary", "loss_aware", "twn"])
def test_a_nan_stays_in_its_row(scheme):
    spec = quant.Spec(
        {"ternary": 2, "binary": 1}.get(scheme, 4), scheme, quant.per_channel(0), range="dynamic", clip=(-2, 2)
    )
    y = quant.fake_quant(spec, jnp.array([[1.0, jnp.nan, 3.0], [1.0, -2.0, 0.1], [0.0, 0.0, 0.0]]))
    assert np.isnan(y[0, 1]) and np.isfinite(y[1]).all() and not np.any(y[2])


@pytest.mark.parametrize("kind", AXES)
def test_statistics_are_those_of_the_clamped_tensor(kind):
    granularity, axis = AXES[kind]
    x, g = np.random.default_rng(1).standard_normal((2, 6, 7)).astype(np.float32) * 2
    spec = quant.ternary(granularity, clip=(-1.0, 1.5))
    y, back = jax.vjp(lambda x: quant.fake_quant(spec, x), jnp.asarray(x))
    codes, scale, _ = reference("ternary", np.clip(x, -1, 1.5), axis)
    np.testing.assert_allclose(y, codes * scale, rtol=1e-6)
    np.testing.assert_array_equal(back(g)[0], g * ((x > -1) & (x < 1.5)))
    np.testing.assert_array_equal(quant.quantize(spec, x)[0], codes)


# --- More bits, loss-aware ---


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("bits", [4, 7])
def test_twn_with_more_bits_against_numpy(bits, kind):
    granularity, axis = AXES[kind]
    x, g = np.random.default_rng(bits).standard_normal((2, 5, 9))
    magnitude = np.abs(x)
    keep = magnitude > magnitude.mean(axis, keepdims=True)
    end = (magnitude * keep).sum(axis, keepdims=True) / keep.sum(axis, keepdims=True)
    step = 2 * end / (2**bits - 1)
    with jax.enable_x64(True):
        spec = quant.Spec(bits, "twn", granularity, range="dynamic")
        y, back = jax.vjp(lambda x: quant.fake_quant(spec, x), jnp.asarray(x))
        np.testing.assert_allclose(y, np.rint(np.clip(x, -end, end) / step) * step, rtol=1e-12)
        np.testing.assert_array_equal(back(jnp.asarray(g))[0], g)
        assert np.abs(quant.quantize(spec, jnp.asarray(x))[0]).max() <= 2 ** (bits - 1)
        np.testing.assert_allclose(
            quant.fake_quant(spec, -jnp.ones((2, 3))), -np.ones((2, 3)) * 2**bits / (2**bits - 1)
        )


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize(("bits", "iterations"), [(2, 1), (2, 11), (4, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_aware_against_numpy(bits, iterations, weighted, kind):
    granularity, axis = AXES[kind]
    rng = np.random.default_rng(bits)
    (x, g), levels = rng.standard_normal((2, 5, 9)), 2 ** (bits - 1) - 1
    curvature = rng.uniform(0.1, 3.0, x.shape) if weighted else np.ones_like(x)
    found = np.sign(x)
    for _ in range(iterations):
        weight = np.abs(found) * curvature
        scale = (weight * np.abs(x)).sum(axis, keepdims=True) / weight.sum(axis, keepdims=True)
        found = np.rint(np.clip(x / scale, -1, 1) * levels) / levels
    with jax.enable_x64(True):
        spec = quant.loss_aware(bits, granularity, iterations=iterations)
        given = jnp.asarray(curvature) if weighted else None
        y, back = jax.vjp(lambda x: quant.fake_quant(spec, x, curvature=given), jnp.asarray(x))
        np.testing.assert_allclose(y, scale * found, rtol=1e-12)
        np.testing.assert_array_equal(back(jnp.asarray(g))[0], g)
        codes = quant.quantize(spec, jnp.asarray(x), curvature=given)[0]
    np.testing.assert_array_equal(codes, np.rint(found * levels))


def test_the_scale_of_a_loss_aware_grid_is_better():
    x = jax.random.normal(jax.random.key(0), (200,))
    errors = [float(jnp.sum((quant.fake_quant(spec, x) - x) ** 2)) for spec in (quant.loss_aware(), quant.ternary())]
    assert errors[0] < errors[1]


# --- Sign and magnitude ---


def test_the_euclidean_norm_in_place_of_the_largest():
    w = jnp.array([[3.0, -4.0], [0.0, 0.0], [5.0, 12.0]])
    codes, step, _ = quant.quantize(quant.magnitude(4, quant.per_channel(0), scale="norm"), w)
    np.testing.assert_allclose(np.ravel(step), np.array([5.0, 0.0, 13.0]) / 15)
    np.testing.assert_array_equal(codes, [[9, -12], [0, 0], [6, 14]])
    whole = quant.quantize(quant.magnitude(4, scale="norm"), w)[1]
    assert float(whole) == pytest.approx(194**0.5 / 15)


@pytest.mark.parametrize("kind", AXES)
@settings(max_examples=20, deadline=None)
@given(x=TENSORS, bits=st.sampled_from([1, 4, 8]))
def test_magnitudes_are_within_a_step_and_on_the_grid(kind, x, bits):
    granularity, axis = AXES[kind]
    spec = quant.magnitude(bits, granularity)
    codes, step, _ = quant.quantize(spec, x)
    levels = 2**bits - 1
    assert np.abs(codes).max() <= levels
    largest = np.abs(x).max(axis, keepdims=True)
    np.testing.assert_allclose(np.broadcast_to(step, x.shape), np.broadcast_to(largest / levels, x.shape), rtol=1e-6)
    value = np.asarray(quant.fake_quant(spec, x))
    assert np.all(np.abs(value - x) <= 0.501 * np.broadcast_to(step, x.shape))
    low, high = (np.asarray(quant.fake_quant(spec, x, noise=np.full(x.shape, u, np.float32))) for u in (0.999999, 0.0))
    assert np.all(np.abs(low) <= np.abs(high) + 1e-6)


@pytest.mark.parametrize(
    "spec", [quant.magnitude(2), quant.symmetric(4, range="dynamic", rounding="stochastic")], ids=str
)
def test_stochastic_rounding_keeps_the_mean(spec):
    x = jnp.linspace(-1.0, 0.9, 24).reshape(4, 6)
    params = None if spec.is_codebook else quant.estimate(spec, x)
    noise = jax.random.uniform(jax.random.key(0), (4000, *x.shape))
    draws = jax.vmap(lambda u: quant.fake_quant(spec, x, params, u))(noise)
    np.testing.assert_allclose(draws.mean(0), x, atol=0.02)
    assert len(np.unique(np.round(np.asarray(draws[:, 1, 1]), 5))) == 2
    nearest = quant.fake_quant(spec, x, params)
    np.testing.assert_array_equal(quant.fake_quant(spec, x, params), nearest)  # without draws nothing is random


def test_codes_wrap_in_a_signed_byte_as_published():
    x = jnp.array([1.0, 0.75, 0.4, -0.75, -1.0, 0.0])
    spec = quant.Spec(8, "magnitude_int8", range="dynamic")
    codes, step, _ = quant.quantize(spec, x)
    np.testing.assert_array_equal(codes, [-1, 191 - 256, 102, 256 - 191, 1, 0])
    np.testing.assert_array_equal(quant.quantize(quant.magnitude(8), x)[0], [255, 191, 102, -191, -255, 0])
    np.testing.assert_allclose(quant.fake_quant(spec, x), codes * step)


# --- Signs with gradients of their own ---


def backward(spec, x, g, progress=1.0):
    return np.asarray(jax.vjp(lambda x: quant.fake_quant(spec, x, progress=progress), x)[1](g)[0])


def test_gradients_of_signs():
    x, g = jnp.array([[-1.5, -1.0, -0.2], [0.3, 1.0, 1.00001]]), jnp.arange(1.0, 7.0).reshape(2, 3)
    inside = np.array([[0, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(backward(quant.binary(), x, g), g)
    for spec in (quant.binary(scale="one", gradient="clipped"), quant.Spec(1, "sign", range="dynamic")):
        np.testing.assert_array_equal(quant.fake_quant(spec, x), np.sign(x))
        np.testing.assert_array_equal(backward(spec, x, g), g * inside)
    assert float(quant.fake_quant(quant.Spec(1, "sign", range="dynamic"), jnp.zeros(1))[0]) == 0


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.95])
def test_ir_net_against_what_it_replaces(progress):
    """Its gradient is that of `scale k tanh(t (w - mean) / std)` with a constant scale, by automatic differentiation."""
    w = jax.random.normal(jax.random.key(0), (6, 5)) * jnp.arange(1.0, 6.0)
    g = jax.random.normal(jax.random.key(1), w.shape)
    spec = quant.ir_net(quant.per_channel(1))
    codes, scale, _ = quant.quantize(spec, w)
    assert set(np.unique(codes)) == {-1, 1}
    np.testing.assert_array_equal(np.log2(scale), np.round(np.log2(scale)))
    t = 10 ** (-1 + 2 * progress)

    def soft(w):
        standard = (w - w.mean(0)) / jnp.std(w, axis=0, ddof=1)
        return scale * max(1 / t, 1) * jnp.tanh(t * standard)

    np.testing.assert_allclose(backward(spec, w, g, progress), jax.vjp(soft, w)[1](g)[0], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(quant.fake_quant(spec, w, progress=progress), codes * scale)


def test_constant_rows_are_finite():
    w = jnp.stack([jnp.full(4, 0.5), jnp.zeros(4), jnp.arange(4.0)])
    for spec in (quant.ir_net(quant.per_channel(0)), quant.Spec(1, "tanh", quant.per_channel(0), range="dynamic")):
        assert np.isfinite(quant.fake_quant(spec, w, progress=0.5)).all()
        assert np.isfinite(backward(spec, w, jnp.ones_like(w), 0.5)).all()


@pytest.mark.parametrize("granularity", [quant.per_channel(1), quant.per_tensor()])
def test_constants_are_zeros_on_the_grid_of_two_states(granularity):
    for value in (0.1, 0.3, -0.02, 1 / 3, 1e-3):
        for length in (1, 7, 12, 384):
            w = jnp.full((length, 2), value)
            np.testing.assert_array_equal(quant.fake_quant(quant.absmean(2, granularity), w), 0)


def test_what_does_not_go_together():
    for fields, words in [
        (dict(scheme="ternary", bits=4), "bits=2"),
        (dict(scheme="magnitude", bits=16), "1 to 15"),
        (dict(scheme="binary", bits=1, scale="norm"), "magnitude grids, not 'binary'"),
        (dict(scheme="magnitude", bits=4, scale="one"), "ternary and binary"),
        (dict(scheme="symmetric", bits=8, gradient="clipped", range="static"), "ternary and binary"),
        (dict(scheme="binary", bits=1, rounding="stochastic"), "not rounded"),
        (dict(scheme="symmetric", bits=8, rounding="floor", range="static"), "'shifted'"),
        (dict(scheme="shifted", bits=8, range="static"), "'shifted'"),
        (dict(scheme="offset", bits=8, range="static", estimator=quant.Search()), "minimum and maximum"),
        (dict(scheme="binary", bits=1, gradient="decayed"), "'decay'"),
    ]:
        with pytest.raises(quant.spec.UserError, match=words):
            quant.Spec(**{"range": "dynamic", **fields})
    with pytest.raises(quant.spec.UserError, match="no codes"):
        quant.quantize(quant.Spec(1, "tanh", range="dynamic"), jnp.ones(3))


@pytest.mark.parametrize("states", [2, 3, 4, 5])
@settings(max_examples=15, deadline=None)
@given(x=TENSORS, kind=st.sampled_from(sorted(AXES)))
def test_states_against_numpy(states, kind, x):
    granularity, axis = AXES[kind]
    spec = quant.absmean(states, granularity)
    wide = x.astype(np.float64)
    scale = np.maximum(np.abs(wide).mean(axis, keepdims=True), 1e-5)
    if states == 2:
        centred = wide - wide.mean(axis, keepdims=True)
        want, distance = np.sign(centred), np.abs(centred) / scale
    else:
        level = wide / scale
        want = np.clip(np.round(level), -(states // 2), (states - 1) // 2)
        distance = np.abs(np.abs(level - np.trunc(level)) - 0.5)
    integers, step, _ = quant.quantize(spec, x)
    clear = distance > 1e-5  # float32 may decide otherwise about what is close
    np.testing.assert_array_equal(np.asarray(integers)[clear], want[clear])
    np.testing.assert_allclose(np.broadcast_to(step, x.shape), np.broadcast_to(scale, x.shape), rtol=1e-6)
    y, back = jax.vjp(lambda x: quant.fake_quant(spec, x), x)
    np.testing.assert_array_equal(y, integers * step)
    np.testing.assert_array_equal(back(x)[0], x)


def test_states_of_zeros_ties_and_tiny_values():
    x = np.float32([[0, 0, 0, 0], [3, 3, 3, 3], [2.5, -2.5, 0.5, -0.5], [1e-6, -1e-6, 0, 0]])
    got = {
        states: np.asarray(quant.quantize(quant.absmean(states, quant.per_channel(0)), x)[0]) for states in (2, 3, 4, 5)
    }
    np.testing.assert_array_equal(got[2], [[0] * 4, [0] * 4, [1, -1, 1, -1], [1, -1, 0, 0]])
    np.testing.assert_array_equal(got[3], [[0] * 4, [1] * 4, [1, -1, 0, 0], [0] * 4])
    np.testing.assert_array_equal(got[4], [[0] * 4, [1] * 4, [1, -2, 0, 0], [0] * 4])
    np.testing.assert_array_equal(got[5], [[0] * 4, [1] * 4, [2, -2, 0, 0], [0] * 4])
    assert np.isnan(np.asarray(quant.fake_quant(quant.absmean(3, quant.per_channel(0)), x * np.float32(np.nan)))).all()
