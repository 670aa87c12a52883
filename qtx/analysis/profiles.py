"""What a classifier makes of its classes, in two dimensions: texts coloured by class, and the profiles of classes.

plot_points(embed(probabilities, "tsne"), labels, path)
plot_profiles(class_profiles(encoder_logits, graph_logits), path)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics.pairwise import cosine_distances

from qtx.errors import UserError, near_misses
from qtx.train.plots import GREY, INK, new_figure, save_figure

Method = Literal["pca", "tsne", "umap"]
Profile = Literal["mean", "rsa"]


def embed(features: ArrayLike, method: Method = "tsne", seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """Maps features to the plane.

    Args:
      features: `[N, D]`, such as probabilities, logits or document features.
      method: `'pca'` (the two directions of most variance), `'tsne'` (van der Maaten and Hinton 2008) or `'umap'`
        (McInnes et al. 2018; needs the package umap-learn).
      seed: of t-SNE and UMAP.
      perplexity: of t-SNE: about how many neighbours a point has.

    Returns:
      float64 `[N, 2]`. Signs of the axes are arbitrary.

    Raises:
      UserError: an unknown method, values that are not finite or too few of them, or umap-learn is missing.
    """
    values = np.asarray(features, np.float64)
    if method not in get_args(Method):
        raise UserError(f"unknown way to two dimensions {method!r}{near_misses(method, get_args(Method))}")
    _check(values)
    if method == "pca":
        return PCA(2, svd_solver="full").fit_transform(values)
    if method == "tsne":
        if not 0 < perplexity < len(values):
            raise UserError(f"perplexity {perplexity} must lie between 0 and the number of points, {len(values)}")
        found = TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(values)
    else:
        try:
            umap = importlib.import_module("umap")
        except ImportError:
            raise UserError("UMAP needs a package of its own: pip install umap-learn, or use 'tsne' or 'pca'") from None
        found = umap.UMAP(n_components=2, random_state=seed).fit_transform(values)
    return np.asarray(found, np.float64)


def explained(features: ArrayLike) -> np.ndarray:
    """Returns the shares of the variance of features `[N, D]` along both axes of `embed(features, "pca")`, float64 `[2]`.

    Features that are all the same have none: 0 and 0. Raises a `UserError` as `embed` does.
    """
    values = np.asarray(features, np.float64)
    _check(values)
    whole = values.var(0).sum()
    return embed(values, "pca").var(0) / whole if whole else np.zeros(2)


def _check(values: np.ndarray) -> None:
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise UserError(f"features of shape {values.shape}: give finite numbers, at least two rows of two")


def class_profiles(encoder: ArrayLike, graph: ArrayLike, kind: Profile = "mean") -> np.ndarray:
    """Returns what the classes look like to the two heads of a model with a graph.

    A head's class is what it decides itself: the mean of its logits over the examples that it gives to a class. A class
    that it gives none to has the mean 0, at distance 1 from all others.

    Args:
      encoder: logits of the classifier `[N, C]`.
      graph: logits of the graph convolution `[N, C]`.
      kind: `'mean'`: those means; `'rsa'`: their cosine distances to one another, head by head, as in representational
        similarity analysis (Kriegeskorte et al. 2008).

    Returns:
      float64 `[2 C, C]`: a row for each class of the encoder, then of the graph.

    Raises:
      UserError: an unknown kind, or logits of different shapes.
    """
    heads = [np.asarray(logits, np.float64) for logits in (encoder, graph)]
    if kind not in get_args(Profile):
        raise UserError(f"unknown kind of profile {kind!r}{near_misses(kind, get_args(Profile))}")
    if heads[0].ndim != 2 or heads[0].shape != heads[1].shape:
        raise UserError(f"logits of shapes {heads[0].shape} and {heads[1].shape}: both heads give [N, C]")
    means = [_class_means(logits) for logits in heads]
    return np.concatenate(means if kind == "mean" else [cosine_distances(mean) for mean in means])


def _class_means(logits: np.ndarray) -> np.ndarray:
    one_hot = np.eye(logits.shape[1])[logits.argmax(1)]
    return one_hot.T @ logits / np.maximum(one_hot.sum(0), 1)[:, None]


def plot_points(
    panels: Mapping[str, ArrayLike],
    labels: ArrayLike,
    path: str | Path,
    names: Sequence[str] = (),
    shares: Mapping[str, ArrayLike] | None = None,
) -> None:
    """Draws points in the plane, coloured by class, as a PNG written atomically.

    Args:
      panels: points `[N, 2]` from `embed`, by title; side by side, four in a row.
      labels: class of each point, int `[N]`.
      path: of the PNG; its directories are made.
      names: of the classes; empty: their numbers.
      shares: of the variance along both axes, from `explained`, by title, for the panels that have such axes.

    Raises:
      UserError: nothing to plot, or a number of points that is not that of the labels.
    """
    classes = np.asarray(labels)
    points = {title: np.asarray(values, np.float64) for title, values in panels.items()}
    if not points:
        raise UserError("no points to plot: give at least one panel")
    for title, values in points.items():
        if values.shape != (len(classes), 2):
            raise UserError(f"panel {title!r} has points of shape {values.shape} for {len(classes)} labels")
    columns = min(len(points), 4)
    rows = -(-len(points) // columns)
    figure, grid = new_figure(4.2 * columns + 1.6, 4 * rows, rows, columns)
    found, colors = np.unique(classes), _colors(int(classes.max()) + 1)
    for axes, (title, values) in zip(grid.flat, points.items(), strict=False):
        # In random order: classes drawn one after the other would hide each other.
        order = np.random.default_rng(0).permutation(len(classes))
        axes.scatter(*values[order].T, s=9, color=colors[classes[order]], alpha=0.8, linewidth=0)
        _bare(axes, title, (shares or {}).get(title))
    for axes in list(grid.flat)[len(points) :]:
        axes.set_axis_off()
    marks = [Line2D([], [], marker="o", linestyle="", markersize=6, color=colors[i]) for i in found]
    figure.legend(
        marks, [names[i] if len(names) else str(i) for i in found], loc="outside right upper", frameon=False, fontsize=8
    )
    save_figure(figure, path)


def plot_profiles(profiles: ArrayLike, path: str | Path, names: Sequence[str] = (), kind: Profile = "mean") -> None:
    """Draws the principal components of class profiles: a square for the encoder, a circle for the graph, a colour a class.

    Args:
      profiles: from `class_profiles`, `[2 C, C]`.
      path: of the PNG, which is written atomically; its directories are made.
      names: of the classes; empty: their numbers.
      kind: which ones they are, for the title.
    """
    plane = embed(profiles, "pca")
    count = len(plane) // 2
    colors = _colors(count)
    figure, ((axes,),) = new_figure(7.5, 5.5)
    for start, marker, size in ((0, "s", 150), (count, "o", 60)):  # a circle on its square hides it not
        axes.scatter(*plane[start : start + count].T, marker=marker, s=size, color=colors, edgecolor="white", zorder=3)
    for i in range(count):
        axes.plot(*plane[[i, count + i]].T, color=colors[i], linewidth=0.8, alpha=0.5)
        text = names[i] if len(names) else str(i)
        axes.annotate(text, plane[i], (9, 6), textcoords="offset points", fontsize=8, color=INK)
    what = {"mean": "mean logits of classes", "rsa": "distances between classes"}[kind]
    _bare(axes, f"{what}, principal components", explained(profiles))
    marks = [
        Line2D([], [], marker=m, linestyle="", markersize=7, color=GREY, label=label)
        for m, label in (("s", "encoder"), ("o", "graph"))
    ]
    figure.legend(handles=marks, loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _bare(axes: Any, title: str, shares: ArrayLike | None = None) -> None:
    """The scale of such axes says nothing; principal components have the same one, and their shares of the variance."""
    axes.set_title(title, fontsize=10, color=INK)
    if shares is not None:
        first, second = (f"component {i}: {share:.0%} of the variance" for i, share in enumerate(np.asarray(shares), 1))
        axes.set_xlabel(first, fontsize=8, color=INK)
        axes.set_ylabel(second, fontsize=8, color=INK)
        axes.set_aspect("equal", adjustable="datalim")  # else next to nothing would fill the height
    axes.set_xticks([])
    axes.set_yticks([])


def _colors(count: int) -> np.ndarray:
    """Returns so many colours `[count, 4]`, those of tab10 or tab20, and of a continuous map for more."""
    if count <= 20:
        return np.asarray(matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors)[:count]  # type: ignore
    return matplotlib.colormaps["turbo"](np.linspace(0, 1, count))
