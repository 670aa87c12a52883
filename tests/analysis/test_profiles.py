import sys

import numpy as np
import pytest

from qtx.analysis import profiles
from qtx.analysis.profiles import class_profiles, embed, explained, plot_points, plot_profiles
from qtx.errors import UserError

RNG = np.random.default_rng(0)
LABELS = np.arange(24) % 3
POINTS = 5 * np.eye(3)[LABELS] + RNG.normal(0, 0.1, (24, 3))


def near_neighbours_agree(plane):
    distances = np.linalg.norm(plane[:, None] - plane[None], axis=-1) + 1e9 * np.eye(len(plane))
    return np.mean(LABELS[distances.argmin(1)] == LABELS)


@pytest.mark.parametrize(("method", "options"), [("pca", {}), ("tsne", {"perplexity": 5})])
def test_classes_that_lie_apart_stay_apart(method, options):
    found = embed(POINTS, method, **options)
    assert found.shape == (24, 2) and found.dtype == np.float64
    assert near_neighbours_agree(found) == 1
    np.testing.assert_array_equal(found, embed(POINTS, method, **options))


def test_what_cannot_be_embedded(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        embed(POINTS, "umap")
    with pytest.raises(UserError, match="'tsne'"):
        embed(POINTS, "tsn")
    with pytest.raises(UserError, match="perplexity 30"):
        embed(POINTS)
    with pytest.raises(UserError, match="finite"):
        embed([[1.0, np.nan], [0.0, 1.0]], "pca")


def test_umap_is_called_with_the_seed(monkeypatch):
    class Module:
        class UMAP:
            def __init__(self, **options):
                self.options = options

            def fit_transform(self, values):
                return values[:, :2] + self.options["random_state"]

    monkeypatch.setitem(sys.modules, "umap", Module)
    np.testing.assert_array_equal(embed(POINTS, "umap", seed=3), POINTS[:, :2] + 3)


def test_profiles_are_means_over_what_a_head_decides():
    encoder = np.array([[2.0, 0, 0], [4.0, 0, 2], [0, 1.0, 0]])
    graph = np.array([[0, 3.0, 0], [0, 0, 1.0], [0, 0, 5.0]])
    found = class_profiles(encoder, graph)
    np.testing.assert_allclose(found[:3], [[3, 0, 1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(found[3:], [[0, 0, 0], [0, 3, 0], [0, 0, 3]])
    distances = class_profiles(encoder, graph, "rsa")
    np.testing.assert_allclose(distances[3:], 1 - np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.diag(distances[:3]), 0, atol=1e-12)
    assert distances[0, 1] == pytest.approx(1)
    with pytest.raises(UserError, match="'mean'"):
        class_profiles(encoder, graph, "meen")
    with pytest.raises(UserError, match="both heads"):
        class_profiles(encoder, graph[:, :2])


def test_shares_of_the_variance():
    points = RNG.normal(size=(400, 3)) * [3, 2, 1]
    np.testing.assert_allclose(
        explained(points), np.sort(np.linalg.eigvalsh(np.cov(points.T)))[:0:-1] / np.cov(points.T).trace()
    )
    np.testing.assert_array_equal(explained(np.ones((4, 3))), [0, 0])
    with pytest.raises(UserError, match="finite"):
        explained(np.ones((1, 3)))


def test_axes_of_principal_components_say_what_they_explain(monkeypatch):
    drawn = []
    monkeypatch.setattr(profiles, "save_figure", lambda figure, path: drawn.append(figure))
    plane = {"pca": POINTS[:, :2], "tsne": POINTS[:, 1:]}
    plot_points(plane, LABELS, "points.png", shares={"pca": [0.75, 0.2]})
    pca, tsne = drawn[0].axes
    assert (pca.get_xlabel(), pca.get_ylabel()) == (
        "component 1: 75% of the variance",
        "component 2: 20% of the variance",
    )
    assert not tsne.get_xlabel()
    for kind in ("mean", "rsa"):
        plot_profiles(class_profiles(POINTS, POINTS, kind), "profiles.png", kind=kind)
    mean, rsa = (figure.axes[0] for figure in drawn[1:])
    assert mean.get_title() != rsa.get_title() and "% of the variance" in mean.get_xlabel()


def test_plots(tmp_path):
    plot_points({"a": POINTS[:, :2], "b": POINTS[:, 1:]}, LABELS, tmp_path / "points.png", names=("x", "y", "z"))
    plot_profiles(class_profiles(POINTS, POINTS), tmp_path / "profiles.png")
    for name in ("points", "profiles"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="24 labels"):
        plot_points({"a": POINTS}, LABELS, tmp_path / "points.png")
    with pytest.raises(UserError, match="at least one panel"):
        plot_points({}, LABELS, tmp_path / "points.png")
