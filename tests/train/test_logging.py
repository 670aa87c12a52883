import io
import json
import math

import pytest
import rich.console
from tensorboardX.proto import event_pb2

from qtx.train.logging import MetricsLog, progress, read_metrics, running_means


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(path):
    """Reads the events of a file in TFRecord framing: length (8), its checksum (4), data, its checksum (4)."""
    data, offset = path.read_bytes(), 0
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 8], "little")
        yield event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length])
        offset += length + 16


def board(workdir):
    """Returns (step, tag, value) as TensorBoard shows them: what a later session has purged is left out."""
    scalars = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        for event in events(path):
            if event.HasField("session_log"):
                scalars = [scalar for scalar in scalars if scalar[0] < event.step]
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return scalars


def test_scalars_go_to_both_places(tmp_path):
    with MetricsLog(tmp_path / "run") as log:
        log.write(1, {"loss": 0.5, "lr": 0.25})
        assert lines(tmp_path / "run") == [{"step": 1, "loss": 0.5, "lr": 0.25}], "a line is readable at once"
        log.write(2, {"accuracy": 0.75}, prefix="eval/")
    assert lines(tmp_path / "run")[1] == {"step": 2, "eval/accuracy": 0.75}
    assert board(tmp_path / "run") == [(1, "loss", 0.5), (1, "lr", 0.25), (2, "eval/accuracy", 0.75)]


def test_opening_again_appends(tmp_path):
    for step in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.write(step, {"loss": float(step)})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert board(tmp_path) == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_rewind_forgets_what_came_later(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with MetricsLog(tmp_path) as log:
        log.rewind(3)
        log.write(4, {"loss": 40.0})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert [(step, value) for step, _, value in board(tmp_path)] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize(
    "tail, kept", [('{"step": 2, "lo', [1]), ('{"step": 2, "loss": 2.0}', [1, 2]), ("\udcff\udcfe", [1]), ("", [1])]
)
def test_a_torn_last_line_is_repaired(tmp_path, tail, kept):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(tail)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1], "a reader does not wait for the repair"
    with MetricsLog(tmp_path) as log:
        log.write(3, {"loss": 3.0})
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 3]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "lr": 1.0}]
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["lr"] == 1.0
    assert math.isinf(board(tmp_path)[1][2])


def test_misuse_is_an_error(tmp_path):
    assert read_metrics(tmp_path / "absent") == []
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match="'step'"):
            log.write(1, {"step": 2.0})
    with pytest.raises(ValueError, match="closed"):
        log.write(1, {"loss": 2.0})
    assert lines(tmp_path) == []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_and_tell_all(capsys):
    clock = Clock()
    with progress(100, "train: rte", examples_per_step=32, clock=clock) as shown:
        for step in range(1, 91):
            clock.now += 0.5
            shown.update(step, **({"loss": 1 / step} if step % 10 == 0 else {}))
    captured = capsys.readouterr()
    assert captured.out == ""
    printed = captured.err.splitlines()
    assert len(printed) == 6, "at 0.5 s, then every 10 s, then at the end"
    assert printed[0].startswith("train: rte: 1/100 (1%)")
    assert printed[1] == "train: rte: 21/100 (21%)  64 examples/s  loss 0.05  0:00:40 left"
    assert printed[-1] == "train: rte: 90/100 (90%)  64 examples/s  loss 0.01111  0:00:05 left"


def test_a_resumed_run_does_not_count_old_steps_as_speed(capsys):
    clock = Clock()
    with progress(1000, "train", start=900, clock=clock) as shown:
        for step in range(901, 1001):
            clock.now += 0.2
            shown.update(step)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "901/1000 (90%)" in first
    assert last == "train: 1000/1000 (100%)  5 steps/s"
    with progress(1000, "train", start=900, clock=clock):
        pass
    assert capsys.readouterr().err == "train: 900/1000 (90%)\n"


def test_a_loop_that_raises_still_says_how_far_it_came(capsys):
    with pytest.raises(RuntimeError), progress(10, "train", clock=Clock()) as shown:
        shown.update(3, loss=1.0)
        shown.update(4, loss=2.0)
        raise RuntimeError
    assert capsys.readouterr().err.splitlines()[-1] == "train: 4/10 (40%)  loss 2"


def test_a_terminal_gets_a_bar():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})
    clock = Clock()
    with progress(4, "train [rte]", console=console, clock=clock) as shown:
        for step in range(1, 5):
            clock.now += 1.0
            shown.update(step, loss=0.125)
    text = console.file.getvalue()
    for part in ("train [rte]", "━", "4/4", "1 steps/s", "loss 0.125", "0:00:00"):
        assert part in text
    assert "(100%)" not in text, "no plain lines next to the bar"


def test_running_means_weigh_batches_by_their_examples():
    assert running_means([1.0, 0.0, 4.0], [1, 3, 4]).tolist() == [1.0, 0.25, 2.125]
    assert running_means([], []).size == 0
