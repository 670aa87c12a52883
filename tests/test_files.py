import os

import numpy as np
import pytest
import safetensors.numpy

from qtx import files


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "notes.md"
    files.write_text(path, "old\r\n×\n")
    assert path.read_bytes() == "old\r\n×\n".encode()

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            files.write_text(path, "new")
    assert path.read_text() == "old\n×\n"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["notes.md"]


def test_who_may_read_files_may_read_these(tmp_path):
    with files.whole_file(tmp_path / "model.safetensors") as temporary:
        safetensors.numpy.save_file({"a": np.zeros(2)}, temporary)
    (tmp_path / "any").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
