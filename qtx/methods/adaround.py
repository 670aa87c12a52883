"""AdaRound: learned rounding of weights after training (Nagel et al. 2020; Bondarenko et al. 2021, section 5).

    rounded = adaround(model, params, batches, AdaRound())
    ranges = calibrate(model, rounded.params, batches, weights=rounded.ranges)

Layer by layer, in the order of the data's way through the model, weights are rounded so that the layer's *output* is
kept: what it computes from the inputs that the quantized network so far hands it is held against what the full-precision
layer computes in the full-precision network. Activations stay in full precision meanwhile. The result is parameters that
lie on their grids: quantizing them to nearest, with the ranges returned, changes nothing, so evaluation and packing know
nothing of AdaRound.

Two solvers. `'relaxation'` is the published one: Adam on a smooth relaxation, over random batches. `'descent'` (the
default) uses that the error of a linear layer is a quadratic form: coordinate descent on the Gram matrix of its inputs,
without data in the loop; it reaches lower errors in a hundredth of the time (see the benchmark). It looks at outputs
before the activation function.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.methods.calibrate import Args, put, quantized_weights, stored_qparams, weight_ranges
from qtx.methods.layer_walk import (
    Block,
    Call,
    Stage,
    enter_blocks,
    inputs_around_blocks,
    inputs_in_model,
    make_stages,
    run_block,
    trace,
)
from qtx.nn.layers import Dense
from qtx.nn.sites import check_policy, list_sites
from qtx.quant import grid, rounding, rows
from qtx.quant.policy import Policy, matches
from qtx.quant.spec import Spec
from qtx.train.logging import progress
from qtx.train.report import Table

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


# --- one layer


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


# --- the whole model


class LayerReport(NamedTuple):
    """What rounding did to one layer: mean squared errors of its outputs, the solver, and seconds."""

    name: str
    nearest: float
    rounded: float
    solver: str
    seconds: float


class Rounded(NamedTuple):
    """The result of `adaround`.

    Attributes:
      params: nested; the rounded weights lie on their grids, the others are as they were.
      ranges: the `ranges` collection of all weights, for `calibrate(..., weights=...)`.
      layers: a report for each rounded weight, in order.
    """

    params: dict[str, Any]
    ranges: dict[str, Any]
    layers: list[LayerReport]

    def table(self) -> Table:
        """Returns the errors before and after as a table."""
        rows = [
            [r.name, r.nearest, r.rounded, r.rounded / r.nearest if r.nearest else None, r.solver, r.seconds]
            for r in self.layers
        ]
        formats = {"nearest": ".3e", "rounded": ".3e", "ratio": ".3f", "seconds": ".2f"}
        return Table(
            ["weight", "nearest", "rounded", "ratio", "solver", "seconds"], rows, formats, "Output error of each layer"
        )


def layers_to_round(options: AdaRound, policy: Policy, weights: Sequence[str]) -> dict[str, Spec]:
    """Returns the weights that are to be rounded, with their specs.

    Args:
      options: `layers` are its patterns.
      policy: of the model.
      weights: names of all weight sites.

    Raises:
      UserError: on a pattern that matches nothing, a weight whose grid cannot be rounded to, or nothing to do.
    """
    for pattern in options.layers:
        if not any(matches(pattern, name) for name in weights):
            raise UserError(f"adaround: layers {pattern!r} matches no weight{near_misses(pattern, weights)}")
    found: dict[str, Spec] = {}
    for name in weights:
        spec = policy.spec("weight", name)
        if spec is None or not any(matches(pattern, name) for pattern in options.layers):
            continue
        if spec.is_codebook or spec.range == "dynamic":
            raise UserError(f"adaround: weight {name!r} is {spec}; rounding needs a uniform grid with a static range")
        found[name] = spec
    if not found:
        raise UserError("adaround: the policy keeps all of these layers in full precision; give their weights bits")
    return found


def adaround(
    model: nn.Module, params: Mapping[str, Any], batches: Sequence[Args], options: AdaRound = AdaRound()
) -> Rounded:
    """Rounds the weights of a model so that the outputs of its layers are kept.

    Args:
      model: a module with a policy for its weights; activations are in full precision while this works.
      params: nested parameters.
      batches: argument tuples for the model, all of one shape; padding does not count.
      options: see `AdaRound`.

    Raises:
      UserError: if the policy does not fit, a pattern matches nothing, or there is no batch.
    """
    policy: Policy | None = getattr(model, "policy", None)
    if policy is None or not policy.weights:
        raise UserError("adaround needs a model whose policy quantizes weights; clone it with model.clone(policy=...)")
    if len(batches) == 0:
        raise UserError("adaround got no batches; give it at least one")
    bare = model.clone(policy=None)
    sites = list_sites(bare, {"params": params}, *batches[0])
    check_policy(policy, sites)
    weights = {name: info for name, info in sites.items() if info.kind == "weight"}
    chosen = {
        name: spec.at(weights[name].channel_axis, len(weights[name].shape))
        for name, spec in layers_to_round(options, policy, list(weights)).items()
    }
    ranges = weight_ranges(policy, sites, params)
    owners = {name.rpartition("/")[0]: name for name in chosen}
    calls, blocks = trace(bare, params, batches[0], set(owners))
    work = _Work(bare, params, quantized_weights(policy, sites, params, ranges), blocks, batches, options)
    # Blocks with arguments of their own are not run one by one: their layers' inputs come from the whole model.
    stages = make_stages(calls, alike=len({block.rest for block in blocks}) <= 1)
    reports: list[LayerReport] = []
    with progress(len(chosen), "adaround") as bar:
        for stage in stages:
            work.go_to(stage)
            for call in stage.calls:
                clock = time.perf_counter()
                name = owners[call.path]
                found, nearest, after, solver = work.round(
                    stage, call, name, chosen[name], stored_qparams(ranges, name)
                )
                put(ranges, name, found._asdict())
                reports.append(LayerReport(name, nearest, after, solver, time.perf_counter() - clock))
                bar.update(len(reports), nearest=nearest, rounded=after)
    flat = traverse_util.flatten_dict(params, sep="/")
    done = {name: work.quantized[name] if name in chosen else value for name, value in flat.items()}
    return Rounded(traverse_util.unflatten_dict(done, sep="/"), ranges, reports)


class _Work:
    """The two networks, full-precision and quantized so far, and how far the data have come through them."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        quantized: Any,
        blocks: Sequence[Block],
        batches: Sequence[Args],
        options: AdaRound,
    ):
        self.model, self.blocks, self.batches, self.options = model, blocks, batches, options
        self.full = dict(traverse_util.flatten_dict(params, sep="/"))
        self.quantized = dict(traverse_util.flatten_dict(quantized, sep="/"))
        self.done = 0  # blocks behind the data
        self.x: list[tuple[Any, Any]] = []  # by batch: the data in both networks, before block number `done`
        self.arrays: list[tuple[Any, Any]] = []  # by batch: what else the blocks are called with
        self.cached: tuple[Stage, Any] | None = None

    def _both(self, program: Callable[..., Any], *pairs: tuple[Any, Any], below: str = "") -> tuple[Any, Any]:
        """Returns `program(params, ...)` of the full-precision and of the quantized network, each with its part of the
        pairs."""
        found: list[Any] = []
        for i, flat in enumerate((self.full, self.quantized)):
            if i == 1 and self.options.inputs == "full_precision":
                return found[0], found[0]
            mine = {name.removeprefix(below): value for name, value in flat.items() if name.startswith(below)}
            found.append(program(traverse_util.unflatten_dict(mine, sep="/"), *(pair[i] for pair in pairs)))
        return found[0], found[1]

    def _block(self, path: str, x: tuple[Any, Any], arrays: tuple[Any, Any]) -> tuple[Any, Any]:
        """Runs the next block in both networks; `path` is that of a layer in it, or empty."""
        block = self.blocks[self.done]
        program = partial(run_block, block.module, block.static, path.removeprefix(f"{block.path}/"))
        return self._both(program, x, arrays, below=f"{block.path}/")

    def go_to(self, stage: Stage) -> None:
        """Carries the data through all blocks before a stage."""
        self.cached = None
        call = stage.calls[0]
        target = call.block - call.inside
        if not stage.once or (target == 0 and not call.inside):
            return
        if not self.x:
            entered = [self._both(partial(enter_blocks, self.model), (args, args)) for args in self.batches]
            self.x = [(a[0], b[0]) for a, b in entered]
            self.arrays = [(a[1], b[1]) for a, b in entered]
        while self.done < target:
            self.x = [self._block("", x, arrays) for x, arrays in zip(self.x, self.arrays, strict=True)]
            self.done += 1

    def _inputs(self, stage: Stage) -> Iterator[tuple[Any, Any, Any]]:
        """Yields, batch by batch, the inputs of both networks and counts, once for every call of the stage's layers."""
        call = stage.calls[0]
        for number, args in enumerate(self.batches):
            if not stage.once:
                both = self._both(partial(inputs_in_model, self.model, call.path), (args, args))
            elif call.inside:
                both = self._block(call.path, self.x[number], self.arrays[number])
            else:
                program = partial(inputs_around_blocks, self.model, call.path, self.done)
                both = self._both(program, (args, args), self.x[number] if self.done else (None, None))
            for (x0, counts), (x, _) in zip(*both, strict=True):
                yield x0, x, counts

    def round(self, stage: Stage, call: Call, name: str, spec: Spec, params: grid.QParams | None):
        """Rounds one weight; returns its quantizer parameters, errors to nearest and after, and the solver's name."""
        assert params is not None
        linear = isinstance(call.module, Dense)
        solve = self._relaxation if self.options.solver == "relaxation" else self._descent if linear else self._nearest
        return solve(stage, call, name, spec, params)

    def _nearest(self, stage: Stage, call: Call, name: str, spec: Spec, params: grid.QParams):
        data, layer, others = self._data(stage, call, name)
        error = _mean_error(layer, others, self.quantized[name], data)
        return params, error, error, "nearest"

    def _descent(self, stage: Stage, call: Call, name: str, spec: Spec, params: grid.QParams):
        if self.cached is None or self.cached[0] is not stage:
            self.cached = stage, self._output_error(stage)
        error, error_full, count = self.cached[1]
        weight, groups = self.full[name], call.module.groups  # type: ignore[attr-defined]
        if self.options.init != "range_estimator":
            scored = {
                "mse": lambda q: _by_range(spec, jnp.square(q - weight)),
                "mse_out": lambda q: _by_output(spec, _errors(error_full, groups, q, weight)),
                "mse_out_asym": lambda q: _by_output(spec, _errors(error, groups, q, weight)),
            }[self.options.init]
            params = search_scale(spec, weight, scored, self.options.init_scale)
        nearest = grid.fake_quant(spec, weight, params)
        found = _descend(spec, weight, params, error, groups, self.options)
        self.quantized[name] = found
        size = count * weight.shape[-1]
        before, after = (float(jnp.sum(_errors(error, groups, q, weight)) / size) for q in (nearest, found))
        return params, before, after, "descent"

    def _output_error(self, stage: Stage) -> tuple[rounding.OutputError, rounding.OutputError | None, float]:
        """Returns the output error on the inputs of the quantized network, on those of the full-precision one if it is
        needed, and the number of rows."""
        drifted, full = self.options.inputs == "quantized", self.options.init == "mse_out"
        total = None
        for x0, x, counts in self._inputs(stage):
            part = _products(x0, x, counts, drifted, full)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        assert total is not None
        return total[0], total[1], float(total[2])

    def _data(
        self, stage: Stage, call: Call, name: str, full_inputs: bool = False
    ) -> tuple[Data, Layer, dict[str, Any]]:
        path, _, leaf = name.rpartition("/")
        module = call.module
        if isinstance(module, Dense) and not self.options.include_activation:
            module = module.clone(activation=None)
        layer = Layer(module, leaf)
        prefix = path + "/"
        others = {k.removeprefix(prefix): v for k, v in self.full.items() if k.startswith(prefix) and k != name}
        parts = list(self._inputs(stage))
        targets = [layer(others, self.full[name], x0) for x0, _, _ in parts]
        inputs = jnp.concatenate([x0 if full_inputs else x for x0, x, _ in parts])
        counts = None
        if parts[0][2] is not None:
            counts = jnp.concatenate(
                [jnp.broadcast_to(c, (*y.shape[:-1], 1)) for (_, _, c), y in zip(parts, targets, strict=True)]
            )
        return Data(inputs, jnp.concatenate(targets), counts), layer, others

    def _relaxation(self, stage: Stage, call: Call, name: str, spec: Spec, params: grid.QParams):
        with jax.enable_x64(self.options.dtype == "float64"):
            return self._relaxed(stage, call, name, spec, params)

    def _relaxed(self, stage: Stage, call: Call, name: str, spec: Spec, params: grid.QParams):
        options, dtype = self.options, jnp.dtype(self.options.dtype)
        data, layer, others = self._data(stage, call, name)
        cast = partial(jax.tree.map, lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v)
        weight, data, others, params = cast((self.full[name], data, others, params))
        layer = dataclasses.replace(layer, module=layer.module.clone(dtype=dtype))
        if options.init != "range_estimator":
            source = data if options.init != "mse_out" else cast(self._data(stage, call, name, full_inputs=True)[0])
            if options.init == "mse":
                scored = lambda q: _by_range(spec, jnp.square(q - weight))  # noqa: E731
            else:
                scored = lambda q: _by_output(spec, column_errors(layer, others, q, source))  # noqa: E731
            params = search_scale(spec, weight, scored, options.init_scale)
        batches = draw_batches(data.inputs.shape[0], options)
        temperatures = jnp.asarray(temperature(options, np.arange(1, options.iterations + 1)))
        relaxed = optimise(layer, spec, options, weight, others, params, data, batches, temperatures)
        found = rounding.weights_above_floor(spec, weight, params, (relaxed.alpha >= 0).astype(weight.dtype))
        nearest = grid.fake_quant(spec, weight, params)
        errors = [_mean_error(layer, others, q, data) for q in (nearest, found)]
        params = jax.tree.map(lambda v: v if v.dtype == bool else v.astype(jnp.float32), params)
        # In float32 again: the codes are what was found, their values those of every other quantized weight.
        self.quantized[name] = grid.fake_quant(spec, found.astype(jnp.float32), params)
        return params, *errors, "relaxation"


@partial(jax.jit, static_argnums=(3, 4))
def _products(x0: jax.Array, x: jax.Array, counts: jax.Array | None, drifted: bool, full: bool):
    """Returns the output errors of one batch on the inputs `x` and, if asked for, `x0`, and the number of rows that count."""
    where = jnp.ones((*x.shape[:-1], 1)) if counts is None else jnp.broadcast_to(counts, (*x.shape[:-1], 1))
    flat, flat0 = ((v * where).reshape(-1, v.shape[-1]).astype(jnp.float32) for v in (x, x0))
    error = rounding.OutputError.of(flat, flat0 if drifted else None)
    return error, rounding.OutputError.of(flat0) if full else None, jnp.sum(where)


def _columns(group: int, groups: int, width: int) -> slice:
    return slice(group * width // groups, (group + 1) * width // groups)


@partial(jax.jit, static_argnums=1)
def _errors(error: rounding.OutputError, groups: int, quantized: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the error of every output of a layer, `[out]`."""
    columns = [_columns(i, groups, w.shape[1]) for i in range(groups)]
    parts = zip(error.split(groups), columns, strict=True)
    return jnp.concatenate([part(quantized[:, c], w[:, c]) for part, c in parts])


def _descend(
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


def _mean_error(layer: Layer, others: Any, weight: jax.Array, data: Data) -> float:
    rows = data.targets[..., 0].size if data.counts is None else float(jnp.sum(data.counts))
    return float(jnp.sum(column_errors(layer, others, weight, data)) / (rows * data.targets.shape[-1]))


def _by_range(spec: Spec, errors: jax.Array) -> jax.Array:
    """Sums errors of weights over all that share a range."""
    found = rows.to_rows(errors, spec.granularity)
    return jnp.sum(found.reshape(found.shape[0], -1), 1)


def _by_output(spec: Spec, errors: jax.Array) -> jax.Array:
    """Returns the errors of outputs `[out]` by range: one each, or one in all."""
    if spec.granularity.axis is None:
        return jnp.sum(errors)[None]
    if spec.granularity.groups is not None or spec.granularity.axis not in (-1, 1):
        raise UserError(
            f"adaround: init 'mse_out' cannot tell the outputs of ranges {spec.granularity}; use init_scale='tensor'"
        )
    return errors
