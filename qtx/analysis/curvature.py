"""Curvature of a loss: top eigenvalues, trace and spectral density of its Hessian, from products with vectors alone.

    found = top_eigenvalues(task_loss(model, norms=0.01), params, stack(batches), jax.random.key(0))
    print(found.values, found.iterations)

Procedure and constants are those of Kim et al. 2023 (figure 5): power iteration with deflation, Hutchinson's estimator of the
trace, and stochastic Lanczos quadrature for the density, as in Yao et al. 2020, "PyHessian". Each of them has one compiled
program, which batches, samples and runs share. Parameters are any pytree of floats; vectors are flat, `[P]`, in the order of
`jax.flatten_util.ravel_pytree`. The loss is the mean over batches `[N, ...]`, see `qtx.analysis.losses`.

A product is the gradient of `<gradient, v>`, reverse over reverse: straight-through estimators are written for the reverse
mode and have no other. For a quantized model, whose loss is piecewise constant, this is not a Hessian: it is the derivative of
the straight-through gradient, by the same straight-through rules. With grids on weights alone it is `M H M`, where `H` is the
Hessian at the quantized weights and `M` is 1 where the gradient passes and 0 where it is clipped. Ranges that have a gradient
of their own, and grids on activations, give further terms, and then it need not be symmetric; a range whose backward pass is
`'compact'` has no term from the remainder of rounding, which is stored as a code. `product` is its transpose
applied to v, power iteration finds what dominates it, the trace is that of its symmetric part, and Lanczos, which needs
symmetry, sees no more than the upper triangle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from qtx.analysis.losses import Loss, bound
from qtx.errors import UserError
from qtx.train.logging import progress
from qtx.train.plots import INK, RUN_COLORS, new_figure, save_figure
from qtx.train.report import Table

_EPS = 1e-6  # of norms and of relative changes, as published
_FAINTEST = 1e-10  # density that a plot shows, relative to the highest: less than one parameter in many millions
_BREAKDOWN = 1e-5  # a Lanczos vector that is shorter, relative to the spectrum, is nothing but rounding

Multiply = Callable[[jax.Array], jax.Array]


# --- Products ---


def product(loss: Loss, params: Any, batches: Any, vector: jax.Array) -> jax.Array:
    """Returns the Hessian of the mean loss times a vector `[P]`; see above for quantized models.

    Args:
      loss: `(params, batch) -> scalar`.
      params: pytree of floats.
      batches: arrays `[N, ...]`.
      vector: `[P]`.
    """
    return products(loss, params, batches, vector[None])[0]


def products(loss: Loss, params: Any, batches: Any, vectors: jax.Array) -> jax.Array:
    """Returns `product` for each of the vectors `[K, P]`, one after the other."""
    return _products(bound(loss), params, batches, vectors)


@jax.jit
def _products(loss, params, batches, vectors):
    return jax.lax.map(_multiply(loss, params, batches)[0], vectors)


def _multiply(loss: Loss, params: Any, batches: Any) -> tuple[Multiply, jax.Array]:
    """Returns the product as a function of the vector, and the flat parameters."""
    flat, unravel = ravel_pytree(params)
    count = jax.tree.leaves(batches)[0].shape[0]

    def multiply(vector: jax.Array) -> jax.Array:
        def add(total, batch):
            def along(x):
                return jnp.vdot(jax.grad(lambda x: loss(unravel(x), batch))(x), vector)

            return total + jax.grad(along)(flat), None

        return jax.lax.scan(add, jnp.zeros_like(flat), batches)[0] / count

    return multiply, flat


# --- Eigenvalues ---


class Eigenvalues(NamedTuple):
    """The eigenvalues of greatest magnitude, the greatest first.

    Attributes:
      values: `[K]`, of either sign.
      vectors: `[K, P]`.
      quotients: `[K, iterations]` Rayleigh quotients as the iteration went; NaN after its end.
      iterations: `[K]` int32, how many there were.
    """

    values: Any
    vectors: Any
    quotients: Any
    iterations: Any


def top_eigenvalues(
    loss: Loss,
    params: Any,
    batches: Any,
    key: jax.Array,
    count: int = 3,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    start: jax.Array | None = None,
) -> Eigenvalues:
    """Finds the top eigenvalues by power iteration with deflation.

    In every iteration the vector is made orthogonal to those found before and normalized, multiplied, and its Rayleigh quotient
    taken. The iteration ends when the quotient has changed by less than `tolerance` of itself, and then the older one is
    the eigenvalue; or with the last iteration, and then that one's is.

    Args:
      loss: `(params, batch) -> scalar`.
      params: pytree of floats.
      batches: arrays `[N, ...]`.
      key: draws the first vectors, which are normal.
      count: K.
      iterations: at most, for each eigenvalue.
      tolerance: relative; 0 never ends early.
      start: `[K, P]` first vectors, instead of drawn ones.

    Raises:
      UserError: a number out of range.
    """
    _check(count=count, iterations=iterations)
    _check_count(count, params)
    return _top(bound(loss), params, batches, key, tolerance, start, count=count, iterations=iterations)


def top_eigenvalues_by_batch(
    loss: Loss, params: Any, batches: Any, key: jax.Array, count: int = 3, *, iterations: int = 100, tolerance=1e-3
) -> np.ndarray:
    """Returns `[N, K]`: the top eigenvalues of every batch for itself, as the published figure pools them.

    Args:
      loss: as in `top_eigenvalues`, like all others.
      params: pytree of floats.
      batches: arrays `[N, ...]`; in the figure, of one example each.
      key: draws the first vectors, others for each batch.
      count: K.
      iterations: at most.
      tolerance: relative.
    """
    _check(count=count, iterations=iterations)
    _check_count(count, params)
    batches = jax.device_get(batches)
    keys = jax.random.split(key, jax.tree.leaves(batches)[0].shape[0])
    found: list[np.ndarray] = []
    with progress(len(keys), "top eigenvalues") as bar:
        for number, first in enumerate(keys):
            alone = jax.tree.map(lambda x, number=number: x[number : number + 1], batches)
            top = _top(bound(loss), params, alone, first, tolerance, None, count=count, iterations=iterations)
            found.append(np.asarray(top.values))
            bar.update(number + 1, largest=float(found[-1][0]))
    return np.stack(found)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value}: give at least 1")


def _check_count(count: int, params: Any) -> None:
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    if count > size:
        raise UserError(f"{count} eigenvalues of a loss with {size} parameters: ask for no more than there are")


def _normalized(vector: jax.Array) -> jax.Array:
    return vector / (jnp.linalg.norm(vector) + _EPS)


def _without(vector: jax.Array, basis: jax.Array) -> jax.Array:
    """Takes what lies along each row of `basis` `[K, P]` out of a vector; rows of zeros take nothing."""
    return vector - (basis @ vector) @ basis


@partial(jax.jit, static_argnames=("count", "iterations"))
def _top(loss, params, batches, key, tolerance, start, *, count, iterations) -> Eigenvalues:
    multiply, flat = _multiply(loss, params, batches)

    def one(basis, given):
        number, key, vector = given
        if vector is None:
            vector = jax.random.normal(key, flat.shape, flat.dtype)

        def iterate(state):
            i, vector, value, quotients, _ = state
            vector = _normalized(_without(vector, basis))
            turned = multiply(vector)
            quotient = jnp.vdot(turned, vector)
            done = (i > 0) & (jnp.abs(value - quotient) / (jnp.abs(value) + _EPS) < tolerance)
            value = jnp.where(done, value, quotient)
            return i + 1, _normalized(turned), value, quotients.at[i].set(quotient), done

        def go_on(state):
            return (state[0] < iterations) & ~state[-1]

        zero, empty = jnp.zeros((), flat.dtype), jnp.full(iterations, jnp.nan, flat.dtype)
        first = jnp.int32(0), _normalized(vector), zero, empty, jnp.asarray(False)
        i, vector, value, quotients, _ = jax.lax.while_loop(go_on, iterate, first)
        return basis.at[number].set(vector), (value, quotients, i)

    basis = jnp.zeros((count, flat.size), flat.dtype)
    given = jnp.arange(count), jax.random.split(key, count), start
    basis, (values, quotients, taken) = jax.lax.scan(one, basis, given)
    return Eigenvalues(values, basis, quotients, taken)


# --- Trace ---


class Trace(NamedTuple):
    """Hutchinson's estimate, of the whole trace and of the part of every tensor on the diagonal.

    Attributes:
      samples: `[S, tensors]`: what each tensor adds to `<v, H v>`, in the order of `jax.tree.leaves`.
    """

    samples: np.ndarray

    @property
    def value(self) -> float:
        """The mean of the samples."""
        return self.of()[0]

    @property
    def standard_error(self) -> float:
        """Of the value; NaN with a single sample."""
        return self.of()[1]

    def of(self, tensors: Sequence[int] | None = None) -> tuple[float, float]:
        """Returns the trace of the block of some tensors, and its standard error.

        Args:
          tensors: their numbers; None: all.
        """
        chosen = self.samples if tensors is None else self.samples[:, list(tensors)]
        sums = np.asarray(np.sum(chosen, 1, dtype=np.float64))
        error = np.std(sums, ddof=1) / np.sqrt(len(sums)) if len(sums) > 1 else np.nan
        return float(np.mean(sums)), float(error)


def trace(
    loss: Loss, params: Any, batches: Any, key: jax.Array, samples: int = 100, *, tolerance: float = 1e-3
) -> Trace:
    """Estimates the trace with Rademacher vectors (Hutchinson 1989).

    Ends when a sample has changed the mean by less than `tolerance` of itself.

    Args:
      loss: `(params, batch) -> scalar`.
      params: pytree of floats.
      batches: arrays `[N, ...]`.
      key: draws the vectors.
      samples: S, at most.
      tolerance: relative; 0 draws all samples.

    Raises:
      UserError: fewer than one sample.
    """
    _check(samples=samples)
    drawn: list[np.ndarray] = []
    mean = 0.0
    with progress(samples, "trace") as bar:
        for i in range(samples):
            drawn.append(np.asarray(_sample(bound(loss), params, batches, jax.random.fold_in(key, i))))
            before, mean = mean, mean + (float(np.sum(drawn[-1], dtype=np.float64)) - mean) / (i + 1)
            bar.update(i + 1, trace=mean)
            if abs(mean - before) / (abs(before) + _EPS) < tolerance:
                break
    return Trace(np.stack(drawn))


@jax.jit
def _sample(loss, params, batches, key):
    """One sample of the trace, `[tensors]`."""
    multiply, flat = _multiply(loss, params, batches)
    vector = jax.random.rademacher(key, flat.shape, flat.dtype)
    parts = ravel_pytree(params)[1](vector * multiply(vector))
    return jnp.stack([jnp.sum(part) for part in jax.tree.leaves(parts)])


# --- Density ---


class Density(NamedTuple):
    """The distribution of the eigenvalues as point masses.

    Attributes:
      values: `[R, S]` for R runs of S steps.
      weights: `[R, S]`; those of a run sum to 1.
    """

    values: Any
    weights: Any

    def on(self, x: np.ndarray, width: float) -> np.ndarray:
        """Returns the density at `x` `[X]`, the mean over runs, with Gaussians of standard deviation `width` for the masses."""
        values, weights = (np.asarray(each, np.float64) for each in self)
        kernels = np.exp(-0.5 * ((np.asarray(x)[:, None, None] - values) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        return np.mean(np.sum(kernels * weights, -1), -1)


def density(loss: Loss, params: Any, batches: Any, key: jax.Array, steps: int = 100, *, runs: int = 1) -> Density:
    """Estimates the spectral density by stochastic Lanczos quadrature, with full re-orthogonalization.

    All vectors of a run are kept: `steps` times the size of the parameters.

    Args:
      loss: `(params, batch) -> scalar`, whose Hessian is taken for symmetric.
      params: pytree of floats.
      batches: arrays `[N, ...]`.
      key: draws the first vectors (Rademacher).
      steps: S; no more than there are parameters.
      runs: R.

    Raises:
      UserError: a number out of range.
    """
    _check(steps=steps, runs=runs)
    _check_count(steps, params)
    found = []
    with progress(runs, "density") as bar:
        for number, first in enumerate(jax.random.split(key, runs), 1):
            found.append(jax.device_get(_density(bound(loss), params, batches, first, steps=steps)))
            bar.update(number)
    return Density(*map(np.stack, zip(*found, strict=True)))


@partial(jax.jit, static_argnames="steps")
def _density(loss, params, batches, key, *, steps):
    """One run: values and weights, `[S]`."""
    multiply, flat = _multiply(loss, params, batches)

    def unit(vector):
        return vector / jnp.linalg.norm(vector)

    def orthogonal(vector, basis):
        return _without(_without(vector, basis), basis)  # once more takes out what rounding left

    first, rest = jax.random.split(key)

    def step(state, given):
        basis, vector, largest = state
        i, key = given
        basis = basis.at[i].set(vector)
        turned = multiply(vector)
        alpha = jnp.vdot(turned, vector)
        residual = orthogonal(turned, basis)
        beta = jnp.linalg.norm(residual)
        largest = jnp.maximum(largest, jnp.maximum(jnp.abs(alpha), beta))
        # The vectors so far span an invariant space. Go on in the rest of it, to which the first vector gives no weight.
        done = beta <= _BREAKDOWN * largest
        fresh = unit(orthogonal(jax.random.normal(key, flat.shape, flat.dtype), basis))
        vector = jnp.where(done, fresh, residual / jnp.where(done, 1, beta))
        return (basis, vector, largest), (alpha, jnp.where(done, 0, beta))

    start = unit(jax.random.rademacher(first, flat.shape, flat.dtype))
    empty = jnp.zeros((steps, flat.size), flat.dtype)
    keys = jax.random.split(rest, steps)
    _, (alpha, beta) = jax.lax.scan(step, (empty, start, jnp.zeros((), flat.dtype)), (jnp.arange(steps), keys))
    tridiagonal = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    return values, jnp.square(vectors[0])


# --- Reports ---


def summary_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a row for each model.

    Args:
      found: by model: `loss`, and, where they were measured, `eigenvalues` of any shape and `trace` `[S, tensors]`.
    """
    columns = ["model", "loss", "greatest eigenvalue", "median of positive", "median of negative", "trace"]
    rows = []
    for model, values in found.items():
        row: list[Any] = [model, float(values["loss"]), None, None, None, None]
        if "eigenvalues" in values:
            top = np.ravel(values["eigenvalues"])
            row[2] = float(top[np.argmax(np.abs(top))])
            row[3:5] = [float(np.median(side)) if side.size else None for side in (top[top > 0], top[top < 0])]
        if "trace" in values:
            row[5] = Trace(values["trace"]).value
        rows.append(row)
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] is not None for row in rows)]
    columns = [columns[i] for i in kept]
    return Table(columns, [[row[i] for i in kept] for row in rows], dict.fromkeys(columns[1:], ".4g"))


def eigenvalues_table(found: Mapping[str, Any]) -> Table:
    """Returns a row for each eigenvalue: model, batch, rank from 0, value.

    Args:
      found: `[N, K]` by model, from `top_eigenvalues_by_batch`.
    """
    rows = [
        [name, batch, rank, float(value)]
        for name, values in found.items()
        for batch, of_batch in enumerate(np.asarray(values))
        for rank, value in enumerate(of_batch)
    ]
    return Table(["model", "batch", "rank", "eigenvalue"], rows)


def parts_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Returns which tensors make up each part of a model: embeddings, every layer, and what else there is.

    Args:
      names: of the parameters, such as `encoder/layer_0/ffn/up/kernel`, in the order of the tensors of a `Trace`.
    """
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        layer = re.search(r"(?:^|/)layer_(\d+)/", name)
        part = f"layer {layer[1]}" if layer else name.removeprefix("encoder/").split("/")[0]
        found.setdefault(part, []).append(number)
    # By the way through the model: embeddings, layers, the head and its last part.
    place = {"embeddings": (0, 0), "classifier": (3, 0)}
    place |= {part: (1, int(part.removeprefix("layer "))) for part in found if part.startswith("layer ")}
    return {part: found[part] for part in sorted(found, key=lambda part: place.get(part, (2, 0)))}


def traces_table(found: Mapping[str, Trace], names: Sequence[str], sizes: Sequence[int]) -> Table:
    """Returns a row for each model and part, and one for each whole model.

    Args:
      found: by model.
      names: of the tensors.
      sizes: of the tensors.
    """
    rows: list[list[Any]] = []
    for model, each in found.items():
        for part, tensors in (parts_of(names) | {"all": range(len(names))}).items():
            size = sum(sizes[number] for number in tensors)
            value, error = each.of(tensors)
            rows.append([model, part, size, value, error, value / size, len(each.samples)])
    columns = ["model", "part", "parameters", "trace", "standard error", "by parameter", "samples"]
    formats = {"parameters": ",d", "trace": ".4g", "standard error": ".2g", "by parameter": ".3g"}
    return Table(columns, rows, formats)


def plot_traces(found: Mapping[str, Trace], names: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draws the trace of every part's block of the Hessian, with two standard errors to either side.

    Args:
      found: by model.
      names: of the tensors.
      path: of the PNG.
    """
    parts = parts_of(names)
    figure, ((axes,),) = new_figure(max(6, 0.7 * len(parts) + 2), 3.8)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.axhline(0, color="#cbd2d9", linewidth=0.8)
    for number, (name, each) in enumerate(found.items()):
        values, errors = np.transpose([each.of(tensors) for tensors in parts.values()])
        at = np.arange(len(parts)) + 0.16 * (number - (len(found) - 1) / 2)
        color = RUN_COLORS[number % len(RUN_COLORS)]
        errors = np.nan_to_num(2 * errors)
        axes.errorbar(at, values, errors, fmt="o", color=color, markersize=4, linewidth=1.2, capsize=2, label=name)
    axes.set_xticks(np.arange(len(parts)), parts, fontsize=8, rotation=0 if len(parts) < 11 else 45)
    axes.set_ylabel("trace", color=INK)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_densities(found: Mapping[str, Density], path: str | os.PathLike[str], points: int = 1000) -> None:
    """Draws spectral densities over each other, with a logarithmic density.

    The masses are Gaussians as wide as a hundredth of the range of all eigenvalues.

    Args:
      found: by model.
      path: of the PNG.
      points: of each curve.

    Raises:
      UserError: an eigenvalue that is not finite.
    """
    every = np.concatenate([np.ravel(each.values) for each in found.values()]).astype(np.float64)
    if not np.isfinite(every).all():
        raise UserError("no density to plot: the losses or their derivatives are not numbers")
    width = max(float(np.ptp(every)), _EPS) / 100
    x = np.linspace(every.min() - 5 * width, every.max() + 5 * width, points)
    figure, ((axes,),) = new_figure(7, 4)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    highest = 0.0
    for color, (name, each) in zip(RUN_COLORS * len(found), found.items(), strict=False):
        density = each.on(x, width)
        highest = max(highest, float(density.max()))
        axes.plot(x, density, color=color, linewidth=1.2, label=name)
    axes.set_yscale("log")
    axes.set_ylim(highest * _FAINTEST, highest * 3)
    axes.set_xlabel("eigenvalue", color=INK)
    axes.set_ylabel("density (log scale)", color=INK)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_eigenvalues(found: Mapping[str, Any], path: str | os.PathLike[str], bins: int = 40) -> None:
    """Draws histograms of pooled top eigenvalues: negative ones to the left, positive ones to the right (figure 5).

    Args:
      found: arrays of any shape by model.
      path: of the PNG.
      bins: of each side; all models share them.

    Raises:
      UserError: no finite eigenvalue, or fewer than one bin.
    """
    _check(bins=bins)
    pooled = {name: np.ravel(np.asarray(values, np.float64)) for name, values in found.items()}
    every = np.concatenate([np.zeros(0), *pooled.values()])
    if not np.isfinite(every).any():
        raise UserError("no finite eigenvalue to plot: the losses or their derivatives are not numbers")
    figure, grid = new_figure(9, 3.6, columns=2)
    for axes, sign, title in zip(grid[0], (-1, 1), ("negative", "positive"), strict=True):
        reach = max(np.max(np.abs(every[(sign * every > 0) & np.isfinite(every)]), initial=0), _EPS)
        edges = np.sort(sign * np.linspace(0, reach, bins + 1))
        for color, (name, values) in zip(RUN_COLORS * len(pooled), pooled.items(), strict=False):
            counts = np.histogram(values[sign * values > 0], edges)[0]
            axes.stairs(counts, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(counts, edges, color=color, linewidth=1.2, label=name)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"{title} top eigenvalues", color=INK)
        axes.set_ylabel("count", color=INK)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=8
    )
    save_figure(figure, path)
