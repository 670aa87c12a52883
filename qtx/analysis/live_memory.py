"""Which tensors of a forward pass are alive at the same time, and what the largest such set takes at each bit width.

    found = tensors(model, params, *args)
    items = tensor_memory(policy, found)
    peak(found, items)                    # (bytes, the site at which that is reached)

The model is traced, not run: the trace says in which order sites are visited and which sites each of them is made of.

A site's value is a tensor. A value that another site has already, as it is or in another shape, is the same tensor: the input
of a linear layer is mostly the output of what stands before it. A tensor is alive from its site to the last site that is
made of it with no other site between: queries until the scores, a residual stream until its sum, the logits to the end. The
live set of a site is what is alive there, with the tensor that is being made and those that it is made of.

A tensor has the bits that its own site puts it on, or those of its readers where all of them put it on a grid: then nothing
needs more of it. A residual stream that layers read at 4 bits and a sum reads as it is stays in full precision. A part of a
tensor, such as the first token, is a tensor of its own with at most the bits of the whole.

What the model leaves out: what lies between two sites (rows of tables, products before their bias or activation function,
statistics of norms, masks) is taken to be fused, and takes nothing; no tensor is written over one that ends; sites run one
after the other in the order of the trace. Parameters and the model's inputs are arguments, and are not counted here. There
is no backward pass, whose tensors are kept until their gradients are computed: by XLA's account alone, see
`qtx.analysis.memory`.

In full precision the peak is to be held against XLA's `temporary` bytes of a forward pass. They are more where XLA gives
products and what follows them buffers of their own, and fewer where it writes a tensor over one that ends, which the model
does not. On CPU (jaxlib 0.10) they are 1.00 times the peak for one text of the AG_NEWS classifier, 0.68 times for eight texts
of a small one (as if probabilities lay where scores were), and 1.8 to 2.2 times for a BERT of 384 channels, whose GELU takes
more than one buffer. Quantized, there is nothing to hold the peak against: fake quantization computes in float32 and keeps
weights on their grids, so XLA's buffers grow (2.7 to 13 times the float32 peak of the classifier and that BERT), whatever the
bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.extend import core

from qtx.analysis.memory import Item, part_of, payload, totals
from qtx.nn.sites import list_sites
from qtx.quant.pack import packed_size
from qtx.quant.policy import Kind, Policy
from qtx.quant.spec import Spec
from qtx.train.report import Table

_VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "stop_gradient")
_PARTS = ("slice", "dynamic_slice", "gather")
_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2")

Visit = tuple[Kind, str]  # of a site: its kind and its name


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One value of a forward pass. Tensors are numbered in the order in which they are made.

    Attributes:
      name: of the first site that has it.
      shape: there.
      dies: number of the last tensor that is made of it; of the last one of all where the model returns it.
      reads: for each kind of reader the sites that the value has passed on its way there, those of the whole included where it
        is a part.
    """

    name: str
    shape: tuple[int, ...]
    dies: int
    reads: tuple[tuple[Visit, ...], ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of a variable of the trace.

    Attributes:
      sources: numbers of the tensors that it is computed from with no site between.
      view: where it is a tensor itself: its number.
      passed: the sites that its values have passed unchanged, where it is a tensor or a part of one.
      flag: where it is the flag of a site: that site.
    """

    sources: frozenset[int] = frozenset()
    view: int | None = None
    passed: tuple[Visit, ...] = ()
    flag: Visit | None = None


_NOTHING = _Value()


class _Walk:
    """Goes through a trace and collects its tensors: lists with an entry for each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dies: list[int] = []
        self.reads: list[dict[tuple[Visit, ...], None]] = []

    def run(self, jaxpr: Any, given: Sequence[_Value], wanted: Sequence[bool]) -> list[_Value]:
        """Returns what is known of a program's results, from what is known of its arguments.

        Args:
          jaxpr: the program.
          given: of each argument.
          wanted: whether a result is used; what leads to others alone is never computed.
        """
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, given, strict=True))

        def value(atom: Any) -> _Value:
            return _NOTHING if isinstance(atom, core.Literal) else known.get(atom, _NOTHING)

        for equation in _used(jaxpr, wanted):
            values = [value(atom) for atom in equation.invars]
            if equation.primitive.name in _CALLS:
                inner = equation.params["jaxpr"]
                found = self.run(getattr(inner, "jaxpr", inner), values, [True] * len(equation.outvars))
            else:
                found = [self._result(equation, values)] * len(equation.outvars)
            known.update(zip(equation.outvars, found, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _result(self, equation: Any, values: Sequence[_Value]) -> _Value:
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        flag = next((value.flag for value in values if value.flag is not None), None)
        if flag is not None:
            # The value is detached where the flag is true, and passes as it is where it is false.
            return self._visit(flag, values[1], shape) if name == "select_n" else _Value(flag=flag)
        if name in _VIEWS:
            return values[0]
        sources = self._read(values)
        return _Value(sources, passed=values[0].passed if name in _PARTS else ())

    def _visit(self, site: Visit, value: _Value, shape: tuple[int, ...]) -> _Value:
        passed = (*value.passed, site)
        if value.view is not None:
            return _Value(view=value.view, passed=passed)
        number = len(self.names)
        for source in value.sources:
            self.dies[source] = number
        self.names.append(site[1])
        self.shapes.append(shape)
        self.dies.append(number)
        self.reads.append({})
        return _Value(view=number, passed=passed)

    def _read(self, values: Iterable[_Value]) -> frozenset[int]:
        """Notes who is read, and returns the tensors that whatever is made of these values comes from."""
        sources: set[int] = set()
        for value in values:
            sources |= value.sources
            if value.view is not None:
                self.reads[value.view][value.passed] = None
                sources.add(value.view)
        return frozenset(sources)

    def tensors(self, results: Iterable[_Value]) -> tuple[Tensor, ...]:
        """Returns the tensors of a program that returns `results`."""
        for number in self._read(results):
            self.dies[number] = len(self.names) - 1
        found = zip(self.names, self.shapes, self.dies, map(tuple, self.reads), strict=True)
        return tuple(Tensor(*each) for each in found)


def _used(jaxpr: Any, wanted: Sequence[bool]) -> list[Any]:
    """Returns the equations that lead to the wanted results, in order."""
    needed = {atom for atom, want in zip(jaxpr.outvars, wanted, strict=True) if want and isinstance(atom, core.Var)}
    found = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            found.append(equation)
            needed.update(atom for atom in equation.invars if isinstance(atom, core.Var))
    return found[::-1]


def tensors(model: nn.Module, params: Mapping[str, Any], *args: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a forward pass, in the order in which they are made; nothing is computed.

    Only what leads to the logits (of a model that returns something else: to all that it returns) is there.

    Args:
      model: any linen module whose tensors are marked by sites; its policy does not matter.
      params: nested parameters, or their shapes.
      *args: what the model is called with, or the shapes.
    """
    plain: Any = model.clone(policy=None) if getattr(model, "policy", None) is not None else model
    sites = list_sites(model, {"params": params}, *args)
    visits: list[Visit] = [(info.kind, name) for name, info in sites.items() if info.kind != "weight"]

    def forward(flags: list[jax.Array], params: Any, args: Any) -> Any:
        # A site that has a flag of its own in the collection `detach` leaves an equation in the trace that reads it.
        named = {name: flag for (_, name), flag in zip(visits, flags, strict=True)}
        found = plain.apply({"params": params, "detach": traverse_util.unflatten_dict(named, sep="/")}, *args)
        return getattr(found, "logits", found)

    flags = [jax.ShapeDtypeStruct((), jnp.bool_)] * len(visits)
    jaxpr = jax.make_jaxpr(forward)(flags, params, args).jaxpr
    given = [_Value(flag=visit) for visit in visits] + [_NOTHING] * (len(jaxpr.invars) - len(visits))
    walk = _Walk()
    return walk.tensors(walk.run(jaxpr, given, [True] * len(jaxpr.outvars)))


def _finest(policy: Policy | None, passed: Iterable[Visit]) -> Spec | None:
    """Returns the grid with fewest bits of those that a value has been put on; None: it is in full precision."""
    specs = [spec for kind, name in passed if policy is not None and (spec := policy.spec(kind, name)) is not None]
    return min(specs, key=lambda spec: spec.storage_bits, default=None)


def _item(name: str, count: int, specs: Sequence[Spec | None]) -> Item:
    """Returns the item of values that have to serve readers with these grids: at the bits of the one that needs most."""
    grids = [spec for spec in specs if spec is not None]
    spec = max(grids, key=lambda spec: spec.storage_bits) if grids and len(grids) == len(specs) else None
    bits = 32 if spec is None else spec.storage_bits
    return Item(name, count, bits, bits, payload(spec, count))


def tensor_memory(policy: Policy | None, found: Iterable[Tensor]) -> tuple[Item, ...]:
    """Returns an item for every tensor, with the bytes that it takes at its bits; scales are not in it.

    Args:
      policy: decides about the bits.
      found: from `tensors`, called with the batch size and length that are wanted.
    """
    return tuple(_item(each.name, each.count, [_finest(policy, passed) for passed in each.reads]) for each in found)


def product_memory(policy: Policy | None, found: Iterable[Tensor]) -> tuple[Item, ...]:
    """Returns an item for every input of a product, at the bits that it comes with or is put on.

    Args:
      policy: decides about the bits.
      found: from `tensors`.
    """
    items: dict[str, Item] = {}
    for tensor in found:
        for passed in tensor.reads:
            for end, (kind, name) in enumerate(passed, 1):
                if kind == "input" and name not in items:
                    items[name] = _item(name, tensor.count, [_finest(policy, passed[:end])])
    return tuple(items.values())


def live_bytes(found: Sequence[Tensor], items: Sequence[Item]) -> list[int]:
    """Returns the bytes of the live set of every tensor's site.

    Args:
      found: from `tensors`.
      items: from `tensor_memory`, for the same tensors.
    """
    changes = [0] * (len(found) + 1)
    for number, (tensor, item) in enumerate(zip(found, items, strict=True)):
        changes[number] += item.payload
        changes[tensor.dies + 1] -= item.payload
    alive, sums = 0, []
    for change in changes[:-1]:
        alive += change
        sums.append(alive)
    return sums


def peak(found: Sequence[Tensor], items: Sequence[Item]) -> tuple[int, str]:
    """Returns the bytes of the largest live set, and the first site that has it; see `live_bytes`. (0, '') without sites."""
    sums = live_bytes(found, items)
    most = max(sums, default=0)
    return most, found[sums.index(most)].name if sums else ""


def at_width(items: Iterable[Item], bits: int, every: bool = False) -> tuple[Item, ...]:
    """Returns items with other bits where they are on a grid; ranges stay as they are.

    Args:
      items: of weights or tensors.
      bits: of a value; 32: full precision.
      every: also what is not on a grid.
    """

    def changed(item: Item) -> Item:
        own = bits if item.bits < 32 or every else item.bits
        plain = bits if item.plain_bits < 32 or every else item.plain_bits
        return dataclasses.replace(item, bits=own, plain_bits=plain, payload=packed_size(item.count, math.ceil(own)))

    return tuple(changed(item) if item.count else item for item in items)


def widths_table(
    widths: Sequence[int],
    parameters: Sequence[Item],
    found: Sequence[Tensor],
    items: Sequence[Item],
    programs: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
) -> Table:
    """Returns parameter bytes and the peak of the activations at each width, and as the policy has it.

    At a width everything that the policy puts on a grid has so many bits. Parameters are counted without ranges, embeddings
    apart; their ratio to float32 is that of the others, with biases at 32 bits and (plain) at those of their layer. XLA's
    figures are those of the forward pass: in float32, whatever the bits, so that they stand in two rows alone.

    Args:
      widths: bits; 32 is full precision.
      parameters: from `weight_memory` with the policy.
      found: from `tensors`.
      items: from `tensor_memory` with the policy.
      programs: from `model_memory`, under `full precision` and `quantized`; None or empty: XLA was not asked.
    """
    embeddings = [item for item in parameters if part_of(item.name) == "embeddings"]
    others = [item for item in parameters if part_of(item.name) != "embeddings"]
    full = totals(others)["float32"] or 1  # a model may have nothing but embeddings
    columns = ["bits", "weights, MiB", "of float32", "plain", "embeddings, MiB", "activations at peak, MiB"]
    columns.append("with every site, MiB")
    asked = ("arguments", "temporary", "in all") if programs else ()
    columns += [f"XLA: {what}, MiB" for what in asked]

    def row(name: int | str, bits: int | None, program: str) -> list[Any]:
        weights, tables, own = (
            group if bits is None else at_width(group, bits) for group in (others, embeddings, items)
        )
        sizes = totals(weights)
        whole = None if bits is None else peak(found, at_width(items, bits, every=True))[0]
        by_xla = (programs or {}).get(program, {}).get("forward", {})
        counted = [sum(item.payload for item in tables), peak(found, own)[0], whole]
        counted += [by_xla.get(what) for what in asked]
        mib = [None if size is None else size / 2**20 for size in (sum(item.payload for item in weights), *counted)]
        return [name, mib[0], sizes["biases at 32"] / full, sizes["plain"] / full, *mib[1:]]

    rows = [row(bits, bits, "full precision" if bits == 32 else "") for bits in widths]
    rows.append(row("policy", None, "quantized"))
    ratios = ("of float32", "plain")
    return Table(columns, rows, {name: ".4f" if name in ratios else ".3f" for name in columns[1:]})


def live_table(widths: Sequence[int], found: Sequence[Tensor], items: Sequence[Item]) -> Table:
    """Returns every tensor in the order in which it is made, its last reader, and the live set of its site in bytes.

    Args:
      widths: bits: what the policy puts on a grid has so many.
      found: from `tensors`.
      items: from `tensor_memory` with the policy.
    """
    names = [*map(str, widths), "policy"]
    live = [live_bytes(found, group) for group in (*(at_width(items, bits) for bits in widths), items)]
    rows = [
        [number, item.name, item.count, item.bits, item.payload, found[tensor.dies].name, *at_site]
        for number, (tensor, item, *at_site) in enumerate(zip(found, items, *live, strict=True))
    ]
    columns = ["number", "site", "values", "bits", "bytes", "alive until"]
    columns += [f"live at {name} bits" if name != "policy" else "live as the policy has it" for name in names]
    numbers = {column: ",d" for column in columns if column not in ("number", "site", "bits", "alive until")}
    return Table(columns, rows, numbers | {"bits": ".3g"})
