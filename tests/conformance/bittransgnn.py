"""Kinds of cases of BitTransGNN."""

from tests.conformance import graph_data, graph_efficiency, graph_layers, graph_models, graph_outlier

HANDLERS = {
    **graph_data.HANDLERS,
    **graph_layers.HANDLERS,
    **graph_models.HANDLERS,
    **graph_efficiency.HANDLERS,
    **graph_outlier.HANDLERS,
}
