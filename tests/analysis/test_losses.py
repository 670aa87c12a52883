"""The loss of a model as a function of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from qtx.analysis.losses import mean_loss, of_some, stack, sum_of_norms, task_loss
from qtx.methods.teacher_intervention import student_policy
from qtx.nn import BertClassifier
from qtx.train.phase import label_losses
from tests.methods.test_distillation import batch_of
from tests.nn import tiny

MODEL = BertClassifier(tiny.ONE_LAYER, policy=student_policy())
PARAMS = tiny.params(tiny.ONE_LAYER)


def test_mean_over_batches_of_the_weighted_loss_with_norms():
    batches = [batch_of(), batch_of(seed=1, weights=[1, 0, 3])]
    means, apply = [], jax.jit(MODEL.apply)
    for batch in batches:
        logits = apply({"params": PARAMS}, *(batch[name] for name in MODEL.inputs)).logits
        means.append(np.average(label_losses(logits, batch["labels"]), weights=batch["weights"]))
    norms = sum(np.linalg.norm(np.ravel(leaf)) for leaf in jax.tree.leaves(PARAMS))
    found = mean_loss(task_loss(MODEL, norms=0.01), PARAMS, stack(batches))
    np.testing.assert_allclose(found, np.mean(means) + 0.01 * norms, rtol=1e-4)


def test_losses_of_equal_models_share_programs():
    count = []

    @jax.jit
    def run(loss):
        count.append(1)
        return jnp.zeros(())

    for value in (1.0, 2.0):
        run(task_loss(BertClassifier(tiny.ONE_LAYER, policy=student_policy()), {"ranges": {"a": jnp.asarray(value)}}))
    assert len(count) == 1


def test_norms_of_zero_have_no_gradient():
    gradient = jax.grad(sum_of_norms)({"a": jnp.zeros(3), "b": jnp.asarray([3.0, 4.0])})
    np.testing.assert_allclose(gradient["a"], 0)
    np.testing.assert_allclose(gradient["b"], [0.6, 0.8], rtol=1e-6)


def test_a_loss_of_some_parameters_keeps_the_others():
    def loss(params, batch):
        return batch * params["a"]["x"] * params["b"]

    part, chosen = of_some(loss, {"a": {"x": jnp.float32(2)}, "b": jnp.float32(3)}, ("a/**",))
    assert chosen == {"a/x": 2}
    value, gradient = jax.value_and_grad(part)({"a/x": jnp.float32(5)}, 10.0)
    assert value == 150 and gradient == {"a/x": 30}
