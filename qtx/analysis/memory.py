"""What a quantized model takes: bytes of weights, ranges and activations, by site and in all, from shapes alone.

    weights = weight_memory(policy, sites, abstract_params(family, config))
    totals(weights + range_memory(policy, sites))

Papers count the weights in two ways, and neither counts scales (Bondarenko et al. 2021, table 7, leaves open which it is):

    plain          every parameter at the bits of its module's weight, biases too
    biases at 32   every quantized weight at its bits, what is never quantized (biases, shifts of norms) at 32

`stored` is what the packed artifact holds: whole bytes for each tensor, with scales, zero points and permutation indices.

What a model takes while it runs has no single number either; `run_time_table` puts these side by side:

    activations         every tensor once, at its bits, as if all of them were kept at the same time
    peak of activations the most that is alive at the same time, see `qtx.analysis.live_memory`
    published counter   of the AG_NEWS study: some of the sites
    arguments           parameters, ranges and inputs: as counted from their shapes, and as XLA says
    temporary, output   what XLA reserves for the compiled program, beside its arguments
    in all              arguments, temporary and output: what the program holds at its peak

A program reuses a buffer when its tensor is no longer needed, and by fusion some tensors never get one: a forward pass
takes less than the sum of its sites. A backward pass keeps what its gradients need, and returns a gradient for each
parameter. Fake quantization computes in float32: grids save nothing at run time here, and the weights on their grids are
buffers of the program, in which full precision has its arguments alone. What integer kernels would take is the peak at its
bits. The figures of XLA depend on backend and version.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from qtx.methods.calibrate import put
from qtx.models.family import ModelConfig
from qtx.nn.bert import BertConfig
from qtx.nn.sites import SiteInfo, list_sites
from qtx.quant import rows
from qtx.quant.pack import packed_size, trits_size
from qtx.quant.policy import Kind, Policy
from qtx.quant.spec import Spec
from qtx.train.logging import progress
from qtx.train.report import Table


@dataclasses.dataclass(frozen=True)
class Item:
    """One tensor, or the ranges of one activation.

    Attributes:
      name: of the site or parameter.
      count: number of values; 0 for ranges.
      bits: of a value as quantized; 32 for full precision, log2(3) for ternary.
      plain_bits: as `bits`; for what is never quantized, the bits of its module's weight.
      payload: bytes of the values.
      scales: bytes of the scales.
      zero_points: bytes of zero points, and of the flag that says whether a range has a sign.
      indices: bytes of the groups of permuted channels.
    """

    name: str
    count: int
    bits: float
    plain_bits: float
    payload: int
    scales: int = 0
    zero_points: int = 0
    indices: int = 0

    @property
    def stored(self) -> int:
        """Bytes in all."""
        return self.payload + self.scales + self.zero_points + self.indices


def _spec(policy: Policy | None, kind: Kind, name: str, info: SiteInfo) -> Spec | None:
    spec = None if policy is None else policy.spec(kind, name)
    return None if spec is None else spec.at(info.channel_axis, len(info.shape))


def _bits(spec: Spec | None) -> float:
    return 32 if spec is None else spec.storage_bits


def payload(spec: Spec | None, count: int) -> int:
    """Returns the bytes of so many packed values on a grid; None: in full precision."""
    if spec is not None and spec.is_ternary:
        return trits_size(count)
    return packed_size(count, math.ceil(_bits(spec)))


def weight_memory(policy: Policy | None, sites: Mapping[str, SiteInfo], params: Mapping[str, Any]) -> tuple[Item, ...]:
    """Returns an item for every parameter, as a packed file holds it.

    Two states take a bit each here; in a file they take as much as three where one of the values is its row's mean.

    Args:
      policy: decides which weights are packed, and how; None: none is.
      sites: from `list_sites`.
      params: nested parameters; `jax.ShapeDtypeStruct`s do.
    """
    specs = {name: _spec(policy, "weight", name, info) for name, info in sites.items() if info.kind == "weight"}
    of_module = {name.rpartition("/")[0]: _bits(spec) for name, spec in specs.items()}
    items = []
    for name, value in traverse_util.flatten_dict(params, sep="/").items():
        spec, count = specs.get(name), math.prod(value.shape)
        plain = _bits(spec) if name in specs else of_module.get(name.rpartition("/")[0], 32)
        ranges = 0 if spec is None else rows.row_count(spec.granularity, value.shape) or 1
        zero_point = 0
        if spec is not None and spec.has_zero_point:
            zero_point = 4 if spec.scheme != "asymmetric" else 1 if spec.bits <= 8 else 2
        items.append(Item(name, count, _bits(spec), plain, payload(spec, count), 4 * ranges, zero_point * ranges))
    return tuple(items)


def range_memory(policy: Policy | None, sites: Mapping[str, SiteInfo]) -> tuple[Item, ...]:
    """Returns an item for the stored range of every activation and input; dynamic ranges are not stored.

    Args:
      policy: decides about the ranges.
      sites: from `list_sites`.
    """
    items = []
    for name, info in sites.items():
        spec = None if info.kind == "weight" else _spec(policy, info.kind, name, info)
        if spec is None or spec.range == "dynamic":
            continue
        count = rows.row_count(spec.granularity, info.shape) or 1
        indices = 4 * info.shape[-1] if spec.granularity.permute else 0
        items.append(Item(name, 0, 32, 32, 0, 4 * count, 4 * count + 1, indices))
    return tuple(items)


def activation_memory(policy: Policy | None, sites: Mapping[str, SiteInfo]) -> tuple[Item, ...]:
    """Returns an item for every activation, with the bytes that it takes at its bits.

    Args:
      policy: decides about the bits.
      sites: from `list_sites`, called with the batch size and length that are wanted; shapes come from there.
    """
    return tuple(_value(policy, name, info) for name, info in sites.items() if info.kind == "activation")


def input_memory(policy: Policy | None, sites: Mapping[str, SiteInfo]) -> tuple[Item, ...]:
    """Returns an item for every input of a product that a policy quantizes, as `activation_memory` does.

    What several layers read, such as query, key and value, is counted for each of them; and most inputs are activations
    of another name. So they are not to be added to those.

    Args:
      policy: decides which inputs, and about the bits.
      sites: as for `activation_memory`.
    """
    inputs = {name: info for name, info in sites.items() if info.kind == "input"}
    return tuple(_value(policy, name, info) for name, info in inputs.items() if _spec(policy, "input", name, info))


def _value(policy: Policy | None, name: str, info: SiteInfo) -> Item:
    spec, count = _spec(policy, info.kind, name, info), math.prod(info.shape)
    return Item(name, count, _bits(spec), _bits(spec), payload(spec, count))


def program_memory(program: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Compiles a function and returns the bytes that it takes, by XLA's own account.

    Args:
      program: a pure function of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Bytes of its `arguments` (all of them, used or not), of its `temporary` buffers, which are one block as large as their own
      peak, and of its `output`; of these `in all`, less what shares a buffer; and `peak`, XLA's own figure, where there is
      one. On CPU `peak` leaves the temporary buffers out (jaxlib 0.10: it is arguments, constants and output), so `in all` is
      what to compare with. An empty dict where the backend has no such account.
    """
    # An argument that is not used is there all the same: without `keep_unused` XLA would not see it.
    compiled = jax.jit(program, keep_unused=True).lower(*args).compile()
    try:
        found = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # of backends that cannot tell
        return {}
    if found is None:
        return {}
    sizes = {
        "arguments": int(found.argument_size_in_bytes),
        "temporary": int(found.temp_size_in_bytes),
        "output": int(found.output_size_in_bytes),
    }
    sizes["in all"] = sum(sizes.values()) - int(found.alias_size_in_bytes)
    peak = getattr(found, "peak_memory_in_bytes", None)  # not in every version of jaxlib
    return sizes if peak is None else sizes | {"peak": int(peak)}


def argument_bytes(model: nn.Module, params: Mapping[str, Any], *args: Any) -> int:
    """Returns the bytes of what a compiled forward pass is given: parameters, ranges and inputs, as they are in memory.

    Args:
      model: with or without a policy.
      params: nested parameters, or their shapes.
      *args: what the model is called with, or the shapes.
    """
    ranges = abstract_ranges(model, params, *args) if getattr(model, "policy", None) is not None else {}
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, ranges, args)))


def abstract_ranges(model: nn.Module, params: Mapping[str, Any], *args: Any) -> dict[str, Any]:
    """Returns the `ranges` collection that calibration would give, as `jax.ShapeDtypeStruct`s; nothing is computed.

    Args:
      model: with a policy.
      params: nested parameters, or their shapes.
      *args: what the model is called with, or the shapes.
    """
    policy: Policy = model.policy  # type: ignore[attr-defined]
    groups: dict[str, Any] = {}
    for name, info in list_sites(model, {"params": params}, *args).items():
        spec = policy.spec(info.kind, name)
        if spec is not None and spec.granularity.permute:
            put(groups, name, jax.ShapeDtypeStruct(info.shape[-1:], jnp.int32))

    def observe(variables: Mapping[str, Any], args: Any) -> dict[str, Any]:
        return dict(model.apply(variables, *args, mutable=["ranges", "observers"])[1].get("ranges", {}))

    return jax.eval_shape(observe, {"params": params, "groups": groups}, args)


def model_memory(model: nn.Module, params: Mapping[str, Any], *args: Any) -> dict[str, dict[str, int]]:
    """Returns what `program_memory` says of a model: of its `forward` pass, and of `forward and backward`.

    The second is the value and the gradient, by every parameter, of the sum of the logits: what a training step does without
    its optimizer, its loss and dropout. Weights are put on their grids within the program.

    Args:
      model: with or without a policy.
      params: nested parameters, or their shapes.
      *args: what the model is called with, or the shapes.
    """
    shapes = jax.eval_shape(lambda tree: tree, params)
    quantized = getattr(model, "policy", None) is not None
    ranges = abstract_ranges(model, shapes, *args) if quantized else {}

    def forward(params: Any, ranges: Any, args: Any) -> jax.Array:
        return model.apply({"params": params, "ranges": ranges}, *args).logits  # type: ignore[union-attr]

    def total(*given: Any) -> jax.Array:
        return jnp.sum(forward(*given))

    programs: dict[str, Callable[..., Any]] = {"forward": forward, "forward and backward": jax.value_and_grad(total)}
    found = {}
    with progress(len(programs), f"compile{', quantized' * quantized}") as bar:
        for number, (name, program) in enumerate(programs.items(), 1):
            found[name] = program_memory(program, shapes, ranges, args)
            bar.update(number)
    return found


def run_time_table(
    config: ModelConfig,
    batch: int,
    tokens: int,
    activations: Iterable[Item],
    inputs: Iterable[Item] = (),
    programs: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
    peaks: tuple[float, float] | None = None,
    arguments: tuple[float, float] | None = None,
) -> Table:
    """Returns the memory of a run by every count, in full precision and quantized, and says what each of them is.

    Args:
      config: sizes of the model.
      batch: examples.
      tokens: length of an example.
      activations: from `qtx.analysis.live_memory.tensor_memory` (or `activation_memory`: what inputs of products save is not in
        it), for the same batch and length.
      inputs: from `input_memory`, likewise.
      programs: from `model_memory`, under `full precision` and `quantized`.
      peaks: bytes from `qtx.analysis.live_memory.peak`, in full precision and quantized.
      arguments: bytes from `argument_bytes`, likewise.
    """
    activations, inputs = tuple(activations), tuple(inputs)

    def sites(items: tuple[Item, ...]) -> list[float]:
        found = totals(items)
        return [found["float32"], found["stored"]]

    rows: list[list[Any]] = [["activations", *sites(activations), "every one once, at the bits that are needed of it"]]
    if peaks is not None:
        rows.append(["peak of activations", *peaks, "most that is alive at the same time, at its bits"])
    if inputs:
        rows.append(["inputs of products", *sites(inputs), "those that are quantized, for each layer that reads them"])
    if isinstance(config, BertConfig):  # the counter knows encoders alone
        elements = activation_elements(config, batch, tokens)
        bits = {item.bits for item in activations + inputs} - {32} or {32}
        counted = elements * bits.pop() / 8 if len(bits) == 1 else None
        note = f"{elements:,d} values at the bits of quantized sites"
        rows.append(["published counter", 4 * elements, counted, note])
    if arguments is not None:
        rows.append(["arguments", *arguments, "parameters, ranges and inputs, from their shapes"])
    notes = {
        "arguments": "the same, as XLA says",
        "temporary": "buffers that XLA reserves beside the arguments, float32",
        "output": "what the program returns",
        "in all": "these three",
        "peak": "XLA's own figure; on CPU without temporary buffers",
    }
    full, quantized = ((programs or {}).get(name, {}) for name in ("full precision", "quantized"))
    for program in dict.fromkeys([*full, *quantized]):
        for what, note in notes.items():
            sizes = [found.get(program, {}).get(what) for found in (full, quantized)]
            if sizes != [None, None]:
                rows.append([f"{program}: {what}", *sizes, note])
    columns = ["counted", "full precision, MiB", "quantized, MiB", "what it is"]
    rows = [[name, *(size if size is None else size / 2**20 for size in sizes), note] for name, *sizes, note in rows]
    return Table(columns, rows, dict.fromkeys(columns[1:3], ".3f"))


def totals(items: Iterable[Item]) -> dict[str, float]:
    """Returns bytes: `float32`, the two published conventions `plain` and `biases at 32`, and `stored`."""
    items = tuple(items)
    return {
        "float32": 4 * sum(item.count for item in items),
        "plain": sum(item.count * item.plain_bits for item in items) / 8,
        "biases at 32": sum(item.count * item.bits for item in items) / 8,
        "stored": sum(item.stored for item in items),
    }


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many parameters each part of a model has, biases and norms included.

    Args:
      params: nested parameters under the names of `qtx.nn.bert` or `qtx.nn.encoder_decoder`; `jax.ShapeDtypeStruct`s do.

    Returns:
      Counts of `embeddings`, of the parts of the layers, each over all layers (`attention`, `ffn`; of a decoder
      `self_attention`, `cross_attention`), and of what follows them (`norm`, `pooler`, `classifier`, `generator`).
    """
    counts: dict[str, int] = {}
    for name, value in traverse_util.flatten_dict(params, sep="/").items():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + math.prod(value.shape)
    return counts


def part_of(name: str) -> str:
    """Returns the part of a model that a parameter belongs to, see `parameter_counts`."""
    return re.sub(r"^(en|de)coder/(layer_\d+/)?", "", name).partition("/")[0]


def activation_elements(config: BertConfig, batch: int, tokens: int, embeddings: bool = True) -> int:
    """Returns the number of activations in a forward pass as the AG_NEWS study counts them.

    For an example of T tokens: 3 T D in the embedding stage; H T^2 + 3 T D in each layer; T D, D and C at the end. So most
    of what lies within a layer, such as the hidden units of the FFN, is left out: `activation_memory` counts every site.

    Args:
      config: sizes of the model: D `hidden_size`, H `num_heads`, C `num_labels`, and the layers.
      batch: examples.
      tokens: length of an example.
      embeddings: whether the first three count.
    """
    c, width = config, tokens * config.hidden_size
    layers = c.num_layers * (c.num_heads * tokens**2 + 3 * width)
    return batch * (3 * width * embeddings + layers + width + c.hidden_size + c.num_labels)


def share(items: Iterable[Item], bits: float) -> tuple[float, float]:
    """Returns which part of the values, and which part of the tensors, has so many bits.

    The paper's "about 22 %" of 16-bit activations in mixed precision is the part of the tensors (x, h and y: 36 of 161
    in BERT-base). Of the values it is less, because probabilities, scores and GELU outputs are large tensors.
    """
    items = tuple(items)
    chosen = [item for item in items if item.bits == bits]
    return sum(item.count for item in chosen) / sum(item.count for item in items), len(chosen) / len(items)


def totals_table(items: Iterable[Item]) -> Table:
    """Returns the totals with their ratio to float32."""
    found = totals(items)
    rows = [[name, size / 2**20, found["float32"] / size] for name, size in found.items()]
    return Table(["counted", "MiB", "smaller by"], rows, {"MiB": ".3f", "smaller by": ".2f"})


def sites_table(items: Iterable[Item]) -> Table:
    """Returns the bytes by site; what differs in the number of its layer alone shares a row."""
    merged: dict[tuple[str, float], list[Item]] = {}
    for item in items:
        merged.setdefault((re.sub(r"layer_\d+", "layer_*", item.name), item.bits), []).append(item)
    rows = [
        [
            name,
            len(found),
            sum(item.count for item in found),
            bits,
            *(sum(getattr(item, field) for item in found) for field in ("payload", "scales", "zero_points", "indices")),
        ]
        for (name, bits), found in merged.items()
    ]
    columns = ["site", "tensors", "values", "bits", "bytes", "of scales", "of zero points", "of indices"]
    numbers = {column: ",d" for column in columns[2:] if column != "bits"}
    return Table(columns, rows, numbers | {"bits": ".3g"})
