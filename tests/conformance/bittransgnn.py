"""Kinds of cases of BitTransGNN."""

from tests.conformance import graph_models

HANDLERS = {**graph_models.HANDLERS}
