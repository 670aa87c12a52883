import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.errors import UserError
from qtx.train.optimizer import OptimizerConfig, learning_rate, make_optimizer


def test_schedule():
    rate = learning_rate(OptimizerConfig(warmup=0.1), 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    assert learning_rate(OptimizerConfig(warmup=0.0, schedule="constant"), 7)(6) == 1
    with pytest.raises(UserError, match="'linear'"):
        OptimizerConfig(schedule="linar")
    assert learning_rate(OptimizerConfig(warmup_steps=4), 100)(2) == 0.5
    root = learning_rate(OptimizerConfig(warmup_steps=4, schedule="inverse_sqrt"), 100)
    np.testing.assert_allclose([root(0), root(1), root(3), root(15)], [0.25, 0.5, 1, 0.5], rtol=1e-6)
    with pytest.raises(UserError, match="warmup_steps -1"):
        OptimizerConfig(warmup_steps=-1)


def test_milestones_are_whole_epochs():
    config = OptimizerConfig(warmup=0.0, schedule="milestones")
    rate = learning_rate(config, 5 * 3, batches_per_epoch=3)
    np.testing.assert_allclose([rate(step) for step in (0, 5, 6, 14, 15)], [1, 1, 0.1, 0.1, 0.1], rtol=1e-6)
    twice = OptimizerConfig(warmup=0.1, schedule="milestones", milestones=(0.29, 0.5), milestone_factor=0.5)
    rate = learning_rate(twice, 100)
    np.testing.assert_allclose([rate(step) for step in (5, 28, 29, 49, 50)], [0.5, 1, 0.5, 0.5, 0.25], rtol=1e-6)


def test_ranges_have_a_learning_rate_of_their_own_and_no_decay():
    trained = {"params/x/kernel": jnp.ones(2), "ranges/x/kernel/scale": jnp.ones(2)}
    config = OptimizerConfig(1e-2, range_learning_rate=1e-4, warmup=0.0, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)
    np.testing.assert_allclose(updates["params/x/kernel"], -1e-2 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["ranges/x/kernel/scale"], 0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), optimizer.init(trained), trained)
    np.testing.assert_allclose(updates["ranges/x/kernel/scale"], -1e-4, rtol=1e-3)


def constant(**fields):
    return OptimizerConfig(1e-2, warmup=0.0, schedule="constant", weight_decay=0.0, **fields)


def test_rate_factors_scale_the_steps_of_what_they_match():
    trained = {f"params/{name}": jnp.ones(2) for name in ("encoder/kernel", "pooler/kernel", "pooler/bias")}
    optimizer = make_optimizer(constant(rate_factors=(("pooler/**", 10.0), ("**/bias", 3.0))), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trained), optimizer.init(trained), trained)
    for name, factor in (("encoder/kernel", 1), ("pooler/kernel", 10), ("pooler/bias", 3)):
        np.testing.assert_allclose(updates[f"params/{name}"], -1e-2 * factor, rtol=1e-3)


def test_weights_are_decayed_and_biases_and_norms_are_not():
    trained = {f"params/x/{name}": jnp.ones(2) for name in ("kernel", "bias", "norm/scale")}
    optimizer = make_optimizer(OptimizerConfig(1e-2, warmup=0.0, schedule="constant", weight_decay=0.1), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)
    assert {name.rpartition("x/")[2]: bool(update.any()) for name, update in updates.items()} == {
        "kernel": True,
        "bias": False,
        "norm/scale": False,
    }


def test_a_long_gradient_is_clipped():
    trained = {"params/x/kernel": jnp.zeros(2)}
    updates = {}
    for length in (10.0, 1000.0):
        # Adam forgets the length of the first gradient but for eps; with a large eps it shows.
        optimizer = make_optimizer(constant(max_grad_norm=1.0, eps=1e3), 10)
        grads = {"params/x/kernel": jnp.array([length, 0.0])}
        updates[length], _ = optimizer.update(grads, optimizer.init(trained), trained)
    np.testing.assert_allclose(updates[10.0]["params/x/kernel"], updates[1000.0]["params/x/kernel"], rtol=1e-5)


@pytest.mark.parametrize("factors", [(("pooler/**",),), (("pooler/**", 0.0),), ((3, 1.0),)])
def test_rate_factors_that_are_no_pairs(factors):
    with pytest.raises(UserError, match="rate_factors"):
        OptimizerConfig(rate_factors=factors)


# --- Schedules with cycles, and BertAdam ---


def test_schedules_with_cycles():
    def rates(taken, **fields):
        return learning_rate(OptimizerConfig(**fields), 100)(jnp.asarray(taken))

    cosine = rates([0, 50, 100, 150], warmup=0.0, schedule="cosine")
    np.testing.assert_allclose(cosine, [1, 0.5, 0, 0], atol=1e-6)  # past the end it stays
    published = rates([0, 50, 100, 150], warmup=0.0, schedule="cosine", name="bert_adam")
    np.testing.assert_allclose(published, [1, 0.5, 0, 0.5], atol=1e-6)
    hard = rates([5, 10, 40, 69], warmup=0.1, schedule="hard_restarts", cycles=3.0)
    np.testing.assert_allclose(hard, [0.5, 1, 1, 0.5 * (1 + np.cos(np.pi * 29 / 30))], atol=1e-5)
    warm = rates([0, 5, 10, 50, 60], warmup=0.1, schedule="warm_restarts", cycles=2.0)
    np.testing.assert_allclose(warm, [0, 0.5, 1, 0, 1], atol=1e-6)
    for fields in ({"cycles": 3.0}, {"schedule": "hard_restarts"}, {"schedule": "cosine", "cycles": 0.0}):
        with pytest.raises(UserError, match="cycles"):
            OptimizerConfig(**fields)


@pytest.mark.parametrize(
    "steps, warmup, cycles", [(60, 0.2, 2), (60, 0.2, 3), (120, 0.2, 3), (150, 0.1, 5), (80, 0.15, 4)]
)
def test_a_hard_restart_is_in_the_step_where_the_published_formula_has_it(steps, warmup, cycles):
    def published(taken):
        x = taken / steps
        y = (x - warmup) / (1 - warmup)
        return x / warmup if x < warmup else 0.5 * (1 + math.cos(math.pi * ((cycles * y) % 1)))

    config = OptimizerConfig(name="bert_adam", schedule="hard_restarts", warmup=warmup, cycles=float(cycles))
    with jax.enable_x64(True):
        got = learning_rate(config, steps)(np.arange(steps + 5))
    np.testing.assert_allclose(got, [published(taken) for taken in range(steps + 5)], rtol=0, atol=1e-12)


def published_adam(config, gradients, value, decay, steps):
    """One array in float64; None is no gradient."""
    mu = nu = np.zeros_like(value)
    count = 0
    for gradient in gradients:
        if gradient is None:
            continue
        gradient = gradient * min(1, 1 / (np.linalg.norm(gradient) + 1e-6))
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
        share = count / steps
        rate = share / config.warmup if share < config.warmup else (share - 1) / (config.warmup - 1)
        value = value - config.learning_rate * rate * (mu / (np.sqrt(nu) + config.eps) + decay * value)
        count += 1
    return value


def test_bert_adam_against_numpy_in_float64():
    config = OptimizerConfig(0.1, name="bert_adam", eps=1e-6, warmup=0.15)
    rng, steps = np.random.default_rng(0), 10
    names = {"params/x/kernel": 0.01, "params/x/bias": 0.0, "params/late/kernel": 0.01}
    gradients = {name: list(rng.standard_normal((steps, 3)) * 3) for name in names}
    for step in (0, 1, 5):
        gradients["params/late/kernel"][step] = None
    start = {name: rng.standard_normal(3) for name in names}
    with jax.enable_x64(True):
        optimizer = make_optimizer(config, steps)
        trained = {name: jnp.asarray(value) for name, value in start.items()}
        # Donated as in a train step, for which no two arrays may be the same.
        state, update = optimizer.init(trained), jax.jit(optimizer.update, donate_argnums=1)
        for step in range(steps):
            given = {name: jnp.zeros(3) if g[step] is None else jnp.asarray(g[step]) for name, g in gradients.items()}
            before = trained
            updates, state = update(given, state, trained)
            trained = {name: value + updates[name] for name, value in trained.items()}
            if step in (1, 5):
                np.testing.assert_array_equal(trained["params/late/kernel"], before["params/late/kernel"])
        for name, decay in names.items():
            want = published_adam(config, gradients[name], start[name], decay, steps)
            np.testing.assert_allclose(trained[name], want, rtol=1e-12)
    assert {name: int(count) for name, count in state.counts.items()} == dict.fromkeys(names, 10) | {
        "params/late/kernel": 7
    }


def test_a_nan_gradient_is_no_missing_one():
    optimizer = make_optimizer(OptimizerConfig(name="bert_adam", warmup=0.0), 4)
    trained = {"params/bias": jnp.zeros(2)}
    updates, state = optimizer.update({"params/bias": jnp.array([jnp.nan, 0.0])}, optimizer.init(trained), trained)
    assert np.isnan(updates["params/bias"]).all() and int(state.counts["params/bias"]) == 1


def test_muon_moves_kernels_by_orthogonal_matrices_and_all_else_as_adam_does():
    rng = np.random.default_rng(0)
    shapes = {
        "params/a/kernel": (6, 4),
        "params/b/kernel": (4, 6),
        "params/table/embedding": (6, 4),
        "params/a/bias": (4,),
    }
    trained = {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"ranges/a/kernel/scale": jnp.ones(())}
    grads = {name: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for name, value in trained.items()}
    updates = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(constant(name=name), 10)
        updates[name], _ = optimizer.update(grads, optimizer.init(trained), trained)
    for name in ("params/a/kernel", "params/b/kernel"):
        u, _, v = np.linalg.svd(np.asarray(grads[name], float), full_matrices=False)
        step = np.asarray(updates["muon"][name], float) / (-1e-2 * 0.2 * 6**0.5)
        # The iteration stops with singular values of about one, in the directions of the gradient.
        np.testing.assert_allclose(u.T @ step @ v.T, np.diag(np.diag(u.T @ step @ v.T)), atol=1e-3)
        assert np.all(np.abs(np.diag(u.T @ step @ v.T) - 1) < 0.4)
        assert 0.1 < np.sqrt(np.mean(np.square(updates["muon"][name]))) / 1e-2 < 0.3
    for name in ("params/table/embedding", "params/a/bias", "ranges/a/kernel/scale"):
        np.testing.assert_array_equal(updates["muon"][name], updates["adamw"][name])


def test_muon_decays_kernels_and_heeds_rate_factors():
    trained = {"params/a/kernel": jnp.ones((4, 4)), "params/b/kernel": jnp.ones((4, 4))}
    config = OptimizerConfig(
        1e-2, name="muon", warmup=0.0, schedule="constant", weight_decay=0.5, rate_factors=(("b/**", 3.0),)
    )
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)
    for name, factor in (("a", 1), ("b", 3)):
        np.testing.assert_allclose(updates[f"params/{name}/kernel"], -1e-2 * 0.5 * factor, rtol=1e-6)
