"""Uniform grids against a second implementation in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qtx import quant
from qtx.quant import grid
from qtx.quant.exact import divide

SCHEMES = {"symmetric": quant.symmetric, "asymmetric": quant.asymmetric}
N = 12

floats = functools.partial(st.floats, width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
ELEMENTS = floats(-4.0, 4.0) | floats(-(2.0**100), 2.0**100) | st.sampled_from([0.0, -0.0, 0.5, -1.5, 1e-8, -1e-8])
TENSORS = hnp.arrays(np.float32, N, elements=ELEMENTS)

fake_quant = jax.jit(quant.fake_quant, static_argnums=0)


def reference_params(scheme, bits, low, high, eps=1e-8):
    """Scale, zero point (not rounded), limits in float64: reference, sections 2.1 and 2.2."""
    low, high = min(float(low), 0.0), max(float(high), eps)
    if scheme == "asymmetric":
        step = (high - low) / (2**bits - 1)
        return step, -low / step, 0, 2**bits - 1
    q_min, q_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low < 0 else (0, 2**bits - 1)
    return max(-low, high) / q_max, 0.0, q_min, q_max


def reference_levels(x, scale, zero_point, q_min, q_max):
    """Integers by IEEE float32 division, everything after it in float64."""
    ratio = np.divide(x, np.float32(scale), dtype=np.float32).astype(np.float64)
    return np.clip(np.rint(ratio) + zero_point, q_min, q_max)


def params_of(spec, low, high):
    return quant.qparams(spec, jnp.float32(low), jnp.float32(high))


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 16), x=TENSORS)
@example(bits=8, x=np.zeros(N, np.float32))
@example(bits=2, x=np.full(N, 3.7, np.float32))
@example(bits=4, x=np.full(N, -3.7, np.float32))
@example(bits=16, x=np.linspace(-1e30, 1e30, N, dtype=np.float32))
@example(bits=8, x=np.linspace(-1e-12, 1e-12, N, dtype=np.float32))
@example(bits=3, x=(np.arange(N, dtype=np.float32) - 4) / 2)
def test_against_numpy(scheme, bits, x):
    spec = SCHEMES[scheme](bits)
    params = params_of(spec, x.min(), x.max())
    step, zero, q_min, q_max = reference_params(scheme, bits, x.min(), x.max())
    np.testing.assert_allclose(params.scale, step, rtol=3e-7)
    np.testing.assert_allclose(params.zero_point, zero, rtol=6e-7, atol=1e-30)

    integers, scale, offset = (np.asarray(v) for v in quant.quantize(spec, x, params))
    assert scale == max(np.asarray(params.scale), np.float32(1e-8))
    assert offset == (np.clip(np.rint(np.asarray(params.zero_point)), q_min, q_max) if scheme == "asymmetric" else 0)
    np.testing.assert_array_equal(integers, reference_levels(x, scale, offset, q_min, q_max))
    assert integers.dtype == np.int32 and integers.min() >= q_min and integers.max() <= q_max

    on_grid = np.asarray(quant.fake_quant(spec, x, params))
    np.testing.assert_array_equal(on_grid, scale * (integers - offset).astype(np.float32))
    # Inside the range the error is half a step; the rounded zero point can push an end out by another half.
    slack = 0.5 if scheme == "symmetric" else 1.0
    assert np.all(np.abs(on_grid.astype(np.float64) - x) <= scale.astype(np.float64) * slack * (1 + 1e-2))
    # Monotone, and zero stays zero.
    assert np.all(np.diff(on_grid[np.argsort(x, kind="stable")]) >= 0)
    assert np.all(on_grid[x == 0] == 0)
    # Twice is once, bit for bit; so is the way over the integers.
    np.testing.assert_array_equal(quant.fake_quant(spec, jnp.asarray(on_grid), params), on_grid)
    np.testing.assert_array_equal(quant.dequantize(jnp.asarray(integers), scale, offset), on_grid)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_compiled_equals_eager_bit_for_bit(scheme, bits):
    spec = SCHEMES[scheme](bits)
    rng = np.random.default_rng(bits)
    for low, high in [(-1.0, 0.37), (0.0, 7.0), (-3e-3, 5.1), (-123.456, -1.0)]:
        params = params_of(spec, low, high)
        _, scale, _ = quant.quantize(spec, jnp.zeros(1), params)
        ties = (np.arange(-600, 600) + 0.5).astype(np.float32) * np.asarray(scale)
        x = jnp.asarray(np.concatenate([rng.uniform(low - 1, high + 1, 2000).astype(np.float32), ties]))
        eager = np.asarray(quant.fake_quant(spec, x, params))
        np.testing.assert_array_equal(fake_quant(spec, x, params), eager)
        integers, scale, offset = jax.jit(quant.quantize, static_argnums=0)(spec, x, params)
        np.testing.assert_array_equal(quant.dequantize(integers, scale, offset), eager)


@pytest.mark.parametrize("scale", [0.1, 3.7e-3, 7.0, 1e-8, 123.4])
def test_divide_is_ieee_division(scale):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20000) * 10.0 ** rng.uniform(-6, 6, 20000)).astype(np.float32)
    scale = np.float32(scale)
    want = x / scale
    np.testing.assert_array_equal(divide(x, scale), want)
    np.testing.assert_array_equal(jax.jit(divide)(x, scale), want)
    np.testing.assert_array_equal(jax.jit(lambda x: divide(x, float(scale)))(x), want)
    rows = np.stack([x[:50], x[50:100]]), np.array([[scale], [2.3]], np.float32)
    np.testing.assert_array_equal(jax.jit(divide)(*rows), rows[0] / rows[1])


def test_plain_compiled_division_is_not():
    """The reason for `divide`; if this fails, the compiler has changed and `exact` may be superfluous."""
    x = np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    assert np.any(np.asarray(jax.jit(lambda x, s: x / s)(x, np.float32(0.1))) != x / np.float32(0.1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_exact_ties_go_to_even(bits):
    spec = quant.symmetric(bits)
    half = 2 ** (bits - 1)
    params = params_of(spec, -(half - 1) * 0.25, (half - 1) * 0.25)  # the step is 0.25 exactly
    k = np.arange(-half, half)
    want = np.clip(np.rint(k + 0.5), -half, half - 1)
    np.testing.assert_array_equal(fake_quant(spec, jnp.asarray((k + 0.5) * 0.25, jnp.float32), params), want * 0.25)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("signed", [False, True])
def test_limits(scheme, signed):
    low, high = grid.limits(SCHEMES[scheme](4), jnp.asarray(signed))
    assert (low, high) == ((-8, 7) if scheme == "symmetric" and signed else (0, 15))


def test_sidedness_is_one_decision_for_all_rows():
    spec = quant.symmetric(4, quant.per_channel(0))
    one_sided = quant.estimate(spec, jnp.array([[0.0, 1.5], [3.0, 2.0]]))
    assert not one_sided.signed
    np.testing.assert_allclose(one_sided.scale, [0.1, 0.2], rtol=1e-6)
    mixed = quant.estimate(spec, jnp.array([[0.0, 1.4], [-0.7, 0.2]]))
    assert mixed.signed
    np.testing.assert_allclose(mixed.scale, [0.2, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(quant.quantize(spec, jnp.array([[-9.0, 9.0]] * 2), mixed)[0], [[-8, 7]] * 2)
    # Calibrated on one side, negative values later clip to zero.
    np.testing.assert_array_equal(quant.fake_quant(spec, -jnp.ones((2, 2)), one_sided), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("granularity", "axis"), [(quant.per_tensor(), None), (quant.per_token(), -1), (quant.Granularity((0, 1)), (2, 3))]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip", [None, (-0.75, 2.0)])
def test_narrow_grids_against_numpy_in_float64(bits, clip, granularity, axis):
    x, g = np.random.default_rng(bits).standard_normal((2, 2, 3, 4, 5))
    x.reshape(-1)[:3] = -0.75, 2.0, 2.5
    low, high = clip or (-np.inf, np.inf)
    clamped, levels = np.clip(x, low, high), 2 ** (bits - 1) - 1
    step = np.abs(clamped).max(axis, keepdims=True) / levels
    with jax.enable_x64(True):
        spec = quant.Spec(bits, "narrow", granularity, range="dynamic", clip=clip).at(-1, x.ndim)

        def run(x):
            return quant.fake_quant(spec, x, quant.estimate(spec, x))

        y, back = jax.vjp(run, jnp.asarray(x))
        np.testing.assert_allclose(y, np.rint(clamped / step) * step, rtol=1e-12)
        np.testing.assert_array_equal(back(jnp.asarray(g))[0], g * ((x > low) & (x < high)))
        codes, _, zero = quant.quantize(spec, jnp.asarray(x), quant.estimate(spec, jnp.asarray(x)))
    assert np.abs(codes).max() == levels and not np.any(zero)


def test_narrow_grids_are_signed_on_one_sided_data():
    spec, x = quant.Spec(8, "narrow"), jnp.array([0.0, 0.1, 1.27])
    params = quant.estimate(spec, x)
    np.testing.assert_array_equal(quant.quantize(spec, x, params)[0], [0, 10, 127])
    np.testing.assert_array_equal(quant.quantize(spec, -2 * x, params)[0], [0, -20, -127])


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_offset_grids_with_a_clip_against_numpy_in_float64(bits):
    x, g = np.random.default_rng(bits).standard_normal((2, 6, 7)) * 1.5
    clamped, levels = np.clip(x, -1.0, 1.5), 2**bits - 1
    low, width = clamped.min(1, keepdims=True), np.ptp(clamped, axis=1, keepdims=True)
    with jax.enable_x64(True):
        spec = quant.Spec(bits, "offset", quant.per_channel(0), range="dynamic", clip=(-1.0, 1.5))
        y, back = jax.vjp(lambda x: quant.fake_quant(spec, x, quant.estimate(spec, x)), jnp.asarray(x))
        np.testing.assert_allclose(y, np.rint((clamped - low) / width * levels) / levels * width + low, atol=1e-12)
        np.testing.assert_array_equal(back(jnp.asarray(g))[0], g * ((x > -1) & (x < 1.5)))


def test_looked_up_rows_are_those_of_the_quantized_table():
    table, ids = jax.random.normal(jax.random.key(0), (9, 4)) * 2, jnp.array([[3, 0, 3], [8, 1, 3]])
    g = jax.random.normal(jax.random.key(1), (2, 3, 4))
    for spec in (
        quant.ternary(quant.per_channel(0), clip=(-2.5, 2.5)),
        quant.ternary(),
        quant.ternary(quant.per_channel(1)),
    ):
        y, back = jax.vjp(lambda table, spec=spec: grid.fake_quant_rows(spec, table, ids), table)
        want, wanted = jax.vjp(lambda table, spec=spec: quant.fake_quant(spec, table)[ids], table)
        np.testing.assert_array_equal(y, want)
        np.testing.assert_allclose(back(g)[0], wanted(g)[0], rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme):
    spec, x = SCHEMES[scheme](8), jnp.zeros((2, 3))
    params = quant.estimate(spec, x)
    assert np.isfinite(params.scale) and np.isfinite(params.zero_point)
    np.testing.assert_array_equal(quant.fake_quant(spec, x, params), x)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-3, 1e20])
def test_constants_keep_their_value(scheme, value):
    """The one value is the end of its range, so it is on the grid, up to rounding of the step.

    The signed symmetric grid has its ends at +-absmax too.
    """
    spec, x = SCHEMES[scheme](8), jnp.full((4,), value)
    np.testing.assert_allclose(quant.fake_quant(spec, x, quant.estimate(spec, x)), x, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_propagates_and_infinity_saturates(scheme):
    spec = SCHEMES[scheme](4)
    params = params_of(spec, -1.0, 2.0)
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e30, -1e30, 0.0])
    y = np.asarray(quant.fake_quant(spec, x, params))
    assert np.isnan(y[0])
    assert y[1] == y[3] > 1 and y[2] == y[4] < -0.9 and y[5] == 0
    assert np.all(np.isfinite(y[1:]))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_ranges_of_broken_data_are_not_finite(scheme, bad):
    spec, x = SCHEMES[scheme](8), jnp.array([-1.0, bad, 2.0])
    assert not np.isfinite(quant.estimate(spec, x).scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("learned", [False, True])
def test_sixteen_bit_floats_are_quantized_in_float32(scheme, dtype, learned):
    spec = SCHEMES[scheme](8, range="learned" if learned else "static")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), dtype)
    params = quant.estimate(spec, x)
    assert params.scale.dtype == jnp.float32
    y = quant.fake_quant(spec, x, params)
    assert y.dtype == dtype
    exact = quant.fake_quant(spec, x.astype(jnp.float32), params)
    np.testing.assert_array_equal(y, exact.astype(dtype))
    np.testing.assert_array_equal(
        quant.quantize(spec, x, params)[0], quant.quantize(spec, x.astype(jnp.float32), params)[0]
    )
    gradient = jax.grad(lambda x: jnp.sum(quant.fake_quant(spec, x, params).astype(jnp.float32)))(x)
    assert gradient.dtype == dtype


def test_large_integers_survive_bfloat16():
    """255 needs eight significant bits and the ratio more: in bfloat16 arithmetic neighbours would collapse."""
    spec = quant.asymmetric(16)
    x = jnp.linspace(0, 1, 3000).astype(jnp.bfloat16)
    integers, scale, zero = quant.quantize(spec, x, params_of(spec, 0.0, 1.0))
    want = np.rint(np.asarray(x, np.float32) / np.asarray(scale))
    np.testing.assert_array_equal(integers, want)


@pytest.mark.parametrize("domain", ["linear", "log", "softplus"])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 0.7, 30.0, 1e4])
def test_scale_domains_are_inverses(domain, scale):
    spec = quant.symmetric(8, scale_domain=domain)
    stored = grid.to_domain(spec, jnp.float32(scale))
    np.testing.assert_allclose(grid.effective_scale(spec, stored), scale, rtol=5e-6)
    if domain != "linear":
        assert abs(
            float(stored) - (np.log(scale) if domain == "log" else scale + np.log(-np.expm1(-scale)))
        ) <= 2e-6 * (1 + abs(float(stored)))


def test_linear_scale_has_a_floor():
    spec = quant.symmetric(8, eps=1e-3)
    np.testing.assert_array_equal(
        grid.effective_scale(spec, jnp.array([-1.0, 0.0, 9e-4, 1e-3, 2e-3])), np.float32([1e-3, 1e-3, 1e-3, 1e-3, 2e-3])
    )


def test_stored_zero_point_is_rounded_and_clipped_when_read():
    spec = quant.asymmetric(4)
    stored = jnp.array([-3.0, -0.4, 2.5, 3.5, 14.7, 99.0])
    np.testing.assert_array_equal(grid.effective_zero_point(spec, stored), [0, 0, 2, 4, 15, 15])
    np.testing.assert_array_equal(grid.effective_zero_point(quant.symmetric(4), stored), np.zeros(6))


GRANULARITIES = {
    "tensor": quant.per_tensor(),
    "channel0": quant.per_channel(0),
    "position": quant.per_position(),
    "embedding": quant.per_embedding(),
    "token": quant.Granularity((0, 1)),
    "groups": quant.per_group(3),
    "groups of axis 1": quant.Granularity(1, groups=2),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_granularity_is_per_tensor_on_every_part(scheme, kind):
    spec, plain = SCHEMES[scheme](4, GRANULARITIES[kind]), SCHEMES[scheme](4)
    x = np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    x[0] *= 5
    got = np.asarray(quant.fake_quant(spec, x, quant.estimate(spec, x)))
    index = np.arange(x.size).reshape(x.shape)
    parts = {
        "tensor": [index],
        "channel0": [index[i] for i in range(2)],
        "position": [index[:, i] for i in range(4)],
        "embedding": [index[..., i] for i in range(6)],
        "token": [index[i, j] for i in range(2) for j in range(4)],
        "groups": [index[..., i : i + 2] for i in (0, 2, 4)],
        "groups of axis 1": [index[:, i : i + 2] for i in (0, 2)],
    }[kind]
    assert sum(part.size for part in parts) == x.size
    want = np.zeros(x.size, np.float32)
    for part in parts:
        piece = jnp.asarray(x.ravel()[part.ravel()])
        want[part.ravel()] = quant.fake_quant(plain, piece, quant.estimate(plain, piece))
    np.testing.assert_array_equal(got.ravel(), want)


def test_permuted_groups_follow_their_members():
    x = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32) * np.array([9, 1, 5, 1, 9, 5], np.float32)
    group = jnp.array([2, 0, 1, 0, 2, 1])
    spec = quant.asymmetric(4, quant.per_group(3, permute=True))
    got = quant.fake_quant(spec, x, quant.estimate(spec, x, group=group))
    for k in range(3):
        members = np.flatnonzero(np.asarray(group) == k)
        piece = jnp.asarray(x[:, members])
        plain = quant.asymmetric(4)
        np.testing.assert_array_equal(got[:, members], quant.fake_quant(plain, piece, quant.estimate(plain, piece)))


def test_offset_grid_holds_its_lower_end_and_shifted_adds_it():
    x = jnp.array([2.0, 2.6, 3.4, 5.0, 7.0, 1.0])
    spec = quant.Spec(3, "offset")
    params = quant.qparams(spec, jnp.float32(2.0), jnp.float32(5.5))
    want = np.array([2.0, 2.5, 3.5, 5.0, 5.5, 2.0])
    np.testing.assert_allclose(quant.fake_quant(spec, x, params), want, rtol=1e-6)
    np.testing.assert_allclose(quant.dequantize(*quant.quantize(spec, x, params)), want, rtol=1e-6)
    gradient = jax.grad(lambda x: quant.fake_quant(spec, x, params).sum())(x)
    np.testing.assert_array_equal(gradient, [1, 1, 1, 1, 0, 0])
    published = quant.Spec(3, "shifted", rounding="truncate")
    np.testing.assert_allclose(quant.fake_quant(published, x, params), [4, 4.5, 5, 7, 7.5, 4], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: quant.fake_quant(published, x, params).sum())(x), np.ones(6))


def test_beyond_the_range_of_a_shifted_grid_is_as_at_its_end():
    """The end is a range divided by its step, one rounding below the greatest level or at it (AG_NEWS study, section 5.3)."""
    spec = quant.Spec(8, "shifted", rounding="truncate")
    for high in np.float32([2.0643928, 1.0, 0.37, 5.3]):
        params = quant.qparams(spec, jnp.float32(0.0), high)
        step = high / np.float32(255)
        x = np.float32([high, 1.5 * high, 10 * high])
        want = np.trunc(np.clip(x, 0, high) / step) * step
        np.testing.assert_allclose(quant.fake_quant(spec, jnp.asarray(x), params), want, rtol=1e-6)
    rows = quant.Spec(8, "shifted", quant.per_channel(0), rounding="truncate")
    table = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params, ids = quant.estimate(rows, table), jnp.array([4, 0, 4])
    looked_up = grid.fake_quant_rows(rows, jnp.asarray(table), ids, params)
    np.testing.assert_array_equal(looked_up, quant.fake_quant(rows, jnp.asarray(table), params)[ids])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constants_on_an_offset_grid_stay_and_keep_their_gradient(bits):
    spec = quant.Spec(bits, "offset", quant.per_channel(0), range="dynamic")
    rows = np.random.default_rng(0).normal(size=100).astype(np.float32)[:, None]
    x = jnp.concatenate([jnp.broadcast_to(rows, (100, 3)), jnp.zeros((1, 3))])

    def quantized(x):
        return quant.fake_quant(spec, x, quant.estimate(spec, x))

    np.testing.assert_allclose(quantized(x), x, rtol=3e-7)
    np.testing.assert_array_equal(jax.grad(lambda x: quantized(x).sum())(x), 1)
    packed = quant.quantize(spec, x, quant.estimate(spec, x))
    np.testing.assert_array_equal(quant.dequantize(*packed), quantized(x))


def test_a_full_grid_is_signed_and_its_ends_lie_half_a_step_outside():
    spec = quant.Spec(4, "full", quant.per_channel(0))
    x = np.array([[1.5, -1.5, 0.0], [3.0, 0.2, 0.05]], np.float32)
    params = quant.estimate(spec, x)
    np.testing.assert_allclose(params.scale, [0.2, 0.4], rtol=1e-6)
    assert params.signed
    np.testing.assert_allclose(quant.fake_quant(spec, x, params), [[1.4, -1.6, 0], [2.8, 0, 0]], atol=1e-6)
