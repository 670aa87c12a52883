"""Finding and reading files; most of it is tested where it is used."""

import bz2
import gzip

import pytest

from qtx.data.reading import first_file, read_lines
from qtx.errors import UserError


def test_a_last_line_needs_no_line_end(tmp_path):
    for text in ("a\n\nb", "a\n\nb\n"):
        (tmp_path / "x").write_text(text)
        assert read_lines(tmp_path / "x") == ["a", "", "b"]
    (tmp_path / "x").write_text("a\n\n")
    assert read_lines(tmp_path / "x") == ["a", ""], "an empty last line is a line"


def test_compressed_lines(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress("Grüße\n".encode()))
    (tmp_path / "x.bz2").write_bytes(bz2.compress("Grüße\n".encode()))
    assert read_lines(tmp_path / "x.gz") == read_lines(tmp_path / "x.bz2") == ["Grüße"]
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"a" * 100)[:-4])
    with pytest.raises(UserError, match=r"cannot read .*x\.gz.*cut short"):
        read_lines(tmp_path / "x.gz")


def test_the_first_name_wins_and_plain_files_before_compressed_ones(tmp_path):
    for name in ("b.gz", "c"):
        (tmp_path / name).write_text("")
    assert first_file(tmp_path, ["a", "b", "c"]) == tmp_path / "b.gz"
    (tmp_path / "b").write_text("")
    assert first_file(tmp_path, ["a", "b", "c"]) == tmp_path / "b"
    assert first_file(tmp_path, ["a"]) is None
