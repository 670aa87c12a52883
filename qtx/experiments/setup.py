"""From a configuration to an experiment of the kind that its task asks for."""

from __future__ import annotations

from ml_collections import ConfigDict

from qtx.experiments import images, translation
from qtx.experiments.classification import Classification
from qtx.experiments.experiment import Experiment


def setup(config: ConfigDict) -> Experiment:
    """Loads and checks everything that a run needs, cheapest first.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    if config.task in translation.TASKS:
        return translation.Translation.make(config)
    if config.task in images.TASKS:
        return images.ImageClassification.make(config)
    return Classification.make(config)
