"""Range search against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from qtx import quant
from qtx.quant import search
from qtx.quant.spec import Search

estimate_range = jax.jit(lambda spec, x: quant.estimated_range(spec, quant.observe(spec, None, x)), static_argnums=0)


def error(x, scheme, bits, low, high):
    """Squared error of fake quantization with one range, float64."""
    x = np.asarray(x, np.float64)
    low, high = min(low, 0.0), max(high, 1e-8)
    if scheme == "asymmetric":
        n = 2**bits - 1
        step = (high - low) / n
        zero = np.clip(np.rint(-low / step), 0, n)
        levels = np.clip(np.rint(x / step) + zero, 0, n) - zero
    else:
        q_min, q_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low < 0 else (0, 2**bits - 1)
        step = max(-low, high) / q_max
        levels = np.clip(np.rint(x / step), q_min, q_max)
    return float(np.sum((levels * step - x) ** 2))


def candidates(x, scheme, bits, how):
    """All (low, high) of the published grid: reference, section 4.4."""
    low, high, n = float(np.min(x)), float(np.max(x)), how.candidates
    margin = how.margin * max(-low, high) if how.relative_margin else how.margin
    widest = max(-low, high) + margin
    found = []
    for i in range(1, n + 1):
        width = i * widest / n
        if low >= 0:
            found.append((0.0, width))
        elif scheme == "symmetric":
            found.append((-width, width))
        else:
            step = 2 * width / (2**bits - 1)
            for k in range(2**bits // 4):
                for shift in (k * step, -k * step):
                    found.append((max(-width + shift, low - margin), min(width + shift, high + margin)))
    return found


def data(kind, n=80):
    x = np.random.default_rng(0).standard_t(3, n).astype(np.float32)
    return {"two-sided": x, "positive": np.abs(x), "negative": -np.abs(x) - 0.1}[kind]


@pytest.mark.parametrize(
    "margin", [dict(margin=0.5), dict(margin=0.25, relative_margin=True)], ids=["absolute", "relative"]
)
@pytest.mark.parametrize("kind", ["two-sided", "positive", "negative"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_grid_is_the_best_of_all_candidates(scheme, kind, margin):
    how, x = Search("mse", "grid", candidates=20, **margin), data(kind)
    spec = getattr(quant, scheme)(4, estimator=how)
    low, high = (float(end) for end in estimate_range(spec, x))
    tried = candidates(x, scheme, 4, how)
    losses = [error(x, scheme, 4, *ends) for ends in tried]
    best = min(losses)
    assert error(x, scheme, 4, low, high) <= best * (1 + 1e-4)
    assert any(np.allclose((low, high), ends, rtol=1e-5, atol=1e-6) for ends in tried), "not a candidate of the grid"
    if kind != "negative":  # the published shifts reach a quarter of the grid, negative data would need half of it
        assert best < error(x, scheme, 4, x.min(), x.max())  # heavy tails: clipping pays


def test_grid_adds_the_losses_of_all_batches():
    how = Search("mse", "grid", candidates=20)
    spec = quant.symmetric(3, estimator=how)
    a, b = data("two-sided"), data("two-sided")[::-1] * 0.3
    state = quant.observe(spec, quant.observe(spec, None, jnp.asarray(a)), jnp.asarray(b))
    losses = [
        error(a, "symmetric", 3, *ends) + error(b, "symmetric", 3, *ends) for ends in candidates(a, "symmetric", 3, how)
    ]
    np.testing.assert_allclose(state.losses[0], losses, rtol=1e-3)
    assert float(state.high[0]) == np.float32(candidates(a, "symmetric", 3, how)[int(np.argmin(losses))][1])


def test_brent_with_shifts_is_about_as_good_as_the_grid():
    x = data("two-sided") + 0.5
    loss = {}
    for method in ("grid", "brent"):
        ends = estimate_range(quant.asymmetric(4, estimator=Search("mse", method)), x)
        loss[method] = error(x, "asymmetric", 4, *(float(end) for end in ends))
    assert loss["brent"] < error(x, "asymmetric", 4, x.min(), x.max())
    assert loss["brent"] <= 1.1 * loss["grid"]  # it may stop in a local minimum


@pytest.mark.parametrize(
    ("scheme", "kind"), [("symmetric", "two-sided"), ("symmetric", "positive"), ("asymmetric", "positive")]
)
def test_brent_is_scipy_on_the_same_loss(scheme, kind):
    x = data(kind)
    widest = float(np.max(np.abs(x)) + 0.5)
    sign = 0.0 if kind == "positive" else -1.0
    want = optimize.minimize_scalar(
        lambda r: float(np.float32(error(x, scheme, 4, sign * r, r))), bounds=(0.01 * widest, widest), method="bounded"
    )
    low, high = estimate_range(getattr(quant, scheme)(4, estimator=Search("mse", "brent")), x)
    assert low == sign * high
    np.testing.assert_allclose(high, want.x, rtol=2e-3)


@pytest.mark.parametrize("method", ["grid", "brent"])
def test_every_row_its_own_extent(method):
    """Rows of magnitude 100, 1 and 0.01: with the tensor's extent the small ones get one candidate, or none."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 60)) * np.array([[100], [1], [0.01]]), jnp.float32)
    losses = {}
    for extent in ("row", "tensor"):
        how = Search("mse", method, candidates=25, extent=extent, relative_margin=True)
        spec = quant.symmetric(4, quant.per_channel(0), estimator=how)
        ends = estimate_range(spec, x)
        losses[extent] = np.array([error(x[i], "symmetric", 4, *(float(end[i]) for end in ends)) for i in range(3)])
    assert np.all(losses["row"] <= losses["tensor"] * (1 + 1e-3))
    assert losses["row"][2] < 0.2 * losses["tensor"][2]


def test_rows_are_searched_independently():
    x = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    for method in ("grid", "brent"):
        how = Search("mse", method, candidates=15)
        low, high = estimate_range(quant.symmetric(4, quant.per_channel(0), estimator=how), x)
        for i in range(3):
            alone = estimate_range(quant.symmetric(4, estimator=how), x[i])
            np.testing.assert_allclose((low[i], high[i]), alone, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_relative_margin_scales_with_the_data(scale):
    x = data("two-sided")
    relative = quant.symmetric(4, estimator=Search("mse", "grid", relative_margin=True))
    want = float(estimate_range(relative, x)[1])
    np.testing.assert_allclose(estimate_range(relative, x * np.float32(scale))[1], want * scale, rtol=1e-4)
    state = search.start(relative, jnp.asarray(x)[None] * scale, None)
    widest, margin = search.extent(relative.estimator, state)
    np.testing.assert_allclose((widest[0], margin[0]), np.array([1.5, 0.5]) * np.abs(x).max() * scale, rtol=1e-6)


def test_absolute_margin_wastes_small_tensors():
    """As published: with a margin of 0.5 and data of 0.001 the finest candidate is wider than the data."""
    x = data("two-sided") * 1e-4
    found = {
        relative: estimate_range(quant.symmetric(4, estimator=Search(relative_margin=relative)), x)
        for relative in (False, True)
    }
    assert error(x, "symmetric", 4, *map(float, found[True])) < 0.5 * error(
        x, "symmetric", 4, *map(float, found[False])
    )


def test_cross_entropy_grid_is_the_best_candidate():
    how = Search("cross_entropy", "grid", candidates=15)
    logits = np.random.default_rng(3).standard_normal((20, 3)).astype(np.float32) * 3
    spec = quant.symmetric(3, estimator=how)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = []
    for _, high in candidates(logits, "symmetric", 3, how):
        step = high / 3
        q = np.clip(np.rint(logits / step), -4, 3) * step
        losses.append(float(-(probs * (q - np.log(np.exp(q).sum(-1, keepdims=True)))).sum()))
    state = quant.observe(spec, None, jnp.asarray(logits))
    np.testing.assert_allclose(state.losses[0], losses, rtol=1e-4)
    assert np.argmin(losses) == int(jnp.argmin(state.losses[0]))


def test_shift_range_follows_the_bits():
    assert [search.max_shift(quant.asymmetric(bits)) for bits in (2, 3, 4, 8, 16)] == [1, 2, 4, 64, 16384]


def test_memory_does_not_grow_with_the_candidates():
    """One tensor at a time, whatever the number of candidates."""
    tensor = 2000 * 384 * 4

    def temporaries(n, granularity):
        spec = quant.symmetric(4, granularity, estimator=Search("mse", "grid", candidates=n))
        lowered = jax.jit(quant.estimate, static_argnums=0).lower(spec, jax.ShapeDtypeStruct((2000, 384), jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes / tensor

    few, many = temporaries(5, quant.per_tensor()), temporaries(100, quant.per_tensor())
    assert many <= few + 0.01
    assert many <= 2.5
    assert temporaries(100, quant.per_channel(-1)) <= 3.5  # plus a transposed copy and the losses
