"""How the weights of a model are distributed, part by part, in full precision and on their grids.

    found = collect(params, sites, policy)
    print(parts_table(found))

The weights are the matrices: kernels and embedding tables. Biases and the scales of norms are left out. Parts are those of
`qtx.analysis.memory.parameter_counts`: the embeddings, attention and FFN over all layers, and what follows the encoder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from qtx.analysis.memory import part_of
from qtx.errors import UserError
from qtx.methods.calibrate import quantized_weights, weight_ranges
from qtx.nn.sites import SiteInfo
from qtx.quant.policy import Policy
from qtx.train.plots import ACCENT, GREY, INK, new_figure, save_figure
from qtx.train.report import Table

_COLUMNS = ["weights", "values", "mean", "std", "min", "max", "zeros", "distinct"]
_FORMATS = {"values": ",d", "mean": ".5f", "std": ".5f", "min": ".4f", "max": ".4f", "zeros": ".2%", "distinct": ",d"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """One kernel or table.

    Attributes:
      name: of the parameter.
      full: its values, flat float32.
      quantized: what the policy makes of them, or None where it keeps full precision.
    """

    name: str
    full: np.ndarray
    quantized: np.ndarray | None = None


def collect(
    params: Mapping[str, Any], sites: Mapping[str, SiteInfo], policy: Policy | None = None
) -> dict[str, list[Weights]]:
    """Returns the weights of each part; those of the encoder come first, otherwise in the order of the parameters.

    Args:
      params: nested parameters.
      sites: from `list_sites`.
      policy: decides which weights have a grid; ranges are estimated from the weights, as in calibration. Rounding that is
        random in training is to nearest.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = [name for name in flat if name in sites and sites[name].kind == "weight" and flat[name].ndim > 1]
    grids: dict[str, np.ndarray] = {}
    if policy is not None and policy.weights:
        on_grids = quantized_weights(policy, sites, params, weight_ranges(policy, sites, params))
        quantized = traverse_util.flatten_dict(on_grids, sep="/")
        grids = {name: _flat(quantized[name]) for name in chosen if policy.spec("weight", name) is not None}
    found: dict[str, list[Weights]] = {}
    for name in sorted(chosen, key=lambda name: not name.startswith("encoder/")):  # the head comes last
        found.setdefault(part_of(name), []).append(Weights(name, _flat(flat[name]), grids.get(name)))
    return found


def check(bins: int) -> None:
    """Raises a `UserError` unless a histogram has at least two bins."""
    if bins < 2:
        raise UserError(f"a histogram of the weights with {bins} bins: give at least 2 (100 is usual)")


def parts_table(found: Mapping[str, Sequence[Weights]]) -> Table:
    """Returns a row for each part, and another for its quantized weights if it has any.

    The second one is about the whole part, too, with the weights in it that stay in full precision. `distinct` counts the
    different values of all tensors together.

    Args:
      found: from `collect`.
    """
    rows = []
    for part, members in found.items():
        full, quantized = _of_part(members)
        rows.append([part, *_numbers(full)])
        if quantized is not None:
            rows.append([f"{part}, quantized", *_numbers(quantized)])
    return Table(["part", *_COLUMNS[1:]], rows, _FORMATS)


def tensors_table(found: Mapping[str, Sequence[Weights]]) -> Table:
    """Returns a row for each kernel and table, and another for its quantized values.

    Args:
      found: from `collect`.
    """
    rows = []
    for each in (each for members in found.values() for each in members):
        rows.append([each.name, *_numbers(each.full)])
        if each.quantized is not None:
            rows.append([f"{each.name}, quantized", *_numbers(each.quantized)])
    return Table(_COLUMNS, rows, _FORMATS)


def plot(found: Mapping[str, Sequence[Weights]], path: str | os.PathLike[str], bins: int = 100) -> None:
    """Draws a histogram of each part, with the share of its weights in every bin on a logarithmic axis.

    Both histograms of a part have the same bins, from the least to the greatest value of either.

    Args:
      found: from `collect`.
      path: of the PNG.
      bins: of each histogram.

    Raises:
      UserError: fewer than two bins.
    """
    check(bins)
    columns = min(len(found), 3)
    count = -(-len(found) // columns)
    figure, grid = new_figure(4 * columns, 0.6 + 2.6 * count, count, columns)
    for axes, (part, members) in zip(grid.flat, found.items(), strict=False):
        full, quantized = _of_part(members)
        both = [full] if quantized is None else [full, quantized]
        edges = np.linspace(min(float(x.min()) for x in both), max(float(x.max()) for x in both), bins + 1)
        if edges[0] == edges[-1]:  # one value has no range
            edges = np.linspace(edges[0] - 0.5, edges[0] + 0.5, bins + 1)
        axes.stairs(_shares(full, edges), edges, fill=True, color=GREY, alpha=0.5, label="full precision")
        if quantized is not None:
            axes.stairs(_shares(quantized, edges), edges, color=ACCENT, linewidth=1, label="quantized")
        axes.set_yscale("log")
        axes.set_title(f"{part} ({full.size:,d})", fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, which="both")
        axes.locator_params(axis="x", nbins=5)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    figure.supxlabel("weight", fontsize=9, color=INK)
    figure.supylabel("share of the part's weights", fontsize=9, color=INK)
    save_figure(figure, path)


def _flat(value: Any) -> np.ndarray:
    return np.ravel(np.asarray(value, np.float32))


def _of_part(members: Sequence[Weights]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns all values of a part, and as quantized; None if nothing of it is."""
    full = np.concatenate([each.full for each in members])
    if all(each.quantized is None for each in members):
        return full, None
    return full, np.concatenate([each.full if each.quantized is None else each.quantized for each in members])


def _numbers(values: np.ndarray) -> list[float | int]:
    """Returns what `_COLUMNS` names, after the first; sums are float64."""
    mean, std = (float(f(values, dtype=np.float64)) for f in (np.mean, np.std))
    zeros = np.count_nonzero(values == 0) / values.size
    return [values.size, mean, std, float(values.min()), float(values.max()), zeros, len(np.unique(values))]


def _shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(values, edges)[0] / values.size
