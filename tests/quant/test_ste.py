"""Straight-through gradients against what the docstrings claim, in float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx import quant
from qtx.quant import grid, ste

SCHEMES = {"symmetric": quant.symmetric, "asymmetric": quant.asymmetric}


def reference_grads(x, g, scale, zero_point, q_min, q_max):
    """dx and the element-wise contributions to d scale and d zero point."""
    ratio = x.astype(np.float64) / np.float64(scale)
    level = np.rint(np.float32(x) / np.float32(scale)) + zero_point
    above, below = level > q_max, level < q_min
    d_scale = np.where(above, q_max - zero_point, np.where(below, q_min - zero_point, level - zero_point - ratio))
    inside = ~(above | below)
    return g * inside, g * d_scale, -np.float64(scale) * g * ~inside


def test_round_passes_the_gradient():
    x, g = jnp.array([-2.5, -0.5, 0.5, 1.5, 1.6]), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    y, pull = jax.vjp(ste.round_ste, x)
    np.testing.assert_array_equal(y, [-2, 0, 0, 2, 2])
    np.testing.assert_array_equal(pull(g)[0], g)


def test_clip_is_inclusive_at_both_edges():
    x = jnp.array([-1.0001, -1.0, 0.0, 2.0, 2.0001])
    y, pull = jax.vjp(lambda x: ste.clip_ste(x, -1.0, 2.0), x)
    np.testing.assert_array_equal(y, jnp.array([-1.0, -1.0, 0.0, 2.0, 2.0]))
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], [0, 1, 1, 1, 0])


def test_clip_inside_is_exclusive_at_both_edges():
    x = jnp.array([-3.0, -2.5, -2.4, 0.0, 1.9, 2.0, 4.0, jnp.nan])
    y, back = jax.vjp(lambda x: ste.clip_inside(x, -2.5, 2.0), x)
    np.testing.assert_array_equal(y, [-2.5, -2.5, x[2], 0, x[4], 2, 2, np.nan])
    np.testing.assert_array_equal(back(jnp.full(8, 3.0))[0], [0, 0, 3, 3, 3, 0, 0, 0])


def test_identity_sends_everything_to_its_first_argument():
    x, q, g = jnp.array([1.0, 2.0]), jnp.array([5.0, 6.0]), jnp.array([3.0, 4.0])
    y, pull = jax.vjp(ste.identity_ste, x, q)
    np.testing.assert_array_equal(y, q)
    dx, dq = pull(g)
    np.testing.assert_array_equal(dx, g)
    np.testing.assert_array_equal(dq, [0, 0])


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8, 16]),
    ends=st.tuples(st.floats(-5, 0), st.floats(0.01, 5)),
    seed=st.integers(0, 2**16),
)
def test_uniform_gradients(scheme, bits, ends, seed):
    spec = SCHEMES[scheme](bits, range="learned")
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 4)) * 3).astype(np.float32)
    g = rng.standard_normal((3, 4)).astype(np.float32)
    params = quant.qparams(spec, *(jnp.float32(end) for end in ends))
    used = grid.affine(spec, params, x.shape)
    dx, d_scale, d_zero, *d_limits = jax.vjp(ste.uniform, x, *used)[1](g)
    want = reference_grads(x, g, *(np.asarray(v) for v in used))
    np.testing.assert_array_equal(dx, want[0].astype(np.float32))
    # [r] - r loses what float32 holds of r.
    slack = 2e-7 * 2**bits * np.abs(g).sum()
    np.testing.assert_allclose(d_scale, want[1].sum(), rtol=2e-5, atol=slack)
    np.testing.assert_allclose(d_zero, want[2].sum(), rtol=2e-5, atol=1e-6 * float(used.scale) * np.abs(g).sum())
    assert all(float(d) == 0 for d in d_limits)
    # A fixed range: the same value and dx, nothing for the rest.
    y, pull = jax.vjp(ste.uniform_fixed, x, *used)
    np.testing.assert_array_equal(y, ste.uniform(x, *used))
    fixed_dx, *others = pull(g)
    np.testing.assert_array_equal(fixed_dx, dx)
    assert all(np.all(np.asarray(other) == 0) for other in others)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_elements_on_the_edge_keep_their_gradient(scheme, learned):
    spec = SCHEMES[scheme](3, range="learned" if learned else "static")
    step = 0.5
    q_min, q_max, zero = {"symmetric": (-4, 3, 0), "asymmetric": (0, 7, 3)}[scheme]
    params = quant.QParams(jnp.float32(step), jnp.float32(zero), jnp.asarray(True))
    low, high = (q_min - zero) * step, (q_max - zero) * step
    # Exactly on the ends; rounding onto them from outside; just too far out; far out.
    x = jnp.array([low, high, low - 0.24, high + 0.24, low - 0.26, high + 0.26, -99.0, 99.0])
    dx = jax.grad(lambda x: jnp.sum(quant.fake_quant(spec, x, params)))(x)
    np.testing.assert_array_equal(dx, [1, 1, 1, 1, 0, 0, 0, 0])


def test_min_max_ranges_clip_no_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
    spec = quant.symmetric(8)
    dx = jax.grad(lambda x: jnp.sum(quant.fake_quant(spec, x, quant.estimate(spec, x))))(x)
    np.testing.assert_array_equal(dx, np.ones(1000))


def surrogate(x, g, stored, domain, zero_point, q_min, q_max, at):
    """sum g s (clip(x/s + c + z) - z) in float64; c, the rounding residue, and the mask are those at `at`."""

    def scale_of(v):
        return {"linear": lambda v: v, "log": np.exp, "softplus": lambda v: np.log1p(np.exp(v))}[domain](v)

    ratio = x / scale_of(at)
    residue = np.rint(ratio) - ratio
    level = np.rint(ratio) + zero_point
    scale = scale_of(stored)
    free = np.clip(x / scale + residue + zero_point, -1e9, 1e9)
    value = np.where(level > q_max, q_max, np.where(level < q_min, q_min, free))
    return float(np.sum(g.astype(np.float64) * scale * (value - zero_point)))


@pytest.mark.parametrize("domain", ["linear", "log", "softplus"])
@pytest.mark.parametrize("scheme", [*SCHEMES, "narrow"])  # of narrow grids the scale is a clip: +-7 scale
def test_learned_scale_against_finite_differences(scheme, domain):
    spec = quant.Spec(4, scheme, range="learned", scale_domain=domain)
    rng = np.random.default_rng(3)
    x, g = (rng.standard_normal(40).astype(np.float32) for _ in range(2))
    params = quant.qparams(spec, jnp.float32(-0.9), jnp.float32(1.1))  # narrower than the data: both ends clip
    found = jax.grad(lambda p: jnp.sum(g * quant.fake_quant(spec, x, p)), allow_int=True)(params)
    used = grid.affine(spec, params, x.shape)
    limits = [float(v) for v in (used.zero_point, used.q_min, used.q_max)]
    at, h = float(params.scale), 1e-6
    high, low = (surrogate(x.astype(np.float64), g, at + d, domain, *limits, at) for d in (h, -h))
    np.testing.assert_allclose(found.scale, (high - low) / (2 * h), rtol=1e-4)
    assert abs(float(found.scale)) > 1e-2


def test_no_gradient_for_a_scale_below_the_floor():
    spec = quant.symmetric(8, range="learned", eps=1e-3)

    def value(scale):
        return jnp.sum(quant.fake_quant(spec, jnp.array([5.0]), quant.QParams(scale, jnp.zeros(()), jnp.asarray(True))))

    assert jax.grad(value)(jnp.float32(9e-4)) == 0
    assert jax.grad(value)(jnp.float32(1e-3)) == 127  # on the floor: inclusive


def test_learned_zero_point_is_straight_through_inside_and_dead_outside():
    spec = quant.asymmetric(3, range="learned")

    def value(zero):
        return jnp.sum(
            quant.fake_quant(spec, jnp.array([99.0, 98.0]), quant.QParams(jnp.float32(0.5), zero, jnp.asarray(False)))
        )

    gradient = jax.grad(value)
    for zero, want in [(2.3, -1.0), (0.0, -1.0), (7.0, -1.0), (-0.4, -1.0), (7.4, -1.0), (-0.6, 0.0), (7.6, 0.0)]:
        assert gradient(jnp.float32(zero)) == want, zero


def test_symmetric_grids_have_no_zero_point_to_learn():
    spec = quant.symmetric(3, range="learned")
    x = jnp.array([9.0, -9.0, 0.3])
    found = jax.grad(lambda p: jnp.sum(quant.fake_quant(spec, x, p) ** 2), allow_int=True)(
        quant.qparams(spec, jnp.float32(-1), jnp.float32(1))
    )
    assert found.zero_point == 0 and found.scale != 0


@pytest.mark.parametrize("permute", [False, True])
def test_group_ranges_sum_the_gradients_of_their_members(permute):
    spec = quant.asymmetric(3, quant.per_group(3, permute), range="learned")
    rng = np.random.default_rng(4)
    x, g = (rng.standard_normal((2, 4, 6)).astype(np.float32) for _ in range(2))
    group = jnp.array([1, 0, 2, 2, 0, 1]) if permute else None
    params = quant.qparams(spec, jnp.array([-0.5, -1.0, -0.2]), jnp.array([0.7, 0.9, 1.5]), group)
    found = jax.grad(lambda p: jnp.sum(g * quant.fake_quant(spec, x, p)), allow_int=True)(params)
    members = np.asarray(group) if permute else np.repeat(np.arange(3), 2)
    for k in range(3):
        pick = members == k
        used = float(params.scale[k]), np.rint(float(params.zero_point[k])), 0, 7
        _, d_scale, d_zero = reference_grads(x[..., pick], g[..., pick], *used)
        np.testing.assert_allclose(found.scale[k], d_scale.sum(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.zero_point[k], d_zero.sum(), rtol=1e-4, atol=1e-5)
        assert abs(d_zero.sum()) > 1e-3


@pytest.mark.parametrize("rule", ["static", "dynamic"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranges_that_are_not_learned_get_no_gradient(scheme, rule):
    spec = SCHEMES[scheme](3, range=rule)
    x = jnp.array([5.0, -5.0, 0.3])
    params = quant.qparams(spec, jnp.float32(-1), jnp.float32(1))
    found = jax.grad(lambda p: jnp.sum(quant.fake_quant(spec, x, p) ** 2), allow_int=True)(params)
    assert found.scale == 0 and found.zero_point == 0


def test_estimated_ranges_carry_no_gradient():
    x = jnp.array([[5.0, -5.0, 0.3], [1.0, 2.0, -3.0]])
    for name in ("current_minmax", "percentile", "mse"):
        spec = quant.asymmetric(2, estimator=quant.estimator(name), range="learned")
        gradient = jax.grad(lambda x, spec=spec: quant.estimate(spec, x).scale)(x)
        np.testing.assert_array_equal(gradient, np.zeros_like(x), err_msg=name)


SHAPES = (64, 6), (3, 25, 8), (2, 3, 22, 4), (2, 13, 4), (4, 1, 8)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "shape, kept", [((), ()), ((128,), ()), *((s, k) for s in SHAPES for k in ((), (0,), (len(s) - 2,), (len(s) - 1,)))]
)
def test_gradients_are_summed_over_all_that_share_a_range(shape, kept, compact):
    """Whatever the number of rows, by which the sums are split."""
    like = tuple(n if axis in kept else 1 for axis, n in enumerate(shape)) if kept else ()
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=shape) * 4, rng.normal(size=shape)
    scale, zero = rng.uniform(0.1, 0.5, like), np.full(like, 3.0)
    level = np.round(x / scale) + zero
    below, above = level < 0, level > 15
    slope = np.where(above, 15 - zero, np.where(below, -zero, np.round(x / scale) - x / scale))
    others = tuple(axis for axis in range(len(shape)) if axis not in kept)
    function = ste.uniform_compact if compact else ste.uniform
    args = (jnp.asarray(value, jnp.float32) for value in (x, scale, zero, 0.0, 15.0))
    _, d_scale, d_zero, *_ = jax.vjp(function, *args)[1](jnp.asarray(g, jnp.float32))
    error = np.sum(np.abs(g), others) / 504 if compact else 0
    assert d_scale.shape == d_zero.shape == like
    assert np.all(np.abs(np.ravel(d_scale) - np.ravel(np.sum(g * slope, others))) <= np.ravel(error) + 1e-4)
    want = np.sum(np.where(below | above, -scale * g, 0), others)
    np.testing.assert_allclose(np.ravel(d_zero), np.ravel(want), atol=1e-5)


@pytest.mark.parametrize("granularity", [quant.per_tensor(), quant.per_channel(-1)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compact_backward_pass_differs_in_the_scale_alone_and_within_its_bound(scheme, granularity):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((40, 6)) * 3, jnp.float32).at[0, 0].set(4.0)
    g = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    exact = SCHEMES[scheme](4, granularity, range="learned")
    params = quant.estimate(exact, 0.5 * x)

    def run(spec):
        def output(x, scale, zero):
            return quant.fake_quant(spec, x, params._replace(scale=scale, zero_point=zero))

        y, pull = jax.vjp(jax.jit(output), x, params.scale, params.zero_point)
        return y, *pull(g)

    (y, dx, ds, dz), (y2, dx2, ds2, dz2) = run(exact), run(dataclasses.replace(exact, backward="compact"))
    np.testing.assert_array_equal(y, y2)
    np.testing.assert_array_equal(dx, dx2)
    np.testing.assert_allclose(dz, dz2, rtol=1e-6)
    bound = np.sum(np.abs(g), 0 if granularity.axis else None) / 504
    assert np.all(np.abs(ds - ds2) <= bound + 1e-4) and np.any(ds != ds2)


@pytest.mark.parametrize("granularity", [quant.per_tensor(), quant.per_channel(-1)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lsq_divides_the_gradients_of_the_range(scheme, granularity):
    rng = np.random.default_rng(6)
    x, g = (jnp.asarray(rng.standard_normal((20, 5)), jnp.float32) for _ in range(2))
    plain = SCHEMES[scheme](4, granularity, range="learned")
    params = quant.estimate(plain, x * 0.6)

    def grads(spec):
        def total(x, scale, zero):
            return jnp.vdot(g, quant.fake_quant(spec, x, params._replace(scale=scale, zero_point=zero)))

        return jax.grad(total, (0, 1, 2))(x, params.scale, params.zero_point)

    want, got = grads(plain), grads(dataclasses.replace(plain, range_gradient="lsq"))
    n, q_max = (20 if granularity.axis else 100), (7 if scheme == "symmetric" else 15)
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b / np.sqrt(n * q_max), rtol=1e-5)


GRID = (jnp.float32(0.5), jnp.float32(0.0), jnp.float32(-2.0), jnp.float32(1.0))


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (ste.round_ste, (1, 1, 1)),
        (lambda x: ste.identity_ste(x, jnp.sign(x)), (1, 1, 1)),
        (lambda x: ste.scaled_ste(x, jnp.sign(x), jnp.float32([2, 3, 4])), (2, 3, 4)),
        (lambda x: ste.scale_gradient(x, 3.0), (3, 3, 3)),
        (lambda x: ste.uniform(x, *GRID), (1, 1, 0)),
        (lambda x: ste.uniform_compact(x, *GRID), (1, 1, 0)),
        (lambda x: ste.uniform_fixed(x, *GRID), (1, 1, 0)),
    ],
)
def test_gradients_are_differentiated_by_the_same_rule(function, slope):
    x, slope = jnp.float32([-0.8, 0.3, 2.2]), np.float32(slope)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.square(function(x))) / 2)(x)

    np.testing.assert_allclose(gradient(x), slope * function(x), rtol=1e-6)
    second = jax.grad(lambda x: jnp.sum(gradient(x)))(x)
    np.testing.assert_allclose(second, slope**2, rtol=1e-6)
