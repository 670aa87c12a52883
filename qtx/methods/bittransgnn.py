"""BitTransGNN: training an encoder with a graph convolution, and distilling both into the encoder alone.

    dynamic   the encoder, its classifier and the graph convolution are trained together; after every epoch the bank of features
              is made again for all documents
    static    features of all documents are computed once; only the graph convolution is trained
    direct separation: the encoder and the classifier of a dynamic model, on their own: nothing to train
    knowledge distillation: an encoder and a classifier learn from the votes of a trained model, once computed (offline), or
              trained in the same step (online)

Every one is a phase of the one training loop. Source: BitTransGNN ("Graph neural networks improve quantized transformers by
incorporating global structural relationships"), after BertGCN (Lin et al. 2021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCSR

from qtx.errors import UserError, near_misses
from qtx.nn.graph import Graph
from qtx.nn.text_graph import GraphOutputs, TextGraphClassifier, mixture
from qtx.train.phase import Batch, Forward, label_losses

Target = Literal["probabilities", "published"]


def graph_loss(forward: Forward, batch: Batch, constants: Any) -> tuple[jax.Array, jax.Array]:
    """The objective of static and dynamic training: the task's loss of the mixed prediction.

    Args:
      forward: of a `TextGraphClassifier`.
      batch: of training documents, whose `index` is their node.
      constants: the collection `graph`.
    """
    outputs, _ = forward(batch, graph=constants)
    return jnp.sum(label_losses(outputs.logits, batch["labels"]) * batch["weights"]), jnp.sum(batch["weights"])


def vote(model: TextGraphClassifier, variables: Mapping[str, Any], adjacency: Graph, nodes: jax.Array) -> GraphOutputs:
    """Returns the outputs for documents whose features are in the bank, with one pass over the graph.

    Args:
      model: any; its encoder does not run.
      variables: `params`, `ranges` if there are any, and `bank`.
      adjacency: of all nodes.
      nodes: int `[B]`.
    """
    return _vote(model.clone(recompute=False), dict(variables) | {"graph": {"adjacency": adjacency}}, nodes)


@jax.jit(static_argnums=0)
def _vote(model: TextGraphClassifier, variables: Mapping[str, Any], nodes: jax.Array) -> GraphOutputs:
    return model.apply(variables, None, None, None, nodes)  # type: ignore[return-value]


def vote_of_others(
    model: TextGraphClassifier, variables: Mapping[str, Any], adjacency: Graph, pooled: jax.Array, edges: BCSR
) -> GraphOutputs:
    """Returns the outputs for documents that are no part of the graph, and are attached to it.

    Args:
      model: any; its encoder does not run.
      variables: `params`, `ranges` if there are any, and `bank`.
      adjacency: of all nodes of the graph.
      pooled: features `[M, D]` of the documents.
      edges: `[M, N + M]`, see `qtx.data.text_graph.attach`.
    """
    return _vote_of_others(model, dict(variables) | {"graph": {"adjacency": adjacency}}, pooled, edges)


@jax.jit(static_argnums=0)
def _vote_of_others(
    model: TextGraphClassifier, variables: Mapping[str, Any], pooled: jax.Array, edges: BCSR
) -> GraphOutputs:
    entering = model.apply(variables, method="entering")
    return model.apply(variables, pooled, edges, entering, method="attached")  # type: ignore[return-value]


def distillation_losses(
    student: jax.Array,
    graph: jax.Array,
    text: jax.Array,
    mix: float,
    temperature: float = 1.0,
    target: Target = "probabilities",
) -> jax.Array:
    """Returns how far a student is from the mixed prediction of a teacher, `[B]`.

    For classes it is `t^2 sum_c p_c (log p_c - log q_c)`, with q the student's softmax at temperature t and p the teacher's
    mixture at t; for one output the squared error.

    Args:
      student: logits `[B, C]`.
      graph: logits of the teacher's graph convolution `[B, C]`; no gradient.
      text: logits of the teacher's classifier `[B, C]`; no gradient.
      mix: the teacher's lambda.
      temperature: t, above 0.
      target: `'published'`: `t^2 / C sum_c exp(p_c) (p_c - log q_c)`: the code hands probabilities to a function that
        expects their logarithms. Its least value is at softmax(p), which is nearly uniform.
    """
    mixed = jax.lax.stop_gradient(mixture(graph, text, mix, temperature))
    if student.shape[-1] == 1:
        return jnp.square(student[:, 0] - mixed[:, 0])
    log_q = nn.log_softmax(student / temperature)
    if target == "published":
        log_p, scale = jnp.exp(mixed), temperature**2 / student.shape[-1]
    else:
        log_p, scale = mixed, temperature**2
    return scale * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


@dataclasses.dataclass(frozen=True)
class GraphDistillation:
    """The objective of knowledge distillation: `alpha` times what `distillation_losses` says, and the rest the task's loss.

    Offline, the votes of the teacher for every training document are the phase's `constants`: `graph` and `text`, each `[N, C]`
    by the document's `index`. Online, the model is a `StudentAndTeacher` and the constants are its collection `graph`; the
    teacher's own loss, that of static and dynamic training, is added, and the student's does not reach it.

    Attributes:
      mix: the teacher's lambda.
      alpha: in [0, 1].
      temperature: above 0; the task's loss has 1.
      target: see `distillation_losses`.
      online: whether the teacher is trained in the same step.

    Raises:
      UserError: a value out of its range.
    """

    mix: float
    alpha: float = 0.5
    temperature: float = 1.0
    target: Target = "probabilities"
    online: bool = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"the share alpha of distillation is {self.alpha}: it must lie in [0, 1]")
        if not self.temperature > 0:
            raise UserError(f"the temperature {self.temperature} of distillation must be above 0")
        if self.target not in get_args(Target):
            raise UserError(
                f"unknown target of distillation {self.target!r}{near_misses(self.target, get_args(Target))}"
            )

    def __call__(self, forward: Forward, batch: Batch, constants: Any) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
        """Returns the losses summed over the batch, the sum of the examples' weights, and each loss summed."""
        if not self.online:
            graph, text = (constants[name][batch["index"]] for name in ("graph", "text"))
            return self.total(forward(batch)[0].logits, graph, text, batch)
        outputs, _ = forward(batch, graph=constants)
        teacher = outputs.teacher
        total, weight, sums = self.total(outputs.logits, teacher.graph, teacher.text, batch)
        own = jnp.sum(label_losses(teacher.logits, batch["labels"]) * batch["weights"])
        return total + own, weight, sums | {"teacher": own}

    def total(self, student: jax.Array, graph: jax.Array, text: jax.Array, batch: Batch) -> tuple[Any, jax.Array, dict]:
        """Returns the same from logits `[B, C]` of student and teacher."""
        losses = {
            "distillation": distillation_losses(student, graph, text, self.mix, self.temperature, self.target),
            "task": label_losses(student, batch["labels"]),
        }
        sums = {name: jnp.sum(value * batch["weights"]) for name, value in losses.items()}
        total = self.alpha * sums["distillation"] + (1 - self.alpha) * sums["task"]
        return total, jnp.sum(batch["weights"]), sums
