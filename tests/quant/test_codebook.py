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
