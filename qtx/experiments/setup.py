"""From a configuration to an experiment of the kind that its task asks for."""

from __future__ import annotations

from ml_collections import ConfigDict

from qtx.experiments.classification import Classification
from qtx.experiments.experiment import Experiment
from qtx.experiments.translation import TASKS, Translation


def setup(config: ConfigDict) -> Experiment:
    """Loads and checks everything that a run needs, cheapest first.

    Raises:
      UserError: on anything in the configuration, the data or the checkpoint that does not fit.
    """
    return Translation.make(config) if config.task in TASKS else Classification.make(config)
