"""Walking through a model layer by layer: in which order layers run, and what each of them sees.

    calls, blocks = trace(model, params, args, {"encoder/layer_0/ffn/up", ...})
    for stage in make_stages(calls): ...

For methods that treat one layer after the other, each with the inputs that the layers treated so far hand it. A model whose
blocks (modules named `layer_i`) are called with the same arguments but for the first is run block by block, each once for
every state of the layers before it; else every question costs a whole forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from qtx.methods.calibrate import Args


class Block(NamedTuple):
    """One call of a block of the model, a module named `layer_i`.

    Attributes:
      path: of the block.
      module: unbound, without a name or a policy, so that equal blocks share their compiled programs.
      rest: identities of its arguments but the first: the same for all blocks, or they are not run one by one.
      static: those arguments that are no arrays, with None in place of the arrays.
    """

    path: str
    module: nn.Module
    rest: tuple[int, ...]
    static: tuple[Any, ...]


class Call(NamedTuple):
    """One call of a layer in the forward pass.

    Attributes:
      path: of the layer.
      module: unbound, without a policy.
      source: tells calls with the same input from others.
      block: how many of the model's blocks had begun.
      inside: whether the last of them had not ended.
    """

    path: str
    module: nn.Module
    source: int
    block: int
    inside: bool


Watch = Callable[[tuple[str, ...], tuple[Any, ...], Callable[[], Any], nn.Module], Any]


def _watched(model: nn.Module, params: Any, args: Args, watch: Watch) -> Any:
    """Applies a model; `watch(path, given, run, module)` stands in for every call of a module in it."""

    def intercept(run, given, options, context):
        if context.method_name != "__call__":
            return run(*given, **options)
        return watch(context.module.path, given, lambda: run(*given, **options), context.module)

    with nn.intercept_methods(intercept):
        return model.apply({"params": params}, *args)


def _is_block(path: Sequence[str]) -> bool:
    return bool(path) and re.fullmatch(r"layer_\d+", path[-1]) is not None


def _bare(module: nn.Module) -> nn.Module:
    return module.clone(parent=None, name=None, policy=None)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def trace(model: nn.Module, params: Mapping[str, Any], args: Args, wanted: set[str]) -> tuple[list[Call], list[Block]]:
    """Returns the calls of the wanted layers, and of the blocks, in the order in which they happen; nothing is computed."""
    calls: list[Call] = []
    blocks: list[Block] = []
    kept: list[Any] = []  # alive, so that no two have the same identity
    inside = False

    def watch(path, given, run, module):
        nonlocal inside
        kept.append(given)
        if _is_block(path):
            static = tuple(None if _is_array(v) else v for v in given[1:])
            blocks.append(Block("/".join(path), _bare(module), tuple(map(id, given[1:])), static))
            inside = True
            result = run()
            inside = False
            return result
        if "/".join(path) in wanted:
            calls.append(Call("/".join(path), _bare(module), id(given[0]), len(blocks), inside))
        return run()

    jax.eval_shape(lambda params, args: _watched(model, params, args, watch), params, args)
    return calls, blocks


Inputs = dict[str, list[tuple[Any, Any]]]  # by path, for every call: inputs, and what counts (or None)


def _collect(found: Inputs) -> Watch:
    """Returns a `watch` that stores the inputs of the layers that `found` names."""

    def watch(path, given, run, module):
        if "/".join(path) in found:
            found["/".join(path)].append((given[0], given[1] if len(given) > 1 else None))
        return run()

    return watch


@partial(jax.jit, static_argnums=(0, 1))
def inputs_in_model(model: nn.Module, path: str, params: Any, args: Args) -> list[tuple[Any, Any]]:
    """Returns the inputs of a layer, wherever it is, from a whole forward pass."""
    found: Inputs = {path: []}
    _watched(model, params, args, _collect(found))
    return found[path]


@partial(jax.jit, static_argnums=(0, 1, 2))
def inputs_around_blocks(
    model: nn.Module, path: str, end: int, params: Any, args: Args, x: Any
) -> list[tuple[Any, Any]]:
    """Returns the inputs of a layer outside of the blocks; `x` is the output of the first `end` blocks."""
    found: Inputs = {path: []}
    collect, begun = _collect(found), 0

    def watch(path, given, run, module):
        nonlocal begun
        if not _is_block(path):
            return collect(path, given, run, module)
        begun += 1
        return x if begun == end else given[0]

    _watched(model, params, args, watch)
    return found[path]


@partial(jax.jit, static_argnums=0)
def enter_blocks(model: nn.Module, params: Any, args: Args) -> tuple[Any, tuple[Any, ...]]:
    """Returns the input of the first block, and the other arrays that it is called with."""
    first: list[Any] = []

    def watch(path, given, run, module):
        if not _is_block(path):
            return run()
        first.append((given[0], tuple(v for v in given[1:] if _is_array(v))))
        return given[0]

    _watched(model, params, args, watch)
    return first[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def run_block(module: nn.Module, static: tuple[Any, ...], path: str, params: Any, x: Any, arrays: tuple[Any, ...]):
    """Returns the inputs of one of a block's layers (`path` within the block), or, without a path, the block's output."""
    found: Inputs = {path: []}
    remaining = iter(arrays)
    rest = tuple(next(remaining) if v is None else v for v in static)
    output = _watched(module, params, (x, *rest), _collect(found))
    return found[path] if path else output  # what is not returned is not computed


class Stage(NamedTuple):
    """Layers that are rounded together, because they read the same input: the calls, and whether each layer is called
    once."""

    calls: tuple[Call, ...]
    once: bool


def make_stages(calls: Sequence[Call], alike: bool = True) -> list[Stage]:
    """Groups neighbouring calls with the same input; a layer that is called more than once has a stage of its own.

    Args:
      calls: in their order.
      alike: whether the model's blocks can be run one by one; if not, no stage counts as called once.
    """
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.path] = counts.get(call.path, 0) + 1
    stages: list[Stage] = []
    seen: set[str] = set()
    for call in calls:
        if call.path in seen:
            continue
        seen.add(call.path)
        once = alike and counts[call.path] == 1
        last = stages[-1] if stages else None
        if once and last is not None and last.once and last.calls[0].source == call.source:
            stages[-1] = Stage((*last.calls, call), True)
        else:
            stages.append(Stage((call,), once))
    return stages
