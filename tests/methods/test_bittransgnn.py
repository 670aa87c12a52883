"""Mixed predictions and distillation from them, against what they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtx.errors import UserError
from qtx.methods.bittransgnn import GraphDistillation, distillation_losses
from qtx.nn.text_graph import GraphConfig, GraphOutputs, PairOutputs, mixture
from qtx.train.phase import Forward

RNG = np.random.default_rng(0)
GRAPH, TEXT, STUDENT = (jnp.asarray(RNG.standard_normal((4, 3)) * 3, jnp.float32) for _ in range(3))
BATCH = {"labels": jnp.array([0, 2, 1, 0]), "weights": jnp.array([1.0, 1.0, 0.0, 1.0]), "index": jnp.arange(4)}


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_a_mixture_is_a_distribution_with_finite_gradients(mix):
    expected = mix * jax.nn.softmax(GRAPH / 2) + (1 - mix) * jax.nn.softmax(TEXT / 2)
    np.testing.assert_allclose(jnp.exp(mixture(GRAPH, TEXT, mix, 2.0)), expected, rtol=1e-5)
    far = jnp.array([[500.0, -500.0, 0.0]])  # where probabilities are zero in float32
    value, gradient = jax.value_and_grad(lambda g: mixture(g, -far, mix)[0, 1])(far)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_a_mixture_of_one_output_is_the_mean_of_both():
    np.testing.assert_allclose(mixture(GRAPH[:, :1], TEXT[:, :1], 0.25), 0.25 * GRAPH[:, :1] + 0.75 * TEXT[:, :1])


def test_distillation_is_zero_where_student_and_teacher_agree():
    teacher = mixture(GRAPH, TEXT, 0.4, 2.0)
    np.testing.assert_allclose(distillation_losses(2 * teacher, GRAPH, TEXT, 0.4, 2.0), 0, atol=1e-5)
    assert np.all(distillation_losses(STUDENT, GRAPH, TEXT, 0.4, 2.0) > 0)

    def published(student):  # is least at the softmax of the teacher's probabilities
        return jnp.sum(distillation_losses(student, GRAPH, TEXT, 0.4, 2.0, "published"))

    np.testing.assert_allclose(jax.grad(published)(2 * jnp.exp(teacher)), 0, atol=1e-5)


def test_filler_rows_count_in_no_loss():
    objective = GraphDistillation(0.4, 0.5, 2.0)
    total, weight, parts = objective.total(STUDENT, GRAPH, TEXT, BATCH)
    others = {name: value[jnp.array([0, 1, 3])] for name, value in BATCH.items()}
    rows = jnp.array([0, 1, 3])
    expected, _, _ = objective.total(STUDENT[rows], GRAPH[rows], TEXT[rows], others)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert weight == 3 and set(parts) == {"distillation", "task"}


def test_online_the_students_loss_does_not_reach_the_teacher():
    objective = GraphDistillation(0.4, 1.0, 1.0, online=True)

    def total(student, graph):
        outputs = PairOutputs(student, GraphOutputs(mixture(graph, TEXT, 0.4), TEXT, graph, TEXT))
        return objective(Forward(lambda *args, **kwargs: (outputs, {})), BATCH, {})[0]

    def own(graph):
        log_p = jax.nn.log_softmax(mixture(graph, TEXT, 0.4))
        return -jnp.sum(log_p[jnp.arange(4), BATCH["labels"]] * BATCH["weights"])

    student, teacher = jax.grad(total, argnums=(0, 1))(STUDENT, GRAPH)
    np.testing.assert_allclose(teacher, jax.grad(own)(GRAPH), atol=1e-6)
    assert np.any(student != 0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GraphConfig(mix=-0.1), "must lie in"),
        (lambda: GraphConfig(hidden_size=0), "positive width"),
        (lambda: GraphConfig(dropout=1.0), "dropout"),
        (lambda: GraphDistillation(0.5, alpha=2.0), "alpha"),
        (lambda: GraphDistillation(0.5, temperature=0.0), "above 0"),
        (lambda: GraphDistillation(0.5, target="probability"), "'probabilities'"),
    ],
)
def test_values_out_of_range(make, named):
    with pytest.raises(UserError, match=named):
        make()
