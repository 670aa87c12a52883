"""Kinds of cases of "Compressed Transformers": the loss, the learning rate, steps of Adam."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qtx.methods.translation import TranslationLoss, smoothed_kl
from qtx.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from qtx.train.phase import Phase, make_state, make_step
from tests.conformance import compressed_models as models


def close(got, want, tolerance, name=""):
    np.testing.assert_allclose(got, want, rtol=tolerance["rtol"], atol=tolerance.get("atol", 0), err_msg=name)


def label_smoothed_kl(case):
    given, want, p = case.values("inputs"), case.values("outputs"), case.entry["params"]
    labels, scores = given["targets"][:, 0].astype(np.int32), jnp.asarray(given["raw_scores"])

    def loss(scores):
        return smoothed_kl(scores, labels, p["smoothing"], p["pad"]).sum() / len(labels)

    got, grads = jax.value_and_grad(loss)(scores)
    close(got, want["loss"], case.entry["tolerance"])
    close(grads, want["grad_raw_scores"], case.entry["tolerance"])
    # The distribution is what makes the gradient vanish, up to the rows that are padding.
    q = want["distribution"]
    real = labels != p["pad"]
    at_optimum = jax.grad(loss)(jnp.log(jnp.maximum(q, 1e-30)))
    np.testing.assert_allclose(at_optimum[real], 0, atol=1e-6)


def rate(case):
    p = case.entry["params"]
    width, warm = p["model_dimension"], p["warmup"]
    config = OptimizerConfig((width * warm) ** -0.5, warmup_steps=warm, schedule="inverse_sqrt")
    steps = jnp.asarray(case.values("inputs")["steps"])
    close(config.learning_rate * learning_rate(config, 10**6)(steps - 1), case.values("outputs")["lr"], {"rtol": 1e-6})


def adam_steps(case):
    p, want, tolerance = case.entry["params"], case.values("outputs"), case.entry["tolerance"]
    given = models.inputs(case)
    model, params = models.model_of(p), models.params_of(p, given)
    b1, b2 = p["betas"]
    settings = OptimizerConfig(
        (p["d"] * p["warmup"]) ** -0.5,
        warmup_steps=p["warmup"],
        schedule="inverse_sqrt",
        weight_decay=0.0,
        b1=b1,
        b2=b2,
        eps=p["eps"],
        max_grad_norm=0.0,
    )
    phase = Phase("train", model, settings, objective=TranslationLoss(p["smoothing"], "rows"))
    optimizer = make_optimizer(settings, p["steps"])
    batches = [models.batch_of(given[f"src{i}"], given[f"trg{i}"]) for i in range(p["steps"])]
    state = make_state(phase, {"params": params}, optimizer, 0, batches[0])
    step, losses = jax.jit(make_step(phase, optimizer, 0)), []
    for batch in batches:
        state, measured = step(state, batch, None)
        losses.append(measured["loss"])
    close(losses, want["losses"], tolerance["losses"] | {"atol": 0}, "losses")
    after = models.named(p, want, "after:")
    reliable = models.named(
        p, {k.replace("reliable:", "after:"): v for k, v in want.items() if "reliable:" in k}, "after:"
    )
    assert after
    for name, value in after.items():
        trusted = reliable[name] > 0 if name in reliable else np.ones(value.shape, bool)
        got = np.asarray(state.trained[f"params/{name}"])
        close(np.where(trusted, got, 0), np.where(trusted, value, 0), tolerance, name)


HANDLERS = {"label_smoothed_kl": label_smoothed_kl, "learning_rate": rate, "adam_steps": adam_steps}
