"""What a model costs: operations and energy in theory, from its sites; seconds and joule as measured.

    found = products(policy, list_sites(model, variables, *args))
    energy(operations(found))

Every matrix product of one forward pass is a `Product`: linear layers, both products of attention, and the dense and sparse
products of a graph convolution. A multiply-accumulate (MAC) is counted once for each term of each output. Softmax, norms,
activation functions and residual sums, about 1 % of BERT-base, are left out.

How a product is costed depends on what meets in it:

    float32      one multiplication and one addition for each MAC
    integers     operands of at most 8 bits: an int8 multiplication and an int32 addition, since sums need the room
    few levels   weights of {-1, 0, 1} need no multiplication but one addition, {-2 .. 2} at most two; int32 if the input has
                 at most 8 bits, else float32
    rescaling    one float32 multiplication for each output of a product with quantized operands

Zeros are not skipped. Bytes are those of `qtx.analysis.memory`, which counts scales. The formulas behind the figures of
BitTransGNN are in `qtx.analysis.efficiency_as_published`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from qtx.errors import UserError, near_misses
from qtx.nn.sites import SiteInfo
from qtx.quant.policy import Kind, Policy

PICOJOULE: dict[str, dict[str, tuple[float, float]]] = {
    "7nm": {"float32": (0.38, 1.31), "int32": (0.03, 1.48), "int8": (0.007, 0.07)},
    "45nm": {"float32": (0.9, 3.7), "int32": (0.1, 3.1), "int8": (0.03, 0.2)},
}
"""Of an addition and of a multiplication, by process and data type (the table of the BitNet papers, after Horowitz 2014 and
Zhang et al. 2022)."""


def energy_per_operation(dtype: str, process: str = "7nm") -> tuple[float, float]:
    """Returns the joule of one addition and of one multiplication.

    Args:
      dtype: `'float32'`, `'int32'` or `'int8'`.
      process: `'7nm'` or `'45nm'`.

    Raises:
      UserError: another data type or process.
    """
    if process not in PICOJOULE:
        raise UserError(f"no energies for process {process!r}{near_misses(process, PICOJOULE)}")
    if dtype not in PICOJOULE[process]:
        raise UserError(f"no energies for data type {dtype!r}{near_misses(dtype, PICOJOULE[process])}")
    addition, multiplication = PICOJOULE[process][dtype]
    return addition * 1e-12, multiplication * 1e-12


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product.

    Attributes:
      name: of the layer or of the site that holds its result.
      kind: linear layer, product of queries and keys, of probabilities and values, or of a sparse matrix and a dense one.
      macs: multiply-accumulates: terms that are multiplied and added, over all outputs.
      outputs: number of elements of the result.
      weight_bits: of the first operand: weights, queries, probabilities or the sparse matrix.
      input_bits: of the other one.
    """

    name: str
    kind: Literal["linear", "scores", "context", "sparse"]
    macs: int
    outputs: int
    weight_bits: float = 32
    input_bits: float = 32

    @property
    def bit_multiplications(self) -> float:
        """MACs times the bits of both operands."""
        return self.macs * self.weight_bits * self.input_bits

    def operations(self) -> dict[str, np.ndarray]:
        """Returns the numbers of additions and multiplications, float64 `[2]`, by data type."""
        found = {dtype: np.zeros(2) for dtype in ("float32", "int32", "int8")}
        added = additions_per_weight(self.weight_bits) if self.kind == "linear" else None
        narrow = self.input_bits <= 8
        if added is not None:
            found["int32" if narrow else "float32"][0] += added * self.macs
        elif narrow and self.weight_bits <= 8:
            found["int32"][0] += self.macs
            found["int8"][1] += self.macs
        else:
            found["float32"] += self.macs
            return found
        found["float32"][1] += self.outputs
        return found


def additions_per_weight(bits: float) -> int | None:
    """Returns how many additions take the place of a multiplication by a weight; None: nothing does.

    Args:
      bits: 1 to log2(3) for weights of -1, 0 and 1: one addition. Up to log2(5), for -2 to 2: two, the second for the double.
    """
    return 1 if bits <= math.log2(3) else 2 if bits <= math.log2(5) else None


def products(policy: Policy | None, sites: Mapping[str, SiteInfo]) -> tuple[Product, ...]:
    """Returns the matrix products of one forward pass of a model.

    The bits of a linear layer's input are those of its input site. Where the policy quantizes activations instead, they are the
    most that any activation has: no site says which activation a layer reads. Queries, keys and values have the fewer bits of
    their layer's output and of their heads.

    Args:
      policy: decides about bits; None: float32.
      sites: from `list_sites`, called with the batch size and length that are wanted.
    """

    def bits(kind: Kind, name: str) -> float:
        spec = None if policy is None else policy.spec(kind, name)
        return 32 if spec is None else spec.storage_bits

    activations = [name for name, info in sites.items() if info.kind == "activation"]
    widest = max((bits("activation", name) for name in activations), default=32)
    found = []
    for name, info in sites.items():
        module, _, role = name.rpartition("/")
        if info.kind == "input" and role == "input":
            weight = _weight(module, sites)
            rows, outputs = math.prod(info.shape[:-1]), math.prod(sites[f"{module}/output"].shape)
            operands = bits("weight", weight), min(bits("input", name), widest)
            found.append(Product(module, "linear", rows * math.prod(sites[weight].shape), outputs, *operands))
        elif role == "scores":
            keys, context = info.shape[-1], math.prod(sites[f"{module}/context"].shape)
            heads = [
                min(bits("activation", f"{module}/{part}/output"), bits("input", f"{module}/{part}_heads"))
                for part in ("query", "key", "value")
            ]
            operands = heads[0], heads[1]
            queries = math.prod(sites[f"{module}/query/output"].shape)
            found.append(Product(name, "scores", queries * keys, math.prod(info.shape), *operands))
            probs = min(bits("activation", f"{module}/probs"), bits("input", f"{module}/probs_dropped"))
            found.append(Product(f"{module}/context", "context", context * keys, context, probs, heads[2]))
    return tuple(found)


def _weight(module: str, sites: Mapping[str, SiteInfo]) -> str:
    """Returns the weight site of a linear layer.

    Layers that share weights have it under the first of them; a layer that shares a table has it there.
    """
    if (own := f"{module}/kernel") in sites:
        return own
    if found := re.match(r"(.*layer_)(\d+)(/.*)", module):
        names = (f"{found[1]}{number}{found[3]}/kernel" for number in range(int(found[2]), -1, -1))
        return next(name for name in names if name in sites)
    shape = sites[f"{module}/output"].shape[-1], sites[f"{module}/input"].shape[-1]
    return next(name for name, info in sites.items() if info.kind == "weight" and info.shape == shape)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Sizes of a two-layer graph convolution and of its graph.

    Attributes:
      nodes: documents and words.
      entries: of the normalised adjacency: symmetric, with self loops.
      width: of the features.
      hidden: units.
      classes: outputs.
    """

    nodes: int
    entries: int
    width: int = 768
    hidden: int = 256
    classes: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"a graph with {getattr(self, field.name)} {field.name}; give at least 1")

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.hidden * (self.width + 1) + self.classes * (self.hidden + 1)

    def bytes(self, bits: float = 32, bias: bool = True, documents: int = 0) -> dict[str, float]:
        """Returns the bytes of `weights` (with a scale for each output if they are quantized, and biases), of the
        `adjacency` (float32 value and int32 column of each entry, int32 row starts) and of the `features` of documents.

        Args:
          bits: of the weights.
          bias: whether the layers have one; quantized layers were published without.
          documents: whose features are kept; words have none.
        """
        outputs = self.hidden + self.classes
        weights = self.hidden * (self.width + self.classes)
        return {
            "weights": bits / 8 * weights + 4 * outputs * bias + 4 * outputs * (bits < 32),
            "adjacency": 8 * self.entries + 4 * (self.nodes + 1),
            "features": 4 * documents * self.width,
        }

    def products(self, weight_bits: float = 32, input_bits: float = 32) -> tuple[Product, ...]:
        """Returns the products of one pass over the whole graph: a dense and a sparse one for each layer.

        Neighbours are summed behind the dense product, at the width of the layer's output, in float32.

        Args:
          weight_bits: of both layers.
          input_bits: of what enters their dense products.
        """
        found = []
        for number, (inputs, outputs) in enumerate(((self.width, self.hidden), (self.hidden, self.classes)), 1):
            size, layer = self.nodes * outputs, f"gcn/layer_{number}"
            found += [
                Product(layer, "linear", size * inputs, size, weight_bits, input_bits),
                Product(f"{layer}/neighbours", "sparse", self.entries * outputs, size),
            ]
        return tuple(found)


def macs(found: Iterable[Product]) -> dict[str, int]:
    """Returns the multiply-accumulates by kind of product. (Floating-point operations are twice as many.)"""
    total: dict[str, int] = {}
    for product in found:
        total[product.kind] = total.get(product.kind, 0) + product.macs
    return total


def operations(found: Iterable[Product]) -> dict[str, np.ndarray]:
    """Returns additions and multiplications, float64 `[2]`, by data type, of all products."""
    total: dict[str, np.ndarray] = {}
    for product in found:
        for dtype, counts in product.operations().items():
            total[dtype] = total.get(dtype, 0) + counts
    return total


def energy(counts: Mapping[str, ArrayLike], process: str = "7nm") -> float:
    """Returns the joule that operations take, each at its own data type.

    Args:
      counts: additions and multiplications by data type, from `operations`.
      process: see `energy_per_operation`.
    """
    return float(sum(np.dot(number, energy_per_operation(dtype, process)) for dtype, number in counts.items()))


class Summary(NamedTuple):
    """Statistics of repeated measurements, in their unit.

    Attributes:
      median: half of them are below.
      p5: 5th percentile, interpolated linearly; so is `p95`.
      p95: 95th percentile.
      mean: their mean.
      std: with divisor n - 1; 0 for a single one.
      n: their number.
    """

    median: float
    p5: float
    p95: float
    mean: float
    std: float
    n: int


def summary(measurements: Sequence[float] | np.ndarray) -> Summary:
    """Returns the statistics of measurements `[N]`; raises a `UserError` if there is none."""
    values = np.asarray(measurements, np.float64)
    if not values.size:
        raise UserError("no measurements to summarise: repeat at least once")
    median, p5, p95 = np.percentile(values, (50, 5, 95))
    std = values.std(ddof=1) if values.size > 1 else 0.0
    return Summary(float(median), float(p5), float(p95), float(values.mean()), float(std), values.size)


class Power(NamedTuple):
    """What a board took: `joule`, `mean` and `peak` watt."""

    joule: float
    mean: float
    peak: float


def power(seconds: ArrayLike, watt: ArrayLike) -> Power:
    """Integrates samples of power by the trapezoid rule.

    Args:
      seconds: times of the samples `[N]`, rising.
      watt: the samples `[N]`.

    Returns:
      The energy between the first and the last sample, its mean over that time, and the largest sample.

    Raises:
      UserError: fewer than two samples, or times that do not rise.
    """
    times, values = np.asarray(seconds, np.float64), np.asarray(watt, np.float64)
    if times.shape != values.shape or times.ndim != 1 or times.size < 2 or (np.diff(times) <= 0).any():
        raise UserError("power needs at least two samples at rising times, one value for each")
    joule = float(np.trapezoid(values, times))
    return Power(joule, joule / float(times[-1] - times[0]), float(values.max()))
