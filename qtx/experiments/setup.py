"""From a configuration to an experiment of the kind that its task asks for."""

from __future__ import annotations

from ml_collections import ConfigDict

from qtx.errors import UserError
from qtx.experiments import images, translation
from qtx.experiments.classification import Classification
from qtx.experiments.experiment import Experiment
from qtx.experiments.graph_classification import GraphClassification, graph_sites
from qtx.models.family import Family, ModelConfig
from qtx.nn.sites import SiteInfo


def sites_of(config: ConfigDict, family: Family, sizes: ModelConfig) -> dict[str, SiteInfo]:
    """Returns the sites of the model that a configuration trains; nothing is loaded."""
    return graph_sites(config, family, sizes) if config.bittransgnn.method else family.sites(sizes)


def setup(config: ConfigDict) -> Experiment:
    """Loads and checks everything that a run needs, cheapest first.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    if "sweep" in config:
        raise UserError(
            "this configuration is a sweep over rows: give it to launch/sweep.py, or name one of its methods"
        )
    if config.bittransgnn.method and config.task in (*translation.TASKS, *images.TASKS):
        raise UserError(
            f"bittransgnn.method is for texts with labels, not for the task {config.task!r}; leave it empty"
        )
    if config.task in translation.TASKS:
        return translation.Translation.make(config)
    if config.task in images.TASKS:
        return images.ImageClassification.make(config)
    return GraphClassification.make(config) if config.bittransgnn.method else Classification.make(config)
