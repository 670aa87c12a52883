"""Splitting variables into what training changes and the rest."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qtx


class Two(nn.Module):
    policy: qtx.Policy | None = None

    @nn.compact
    def __call__(self, x):
        x = qtx.site(self, "input", x)
        return qtx.nn.Dense(3, policy=self.policy, name="dense")(x)


X = jax.random.normal(jax.random.key(0), (8, 4))
PARAMS = Two().init(jax.random.key(1), X)["params"]
WEIGHTS, OUTPUTS = qtx.symmetric(4, qtx.per_channel()), qtx.asymmetric(8)


def parts(policy):
    model = Two(policy)
    variables = {"params": PARAMS, "ranges": qtx.calibrate(model, PARAMS, [(X,)])}
    return model, variables, *qtx.partition(model, variables, X)


def names(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


PARAMETERS = {"params/dense/kernel", "params/dense/bias"}


@pytest.mark.parametrize(
    ("ranges", "learned"),
    [
        ("fixed", set()),
        (
            "learned",
            # A symmetric grid has no zero point to learn.
            {"dense/kernel/scale", "dense/output/scale", "dense/output/zero_point", "input/scale", "input/zero_point"},
        ),
    ],
)
def test_what_is_trained(ranges, learned):
    policy = qtx.training_policy(qtx.policy(weights=WEIGHTS, activations=OUTPUTS), ranges)
    _, variables, trained, fixed = parts(policy)
    assert names(trained) == PARAMETERS | {f"ranges/{name}" for name in learned}
    assert names(trained) | names(fixed) == names(variables) and not names(trained) & names(fixed)


def test_together_they_are_the_variables():
    _, variables, trained, fixed = parts(qtx.training_policy(qtx.policy(weights=WEIGHTS, activations=OUTPUTS)))
    joined = qtx.combine(trained, fixed)
    assert jax.tree.structure(joined) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, joined, variables)


def test_gradients_and_optimizers_take_the_first_part_as_it_is():
    model, _, trained, fixed = parts(qtx.training_policy(qtx.policy(weights=WEIGHTS, activations=OUTPUTS)))
    gradient = jax.grad(lambda trained: jnp.sum(model.apply(qtx.combine(trained, fixed), X) ** 2))(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    sgd = optax.sgd(0.1)
    updates, _ = sgd.update(gradient, sgd.init(trained), trained)
    new = optax.apply_updates(trained, updates)
    assert new["ranges"]["dense"]["kernel"]["signed"] is None
    assert not np.array_equal(new["ranges"]["dense"]["output"]["scale"], trained["ranges"]["dense"]["output"]["scale"])


def test_without_a_policy_parameters_are_trained():
    trained, fixed = qtx.partition(Two(), {"params": PARAMS}, X)
    assert names(trained) == PARAMETERS and names(fixed) == set()
