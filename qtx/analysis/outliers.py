"""Where a model's activations have outliers: ranges by dimension, and what lies beyond k standard deviations.

    found = collect(model, params, batches, names, k=6.0, vocab_size=30522, positions=512)
    print(sites_table(found, tokenizer.convert_ids_to_tokens))

A few embedding dimensions of BERT carry values far outside of everything else, mostly at [SEP], and one range per tensor
then leaves few grid points for the rest (Bondarenko et al. 2021, section 3). An outlier is a value that lies more than
`k` standard deviations from the mean of its tensor: of all values of the site in its batch. Padding counts nowhere.

All batches of one shape stream through one compiled step, and nothing but sums is kept. Means and variances are float32:
values are taken relative to the mean of the first batch, so that a large mean costs no digits; a batch is summed in two
passes and merged by the formula of Chan, Golub and LeVeque (1983, eq. 2.1), whose terms are all positive. With `N` batches of
`n` tokens whose means differ by no more than the standard deviation, the variance is off by at most about
`(3 n + 8 N) 2^-24` of itself. Counts are exact below 2^24 tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qtx.errors import UserError, near_misses
from qtx.nn.aliases import expand, short_name
from qtx.nn.sites import SiteInfo
from qtx.quant.policy import matches
from qtx.train.logging import progress
from qtx.train.plots import ACCENT, AMBER, INK, new_figure, save_figure
from qtx.train.report import Table


class Statistics(NamedTuple):
    """What is known of one site; `D` features, `V` words, `P` positions.

    Attributes:
      tokens: scalar float32, tokens that are not padding.
      low: `[D]` least value of each dimension.
      high: `[D]` greatest value.
      origin: `[D]` what values are taken relative to.
      offset: `[D]` mean minus origin.
      squares: `[D]` sum of squared deviations from the mean.
      outliers: `[D]` int32 outliers of each dimension.
      by_token: `[V]` int32 outliers at each token id.
      by_position: `[P]` int32 outliers at each position.
    """

    tokens: Any
    low: Any
    high: Any
    origin: Any
    offset: Any
    squares: Any
    outliers: Any
    by_token: Any
    by_position: Any

    @property
    def mean(self) -> np.ndarray:
        """`[D]` mean of each dimension."""
        return self.origin + self.offset

    @property
    def std(self) -> np.ndarray:
        """`[D]` standard deviation of each dimension."""
        return np.sqrt(self.squares / np.maximum(self.tokens, 1))


def choose_sites(names: Sequence[str], sites: Mapping[str, SiteInfo]) -> tuple[str, ...]:
    """Returns the activations that short names or patterns stand for.

    Raises:
      UserError: if one matches no activation, or an activation without tokens and features.
    """
    activations = [name for name, info in sites.items() if info.kind == "activation"]
    chosen: dict[str, None] = {}
    for given in names:
        patterns = expand("activation", given)
        found = [name for name in activations if any(matches(pattern, name) for pattern in patterns)]
        if not found:
            raise UserError(f"{given!r} matches no activation of this model{near_misses(patterns[0], activations)}")
        for name in found:
            if len(sites[name].shape) != 3 or not sites[name].features:
                raise UserError(f"site {name!r} (from {given!r}) is not [batch, tokens, features]; leave it out")
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise UserError("no activations to look at; name some, such as h and y")
    # In the order of the layers, 2 before 10.
    return tuple(sorted(chosen, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]))


def collect(
    model: nn.Module,
    params: Mapping[str, Any],
    batches: Sequence[tuple[Any, ...]],
    names: Sequence[str],
    *,
    vocab_size: int,
    positions: int,
    k: float = 6.0,
) -> dict[str, Statistics]:
    """Measures sites over batches.

    Args:
      model: its policy does not matter: values are those of full precision.
      params: its parameters.
      batches: argument tuples for the model, the first the token ids `[B, T]`.
      names: sites, from `choose_sites`.
      vocab_size: V.
      positions: P, the longest length.
      k: how many standard deviations make an outlier.

    Returns:
      NumPy statistics by site, in the order of `names`.

    Raises:
      UserError: if `k` is not positive or there is no batch.
    """
    check(k, len(batches))
    plain = model.clone(policy=None) if getattr(model, "policy", None) is not None else model  # type: ignore[call-arg]
    total: dict[str, Statistics] | None = None
    with progress(len(batches), "outliers") as bar:
        for done, args in enumerate(batches, 1):
            total = _add(plain, tuple(names), vocab_size, positions, params, args, jnp.float32(k), total)
            bar.update(done)
    assert total is not None
    return {name: Statistics(*jax.device_get(tuple(total[name]))) for name in names}


def check(k: float, batches: int) -> None:
    """Raises a `UserError` unless `k` is positive and there is a batch."""
    if not k > 0:
        raise UserError(f"outliers beyond {k} standard deviations: k must be above 0 (6 is usual)")
    if batches < 1:
        raise UserError(f"outliers of {batches} batches: give at least one")


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _add(model, names, vocab_size, positions, params, args, k, total):
    """One batch: the captured values of every site, reduced and merged with what came before."""
    _, found = model.apply({"params": params}, *args, mutable=["captures", "masks"])
    captured, masks = (traverse_util.flatten_dict(found.get(name, {}), sep="/") for name in ("captures", "masks"))
    ids = args[0]
    merged = {}
    for name in names:
        x = captured[name].astype(jnp.float32)
        where = jnp.broadcast_to(masks[name][..., 0] if name in masks else True, x.shape[:2])
        merged[name] = _include(None if total is None else total[name], x, where, ids, k, vocab_size, positions)
    return merged


def _include(total: Statistics | None, x, where, ids, k, vocab_size: int, positions: int) -> Statistics:
    """Adds a batch `x` `[B, T, D]`; `where` and `ids` are `[B, T]`."""
    inside = where[..., None]
    tokens = jnp.sum(where).astype(jnp.float32)
    count = jnp.maximum(tokens, 1)
    origin = jnp.sum(x, (0, 1), where=inside) / count if total is None else total.origin
    relative = x - origin
    offset = jnp.sum(relative, (0, 1), where=inside) / count
    squares = jnp.sum(jnp.square(relative - offset), (0, 1), where=inside)
    mean = origin + offset
    centre = jnp.mean(mean)
    deviation = jnp.sqrt(jnp.mean(squares) / count + jnp.mean(jnp.square(mean - centre)))
    beyond = (jnp.abs(x - centre) > k * deviation) & inside
    at = jnp.sum(beyond, -1, dtype=jnp.int32)
    one = Statistics(
        tokens,
        jnp.min(x, (0, 1), where=inside, initial=jnp.inf),
        jnp.max(x, (0, 1), where=inside, initial=-jnp.inf),
        origin,
        offset,
        squares,
        jnp.sum(beyond, (0, 1), dtype=jnp.int32),
        jnp.zeros(vocab_size, jnp.int32).at[ids].add(at),
        jnp.zeros(positions, jnp.int32).at[: x.shape[1]].add(jnp.sum(at, 0)),
    )
    return one if total is None else _merge(total, one)


def _merge(a: Statistics, b: Statistics) -> Statistics:
    tokens = a.tokens + b.tokens
    part = b.tokens / jnp.maximum(tokens, 1)
    shift = b.offset - a.offset
    return Statistics(
        tokens,
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.origin,
        a.offset + shift * part,
        a.squares + b.squares + jnp.square(shift) * a.tokens * part,
        a.outliers + b.outliers,
        a.by_token + b.by_token,
        a.by_position + b.by_position,
    )


# --- Reports ---


def label(name: str) -> str:
    """Returns a site's short name, or its own."""
    return short_name("activation", name) or name


def sites_table(found: Mapping[str, Statistics], token: Callable[[int], str]) -> Table:
    """Returns a row for each site: its extremes, its outliers, and where most of them are.

    Args:
      found: from `collect`.
      token: text of a token id.
    """
    rows = []
    for name, s in found.items():
        count, values = int(s.outliers.sum()), float(s.tokens) * len(s.low)
        std = float(np.sqrt(np.mean(s.std**2) + np.var(s.mean)))
        tops: list[Any] = [None] * 6
        if count:
            where = [int(np.argmax(by)) for by in (s.outliers, s.by_token, s.by_position)]
            parts = [float(np.max(by)) / count for by in (s.outliers, s.by_token, s.by_position)]
            tops = [where[0], parts[0], token(where[1]), parts[1], where[2], parts[2]]
        rows.append([label(name), float(s.low.min()), float(s.high.max()), std, count, count / max(values, 1), *tops])
    columns = ["site", "min", "max", "std", "outliers", "of values", "dimension", "its share", "token", "token's share"]
    columns += ["position", "position's share"]
    shares = {column: ".1%" for column in columns if column.endswith("share")}
    return Table(
        columns, rows, {"min": ".2f", "max": ".2f", "std": ".3f", "outliers": ",d", "of values": ".3%"} | shares
    )


def dimensions_table(found: Mapping[str, Statistics], count: int = 20) -> Table:
    """Returns the dimensions of each site with most outliers, the worst of all first.

    Args:
      found: from `collect`.
      count: how many rows at most.
    """
    rows: list[list[Any]] = [
        [
            label(name),
            int(d),
            int(s.outliers[d]),
            float(s.outliers[d]) / float(s.outliers.sum()),
            *(float(v[d]) for v in (s.low, s.high, s.mean, s.std)),
        ]
        for name, s in found.items()
        for d in np.flatnonzero(s.outliers)
    ]
    rows.sort(key=lambda row: row[2], reverse=True)
    columns = ["site", "dimension", "outliers", "of the site's", "min", "max", "mean", "std"]
    formats = {"outliers": ",d", "of the site's": ".1%"} | dict.fromkeys(columns[4:], ".3f")
    return Table(columns, rows[:count], formats)


def tokens_table(found: Mapping[str, Statistics], token: Callable[[int], str], count: int = 20) -> Table:
    """Returns the tokens with most outliers over all sites.

    Args:
      found: from `collect`.
      token: text of a token id.
      count: how many rows at most.
    """
    by_token = np.stack([s.by_token for s in found.values()]).sum(0, dtype=np.int64)
    order = np.argsort(-by_token, kind="stable")[:count]
    rows = [[token(int(i)), int(by_token[i]), by_token[i] / by_token.sum()] for i in order if by_token[i]]
    return Table(["token", "outliers", "share"], rows, {"outliers": ",d", "share": ".1%"})


def plot_ranges(found: Mapping[str, Statistics], path: str | os.PathLike[str], per_row: int = 2) -> None:
    """Draws the range of every dimension of each site, as bars from its least to its greatest value.

    Args:
      found: from `collect`.
      path: of the PNG.
      per_row: sites side by side.
    """
    count = -(-len(found) // per_row)
    figure, grid = new_figure(5 * per_row, 1.1 + 1.5 * count, count, per_row, sharex=False)
    for axes, (name, s) in zip(grid.flat, found.items(), strict=False):
        dimensions = np.arange(len(s.low))
        axes.vlines(dimensions, s.low, s.high, color=ACCENT, linewidth=0.6)
        if s.outliers.any():
            top = int(np.argmax(s.outliers))
            axes.vlines(top, s.low[top], s.high[top], color=AMBER, linewidth=1.5)
        axes.set_title(label(name), fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7)
        axes.margins(x=0.01)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("embedding dimension (amber: the one with most outliers)", fontsize=9, color=INK)
    figure.supylabel("least to greatest value", fontsize=9, color=INK)
    save_figure(figure, path)


def plot_counts(found: Mapping[str, Statistics], path: str | os.PathLike[str], count: int = 30) -> None:
    """Draws how many outliers each site has in each dimension, for the dimensions with most of them.

    Args:
      found: from `collect`.
      path: of the PNG.
      count: how many dimensions at most.
    """
    widths = {len(s.outliers) for s in found.values()}
    if len(widths) > 1:
        raise UserError(f"sites with {sorted(widths)} features do not share dimensions; plot them apart")
    matrix = np.array([s.outliers for s in found.values()])
    chosen = np.sort(np.argsort(-matrix.sum(0), kind="stable")[:count])
    chosen = chosen[matrix.sum(0)[chosen] > 0] if matrix.any() else chosen[:1]
    figure, ((axes,),) = new_figure(2.5 + 0.25 * max(len(chosen), 12), 1.6 + 0.25 * len(found))
    image = axes.imshow(np.log10(1 + matrix[:, chosen]), aspect="auto", cmap="Blues", interpolation="nearest")
    axes.set_yticks(range(len(found)), [label(name) for name in found], fontsize=7)
    axes.set_xticks(range(len(chosen)), [str(d) for d in chosen], rotation=90, fontsize=7)
    axes.set_xlabel("embedding dimension", color=INK)
    figure.colorbar(image, label="log10(1 + outliers)")
    save_figure(figure, path)
