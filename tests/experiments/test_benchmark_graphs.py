"""The plain references of the rows about graphs, and what they are measured on."""

import math

import numpy as np
import pytest

from qtx.experiments import benchmark_graphs as rows
from tests.experiments.test_benchmark import smoke_config


def test_the_loop_counts_every_pair_of_every_window():
    # Windows: (0 1), (1 0), (0 2) and (3 3): 0 is in three of four, 1 in two, 2 and 3 in one each.
    found = rows.loop_information([[0, 1, 0, 2], [3, 3]], window=2)
    assert found == {(0, 1): pytest.approx(math.log(2 * 4 / (3 * 2))), (0, 2): pytest.approx(math.log(1 * 4 / (3 * 1)))}


def test_edges_that_differ_are_an_error(monkeypatch):
    monkeypatch.setattr(rows, "loop_information", lambda documents, window: {(0, 1): 100.0})
    with pytest.raises(ArithmeticError, match="an edge between words and the plain loop's differ by"):
        rows.graph_build(smoke_config())


def test_the_random_graph_is_symmetric_and_normalised():
    nodes = 60
    found = rows.text_like_graph(nodes, 500, 0).toarray().astype(float)
    np.testing.assert_allclose(found, found.T, rtol=1e-6)
    assert not found[nodes // 2 :, nodes // 2 :][~np.eye(nodes // 2, dtype=bool)].any()  # no document next to another
    assert np.linalg.eigvalsh(found).max() == pytest.approx(1, rel=1e-5)  # of D^-1/2 (A + I) D^-1/2
