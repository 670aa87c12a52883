"""Which figures a sweep leaves, and which rows are in them."""

import pytest
from matplotlib import image

from qtx.experiments import sweep_plots
from qtx.experiments.config import base, sweeping
from qtx.experiments.plan import plan
from qtx.experiments.study import Attempt
from qtx.experiments.sweep_plots import plot_sweep
from qtx.experiments.sweep_report import make_report

ROWS = ({"name": "full"}, {"name": "low", "start": "full"}, {"name": "ptq", "entry": "quantize", "start": "full"})
CURVES = "phase,step,epoch,training_loss,score\na,4,1.0,0.5,0.75\n"


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, by the name of the file."""
    found = {}

    def note(function):
        def draw(what, path, **options):
            found[path.name] = list(what) if isinstance(what, dict) else [point[:2] for point in what]
            function(what, path, **options)

        return draw

    for name in ("plot_runs", "plot_accuracy_against_size", "plot_series"):
        monkeypatch.setattr(sweep_plots, name, note(getattr(sweep_plots, name)))
    return found


def plots(workdir, done=None, **fields):
    """Plots a sweep in which the named trials are done (None: all); their runs have curves, those of PTQ have none."""
    config = base()
    config.sweep = sweeping(**{"rows": ROWS, "seeds": (1, 2)} | fields)
    trials, attempts = plan(config), {}
    for number, trial in enumerate(trials):
        attempts[trial.name] = Attempt()
        if done is None or trial.name in done:
            outcome = {"": {"score": 0.5, "weight_bytes": 2.0**20 * (1 + len(trial.row.start))}}
            attempts[trial.name] = Attempt("done", number, number, dict.fromkeys(trial.seeds, outcome))
            (workdir / trial.name).mkdir(parents=True)
            if trial.row.entry == "train":
                (workdir / trial.name / "curves.csv").write_text(CURVES)
    return lambda: plot_sweep(trials, attempts, make_report(config.sweep, trials, attempts, "").found, "score", workdir)


def test_one_line_for_each_row_that_trained(drawn, tmp_path):
    assert plots(tmp_path)() == []
    assert drawn == {
        "curves.png": ["full", "low"],
        "accuracy_size.png": [("full", 2**20), ("low", 5 * 2**20), ("ptq", 5 * 2**20)],
    }
    for name in drawn:
        assert image.imread(tmp_path / name).ndim == 3


def test_every_point_has_figures_of_its_own(drawn, tmp_path):
    grid = (("task", ("rte", "mrpc")), ("data.seed", (0, 1)))
    plots(tmp_path, grid=grid)()
    points = ["rte,seed=0", "rte,seed=1", "mrpc,seed=0", "mrpc,seed=1"]
    assert set(drawn) == {f"{name}_{point}.png" for name in ("curves", "accuracy_size") for point in points}
    assert drawn["curves_rte,seed=1.png"] == ["full", "low"]


def test_with_one_row_the_points_are_compared(drawn, tmp_path):
    plots(tmp_path, grid=(("task", ("rte", "mrpc")),), rows=())()
    assert drawn["curves.png"] == ["rte", "mrpc"] and len(drawn["accuracy_size.png"]) == 2
    (tmp_path / "seeds").mkdir()
    plots(tmp_path / "seeds", rows=())()
    assert drawn["curves.png"] == ["seed_1"]


def test_an_axis_of_numbers_has_a_line_for_each_row(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "plot_accuracy_against_size", lambda *args, **options: None)
    rows = ({"name": "full", "entry": "quantize"}, {"name": "low", "entry": "quantize"})
    grid = (("task", ("rte", "mrpc")), ("quant.weight_bits", (4, 8, 6)))
    plots(tmp_path, grid=grid, rows=rows)()
    lines = {name: found for name, found in drawn.items() if name.startswith("along")}
    assert lines == {f"along_weight_bits_{task}.png": ["full", "low"] for task in ("rte", "mrpc")}
    (tmp_path / "one").mkdir()
    drawn.clear()
    plots(tmp_path / "one", grid=grid, rows=rows[:1])()
    assert drawn["along_weight_bits.png"] == ["rte", "mrpc"]


def test_the_first_seed_that_is_done_counts(drawn, tmp_path):
    draw = plots(tmp_path, done=("full/seed_2", "low/seed_1"))
    (tmp_path / "low/seed_1/curves.csv").unlink()
    (line,) = draw()
    assert line.startswith("no curves of low/seed_1: there is no ")
    assert drawn["curves.png"] == ["full"]


def test_nothing_to_plot_leaves_nothing(drawn, tmp_path):
    assert plots(tmp_path, done=())() == [] and not drawn
    draw = plots(tmp_path, done=("full/seed_1",))
    (tmp_path / "full/seed_1/curves.csv").write_text(CURVES.splitlines()[0])  # nothing was measured
    assert draw() == [] and not drawn and not list(tmp_path.glob("*.png"))


def test_samples_of_a_search_have_no_curves(drawn, tmp_path):
    fields = dict(ranges=(("data.seed", 1, 9),), sampler="random", samples=2)
    plots(tmp_path, rows=ROWS[:2], **fields)()
    assert drawn == {"curves.png": ["full"]}
