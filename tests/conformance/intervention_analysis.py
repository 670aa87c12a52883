"""Curvature and loss landscape of the models of "Teacher Intervention".

In float64, as the references: vectors of the manifests are flat, in its order of parameters and in the layout of torch.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.flatten_util import ravel_pytree

from qtx.analysis import curvature, landscape
from qtx.analysis.losses import mean_loss, stack, task_loss
from qtx.methods import teacher_intervention as ti
from qtx.models.checkpoints import from_hf_tensors
from tests.conformance.intervention_models import (
    FAMILY,
    batch_of,
    config_of,
    flat_params,
    in_float64,
    model_of,
    params_of,
    tensors,
)


def loss_of(case, side: str, norms: float = 0.0):
    config = config_of(case)
    if side == "teacher":
        return task_loss(model_of(config), norms=norms)
    return task_loss(model_of(config, ti.student_policy(published=True)), ti.untrained_padding(config), norms)


def slices(case) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Where each parameter lies in a flat vector, and its shape."""
    shapes = {name: np.shape(value) for name, value in tensors(case, "model/teacher/").items()}
    names, found, start = case.entry["param_order"], {}, 0
    for name in names:
        size = int(np.prod(shapes[name]))
        found[name] = slice(start, start + size), shapes[name]
        start += size
    return found


def tree_of(case, vector: np.ndarray) -> dict[str, Any]:
    """A flat vector of the manifest as parameters."""
    parts = {name: vector[where].reshape(shape) for name, (where, shape) in slices(case).items()}
    flat, extra = from_hf_tensors(FAMILY, config_of(case), parts)
    assert not extra
    return traverse_util.unflatten_dict({name: jnp.asarray(x) for name, x in flat.items()}, sep="/")


def vectors_of(case, rows: np.ndarray) -> jax.Array:
    """Flat vectors of the manifest as those of `qtx.analysis.curvature`, float64."""
    return jnp.stack([ravel_pytree(tree_of(case, row))[0] for row in rows]).astype(jnp.float64)


@in_float64
def hessian(case):
    side, e, want = "student" if "student" in case.id else "teacher", case.entry, tensors(case, f"{case.id}/")
    coefficient = float(re.search(r"plus ([\d.e-]+) \*", e["loss"])[1])
    loss, params, batches = loss_of(case, side, coefficient), params_of(case, side), stack([batch_of(case)])
    limit = e["tol"]["fp64"]
    np.testing.assert_allclose(mean_loss(loss, params, batches), want["loss"][0], rtol=1e-9)

    found = curvature.top_eigenvalues(
        loss, params, batches, jax.random.key(0), 1, iterations=e["power_iterations"], tolerance=0.0,
        start=vectors_of(case, want["v0"][None]),
    )  # fmt: skip
    np.testing.assert_allclose(found.quotients[0], want["rayleigh"], **limit)

    start, stop, name = re.match(r"rows and columns (\d+)\.\.(\d+) of .*flattened (\S+)", e["dense_block"]).groups()
    first = slices(case)[name][0].start
    chosen = first + np.arange(int(start), int(stop) + 1)
    signs = want["rademacher"]
    units = np.zeros((len(chosen), signs.shape[1]), np.float32)
    units[np.arange(len(chosen)), chosen] = 1
    vectors = vectors_of(case, np.concatenate([signs.astype(np.float32), units]))
    turned = curvature.products(loss, params, batches, vectors)
    np.testing.assert_allclose(np.sum(turned * vectors, 1)[: len(signs)], want["vHv"], **limit)
    rows, block = vectors[len(signs) :], turned[len(signs) :]
    dense = np.asarray(block @ rows.T)
    # What is not symmetric is rounding in the reference, whose size says how much of it there may be.
    assert np.max(np.abs(dense - dense.T)) <= max(1e-12, 1e3 * float(want["dense_block_asymmetry"][0]))
    np.testing.assert_allclose(np.linalg.eigvalsh((dense + dense.T) / 2), want["dense_block_eigenvalues"], **limit)


def still_of(case) -> tuple[str, ...]:
    """Names that the manifest's keywords leave out, as they are in qtx."""
    keywords = re.findall(r"'([^']+)'", " ".join(case.entry["zeroed"]))
    names = tensors(case, "model/teacher/")
    chosen = {name: value for name, value in names.items() if any(word in name for word in keywords)}
    return tuple(from_hf_tensors(FAMILY, config_of(case), chosen)[0])


@in_float64
def loss_landscape(case):
    e, want, raw = case.entry, tensors(case, f"{case.id}/"), case.file()[f"{case.id}/raw"]
    # Directions are float32, as those of the reference.
    teacher = traverse_util.unflatten_dict(flat_params(case, "model/teacher/"), sep="/")
    made = [landscape.normalized(tree_of(case, row), teacher, still=still_of(case)) for row in raw]
    first = traverse_util.flatten_dict(made[0], sep="/")
    basis = flat_params(case, f"{case.id}/basis0/")
    assert basis
    for path, value in basis.items():
        np.testing.assert_allclose(first[path], value, **e["tol"]["basis"], err_msg=path)
    axes, batches = [np.asarray(e["grid"])] * 2, stack([batch_of(case)])
    for side in ("teacher", "student"):
        found = landscape.evaluate(loss_of(case, side), params_of(case, side), batches, made, axes)
        limit = e["tol"][f"{side}_ce"]
        np.testing.assert_allclose(found.losses, want[f"{side}_ce"], **limit.get("fp64", limit), err_msg=side)


HANDLERS = {function.__name__: function for function in (hessian, loss_landscape)}
