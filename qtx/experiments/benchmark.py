"""What quantization costs: pairs of programs, measured in turn (`qtx.experiments.measuring`), against their bars.

    run(config, workdir="", only=["train-fixed"])

A bar that does not hold is reported, never raised; results that differ are an error. Rows about text graphs are in
`qtx.experiments.benchmark_graphs`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from qtx.errors import UserError, near_misses
from qtx.experiments.benchmark_graphs import dynamic_step, graph_build, graph_product, static_step
from qtx.experiments.measuring import (
    COLUMNS,
    FORMATS,
    Bar,
    Comparison,
    Memory,
    Program,
    environment,
    measure,
    random_batch,
    rows_of,
    temporary_memory,
    train_program,
)
from qtx.files import write_text
from qtx.methods.calibrate import calibrate
from qtx.methods.distillation import LOSS_SETS, Teacher, distillation_phase
from qtx.methods.layer_rounding import AdaRound, Data, Layer, optimise, temperature
from qtx.methods.teacher_intervention import intervention_phase, student_policy
from qtx.nn.aliases import policy
from qtx.nn.bert import MASKED, BertClassifier, BertConfig
from qtx.nn.decoding import Cache, Decoded, Markers, beam_step, begin_beam, end_beam, translate
from qtx.nn.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from qtx.nn.layers import Dense
from qtx.quant import Spec, asymmetric, estimate, estimator, per_channel, per_tensor, symmetric
from qtx.quant import rounding as quant_rounding
from qtx.train.phase import Phase, inputs
from qtx.train.report import Table


class PlainBert(nn.Module):
    """BERT as anyone would write it in linen: Dense, Embed, LayerNorm, no sites. Parameters: see `plain_params`."""

    config: BertConfig

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Maps `[B, T]` ids to logits `[B, C]`."""
        c = self.config
        width = c.hidden_size // c.num_heads
        bias = jnp.where(attention_mask > 0, 0.0, MASKED)[:, None, None, :]

        def dense(features: int, name: str, x: jax.Array) -> jax.Array:
            return nn.Dense(features, name=name)(x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.LayerNorm(c.layer_norm_eps, use_fast_variance=False, name=name)(x)

        x = nn.Embed(c.vocab_size, c.hidden_size, name="encoder_embeddings_word")(input_ids)
        x = x + nn.Embed(c.type_vocab_size, c.hidden_size, name="encoder_embeddings_token_type")(token_type_ids)
        positions = jnp.arange(input_ids.shape[1])[None]
        x = x + nn.Embed(c.max_positions, c.hidden_size, name="encoder_embeddings_position")(positions)
        x = norm("encoder_embeddings_norm", x)
        for i in range(c.num_layers):
            layer = f"encoder_layer_{i}"
            query, key, value = (
                dense(c.hidden_size, f"{layer}_attention_{part}", x).reshape(*x.shape[:2], c.num_heads, width)
                for part in ("query", "key", "value")
            )
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / width**0.5 + bias
            context = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value).reshape(x.shape)
            x = norm(f"{layer}_attention_norm", dense(c.hidden_size, f"{layer}_attention_out", context) + x)
            y = nn.gelu(dense(c.intermediate_size, f"{layer}_ffn_up", x), approximate=False)
            x = norm(f"{layer}_ffn_norm", dense(c.hidden_size, f"{layer}_ffn_down", y) + x)
        pooled = jnp.tanh(dense(c.hidden_size, "pooler_dense", x[:, 0]))
        return dense(c.num_labels, "classifier", pooled)


def plain_params(params: Mapping[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """Renames the parameters of `BertClassifier` for `PlainBert`: one level, `table` becomes `embedding`."""
    plain: dict[str, dict[str, jax.Array]] = {}
    for path, value in traverse_util.flatten_dict(params).items():
        leaf = "embedding" if path[-1] == "table" else path[-1]
        plain.setdefault("_".join(path[:-1]), {})[leaf] = value
    return plain


@dataclasses.dataclass(frozen=True)
class _Setup:
    """A full-precision model with random weights and a batch for it."""

    model: BertClassifier
    params: Any
    batch: dict[str, jax.Array]

    @classmethod
    @functools.lru_cache(1)
    def make(cls, config: FrozenConfigDict) -> _Setup:
        """Returns the setup for the sizes in `config`; the rows of one run share it."""
        batch = random_batch(config)
        model = BertClassifier(BertConfig(**config.model, hidden_dropout=0.0, attention_dropout=0.0))
        params = jax.jit(model.init)(jax.random.key(config.seed), *inputs(model, batch))["params"]
        return cls(model, params, batch)

    def quantized(self, **options: Any) -> tuple[BertClassifier, dict[str, Any]]:
        """Returns the W8A8 model with every site quantized, and its calibrated ranges."""
        model = self.model.clone(policy=policy(symmetric(8, **options), asymmetric(8, **options)))
        return model, calibrate(model, self.params, [inputs(model, self.batch)])

    def step(self, phase: Phase, ranges: Mapping[str, Any]) -> tuple[Program, int]:
        """Returns the train step of a phase, see `train_program`."""
        return train_program(phase, {"params": self.params, "ranges": ranges}, self.batch)

    @functools.cached_property
    def full_precision_step(self) -> tuple[Program, int]:
        """The step without a policy."""
        return self.step(Phase("benchmark", self.model), {})

    @functools.cached_property
    def student(self) -> Phase:
        """Training of a ternary student with labels alone."""
        return Phase("benchmark", self.model.clone(policy=student_policy()))

    @functools.cached_property
    def student_step(self) -> tuple[Program, int]:
        """The student's step."""
        return self.step(self.student, {})

    def forward(self, model: nn.Module, variables: Mapping[str, Any]) -> Program:
        """Returns the compiled forward pass as a program that gives the logits."""

        def logits(variables, batch):
            outputs = model.apply(variables, *inputs(self.model, batch))
            return getattr(outputs, "logits", outputs)

        compiled = jax.jit(logits)
        return lambda: compiled(variables, self.batch)

    @functools.cached_property
    def full_precision_forward(self) -> Program:
        """The forward pass without a policy."""
        return self.forward(self.model, {"params": self.params})


def train_step(config: ConfigDict, learned: bool) -> Comparison:
    """The quantized train step, with fixed or learned ranges, against the full-precision one."""
    setup = _Setup.make(FrozenConfigDict(config))
    options = dict(range="learned", backward="compact") if learned else {}  # as `qat_phase` has it
    model, ranges = setup.quantized(**options)
    a, a_bytes = setup.step(Phase("benchmark", model), ranges)
    b, b_bytes = setup.full_precision_step
    a_is, b_is = f"W8A8 everywhere, {'learned' if learned else 'fixed'} ranges", "full precision"
    memory = Memory(a_bytes, b_bytes, a_is, b_is, Bar(1.25)) if a_bytes and b_bytes else None
    return Comparison(a, b, a_is, b_is, config.rounds, Bar(1.20 if learned else 1.10), memory)


def train_narrow(config: ConfigDict) -> Comparison:
    """The full-precision train step with bfloat16 operands against float32 throughout; no bar: it is the processor's."""
    setup = _Setup.make(FrozenConfigDict(config))
    a, a_bytes = setup.step(Phase("benchmark", setup.model.clone(dtype=jnp.bfloat16)), {})
    b, b_bytes = setup.full_precision_step
    memory = Memory(a_bytes, b_bytes, "bfloat16", "float32", Bar(1.0)) if a_bytes and b_bytes else None
    return Comparison(a, b, "bfloat16", "float32", config.rounds, memory=memory)


def train_teacher(config: ConfigDict, schedule: str) -> Comparison:
    """The train step of a ternary student with its teacher, published losses, against the student's with labels alone."""
    setup = _Setup.make(FrozenConfigDict(config))
    student = setup.student
    teacher, losses = Teacher(setup.model, {"params": setup.params}), LOSS_SETS["teacher_intervention"]
    if schedule:
        taught = intervention_phase(student, teacher, schedule, losses)
    else:
        taught = distillation_phase(student, teacher, losses)
    a, _ = setup.step(taught, {})
    b, _ = setup.student_step
    a_is = f"ternary, distillation{f', interventions: {schedule}' if schedule else ''}"
    return Comparison(a, b, a_is, "ternary, labels", config.rounds, Bar(1.6))


def forward_plain(config: ConfigDict) -> Comparison:
    """The model without a policy against the plain linen model of the same parameters.

    Raises:
      ArithmeticError: if their logits differ.
    """
    setup = _Setup.make(FrozenConfigDict(config))
    a = setup.full_precision_forward
    b = setup.forward(PlainBert(setup.model.config), {"params": plain_params(setup.params)})
    difference = float(jnp.max(jnp.abs(a() - b())))
    if not difference <= 1e-4:
        raise ArithmeticError(f"the model without a policy and plain linen differ by {difference:g} in their logits")
    return Comparison(a, b, "qtx, no policy", "plain linen", config.rounds, Bar(1.05))


def forward_quantized(config: ConfigDict) -> Comparison:
    """The W8A8 forward pass (fake quantization) against full precision; no bar."""
    setup = _Setup.make(FrozenConfigDict(config))
    model, ranges = setup.quantized()
    a = setup.forward(model, {"params": setup.params, "ranges": ranges})
    b = setup.full_precision_forward
    return Comparison(a, b, "W8A8 everywhere, fixed ranges", "full precision", config.rounds)


def loop_search(x: jax.Array, candidates: int, by_row: bool) -> jax.Array:
    """The MSE search as one would write it first: 8 bits symmetric, one candidate after the other, not compiled.

    Returns:
      The upper end of the best range, `[rows]` or a scalar.
    """
    axes = (1,) if by_row else (0, 1)
    extent = 1.5 * jnp.max(jnp.abs(x), axes, keepdims=True)
    least, best = jnp.full_like(extent, jnp.inf), extent
    for i in range(1, candidates + 1):
        high = extent * (i / candidates)
        scale = high / 127
        quantized = scale * jnp.clip(jnp.round(x / scale), -128, 127)
        error = jnp.mean(jnp.square(quantized - x), axes, keepdims=True)
        best = jnp.where(error < least, high, best)
        least = jnp.minimum(error, least)
    return best.squeeze(axes)


def search(config: ConfigDict, by_row: bool) -> Comparison:
    """The library's MSE range search on a heavy-tailed embedding table against `loop_search`.

    Raises:
      ArithmeticError: if the library's range has more error than the loop's.
    """
    shape = config.model.vocab_size, config.model.hidden_size
    x = 0.02 * jax.random.t(jax.random.key(config.seed), 5.0, shape)
    granularity = per_channel(0) if by_row else per_tensor()
    spec = symmetric(8, granularity, estimator=estimator("mse", candidates=config.candidates))
    compiled = jax.jit(estimate, static_argnums=0).lower(spec, x).compile()
    _check_search(x, spec, compiled(x).scale, loop_search(x, config.candidates, by_row) / 127)
    memory, size = temporary_memory(compiled), 4 * x.size
    return Comparison(
        lambda: compiled(x),
        lambda: loop_search(x, config.candidates, by_row),
        f"compiled search, {config.candidates} ranges per {'row' if by_row else 'tensor'}",
        "eager loop over candidates",
        config.search_rounds,
        Bar(10.0, at_least=True),
        Memory(memory, size, "search, temporary", "the tensor", Bar(2.0)) if memory else None,
    )


def _check_search(x: jax.Array, spec: Spec, ours: jax.Array, theirs: jax.Array) -> None:
    """Same range, or one of the same error where two candidates tie to the rounding of a float32 sum."""

    def error(scale: jax.Array) -> np.ndarray:
        s = np.asarray(scale, np.float64).reshape(-1, 1)
        values = np.asarray(x, np.float64)
        errors = (s * np.clip(np.round(values / s), -128, 127) - values) ** 2
        return errors.sum(1) if s.size > 1 else errors.sum(keepdims=True).ravel()

    excess = np.max(error(ours) / np.maximum(error(theirs), 1e-30))
    if not excess <= 1 + 1e-4:
        raise ArithmeticError(f"the {spec} search finds a range with {excess:.6f} times the error of the plain loop's")


def rounding(config: ConfigDict) -> Comparison:
    """Learned rounding of one layer at 4 bits: coordinate descent against the published relaxation, a scan of Adam steps.

    Both start from the inputs of the layer, which are correlated. The activation function is left out on both sides.

    Raises:
      ArithmeticError: if the descent ends with the greater error of the layer's outputs.
    """
    rows, width, outputs = config.batch * config.tokens, config.model.hidden_size, config.model.intermediate_size
    keys = jax.random.split(jax.random.key(config.seed), 4)
    x = jax.random.normal(keys[0], (rows, width)) @ jax.random.normal(keys[1], (width, width)) / width**0.5
    w = 0.05 * jax.random.t(keys[2], 5.0, (width, outputs))
    spec = symmetric(4, estimator=estimator("mse"))
    params = estimate(spec, w)
    options = AdaRound(solver="relaxation", iterations=config.rounding_iterations, batch_size=min(32, rows))
    layer, others = Layer(Dense(outputs), "kernel"), {"bias": jnp.zeros(outputs)}
    data = Data(x, x @ w)
    batches = jax.random.randint(keys[3], (options.iterations, options.batch_size), 0, rows)
    temperatures = jnp.asarray(temperature(options, np.arange(1, options.iterations + 1)))

    @jax.jit
    def descent() -> jax.Array:
        return quant_rounding.descend(spec, w, params, quant_rounding.OutputError.of(x))

    def relaxation() -> jax.Array:
        found = optimise(layer, spec, options, w, others, params, data, batches, temperatures)
        return quant_rounding.weights_above_floor(spec, w, params, (found.alpha >= 0).astype(w.dtype))

    ours, theirs = (float(jnp.sum(jnp.square(x @ (q - w)))) for q in (descent(), relaxation()))
    if not ours <= theirs:
        raise ArithmeticError(f"descent ends with {ours / theirs:.3f} times the output error of the relaxation")
    a_is = f"coordinate descent ({ours / theirs:.2f} of the error)"
    b_is = f"relaxation, {options.iterations} iterations of {options.batch_size}"
    return Comparison(descent, relaxation, a_is, b_is, config.rounding_rounds, Bar(5.0, at_least=True))


def calibration(config: ConfigDict) -> Comparison:
    """Calibration of the whole model by least squared error, a grid for weights and Brent's method for activations, against
    min-max; no bar. (A grid over width and shift of an asymmetric range has 12,800 candidates.)"""
    setup = _Setup.make(FrozenConfigDict(config))
    grid, brent = estimator("mse", candidates=config.candidates), estimator("mse_brent")
    activations = {"**": asymmetric(8), config.calibration_searched: asymmetric(8, estimator=brent)}
    searched = policy(symmetric(8, estimator=grid), activations)
    model, data = setup.model.clone(policy=searched), [inputs(setup.model, setup.batch)]
    return Comparison(
        lambda: calibrate(model, setup.params, data),
        lambda: setup.quantized()[1],
        f"MSE search, weights and activations {config.calibration_searched}",
        "minimum and maximum",
        config.calibration_rounds,
    )


@functools.partial(jax.jit, static_argnames=("model", "width", "alpha"))
def _loop_step(model, variables, encoded, source_mask, state, *, width: int, alpha: float):
    """One token of `loop_translate`, for prefixes of up to `width` tokens."""
    c = model.config
    beam = state.tokens.shape[1]
    encoded, source_mask = jnp.repeat(encoded, beam, 0), jnp.repeat(source_mask, beam, 0)

    def last(model: EncoderDecoder, prefixes: jax.Array, position: jax.Array) -> jax.Array:
        _, decoded = model.decoder(prefixes, encoded, source_mask, True)
        newest = jax.lax.dynamic_slice_in_dim(decoded, position, 1, 1)
        return model.logits(newest, jnp.ones((len(prefixes), 1, 1), bool))[:, 0]

    def step(prefixes: Cache, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
        prefixes = prefixes.at[:, :, position].set(tokens)
        seen = prefixes[:, :, :width].reshape(-1, width)
        return model.apply(variables, seen, position, method=last).reshape(*tokens.shape, -1), prefixes

    return beam_step(step, state, alpha=alpha, markers=Markers(c.bos_token_id, c.eos_token_id, c.pad_token_id))


@functools.partial(jax.jit, static_argnames=("model",))
def _encode(model, variables, source_ids):
    mask = source_ids != model.config.pad_token_id
    return model.apply(variables, source_ids, mask, method=lambda m, ids, mask: m.encoder(ids, mask, True)[1]), mask


def loop_translate(
    model: EncoderDecoder,
    variables: Mapping[str, Any],
    source_ids: jax.Array,
    *,
    beam: int,
    limit: int,
    alpha: float,
    multiple: int,
) -> Decoded:
    """Beam search as one would write it first: a loop over tokens, a decoder pass over the whole prefix for each, no cache.

    Nothing else is slower than in `qtx.nn.decoding.translate`: the source is encoded once, and a pass is compiled, with the
    same selection of hypotheses. Prefixes are padded to a multiple of `multiple`: at `limit` one program serves all steps,
    with less there are more programs, of less work.
    """
    c = model.config
    encoded, mask = _encode(model, variables, source_ids)
    markers = Markers(c.bos_token_id, c.eos_token_id, c.pad_token_id)
    prefixes = jnp.full((len(source_ids), beam, limit), c.pad_token_id, jnp.int32)
    state = begin_beam(prefixes, jnp.any(mask, -1), beam, limit, markers)
    for position in range(limit):
        if not jnp.any(state.open):
            break
        width = min(limit, -(-(position + 1) // multiple) * multiple)
        state = _loop_step(model, variables, encoded, mask, state, width=width, alpha=alpha)
    return end_beam(state, alpha)


def decode(config: ConfigDict) -> Comparison:
    """Beam search in one program with a cache against `loop_translate`: the same random model and sentences.

    Raises:
      ArithmeticError: if more than a tenth of the translations differ (a few may, where hypotheses tie to rounding).
    """
    c = config.decode
    rng = np.random.default_rng(config.seed)
    model = EncoderDecoder(
        EncoderDecoderConfig(
            **c.model,
            source_vocab_size=c.vocabulary,
            target_vocab_size=c.vocabulary,
            max_positions=max(c.tokens, c.limit),
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    )
    lengths = rng.integers(c.tokens // 2, c.tokens + 1, c.batch)
    words = rng.integers(4, c.vocabulary, (c.batch, c.tokens))
    source = jnp.asarray(np.where(np.arange(c.tokens) < lengths[:, None], words, model.config.pad_token_id), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(config.seed), source, source)
    options: dict[str, Any] = dict(beam=c.beam, limit=c.limit, alpha=0.6)

    def ours() -> Decoded:
        return translate(model, variables, source, **options)

    def theirs() -> Decoded:
        return loop_translate(model, variables, source, **options, multiple=c.prefix_multiple)

    a, b = ours(), theirs()
    same = float(jnp.mean(jnp.all(a.tokens == b.tokens, -1)))
    if not same >= 0.9:
        raise ArithmeticError(f"with and without a cache, only {same:.0%} of the translations are the same")
    words_each = float(jnp.mean(a.lengths)) - 1
    return Comparison(
        ours,
        theirs,
        f"beam {c.beam}, one program with a cache, {c.batch} sentences, {words_each:.0f} tokens each",
        f"loop over tokens without a cache, prefixes padded to a multiple of {c.prefix_multiple}",
        c.rounds,
        Bar(5.0, at_least=True),
    )


COMPARISONS: dict[str, Callable[[ConfigDict], Comparison]] = {
    "train-fixed": lambda config: train_step(config, learned=False),
    "train-learned": lambda config: train_step(config, learned=True),
    "train-bfloat16": train_narrow,
    "train-distilled": lambda config: train_teacher(config, schedule=""),
    "train-intervened": lambda config: train_teacher(config, schedule="gradual"),
    "forward-plain": forward_plain,
    "search-tensor": lambda config: search(config, by_row=False),
    "search-row": lambda config: search(config, by_row=True),
    "forward-w8a8": forward_quantized,
    "adaround": rounding,
    "calibrate": calibration,
    "decode": decode,
    "graph-csr": lambda config: graph_product(config, "csr"),
    "graph-buckets": lambda config: graph_product(config, "buckets"),
    "graph-edges": lambda config: graph_product(config, "edges"),
    "graph-dynamic": dynamic_step,
    "graph-static": static_step,
    "graph-build": graph_build,
}


def run(config: ConfigDict, workdir: str | Path = "", only: Sequence[str] = (), rounds: int = 0) -> Table:
    """Measures, prints and, with a `workdir`, saves `benchmark.md`, `benchmark.csv` and `environment.txt`.

    Args:
      config: from `configs/benchmark.py`.
      workdir: where to save; empty: nowhere.
      only: names of `COMPARISONS`, in any order; empty: all.
      rounds: of every row, if positive; else as the configuration has them.

    Returns:
      The table, its rows in the order of `COMPARISONS`.

    Raises:
      UserError: on an unknown name.
      ArithmeticError: if two programs that should agree do not.
    """
    for name in only:
        if name not in COMPARISONS:
            raise UserError(f"unknown row {name!r}{near_misses(name, COMPARISONS)}")
    described = "".join(f"{name}: {value}\n" for name, value in environment().items())
    print(described, end="", flush=True)
    rows: list[list[Any]] = []
    for name, compare in COMPARISONS.items():
        if only and name not in only:
            continue
        comparison = compare(config)
        measured = rows_of(name, comparison, measure(comparison.a, comparison.b, rounds or comparison.rounds))
        print(f"{name}: {measured[0][COLUMNS.index('ratio')]:.3f}", file=sys.stderr, flush=True)
        rows += measured
    table = Table(COLUMNS, rows, FORMATS, title="medians over rounds; spread: least and greatest ratio of a round")
    print(table.markdown(), end="")
    if workdir:
        table.save(workdir, "benchmark")
        write_text(Path(workdir) / "environment.txt", described)
    return table
