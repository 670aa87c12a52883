"""Measuring on a fake clock: ratios, speed-ups, memory, bars."""

import dataclasses

from qtx.experiments.measuring import COLUMNS, Bar, Comparison, Memory, Timing, measure, rows_of


class FakeClock:
    """A clock that programs move."""

    def __init__(self):
        self.now = 0.0
        self.order = ""

    def __call__(self):
        return self.now

    def program(self, name, seconds):
        steps = iter(seconds)

        def run():
            self.now += next(steps)
            self.order += name

        return run


def _comparison(bar=None, memory=None):
    return Comparison(lambda: None, lambda: None, "ours", "theirs", 3, bar, memory)


def _cells(row):
    return dict(zip(COLUMNS, row, strict=True))


def test_measure_takes_turns_and_leaves_the_first_run_out():
    clock = FakeClock()
    timing = measure(clock.program("A", [100, 2, 3, 8]), clock.program("B", [100, 1, 2, 4]), 3, clock)
    assert clock.order == "ABABABAB"
    assert timing == Timing((2.0, 3.0, 8.0), (1.0, 2.0, 4.0))


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    timing = Timing((2.0, 3.0, 8.0), (1.0, 3.0, 2.0))  # ratios 2, 1, 4; the ratio of the medians would be 1.5
    (row,) = rows_of("pair", _comparison(Bar(1.10)), timing)
    cells = _cells(row)
    assert (cells["A seconds"], cells["B seconds"], cells["ratio"]) == (3.0, 2.0, 2.0)
    assert (cells["spread"], cells["bar"], cells["holds"]) == ("1.000-4.000", "at most 1.1", "NO")


def test_a_speed_up_is_the_other_way_round():
    (row,) = rows_of("pair", _comparison(Bar(10, at_least=True)), Timing((1.0, 1.0, 1.0), (12.0, 9.0, 11.0)))
    cells = _cells(row)
    assert (cells["ratio"], cells["bar"], cells["holds"]) == (11.0, "at least 10", "yes")


def test_a_speed_up_needs_no_bar():
    comparison = dataclasses.replace(_comparison(), speedup=True)
    cells = _cells(rows_of("pair", comparison, Timing((1.0, 2.0), (4.0, 8.0)))[0])
    assert (cells["ratio"], cells["bar"], cells["holds"]) == (4.0, "", "")


def test_memory_has_a_row_of_its_own_and_no_bar_gives_no_verdict():
    memory = Memory(3 * 2**20, 2 * 2**20, "ours", "theirs", Bar(1.25))
    time, space = map(_cells, rows_of("pair", _comparison(memory=memory), Timing((1.0,), (1.0,))))
    assert (time["bar"], time["holds"]) == ("", "")
    assert (space["row"], space["A"], space["B"]) == ("pair memory", "ours, 3.0 MiB", "theirs, 2.0 MiB")
    assert (space["ratio"], space["holds"], space["A seconds"]) == (1.5, "NO", None)


def test_bars_include_their_limit():
    assert Bar(1.1).holds(1.1) and not Bar(1.1).holds(1.11)
    assert Bar(10, at_least=True).holds(10) and not Bar(10, at_least=True).holds(9.9)
