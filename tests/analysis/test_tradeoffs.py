import pytest

from qtx.analysis.tradeoffs import Point, Series, plot_costs, plot_series, plot_tradeoff, read_series
from qtx.errors import UserError

CELLS = """lambda,task,row,median,min,max,n
0.5,mr,1 bit,0.8,0.7,0.9,3
0.0,mr,1 bit,0.6,0.5,0.7,3
0.5,mr,2 bits,,,,0
0.5,rte,1 bit,0.1,0.1,0.1,1
"""


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_lines_of_a_sweep(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(CELLS)
    found = read_series(path, "lambda", task="mr")
    assert found == {"1 bit": Series((0.5, 0.0), (0.8, 0.6), (0.7, 0.5), (0.9, 0.7))}
    plot_series(found | {"plain": Series([0, 1], [0.6, 0.7])}, tmp_path / "lambda.png")
    assert is_png(tmp_path / "lambda.png")
    for arguments, named in (
        (("lamda",), "'lambda'"),
        (("row",), "no axis of numbers"),
        (("lambda", "tusk"), "'task'"),
    ):
        with pytest.raises(UserError, match=named):
            read_series(path, *arguments)
    with pytest.raises(UserError, match="run the sweep first"):
        read_series(path, "lambda", task="cola")
    with pytest.raises(UserError, match="no .*nothing.csv"):
        read_series(tmp_path / "nothing.csv", "lambda")
    with pytest.raises(UserError, match="none of them empty"):
        plot_series({"a": Series([], [])}, path)


def test_scores_against_costs(tmp_path):
    points = [Point("a", "1 bit", 10, 0.8), Point("a", "2 bits", 20, 0.9), Point("b", "1 bit", 11, 0.7)]
    for log in (True, False):
        plot_tradeoff(points, tmp_path / f"{log}.png", "MiB", log=log)
        assert is_png(tmp_path / f"{log}.png")
    with pytest.raises(UserError, match="b, full costs 0"):
        plot_tradeoff([Point("b", "full", 0, 1.0)], tmp_path / "no.png", "MiB")
    with pytest.raises(UserError, match="no models"):
        plot_tradeoff([], tmp_path / "no.png", "MiB")


def test_costs_side_by_side(tmp_path):
    plot_costs({"bytes": (8.0, 1.0), "latency": (1.0, 1.5)}, tmp_path / "costs.png", ("full", "quantized"))
    assert is_png(tmp_path / "costs.png")
    with pytest.raises(UserError, match="'bytes' is 0"):
        plot_costs({"bytes": (8.0, 0.0)}, tmp_path / "costs.png", ("full", "quantized"))
    with pytest.raises(UserError, match="no costs"):
        plot_costs({}, tmp_path / "costs.png", ("full", "quantized"))
