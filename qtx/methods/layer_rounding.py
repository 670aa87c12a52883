"""AdaRound for one layer: its settings, the two solvers, the searches for a scale.

`qtx.methods.adaround` walks through a model with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qtx.errors import UserError, near_misses
from qtx.quant import grid, rounding, rows
from qtx.quant.spec import Spec

INITS = ("range_estimator", "mse", "mse_out", "mse_out_asym")
DECAYS = ("linear", "cosine", "sigmoid", "power", "exp", "log")
SCAN = 80  # scales tried by the searching initialisations: 100 %, 99 % ... 21 % of the largest magnitude


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """Settings; those of the relaxation have the published defaults.

    Attributes:
      layers: patterns over weight names; weights that the policy leaves in full precision are passed over.
      solver: see the module. Coordinate descent is for linear layers; other weights (tables, norm scales) are rounded to
        nearest by it, which minimises their output error if their inputs are the same in both networks.
      moves: of the descent: each weight's two neighbours, or the whole grid.
      sweeps: of the descent, at most.
      inputs: of the layers: from the quantized network so far (published as `asym`), or from the full-precision one, in
        which case the order of the layers does not matter.
      init: where the grid comes from: `'range_estimator'` keeps the policy's; `'mse'` searches the scale of least error
        of the weights, `'mse_out'` and `'mse_out_asym'` that of the outputs, on full-precision and quantized-so-far
        inputs (symmetric grids).
      init_scale: searched scales for each row of the spec's granularity, or `'tensor'`, one for all, as published.
      include_activation: the relaxation looks at outputs behind the layer's activation function.
      mode: relaxation, see `qtx.quant.rounding.relax`.
      iterations: steps of Adam for each layer.
      batch_size: examples in a step, drawn without repetition.
      learning_rate: of Adam, constant.
      weight: of the term that drives the relaxation to 0 or 1.
      warmup: part of the iterations without that term.
      annealing: its exponent (or the temperature of `sigmoid_temp_decay`), at the start and at the end.
      decay: shape of the way between the two; with `decay_shape` where there is one.
      decay_start: part of the iterations after the warm-up before the exponent begins to fall.
      sum_over: squared errors are summed over the features and averaged over the rest, or summed over `'axis_1'`, which
        is the tokens of `[B, T, D]`, as published.
      dtype: of the relaxation's arithmetic. While the relaxation still is the weight itself, gradients are rounding
        noise, and Adam makes steps of full size of them; in float64 they are zero, and the result is the same on every
        machine.
      seed: of the batches.
    """

    layers: tuple[str, ...] = ("**/kernel",)
    solver: Literal["descent", "relaxation"] = "descent"
    moves: Literal["neighbours", "grid"] = "neighbours"
    sweeps: int = 30
    inputs: Literal["quantized", "full_precision"] = "quantized"
    init: Literal["range_estimator", "mse", "mse_out", "mse_out_asym"] = "range_estimator"
    init_scale: Literal["granularity", "tensor"] = "granularity"
    include_activation: bool = True
    mode: rounding.Mode = "learned_hard_sigmoid"
    iterations: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight: float = 0.01
    warmup: float = 0.2
    annealing: tuple[float, float] = (20.0, 2.0)
    decay: Literal["linear", "cosine", "sigmoid", "power", "exp", "log"] = "cosine"
    decay_shape: float = 1.0
    decay_start: float = 0.0
    sum_over: Literal["features", "axis_1"] = "features"
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0

    def __post_init__(self):
        choices: dict[str, tuple[str, ...]] = {
            "solver": ("descent", "relaxation"),
            "moves": ("neighbours", "grid"),
            "inputs": ("quantized", "full_precision"),
            "init": INITS,
            "init_scale": ("granularity", "tensor"),
            "mode": rounding.MODES,
            "decay": DECAYS,
            "sum_over": ("features", "axis_1"),
            "dtype": ("float32", "float64"),
        }
        for field, options in choices.items():
            value = getattr(self, field)
            if value not in options:
                raise UserError(f"adaround: unknown {field} {value!r}{near_misses(str(value), options)}")
        for field in ("iterations", "batch_size", "sweeps"):
            if getattr(self, field) < 1:
                raise UserError(f"adaround: {field} is {getattr(self, field)}; give it at least one")
        if not 0 <= self.warmup < 1 or not 0 <= self.decay_start < 1:
            raise UserError(f"adaround: warmup {self.warmup} and decay_start {self.decay_start} must lie in [0, 1)")


def temperature(options: AdaRound, t: np.ndarray, total: int | None = None) -> np.ndarray:
    """Returns the exponent of the rounding term at steps `t`, float64.

    It stays at its start until the warm-up (and `decay_start`) is over, then falls to its end, by `rel` in [0, 1], as

        linear   end + (start - end) max(0, 1 - rel)
        cosine   end + (start - end) (1 + cos(pi rel)) / 2
        sigmoid  start + (end - start) (sig(d (rel - 1/2)) - o) / (1 - 2 o),  o = sig(-d/2)
        power    end + (start - end) (1 - rel^d)
        exp      start + (end - start) (1 - e^(-d rel)) / (1 - e^-d)
        log      d log((e^(end/d) - e^(start/d)) rel + e^(start/d))

    Args:
      options: annealing, decay and its shape `d`, warm-up.
      t: steps, counted from 1.
      total: number of steps; by default `options.iterations`.
    """
    t = np.asarray(t, np.float64)
    n = options.iterations if total is None else total
    (start, end), d = options.annealing, options.decay_shape
    first = n * (options.warmup + (1 - options.warmup) * options.decay_start)
    rel = (t - first) / (n - first)
    inside = np.maximum(rel, 0.0)
    if options.decay == "linear":
        b = end + (start - end) * np.maximum(0.0, 1 - inside)
    elif options.decay == "cosine":
        b = end + (start - end) * (1 + np.cos(np.pi * inside)) / 2
    elif options.decay == "sigmoid":
        offset = 1 / (1 + np.exp(d / 2))
        b = start + (end - start) * (1 / (1 + np.exp(-d * (inside - 0.5))) - offset) / (1 - 2 * offset)
    elif options.decay == "power":
        b = end + (start - end) * (1 - inside**d)
    elif options.decay == "exp":
        b = start + (end - start) * -np.expm1(-d * inside) / -np.expm1(-d)
    else:
        b = d * np.log((np.exp(end / d) - np.exp(start / d)) * inside + np.exp(start / d))
    return np.where(t < first, start, b)


class Data(NamedTuple):
    """What a layer is rounded on.

    Attributes:
      inputs: `[N, ...]`, from the network that `AdaRound.inputs` names.
      targets: `[N, ...]`, of the full-precision layer in the full-precision network.
      counts: broadcastable to the targets, 0 for padding; or None.
    """

    inputs: jax.Array
    targets: jax.Array
    counts: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer as a function of one of its weights.

    Attributes:
      module: unbound, without a policy.
      leaf: name of the weight.
    """

    module: nn.Module
    leaf: str

    def __call__(self, others: Mapping[str, jax.Array], weight: jax.Array, inputs: jax.Array) -> jax.Array:
        """Returns the outputs; `others` are the layer's other parameters."""
        return self.module.apply({"params": {**others, self.leaf: weight}}, inputs)  # type: ignore[return-value]


def reconstruction(outputs: jax.Array, data: Data, sum_over: str) -> jax.Array:
    """Returns the squared error: summed over one axis, averaged over the others (padding counts in neither)."""
    errors = jnp.square(outputs - data.targets)
    axis = 1 if sum_over == "axis_1" else -1
    if data.counts is None:
        return jnp.mean(jnp.sum(errors, axis))
    counts = jnp.broadcast_to(data.counts, errors.shape).astype(errors.dtype)
    if sum_over == "axis_1":
        return jnp.mean(jnp.sum(errors * counts, axis))
    return jnp.sum(errors * counts) / jnp.maximum(jnp.sum(counts[..., 0]), 1)


class Relaxed(NamedTuple):
    """The end of a relaxation: `alpha` of every weight, and by iteration `[iterations, 2]` total and reconstruction loss."""

    alpha: jax.Array
    trace: jax.Array


@partial(jax.jit, static_argnums=(0, 1, 2))
def optimise(
    layer: Layer,
    spec: Spec,
    options: AdaRound,
    weight: jax.Array,
    others: Mapping[str, jax.Array],
    params: grid.QParams,
    data: Data,
    batches: jax.Array,
    temperatures: jax.Array,
) -> Relaxed:
    """Trains the rounding of one weight, as published: Adam on `alpha` alone, compiled as one loop.

    Args:
      layer: computes the outputs.
      spec: of the weight, with concrete axes.
      options: mode, learning rate, warm-up, weight of the rounding term.
      weight: any shape, float32.
      others: the other parameters of the layer.
      params: quantizer parameters of the weight, fixed.
      data: all examples.
      batches: int `[iterations, batch]`, the examples of every step.
      temperatures: `[iterations]`, from `temperature`.

    Returns:
      `alpha` and the losses; `alpha >= 0` rounds up.
    """
    mode, iterations = options.mode, batches.shape[0]
    adam = optax.adam(options.learning_rate)
    start = options.annealing[0]

    def losses(alpha, batch, b, t):
        h = rounding.relax(mode, alpha, b)
        part = jax.tree.map(lambda v: v[batch], data)
        outputs = layer(others, rounding.weights_above_floor(spec, weight, params, h), part.inputs)
        error = reconstruction(outputs, part, options.sum_over)
        if mode == "sigmoid_temp_decay":
            return error, error
        term = jnp.sum(1 - jnp.abs(2 * h - 1) ** b)
        return error + jnp.where(t < options.warmup * iterations, 0.0, options.weight) * term, error

    def step(state, given):
        alpha, moments, b = state
        batch, following, t = given
        # The temperature of a step is set after the step before; the exponent is that of the step.
        b = b if mode == "sigmoid_temp_decay" else following
        (total, error), gradient = jax.value_and_grad(losses, has_aux=True)(alpha, batch, b, t)
        update, moments = adam.update(gradient, moments)
        return (alpha + update, moments, following), jnp.stack([total, error])

    alpha = rounding.unrelax(mode, rounding.fraction_above_floor(spec, weight, params), start)
    steps = jnp.arange(1, iterations + 1)
    state = (alpha, adam.init(alpha), jnp.asarray(start, alpha.dtype))
    (alpha, _, _), trace = jax.lax.scan(step, state, (batches, temperatures.astype(alpha.dtype), steps))
    return Relaxed(alpha, trace)


def draw_batches(count: int, options: AdaRound) -> jax.Array:
    """Returns int32 `[iterations, batch]`: for every step the head of a fresh permutation of the examples."""
    rng = np.random.default_rng(options.seed)
    size = min(options.batch_size, count)
    return jnp.asarray(np.stack([rng.permutation(count)[:size] for _ in range(options.iterations)]), jnp.int32)


def search_scale(
    spec: Spec, weight: jax.Array, error: Callable[[jax.Array], jax.Array], init_scale: str = "granularity"
) -> grid.QParams:
    """Returns the quantizer parameters of the range `(-r, r)` of least error: `r` is 100 %, 99 % ... 21 % of the largest
    magnitude.

    Args:
      spec: with concrete axes.
      weight: float32.
      error: of a quantized weight, one value for each of its ranges (or whatever is to be summed, for one range in all).
      init_scale: see `AdaRound`.
    """
    whole = init_scale == "tensor" or spec.granularity.axis is None
    magnitudes = jnp.abs(weight)[None] if whole else rows.to_rows(jnp.abs(weight), spec.granularity)
    largest = jnp.max(magnitudes.reshape(magnitudes.shape[0], -1), 1)

    def quantizer(high: jax.Array) -> grid.QParams:
        count = rows.row_count(spec.granularity, weight.shape)
        high = high[0] if count is None else jnp.broadcast_to(high, (count,))
        return grid.qparams(spec, -high, high)

    def one(best, i):
        high = (1 - 0.01 * i) * largest
        found = error(grid.fake_quant(spec, weight, quantizer(high)))
        found = jnp.sum(found)[None] if whole else found
        better = found < best[0]
        return (jnp.where(better, found, best[0]), jnp.where(better, high, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf), largest)
    (_, high), _ = jax.lax.scan(one, start, jnp.arange(SCAN, dtype=jnp.float32))
    return quantizer(high)


@partial(jax.jit, static_argnums=(3, 4))
def output_errors(x0: jax.Array, x: jax.Array, counts: jax.Array | None, drifted: bool, full: bool):
    """Returns the output errors of one batch on the inputs `x` and, if asked for, `x0`, and the number of rows that count."""
    where = jnp.ones((*x.shape[:-1], 1)) if counts is None else jnp.broadcast_to(counts, (*x.shape[:-1], 1))
    flat, flat0 = ((v * where).reshape(-1, v.shape[-1]).astype(jnp.float32) for v in (x, x0))
    error = rounding.OutputError.of(flat, flat0 if drifted else None)
    return error, rounding.OutputError.of(flat0) if full else None, jnp.sum(where)


def _columns(group: int, groups: int, width: int) -> slice:
    return slice(group * width // groups, (group + 1) * width // groups)


@partial(jax.jit, static_argnums=1)
def errors_of_outputs(error: rounding.OutputError, groups: int, quantized: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the error of every output of a layer, `[out]`."""
    columns = [_columns(i, groups, w.shape[1]) for i in range(groups)]
    parts = zip(error.split(groups), columns, strict=True)
    return jnp.concatenate([part(quantized[:, c], w[:, c]) for part, c in parts])


def descend(
    spec: Spec, w: jax.Array, params: grid.QParams, error: rounding.OutputError, groups: int, options: AdaRound
) -> jax.Array:
    """Rounds a kernel, group by group of its layer."""
    found = []
    for i, part in enumerate(error.split(groups)):
        c = _columns(i, groups, w.shape[1])
        own = spec.granularity.axis in (-1, 1) and spec.granularity.groups is None  # a range for each output
        mine = params._replace(scale=params.scale[c], zero_point=params.zero_point[c]) if own else params
        found.append(rounding.descend(spec, w[:, c], mine, part, options.moves, options.sweeps))
    return jnp.concatenate(found, 1)


@partial(jax.jit, static_argnums=0)
def column_errors(layer: Layer, others: Any, weight: jax.Array, data: Data) -> jax.Array:
    """Returns the squared error of every output feature of a layer, `[out]`, summed over all rows that count."""
    errors = jnp.square(layer(others, weight, data.inputs) - data.targets)
    errors = errors if data.counts is None else errors * data.counts
    return jnp.sum(errors.reshape(-1, errors.shape[-1]), 0)


def mean_error(layer: Layer, others: Any, weight: jax.Array, data: Data) -> float:
    """Returns the squared error of a layer's outputs, averaged over all that count."""
    rows = data.targets[..., 0].size if data.counts is None else float(jnp.sum(data.counts))
    return float(jnp.sum(column_errors(layer, others, weight, data)) / (rows * data.targets.shape[-1]))


def by_range(spec: Spec, errors: jax.Array) -> jax.Array:
    """Sums errors of weights over all that share a range."""
    found = rows.to_rows(errors, spec.granularity)
    return jnp.sum(found.reshape(found.shape[0], -1), 1)


def by_output(spec: Spec, errors: jax.Array) -> jax.Array:
    """Returns the errors of outputs `[out]` by range: one each, or one in all."""
    if spec.granularity.axis is None:
        return jnp.sum(errors)[None]
    if spec.granularity.groups is not None or spec.granularity.axis not in (-1, 1):
        raise UserError(
            f"adaround: init 'mse_out' cannot tell the outputs of ranges {spec.granularity}; use init_scale='tensor'"
        )
    return errors
