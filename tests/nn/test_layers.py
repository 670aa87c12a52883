"""Without a policy the layers are flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx import quant
from qtx.errors import UserError
from qtx.nn import Dense, Embed, LayerNorm, policy
from qtx.nn.layers import dropout, hashed_bits

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


KERNEL, BIAS, X = normal(5, 4), normal(4), normal(2, 3, 5)
DENSE = {"params": {"kernel": KERNEL, "bias": BIAS}}


def test_dense_is_flax_dense():
    np.testing.assert_allclose(Dense(4).apply(DENSE, X), nn.Dense(4).apply(DENSE, X), rtol=1e-6, atol=1e-6)
    gelu = Dense(4, nn.gelu).apply(DENSE, X)
    np.testing.assert_allclose(gelu, nn.gelu(nn.Dense(4).apply(DENSE, X)), rtol=1e-6, atol=1e-6)


def test_embed_is_flax_embed():
    table, ids = normal(7, 4), jnp.array([[0, 6, 3], [3, 3, 1]])
    want = nn.Embed(7, 4).apply({"params": {"embedding": table}}, ids)
    np.testing.assert_array_equal(Embed(7, 4).apply({"params": {"table": table}}, ids), want)


def test_layer_norm_is_flax_layer_norm():
    variables = {"params": {"scale": normal(5), "bias": normal(5)}}
    plain = nn.LayerNorm(1e-12, use_fast_variance=False)
    np.testing.assert_allclose(LayerNorm().apply(variables, X), plain.apply(variables, X), rtol=1e-6, atol=1e-6)
    ours, theirs = (
        jax.grad(lambda v, m=m: jnp.sum(m.apply(v, X) ** 3))(variables)["params"] for m in (LayerNorm(), plain)
    )
    for name in ("scale", "bias"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [Dense(4), Embed(7, 4), LayerNorm()], ids=["dense", "embed", "norm"])
def test_initial_parameters(module):
    x = jnp.zeros((2, 3), jnp.int32) if isinstance(module, Embed) else X
    params = module.init(jax.random.key(0), x)["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    wide = module.clone(dtype=jnp.bfloat16)
    same = wide.init(jax.random.key(0), x)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert wide.apply({"params": params}, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["outlier channel", "large mean"])
def test_layer_norm_with_huge_outliers(offset):
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32) + np.float32(offset)
    x[:, 7] += 3e4 if offset == 0 else 0
    exact = x.astype(np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-12)
    variables = {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}
    # What the mean loses is a unit in the last place of the offset, over the standard deviation.
    limit = max(1e-6, 2 * np.finfo(np.float32).eps * offset / exact.std())
    np.testing.assert_allclose(LayerNorm().apply(variables, x), want, atol=limit, rtol=1e-5)


def test_layer_norm_computes_in_float32():
    x = (normal(3, 64) + 100).astype(jnp.bfloat16)
    variables = {"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}
    want = LayerNorm().apply(variables, x.astype(jnp.float32))
    got = LayerNorm(dtype=jnp.bfloat16).apply(variables, x)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_biases_and_shifts_are_never_quantized():
    rules = policy(quant.symmetric(2, range="dynamic"))
    out = Dense(4, policy=rules).apply(DENSE, jnp.zeros((1, 5)))
    np.testing.assert_array_equal(out[0], BIAS)
    norm = LayerNorm(policy=rules)
    out = norm.apply({"params": {"scale": normal(5), "bias": jnp.arange(5.0)}}, jnp.ones((1, 5)))
    np.testing.assert_array_equal(out[0], jnp.arange(5.0))


def test_kernel_channels_are_outputs_and_table_channels_are_rows():
    rules = policy(quant.symmetric(3, quant.per_channel(), range="dynamic"))
    spec = quant.symmetric(3, quant.Granularity(1))
    kernel = quant.fake_quant(spec, KERNEL, quant.estimate(spec, KERNEL))
    np.testing.assert_array_equal(Dense(4, policy=rules).apply(DENSE, X), X @ kernel + BIAS)
    table = normal(7, 4)
    spec = quant.symmetric(3, quant.Granularity(0))
    want = quant.fake_quant(spec, table, quant.estimate(spec, table))
    got = Embed(7, 4, policy=rules).apply({"params": {"table": table}}, jnp.arange(7))
    np.testing.assert_array_equal(got, want)


def test_output_site_is_after_the_activation_function():
    rules = policy(activations=quant.symmetric(8, range="dynamic"))
    out = np.asarray(Dense(4, nn.relu, policy=rules).apply(DENSE, X))
    spec = quant.symmetric(8)
    plain = nn.relu(Dense(4).apply(DENSE, X))
    np.testing.assert_array_equal(out, quant.fake_quant(spec, plain, quant.estimate(spec, plain)))
    assert out.min() == 0


def test_input_site_is_what_enters_the_product():
    rules = policy(inputs=quant.asymmetric(3, range="dynamic"))
    spec = quant.asymmetric(3)
    on_grid = quant.fake_quant(spec, X, quant.estimate(spec, X))
    np.testing.assert_array_equal(Dense(4, policy=rules).apply(DENSE, X), Dense(4).apply(DENSE, on_grid))


# Grouped layers


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_layer_is_a_block_diagonal_one(groups):
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 8), (8 // groups, 12), (12,)))
    dense = np.zeros((8, 12), np.float32)
    for g in range(groups):
        rows, columns = slice(8 // groups * g, 8 // groups * (g + 1)), slice(12 // groups * g, 12 // groups * (g + 1))
        dense[rows, columns] = kernel[:, columns]
    got = Dense(12, groups=groups).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(got, x @ dense + bias, atol=1e-5)


def test_per_channel_means_outputs():
    """A huge output channel takes nothing from the precision of the others, whatever its group."""
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((4, 8)).astype(np.float32)
    kernel[:, 3] *= 1000
    model = Dense(8, groups=2, policy=policy(quant.symmetric(8, quant.per_channel(), range="dynamic")))
    x = jnp.eye(8)
    params = {"params": {"kernel": kernel, "bias": np.zeros(8)}}
    error = np.abs(model.apply(params, x) - Dense(8, groups=2).apply(params, x))
    steps = np.abs(kernel).max(0) / 127
    assert np.all(error.max(0) <= 0.5001 * steps) and np.all(error.max(0) > 0)


@pytest.mark.parametrize(("groups", "width", "features"), [(3, 8, 12), (8, 8, 12), (0, 8, 8)])
def test_groups_that_do_not_divide(groups, width, features):
    with pytest.raises(UserError, match=f"{groups} groups do not divide both widths, {width} and {features}"):
        jax.eval_shape(Dense(features, groups=groups).init, jax.random.key(0), jnp.zeros((1, width)))


class Dropped(nn.Module):
    rate: float = 0.25

    @nn.compact
    def __call__(self, x):
        return dropout(self, x, self.rate, False)


def dropped(x, key, rate=0.25):
    return Dropped(rate).apply({}, x, rngs={"dropout": key})


@pytest.mark.parametrize("width", [6, 5, 1])
def test_dropout_draws_every_element_by_itself_at_its_rate(width):
    y = np.asarray(dropped(jnp.ones((4000, width)), jax.random.key(0)))
    gone = y == 0
    np.testing.assert_allclose(y[~gone], 1 / 0.75, rtol=1e-6)
    np.testing.assert_allclose(gone.mean(0), 0.25, atol=0.03)  # four standard deviations
    if width > 1:  # neighbours in a row
        np.testing.assert_allclose(np.corrcoef(gone.T) - np.eye(width), 0, atol=0.07)


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_hashed_bits_are_even_and_independent_of_one_another(impl):
    keys = [jax.random.fold_in(jax.random.key(0, impl=impl), i) for i in range(3)]
    bits = [np.asarray(hashed_bits(key, (2, 64, 512))) for key in keys]
    ones = np.stack([np.unpackbits(b.view(np.uint8)).reshape(-1, 32) for b in bits])
    deviation = 0.5 / np.sqrt(2**16)
    np.testing.assert_allclose(ones.mean(1), 0.5, atol=5 * deviation)  # each of 32 bits, for each key
    np.testing.assert_allclose(np.corrcoef(ones[0].T) - np.eye(32), 0, atol=10 * deviation)
    uniform = np.stack(bits).reshape(3, -1) / 2**32
    for lag in (1, 2, 64, 512, 2**15):  # neighbours, rows, sequences
        assert abs(np.corrcoef(uniform[0, lag:], uniform[0, :-lag])[0, 1]) < 5 / np.sqrt(2**16 - lag), lag
    np.testing.assert_allclose(np.corrcoef(uniform) - np.eye(3), 0, atol=5 / 2**8)  # keys
    counts = np.histogram(uniform, 256)[0]
    assert np.sum((counts - counts.mean()) ** 2 / counts.mean()) < 255 + 5 * np.sqrt(2 * 255)  # chi squared


def test_hashed_bits_come_by_position():
    key = jax.random.key(3)
    flat = hashed_bits(key, (60,))
    np.testing.assert_array_equal(hashed_bits(key, (3, 4, 5)).ravel(), flat)
    assert int(hashed_bits(key, ())) == int(flat[0])
    assert hashed_bits(key, (0, 4)).shape == (0, 4)
    assert np.all(np.asarray(hashed_bits(jax.random.key(4), (60,)) != flat))


@pytest.mark.parametrize("rate", [1e-4, 0.5, 1 - 1e-4, np.nextafter(1.0, 0)])
def test_dropout_at_the_ends_of_its_range(rate):
    y = np.asarray(dropped(jnp.ones((400, 1000)), jax.random.key(1), rate))
    assert np.all(np.isfinite(y))
    assert abs(np.mean(y == 0) - rate) <= 5 * np.sqrt(rate * (1 - rate) / y.size) + 1e-9


def test_gradients_are_dropped_with_their_elements():
    x, key = jnp.arange(1.0, 201.0).reshape(20, 10), jax.random.key(2)
    y, back = jax.vjp(lambda x: dropped(x, key, 0.4), x)
    np.testing.assert_allclose(back(jnp.ones_like(y))[0], np.asarray(y) / np.asarray(x), rtol=1e-6)
    zero = jax.vjp(lambda x: dropped(x, key, 0.4), jnp.full((20, 10), jnp.inf))  # a dropped infinity leaves no NaN
    assert not np.any(np.isnan(zero[0])) and not np.any(np.isnan(zero[1](jnp.ones((20, 10)))[0]))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 2, 6), (6,), (0, 6)])
def test_dense_maps_the_last_axis_of_any_shape(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    layer = Dense(5)
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    np.testing.assert_allclose(layer.apply(variables, x), np.asarray(x) @ kernel, atol=1e-6)
