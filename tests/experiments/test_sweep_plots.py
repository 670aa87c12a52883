"""Which figures a sweep leaves, and which rows are in them."""

import pytest
from matplotlib import image

from qtx.experiments import sweep_plots
from qtx.experiments.config import base, sweeping
from qtx.experiments.plan import plan
from qtx.experiments.study import Attempt
from qtx.experiments.sweep_plots import plot_sweep
from qtx.experiments.sweep_report import make_report
from tests.experiments.test_launch import get_config

ROWS = ({"name": "full"}, {"name": "low", "start": "full"}, {"name": "ptq", "entry": "quantize", "start": "full"})
CURVES = "phase,step,epoch,training_loss,score\na,4,1.0,0.5,0.75\n"


@pytest.fixture
def told():
    """What else a plot is told, by the name of the file."""
    return {}


@pytest.fixture
def drawn(monkeypatch, told):
    """What is drawn, by the name of the file."""
    found = {}

    def note(function):
        def draw(what, path, **options):
            told[path.name] = options
            found[path.name] = list(what) if isinstance(what, dict) else [point[:2] for point in what]
            function(what, path, **options)

        return draw

    for name in ("plot_runs", "plot_accuracy_against_size", "plot_series"):
        monkeypatch.setattr(sweep_plots, name, note(getattr(sweep_plots, name)))
    return found


def plots(workdir, done=None, rest=(), **fields):
    """Plots a sweep in which the named trials are done (None: all); their runs have curves, those of PTQ have none.

    Rows in `rest` know what they weigh without embeddings: half of it.
    """
    config = base()
    config.sweep = sweeping(**{"rows": ROWS, "seeds": (1, 2)} | fields)
    trials, attempts = plan(config), {}
    for number, trial in enumerate(trials):
        attempts[trial.name] = Attempt()
        if done is None or trial.name in done:
            size = 2.0**20 * (1 + len(trial.row.start))
            outcome = {"": {"score": 0.5, "weight_bytes": size}}
            if trial.row.name in rest:
                outcome[""]["weight_bytes_without_embeddings"] = size / 2
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


def test_a_row_that_ignores_the_axis_is_level(tmp_path, monkeypatch):
    axis, found = "quant.weight_bits", {}
    monkeypatch.setattr(sweep_plots, "plot_accuracy_against_size", lambda *args, **options: None)
    monkeypatch.setattr(sweep_plots, "plot_series", lambda lines, path, **options: found.update({path.name: lines}))
    rows = ({"name": "alone", "entry": "quantize", "ignores": (axis,)}, {"name": "low", "entry": "quantize"})
    plots(tmp_path, grid=((axis, (4, 8, 6)),), rows=rows)()
    lines = found["along_weight_bits.png"]
    assert set(lines) == {"alone", "low"}
    assert list(lines["alone"].x) == [4.0, 8.0] and sorted(lines["low"].x) == [4.0, 6.0, 8.0]
    assert len(set(lines["alone"].y)) == 1


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


def test_sizes_are_without_embeddings_if_all_models_know_them(drawn, told, tmp_path):
    for number, rest in enumerate((("full", "low", "ptq"), ("full", "low"))):
        (tmp_path / str(number)).mkdir()
        plots(tmp_path / str(number), rest=rest)()
        shares = [size / 2**20 for _, size in drawn["accuracy_size.png"]]
        label = told["accuracy_size.png"]["xlabel"]
        assert (shares, label) == [([0.5, 2.5, 2.5], "weights without embeddings"), ([1, 5, 5], "weights")][number]


def references(config):
    """Names of the models in full precision that others are held against, by point."""
    trials = plan(config)
    outcome = {"": {config.sweep.metric: 0.5, "weight_bytes": 2**20}}
    attempts = {trial.name: Attempt("done", 0, 0, dict.fromkeys(trial.seeds, outcome)) for trial in trials}
    cells = make_report(config.sweep, trials, attempts, "").found
    return {
        cell.point: [other.row for other in cells if other.full_precision and other.point == cell.point]
        for cell in cells
    }


@pytest.mark.parametrize(
    "config, expected",
    [
        ("efficient_transformer_quantization:minilm", "FP32"),  # on RTE it begins with a model of MNLI
        ("efficient_transformer_quantization:main", "FP32"),
        ("teacher_intervention:rte", "full precision"),
        ("bittransgnn:mr+sweep", "full precision"),
        ("agnews:orderings+small", "full_precision"),  # beside a first epoch in full precision, which is only a start
        ("agnews:patterns", "full_precision"),
        ("translation:tuned", "full_precision"),  # which the others start from
        ("agnews:latent", None),
        ("results:rte", None),  # compares its rows itself
    ],
)
def test_what_is_in_full_precision_follows_from_its_recipe(config, expected):
    found = references(get_config(*config.split(":")))
    assert all(names == ([expected] if expected else []) for names in found.values()), found


QUANTIZED = {"recipe": ("qat",)}


@pytest.mark.parametrize(
    "rows, orderings, expected",
    [
        ([{}, {}], (), []),  # which of two is not clear,
        ([{}, {}], (("c", ">", "b"),), ["b"]),  # unless a claim names one
        ([{}, {}], (("a", ">", "b"),), []),
        ([{}, {"start": "a"}], (), ["b"]),  # further training
        ([QUANTIZED, {}], (), ["b"]),
        ([QUANTIZED, {"entry": "quantize"}], (), []),
        ([{"recipe": ("finetune", "qat")}, {}], (), ["b"]),
    ],
)
def test_the_row_in_full_precision(drawn, told, tmp_path, rows, orderings, expected):
    made = [{"name": "c", "changes": QUANTIZED}]
    for name, row in zip("ab", rows, strict=True):
        fields = {key: row[key] for key in ("entry", "start") if key in row}
        made.append({"name": name, "changes": {key: row[key] for key in ("recipe",) if key in row}, **fields})
    if rows[1].get("entry") == "quantize":
        made[-1]["start"] = "a"
    config = base()
    config.sweep = sweeping(rows=tuple(made), orderings=orderings)
    assert references(config) == {"": expected}
    plots(tmp_path, rows=tuple(made), orderings=orderings)()
    assert told["accuracy_size.png"]["full_precision"] == (expected[0] if expected else None)


def test_points_of_one_row_have_no_model_in_full_precision(drawn, told, tmp_path):
    plots(tmp_path, grid=(("task", ("rte", "mrpc")),), rows=())()
    assert told["accuracy_size.png"]["full_precision"] is None  # each has its own


def test_a_row_goes_on_where_its_start_ended(drawn, told, tmp_path):
    rows = (
        *ROWS[:2],
        {"name": "lower", "start": "low"},
        {"name": "other", "start": "full", "changes": {"task": "mrpc"}},
    )
    draw = plots(tmp_path, rows=rows, seeds=(1,))
    (tmp_path / "full/seed_1/curves.csv").write_text(CURVES + "a,10,2.5,0.25,\n")
    assert draw() == []
    assert told["curves.png"]["before"] == {"full": 0.0, "low": 2.5, "lower": 3.5, "other": 0.0}, (
        "epochs of another task"
    )
    (tmp_path / "low/seed_1/curves.csv").unlink()
    said = draw()
    assert said[1].startswith("lower/seed_1 is drawn from epoch 0 on, not from where its start ended: there is no ")
    assert told["curves.png"]["before"] == {"full": 0.0, "other": 0.0} and "lower" in drawn["curves.png"]
