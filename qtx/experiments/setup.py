"""From a configuration to an experiment of the kind that its task asks for."""

from __future__ import annotations

from ml_collections import ConfigDict

from qtx.experiments.classification import Classification
from qtx.experiments.experiment import Experiment
from qtx.experiments.graph_classification import GraphClassification, graph_sites
from qtx.experiments.translation import TASKS, Translation
from qtx.models.family import Family, ModelConfig
from qtx.nn.sites import SiteInfo


def sites_of(config: ConfigDict, family: Family, sizes: ModelConfig) -> dict[str, SiteInfo]:
    """Returns the sites of the model that a configuration trains; nothing is loaded."""
    if config.task in TASKS or not config.bittransgnn.method:
        return family.sites(sizes)
    return graph_sites(config, family, sizes)


def setup(config: ConfigDict) -> Experiment:
    """Loads and checks everything that a run needs, cheapest first.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    if config.task in TASKS:
        return Translation.make(config)
    return GraphClassification.make(config) if config.bittransgnn.method else Classification.make(config)
