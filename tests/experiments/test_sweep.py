"""Sweeps: what is planned, who runs it, what survives, and what the tables say."""

import contextlib
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from qtx.errors import UserError
from qtx.experiments import compare, plan, study, sweep
from qtx.experiments.classification import Classification
from qtx.experiments.config import base, changed, phase, sweeping
from qtx.experiments.from_config import policy_from
from qtx.experiments.plan import ENTRIES, parse_axis, parse_range, parse_seeds
from qtx.experiments.run import quantize
from qtx.experiments.sweep import STORAGE_FILE, command_of, with_fields
from qtx.train.logging import read_metrics
from qtx.train.report import load_config
from tests.experiments.test_launch import ROOT, get_config, load_leaves, on_tiny

ROWS = (
    {"name": "full", "published": {"rte": 0.6, "mean": 0.7}},
    {"name": "low", "entry": "quantize", "start": "full", "changes": {"quant.weight_bits": 4}},
)
TASKS = (("task", {"rte": {"task": "rte", "data.max_length": 16}, "mrpc": {"task": "mrpc"}}),)


def tiny_sweep(**fields) -> ConfigDict:
    config = base()
    config.sweep = sweeping(**{"grid": TASKS, "rows": ROWS, "seeds": (1, 2, 3), "columns": "task"} | fields)
    return config


@pytest.fixture
def runs(monkeypatch):
    """Entries that only note what they are given; a score is the seed / 10, minus 0.5 after quantization."""
    monkeypatch.setattr(sweep, "check_models", lambda trials: None)  # the model may not be there
    monkeypatch.setattr(sweep, "plot_sweep", lambda *args: [])  # see test_sweep_plots
    started = []

    def entry(config, workdir, lost=0.0):
        started.append((workdir, config))
        (workdir / "model").mkdir(parents=True)
        for name in ("checkpoints", "best"):
            (workdir / name).mkdir()
        return {"": {"score": config.seed / 10 - lost, "weight_bytes": 2**20}}

    monkeypatch.setitem(ENTRIES, "train", entry)
    monkeypatch.setitem(ENTRIES, "quantize", lambda config, workdir: entry(config, workdir, 0.5))
    return started


def names(runs, workdir):
    return [str(directory.relative_to(workdir)) for directory, _ in runs]


def cells(workdir, name="cells"):
    with open(workdir / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the plan


def test_order_of_trials_and_what_they_change():
    found = plan.plan(tiny_sweep(seeds=(1, 2)))
    assert [trial.name for trial in found] == [
        f"{task}/{row}/seed_{seed}" for task in ("rte", "mrpc") for seed in (1, 2) for row in ("full", "low")
    ]
    full, low = found[:2]
    assert (full.config.task, full.config.data.max_length, full.config.save_models) == ("rte", 16, True)
    assert "sweep" not in full.config and low.needs() == ("rte/full/seed_1",)
    config = low.run_config(Path("/runs"), 1, {})
    assert config.model.name == "/runs/rte/full/seed_1/model" and not config.model.fresh_head
    assert (config.quant.weight_bits, config.seed, full.config.quant.weight_bits) == (4, 1, None)


def test_plain_axes_make_readable_directories():
    grid = (("phases.finetune.optimizer.learning_rate", (1e-5, 1e-4)), ("task", ("rte", "mrpc")))
    found = plan.plan(tiny_sweep(grid=grid, rows=(), seeds=(1,)))
    assert [trial.group for trial in found] == [
        f"learning_rate={rate}/{task}" for rate in ("1e-05", "0.0001") for task in ("rte", "mrpc")
    ]
    assert [trial.config.phases.finetune.optimizer.learning_rate for trial in found] == [1e-5, 1e-5, 1e-4, 1e-4]


def test_rows_at_some_points_alone_and_changes_there():
    rows = (*ROWS, {"name": "more", "at": ("rte",), "changes_at": {"rte": {"quant.overrides": "y=16"}}})
    found = [trial for trial in plan.plan(tiny_sweep(rows=rows, seeds=(1,))) if trial.row.name == "more"]
    assert [(trial.name, trial.config.quant.overrides) for trial in found] == [("rte/more/seed_1", "y=16")]


def test_a_row_that_an_axis_does_not_touch_is_run_once_and_shared(runs, tmp_path):
    grid = (("task", {"rte": {"task": "rte"}, "mrpc": {"task": "mrpc"}}), ("quant.weight_bits", (2, 3, 4)))
    rows = (
        {"name": "full", "ignores": ("quant.weight_bits",)},
        {"name": "low", "start": "full", "uses": {"teacher.name": "full/quantized"}},
    )
    config = tiny_sweep(grid=grid, rows=rows, seeds=(1,))
    found = plan.plan(config)
    assert [trial.name for trial in found if trial.row.name == "full"] == ["rte/full/seed_1", "mrpc/full/seed_1"]
    low = [trial for trial in found if trial.row.name == "low"]
    assert [trial.needs() for trial in low] == [("rte/full/seed_1",)] * 3 + [("mrpc/full/seed_1",)] * 3
    started = low[0].run_config(tmp_path, 1, {})
    assert started.model.name == str(tmp_path / "rte/full/seed_1/model")
    assert started.teacher.name == str(tmp_path / "rte/full/seed_1/quantized")
    sweep.sweep(config, tmp_path)
    assert len(names(runs, tmp_path)) == 8
    lines = {(line["task"], line["quant.weight_bits"], line["row"]) for line in cells(tmp_path)}
    assert ("rte", "any", "full") in lines and ("rte", "2", "low") in lines and ("mrpc", "4", "full") not in lines


def test_a_row_that_starts_elsewhere_at_one_point_and_is_shared_by_all_seeds(runs, tmp_path):
    rows = (
        {"name": "before", "at": ("rte",), "ignores": ("seed",), "changes": {"task": "mnli"}},
        {"name": "full", "start_at": {"rte": "before"}, "changes_at": {"rte": {"model.fresh_head": True}}},
        {"name": "low", "start": "full", "start_at": {"mrpc": "full"}},
    )
    config = tiny_sweep(rows=rows, seeds=(1, 2))
    found = {trial.name: trial for trial in plan.plan(config)}
    assert [name for name in found if "before" in name] == ["rte/before/seed_1"]
    second = found["rte/full/seed_2"]
    assert second.needs() == ("rte/before/seed_1",) and second.config.model.fresh_head
    assert second.run_config(tmp_path, 2, {}).model.name == str(tmp_path / "rte/before/seed_1/model")
    assert not found["mrpc/full/seed_2"].needs() and found["mrpc/full/seed_2"].config.model.name == config.model.name
    assert found["mrpc/low/seed_2"].needs() == ("mrpc/full/seed_2",)
    assert found["rte/before/seed_1"].config.task == "mnli" and found["rte/before/seed_1"].config.save_models
    sweep.sweep(config, tmp_path)
    assert len(runs) == 9 and names(runs, tmp_path)[0] == "rte/before/seed_1"
    lines = {(line["task"], line["row"]): line for line in cells(tmp_path)}
    assert ("mrpc", "before") not in lines and "seed_2" not in (tmp_path / "table.md").read_text()
    searched = tiny_sweep(
        rows=rows[:1], seeds=(1, 2), sampler="random", samples=2, ranges=(("model.amplify.factor", 1.0, 2.0),)
    )
    assert [trial.seeds for trial in plan.plan(searched)] == [(1,), (1,)]
    with pytest.raises(UserError, match="row 'full' names the label 'rt'"):
        plan.plan(tiny_sweep(rows=(rows[0], rows[1] | {"start_at": {"rt": "before"}})))
    with pytest.raises(UserError, match="row 'full' starts from 'before', which is not run at 'mrpc'"):
        plan.plan(tiny_sweep(rows=(rows[0], rows[1] | {"start_at": {"mrpc": "before"}})))


def test_a_selection_takes_along_what_it_starts_from():
    found = plan.plan(tiny_sweep())
    chosen = plan.selected(found, ["mrpc/low/seed_[12]"])
    assert [trial.name for trial in chosen] == [
        "mrpc/full/seed_1",
        "mrpc/low/seed_1",
        "mrpc/full/seed_2",
        "mrpc/low/seed_2",
    ]
    assert plan.selected(found, []) == found


def test_command_line():
    assert parse_axis("a.b=1e-5,rte,3") == ("a.b", (1e-5, "rte", 3))
    assert parse_range("a.b=1e-5:1e-3:log") == ("a.b", 1e-5, 1e-3, "log") and parse_range("n=1:4") == ("n", 1, 4)
    assert parse_seeds(["1", "2"]) == (1, 2)
    argv = [
        "launch/sweep.py",
        "--trials=3",
        "--minutes",
        "5",
        "--report_only",
        "--storage=mysql://me:secret@x/y",
        "--a=b c",
    ]
    assert command_of(argv) == "python launch/sweep.py '--storage=mysql://me:***@x/y' '--a=b c'"
    config = base()
    config.lock()
    assert with_fields(config, grid=(parse_axis("data.seed=0,1"),)).sweep.seeds == (config.seed,)
    assert not with_fields(tiny_sweep(), grid=(("data.seed", (0, 1)),)).sweep.columns


def test_changed_copies():
    config = base()
    config.lock()
    new = changed(config, {"quant.weight_options": {"candidates": 5}, "model.hidden_dropout": 0.1}, "a test")
    assert new.quant.weight_options.candidates == 5 and new.model.hidden_dropout == 0.1
    assert config.model.hidden_dropout is None and not config.quant.weight_options
    assert not changed(new, {"quant.weight_options": {}}, "a test").quant.weight_options
    assert new.quant.weight_options.candidates == 5
    with pytest.raises(UserError, match="a test: data cannot be {} .only a section of options can be empty"):
        changed(config, {"data": {}}, "a test")


# --- running


def test_each_model_is_trained_once_and_nothing_is_repeated(runs, tmp_path):
    config = tiny_sweep()
    report = sweep.sweep(config, tmp_path, trials=3)
    assert names(runs, tmp_path) == ["rte/full/seed_1", "rte/low/seed_1", "rte/full/seed_2"]
    assert len(report.missing) == 4
    report = sweep.sweep(config, tmp_path)
    assert names(runs, tmp_path) == [trial.name for trial in plan.plan(config)] and not report.missing
    sweep.sweep(config, tmp_path)
    config.sweep.seeds = (1, 2, 3, 4)  # more of the same is welcome
    sweep.sweep(config, tmp_path, only=["rte/*"])
    assert names(runs, tmp_path)[12:] == ["rte/full/seed_4", "rte/low/seed_4"]
    assert not list(tmp_path.rglob("checkpoints")) and not list(tmp_path.rglob("best"))
    assert json.loads((tmp_path / "config.json").read_text())["sweep"]["seeds"] == [1, 2, 3, 4]


def test_no_trial_is_started_after_the_time(runs, tmp_path, monkeypatch):
    now = iter(range(0, 10_000, 60))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: float(next(now)))
    sweep.sweep(tiny_sweep(), tmp_path, minutes=2.5)
    assert len(runs) == 2


def test_report_only_runs_nothing(runs, tmp_path):
    report = sweep.sweep(tiny_sweep(), tmp_path, report_only=True)
    assert not runs and len(report.missing) == 4
    assert [row[:4] for row in report.table.rows] == [["full", "", "", None], ["low", "", "", None]]


def test_claims_about_rows_are_looked_at_where_both_are_known(runs, tmp_path):
    claims = (
        ("full", ">", "low"),
        ("low", ">", "full"),
        ("full", "~", "low"),
        ("low", "~", "low"),
        ("low", ">=", "full"),
    )
    report = sweep.sweep(tiny_sweep(orderings=claims), tmp_path, only=["rte/*"])
    assert [row[-1] for row in report.orderings.rows] == ["yes", "no", "no", "yes", "no", *[""] * 5]
    assert "| rte   | full > low  |" in (tmp_path / "table.md").read_text()
    wide = sweep.sweep(tiny_sweep(orderings=claims, near=1.0), tmp_path, report_only=True)
    assert [row[-1] for row in wide.orderings.rows][:5] == ["yes", "no", "yes", "yes", "yes"]


def test_a_sweep_from_before_a_field_goes_on(runs, tmp_path, monkeypatch):
    plain = base

    def newer():
        config = plain()
        config.phases.added = phase()
        return config

    def older():
        config = newer()
        del config.model.amplify, config.data.flip, config.phases.added.share
        return config

    monkeypatch.setitem(globals(), "base", older)
    sweep.sweep(tiny_sweep(seeds=(1,)), tmp_path)
    monkeypatch.setitem(globals(), "base", newer)
    sweep.sweep(tiny_sweep(seeds=(1, 2)), tmp_path)
    assert len(runs) == 8
    config = tiny_sweep(seeds=(1,))
    config.data.flip = True
    with pytest.raises(UserError, match=r"data.flip=False, not True"):
        sweep.sweep(config, tmp_path)


def test_fields_that_rows_set_otherwise_are_told(runs, tmp_path, capsys):
    rows = ({"name": "own", "changes": {"log_every": 7}}, {"name": "plain"})
    config = tiny_sweep(rows=rows, seeds=(1,))
    config.log_every = 5
    config.checkpoint_every = 3
    given = ("log_every", "checkpoint_every", "sweep.near")
    sweep.sweep(config, tmp_path, given=given)
    said = " ".join(capsys.readouterr().err.split())
    assert "--config.log_every does not reach own: the sweep sets it there" in said
    assert "checkpoint_every does" not in said and "near" not in said
    assert not sweep.not_reached(config, plan.plan(config), ("checkpoint_every",))


def test_another_configuration_under_the_same_name_is_refused(runs, tmp_path):
    sweep.sweep(tiny_sweep(seeds=(1,)), tmp_path)
    config = tiny_sweep(seeds=(1,))
    config.phases.finetune.epochs = 2.0
    with pytest.raises(UserError, match=r"rte/full/seed_1 .* phases.finetune.epochs=1.0, not 2.0"):
        sweep.sweep(config, tmp_path)
    config = tiny_sweep(seeds=(1,))
    config.data.dir = "/elsewhere"  # on another machine, say
    sweep.sweep(config, tmp_path)
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such task"), "no such task"),
        (RuntimeError("out of memory\nat step 3"), "RuntimeError: out of memory"),
    ],
)
def test_a_failing_trial_is_recorded_and_the_others_go_on(runs, tmp_path, monkeypatch, error, line):
    train, fails = ENTRIES["train"], [True]

    def sometimes(config, workdir):
        if config.seed == 1 and config.task == "rte" and fails:
            raise error
        return train(config, workdir)

    monkeypatch.setitem(ENTRIES, "train", sometimes)
    with pytest.raises(UserError, match=f"1 of 12 trials failed, rte/full/seed_1 with: {line}"):
        sweep.sweep(tiny_sweep(), tmp_path)
    assert len(runs) == 10  # all but it and the row that starts from it
    text = (tmp_path / "table.md").read_text()
    assert f"rte, full: seed_1 failed ({line})" in text and "--retry_failed" in text
    assert "rte, low: seed_1 not run, because rte/full/seed_1 failed" in text
    assert str(error).splitlines()[0] in (tmp_path / "rte/full/seed_1/error.txt").read_text()
    with pytest.raises(UserError, match="1 of 12 trials failed"):
        sweep.sweep(tiny_sweep(), tmp_path)
    fails.clear()
    assert not sweep.sweep(tiny_sweep(), tmp_path, retry_failed=True).missing
    assert names(runs, tmp_path)[10:] == ["rte/full/seed_1", "rte/low/seed_1"]


def test_a_score_that_is_no_number_is_a_failure(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(ENTRIES, "train", lambda config, workdir: {"": {"score": float("nan")}})
    with pytest.raises(UserError, match="its score is nan"):
        sweep.sweep(tiny_sweep(seeds=(1,)), tmp_path)
    with pytest.raises(UserError, match="no metric 'f1' to sweep for, only score"):
        sweep.sweep(tiny_sweep(metric="f1", rows=(), name="other"), tmp_path)


def test_an_interrupted_trial_is_taken_up_first(runs, tmp_path, monkeypatch):
    train = ENTRIES["train"]

    def interrupt(config, workdir):
        raise KeyboardInterrupt

    monkeypatch.setitem(ENTRIES, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(tiny_sweep(), tmp_path)
    monkeypatch.setitem(ENTRIES, "train", train)
    sweep.sweep(tiny_sweep(), tmp_path, trials=1)
    assert names(runs, tmp_path) == ["rte/full/seed_1"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from qtx.experiments import sweep
from qtx.experiments.plan import ENTRIES
from tests.experiments.test_sweep import tiny_sweep

def entry(config, workdir):
    (workdir / "model").mkdir(parents=True, exist_ok=True)
    with open(Path(sys.argv[1]) / "runs.txt", "a") as file:
        file.write(f"{workdir.relative_to(sys.argv[1])}\\n")
    if sys.argv[2] == "die" and config.seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return {"": {"score": 0.5}}

ENTRIES["train"] = ENTRIES["quantize"] = entry
sweep.check_models = lambda trials: None
sweep.sweep(tiny_sweep(), sys.argv[1])
"""


def worker(workdir, how="live"):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER, str(workdir), how]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_workers_share_the_work_after_a_third_was_killed(tmp_path):
    killed = worker(tmp_path, "die")
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    done = (tmp_path / "runs.txt").read_text().split()
    assert done == ["rte/full/seed_1", "rte/low/seed_1", "rte/full/seed_2"]
    workers = [worker(tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], said
    found = (tmp_path / "runs.txt").read_text().split()[3:]
    assert sorted(found) == sorted(trial.name for trial in plan.plan(tiny_sweep()) if trial.name not in done[:2])
    assert not any("optuna" in text or "Warning" in text for pair in said for text in pair), said
    assert all(int(row["n"]) == 3 for row in cells(tmp_path) if row["task"] != "mean")


def ledger_of(tmp_path, **fields):
    return study.Ledger(f"sqlite:///{tmp_path / STORAGE_FILE}", "sweep", tmp_path, heartbeat=60, **fields)


def test_a_trial_is_claimed_once_and_given_back(tmp_path):
    trials = plan.plan(tiny_sweep())
    one, two = ledger_of(tmp_path), ledger_of(tmp_path)
    one.enter(trials)
    two.enter(trials)
    with one.claim(trials[0]) as mine:
        with two.claim(trials[0]) as theirs:
            assert mine and not theirs
        two.enter(trials)
        assert two.attempts(trials)[trials[0].name].state == "running"
    assert two.attempts(trials)[trials[0].name].state == "interrupted"
    two.enter(trials)
    with two.claim(trials[0]) as claim:
        claim.complete(0.5)
    assert one.attempts(trials)[trials[0].name].state == "done"
    assert len(one.study(trials[0]).trials) == len(trials) + 1


def test_the_trial_of_a_worker_elsewhere_is_taken_when_its_heartbeat_is_old(tmp_path, monkeypatch):
    trials = plan.plan(tiny_sweep(seeds=(1,)))
    far, near = ledger_of(tmp_path), ledger_of(tmp_path)
    far._host = "elsewhere"
    far.enter(trials)
    with far.claim(trials[0]) as lost:
        near.enter(trials)
        assert near.attempts(trials)[trials[0].name].state == "running"
        with sqlite3.connect(tmp_path / STORAGE_FILE) as base_:
            base_.execute("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'")
        near.enter(trials)
        assert near.attempts(trials)[trials[0].name].state == "waiting"
        with pytest.raises(study.TakenOver):
            lost.complete(1.0)
    assert near.attempts(trials)[trials[0].name].state == "waiting"


def test_a_worker_shows_that_it_lives(tmp_path):
    trials = plan.plan(tiny_sweep(seeds=(1,)))
    ledger = study.Ledger(f"sqlite:///{tmp_path / STORAGE_FILE}", "sweep", tmp_path, heartbeat=1)
    ledger.enter(trials)
    with ledger.claim(trials[0]), contextlib.closing(sqlite3.connect(tmp_path / STORAGE_FILE, timeout=60)) as data:
        with data:
            data.execute("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'")
        for _ in range(600):  # for a machine that does a lot else
            if not data.execute("select heartbeat from trial_heartbeats").fetchone()[0].startswith("2020"):
                return
            time.sleep(0.1)
    raise AssertionError("no heartbeat in a minute")


# --- the tables


def test_medians_spread_seeds_and_what_is_missing(runs, tmp_path):
    config = tiny_sweep()
    sweep.sweep(config, tmp_path, only=["rte/*", "mrpc/full/seed_2"])
    report = sweep.sweep(config, tmp_path, report_only=True, command="python launch/sweep.py --workdir=w")
    assert report.table.columns == ["row", "rte", "mrpc", "mean", "published mean"]
    assert report.table.rows[0][:3] == ["full", "0.2000 (0.1000 to 0.3000, n=3)", "0.2000 (n=1 of 3)"]
    assert report.table.rows[0][3:] == [pytest.approx(0.2), 0.7]
    assert report.table.rows[1] == ["low", "-0.3000 (-0.4000 to -0.2000, n=3)", "", None, None]
    assert report.missing == (
        ("mrpc, full: seed_1, seed_3 not run", "--only='mrpc/full/*'"),
        ("mrpc, low: seed_1, seed_2, seed_3 not run", "--only='mrpc/low/*'"),
    )
    text = (tmp_path / "table.md").read_text()
    assert all(f"- {what}: `python launch/sweep.py --workdir=w {flags}`\n" in text for what, flags in report.missing)
    rows = {(row["task"], row["row"]): row for row in cells(tmp_path)}
    full = rows["rte", "full"]
    assert (float(full["median"]), float(full["min"]), float(full["max"]), full["n"]) == (0.2, 0.1, 0.3, "3")
    assert full["seeds"] == "1: 0.1000, 2: 0.2000, 3: 0.3000" and float(full["MiB of weights"]) == 1.0
    assert float(full["published"]) == 0.6 and float(full["difference"]) == pytest.approx(-0.4)
    assert float(rows["mean", "full"]["difference"]) == pytest.approx(-0.5)
    assert rows["mrpc", "low"]["median"] == "" and rows["mrpc", "low"]["published"] == ""


def test_published_scores_that_do_not_compare(runs, tmp_path):
    config = tiny_sweep()
    with config.unlocked():
        del config.sweep["comparable"]  # a configuration from before there was the field
    old = sweep.sweep(config, tmp_path)
    assert "difference" in cells(tmp_path)[0] and old.table.columns[-1] == "published mean"
    report = sweep.sweep(tiny_sweep(comparable=False), tmp_path, report_only=True)
    assert report.table.columns[-1] == "published mean (not comparable)" and report.table.rows[0][-1] == 0.7
    row = cells(tmp_path)[0]
    assert row["published (not comparable)"] == "0.6" and "difference" not in row and "published" not in row
    assert "without embeddings" not in row, "trials from before it was recorded"


def test_sizes_with_and_without_embeddings(runs, tmp_path, monkeypatch):
    def entry(config, workdir):
        (workdir / "model").mkdir(parents=True)
        more = {"weight_bytes_without_embeddings": 2**19} if config.seed > 1 else {}  # the first one is older
        return {"": {"score": 0.5, "weight_bytes": 2**20, **more}}

    monkeypatch.setitem(ENTRIES, "train", entry)
    report = sweep.sweep(tiny_sweep(), tmp_path)
    full, low = cells(tmp_path)[:2]
    assert [float(full[name]) for name in ("MiB of weights", "without embeddings")] == [1.0, 0.5]
    assert float(low["MiB of weights"]) == 1.0 and low["without embeddings"] == ""
    assert report.cells.formats["without embeddings"] == ".3f"


def test_an_entry_with_several_methods_has_a_line_for_each(tmp_path, monkeypatch):
    rows = [compare.Row(method, "8", "8", score, 0.0, 1, 1.0) for method, score in (("naive", 0.5), ("PEG", 0.75))]
    monkeypatch.setattr(plan, "compare", lambda config, workdir: rows)
    monkeypatch.setattr(sweep, "check_models", lambda trials: None)
    config = get_config("results", "rte")
    report = sweep.sweep(config, tmp_path)
    assert report.table.rows == [["naive", "0.5000 (0.5000 to 0.5000, n=3)"], ["PEG", "0.7500 (0.7500 to 0.7500, n=3)"]]


# --- searches

RANGES = (
    ("phases.qat.optimizer.learning_rate", 1e-6, 1e-2, "log"),
    ("phases.qat.epochs", 0.5, 2.0),
    ("phases.qat.steps", 1, 5),
    ("phases.qat.batch_size", (8, 16)),
)


def searching(sampler, **fields):
    rows = ({"name": "full"}, {"name": "qat", "start": "full", "changes": {"recipe": ("qat",)}})
    options = dict(rows=rows, ranges=RANGES, sampler=sampler, samples=4, grid=(), columns="", seeds=(1, 2))
    return tiny_sweep(**options | fields)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_draws_for_rows_that_nothing_starts_from(runs, tmp_path, sampler):
    report = sweep.sweep(searching(sampler), tmp_path)
    drawn = [config for _, config in runs if config.recipe == ("qat",)]
    assert names(runs, tmp_path)[:4] == ["full/seed_1", "full/seed_2", "qat/sample_0/seed_1", "qat/sample_0/seed_2"]
    assert len(drawn) == 8 and len(runs) == 10
    rates = [config.phases.qat.optimizer.learning_rate for config in drawn]
    assert len(set(rates)) == 4 and all(1e-6 <= rate <= 1e-2 for rate in rates) and rates[::2] == rates[1::2]
    assert all(config.phases.qat.steps in range(1, 6) and config.phases.qat.batch_size in (8, 16) for config in drawn)
    assert all(config.model.name.endswith(f"full/seed_{config.seed}/model") for config in drawn)
    assert len(report.search.rows) == 4 and report.table.rows == [["full", "0.1500 (0.1000 to 0.2000, n=2)"]]


def test_a_search_of_a_configuration_without_rows(runs, tmp_path):
    config = with_fields(base(), ranges=(parse_range("data.seed=1:9"),), sampler="random", samples=3)
    report = sweep.sweep(config, tmp_path, trials=2)
    assert names(runs, tmp_path) == ["sample_0/seed_1000", "sample_1/seed_1000"] and len(report.search.rows) == 2
    assert report.missing == (("all: sample_2 not run", ""),)


def test_a_search_shows_the_best_first_and_survives_an_interrupt(runs, tmp_path, monkeypatch):
    seen, fails = [], [True]

    def train(config, workdir):
        if config.recipe != ("qat",):
            (workdir / "model").mkdir(parents=True)
            return {"": {"score": 0.5}}
        seen.append((workdir.parent.name, config.seed, config.phases.qat.optimizer.learning_rate))
        if config.seed == 2 and fails:
            fails.pop()
            raise KeyboardInterrupt
        return {"": {"score": config.phases.qat.optimizer.learning_rate}}

    monkeypatch.setitem(ENTRIES, "train", train)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(searching("tpe"), tmp_path)
    report = sweep.sweep(searching("tpe"), tmp_path)
    assert seen[1][:2] == seen[2][:2] == ("sample_0", 2)  # seed 1 is not repeated
    assert seen[0][2] == seen[1][2] == seen[2][2]  # and nothing is drawn anew
    rates = [row[2] for row in report.search.rows]
    assert rates == sorted(rates, reverse=True) and [
        float(row["score"].split()[0]) for row in cells(tmp_path, "search")
    ]


# --- the published tables, and real runs


BY_SIZE = ["rte", "mrpc", "stsb", "cola", "sst2", "qnli", "qqp", "mnli"]


@pytest.mark.parametrize("table", ["table1", "mixed", "peg", "main", "low_bit", "minilm"])
def test_published_tables_are_complete(table):
    config = get_config("efficient_transformer_quantization", table)
    config.lock()
    trials = plan.plan(config)
    tasks = list(dict.fromkeys(trial.labels["task"] for trial in trials))
    # By size in the tables of the paper; by the number of tokens, which is what a CPU feels, on MiniLM.
    by_tokens = ["cola", "stsb", "mrpc", "rte"]
    assert tasks == (by_tokens if table == "minilm" else BY_SIZE)
    for trial in trials:
        full = trial.row.name == "FP32" or trial.config.task == "mnli" != trial.labels["task"]
        behind_mnli = table == "minilm" and trial.labels["task"] == "rte" and trial.row.name == "FP32"
        assert full != (trial.start == f"{trial.labels['task']}/FP32")
        quantized = trial.row.entry == "quantize" or "qat" in trial.config.recipe
        assert quantized != full and bool(trial.start) == (quantized or behind_mnli)
        assert policy_from(trial.config.quant, 12) is not None
    if table == "minilm":  # three seeds of RTE begin with one model of another task, and with heads of their own
        first = [trial for trial in trials if trial.labels["task"] == "rte" and trial.row.name == "FP32"]
        assert len({trial.needs() for trial in first}) == 1 and first[2].needs()[0].endswith("seed_1000")
        assert all(trial.config.model.fresh_head for trial in first)
    assert all(score < 1 for row in config.sweep.rows for score in row["published"].values())
    if table == "table1":  # the paper's averages are those of its rows
        for row in config.sweep.rows:
            scores = dict(row["published"])
            mean = scores.pop("GLUE")
            assert len(scores) == 8 and sum(scores.values()) / 8 == pytest.approx(mean, abs=6e-5)


def test_full_precision_ptq_and_qat_from_one_model_that_was_interrupted(tiny_config, tmp_path, monkeypatch, capsys):
    config = tiny_config
    config.calibration.batches = 1
    rows = (
        dict(name="FP32"),
        dict(name="W8A8", entry="quantize", start="FP32"),
        dict(name="QAT", start="FP32", changes={"recipe": ("qat",), "quant.weight_bits": 4}),
    )
    config.save_models = False
    config.sweep = sweeping(rows=rows, seeds=(7,))
    config.log_every = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classification, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        sweep.sweep(config, tmp_path)
    before = read_metrics(tmp_path / "FP32/seed_7")
    assert [line["step"] for line in before] == [1, 2, 3, 4]
    report = sweep.sweep(config, tmp_path)
    assert read_metrics(tmp_path / "FP32/seed_7") == before  # nothing was trained twice
    assert [row[0] for row in report.table.rows] == ["FP32", "W8A8", "QAT"] and not report.missing
    full = json.loads((tmp_path / "FP32/seed_7/result_finetune.json").read_text())
    quantized = json.loads((tmp_path / "W8A8/seed_7/result.json").read_text())
    assert not quantized["full_precision"]  # is not measured again
    again = quantize(load_config(tmp_path / "W8A8/seed_7"), tmp_path / "again")
    assert again["full_precision"]["score"] == full["score"] and again["quantized"] == quantized["quantized"]
    assert json.loads((tmp_path / "QAT/seed_7/result_qat.json").read_text())["step"] == 4
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["model"]  # of FP32 alone
    sizes = [float(row["MiB of weights"]) for row in cells(tmp_path)]
    assert 0 < sizes[2] < sizes[1] < sizes[0] < 1  # 4, 8 and 32 bits
    assert sizes[0] == 4 * sum(leaf.size for leaf in load_leaves(tmp_path / "FP32/seed_7/model")) / 2**20
    rest = [float(row["without embeddings"]) for row in cells(tmp_path)]
    assert 0 < rest[2] < rest[1] < rest[0]
    full, *quantized = (whole - without for whole, without in zip(sizes, rest, strict=True))
    assert [full / tables for tables in quantized] == pytest.approx(
        [4, 8], rel=0.05
    )  # of tables: bits and scales alone
    for name in ("curves.png", "accuracy_size.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        (tmp_path / name).unlink()
    (tmp_path / "QAT/seed_7/curves.csv").write_text("something else\n")
    capsys.readouterr()
    sweep.sweep(config, tmp_path, report_only=True)
    assert (tmp_path / "curves.png").exists() and (tmp_path / "accuracy_size.png").exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "curves" in line]
    assert said[0].startswith("no curves of QAT/seed_7: ") and not any("FP32" in line for line in said)


def test_the_launcher(tiny_config, tmp_path):
    config = on_tiny(get_config("efficient_transformer_quantization", "smoke"), tiny_config)
    fields = {
        "model.name": config.model.name,
        "task": "table",
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "data.limit_train": 0,
        "data.limit_eval": 0,
    }
    command = [
        sys.executable,
        "launch/sweep.py",
        "--config=configs/efficient_transformer_quantization.py:smoke",
        f"--workdir={tmp_path}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    options = dict(cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trial FP32/seed_1000: 0/2" in done.stderr and "optuna" not in done.stderr
    assert "Missing" not in (tmp_path / "table.md").read_text()
    assert [row["row"] for row in cells(tmp_path)] == ["FP32", "W8A8 PTQ"]
    wrong = subprocess.run([*command, "--only=nothing"], **options)
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1].startswith("error: no trial")
