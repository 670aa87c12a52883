"""What a quantized classifier makes of texts or images, in the plane: its probabilities, and the profiles of its classes.

Of two classes it is the encoder's features: two probabilities lie on a line, and what a plane shows of them is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from qtx.analysis.profiles import Method, Profile, class_profiles, embed, explained, plot_points, plot_profiles
from qtx.errors import UserError, near_misses
from qtx.experiments.classification import Classification
from qtx.experiments.graph_classification import GraphClassification
from qtx.experiments.run import post_training_quantization
from qtx.nn.text_graph import TextGraphClassifier
from qtx.quant.policy import Policy
from qtx.train.report import Table


def features(experiment: Classification, policy: Policy) -> Callable[[Path], list[str | Table]]:
    """Checks the section `analysis.features` and returns what fills a run directory and the report.

    Args:
      experiment: of a trained checkpoint in full precision.
      policy: what is quantized, and how.

    Raises:
      UserError: an unknown method or split, or a regression, which has no classes.
    """
    c = experiment.config.analysis.features
    for name in c.methods:
        if name not in get_args(Method):
            raise UserError(f"unknown analysis.features method {name!r}{near_misses(name, get_args(Method))}")
    if c.split not in experiment.encoded:
        raise UserError(f"analysis.features.split {c.split!r}{near_misses(c.split, experiment.encoded)}")
    if experiment.task.is_regression:
        raise UserError(f"analysis 'features' colours classes, and {experiment.task.name} has none; leave it out")

    def run(workdir: Path) -> list[str | Table]:
        batches = experiment.calibration_batches()
        found = post_training_quantization(experiment, experiment.pretrained.params, policy, batches)
        if experiment.task.num_labels > 2:
            logits = experiment.logits(found.model, found.variables, [c.split])[c.split]
            what, values = "probabilities", np.asarray(jax.nn.softmax(logits))  # of log probabilities: themselves
        else:
            what, values = "pooled features", experiment.pooled(found.model, found.variables, c.split)
        labels = np.asarray(experiment.encoded[c.split].labels)
        some = np.random.default_rng(experiment.config.seed).permutation(len(labels))[: c.limit or None]
        chosen, seed = values[some], experiment.config.seed
        perplexity = min(c.perplexity, (len(some) - 1) / 3)
        panels = {name: embed(chosen, name, seed, perplexity) for name in c.methods}
        shares = {"pca": explained(chosen)} if "pca" in c.methods else {}
        plot_points(panels, labels[some], workdir / "features.png", experiment.task.labels, shares)
        lines: list[str | Table] = [
            f"{what.capitalize()} of {len(some)} examples of the split {c.split!r}, coloured by their class.",
            f"![{what}](features.png)",
        ]
        if isinstance(experiment, GraphClassification) and isinstance(found.model, TextGraphClassifier):
            votes = experiment.votes_of(found.model, found.variables, c.split)
            for kind in get_args(Profile):
                profiles = class_profiles(votes.text, votes.graph, kind)
                plot_profiles(profiles, workdir / f"profiles_{kind}.png", experiment.task.labels, kind)
                lines.append(f"![profiles of classes, {kind}](profiles_{kind}.png)")
        return lines

    return run
