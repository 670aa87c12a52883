"""Files of `torch.save`, read without torch. Those in tests/golden were written by torch 2.13, in both layouts."""

import collections
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qtx.errors import UserError
from qtx.models.torch_file import load_file

GOLDEN = Path(__file__).parents[1] / "golden"
both = pytest.mark.parametrize("name", ["torch-file.bin", "torch-file-older.bin"])


@both
def test_every_tensor_is_read_as_it_was(name):
    # Of every data type; transposed, cut out, with steps, expanded, empty, without dimensions; several views of one storage.
    found, expected = load_file(GOLDEN / name), np.load(GOLDEN / "torch-file.npz")
    assert found.keys() == set(expected.files)
    for key, value in expected.items():
        assert found[key].shape == value.shape
        dtype = "bfloat16" if key == "bfloat16" else value.dtype
        assert found[key].dtype == dtype
        np.testing.assert_array_equal(found[key].astype(value.dtype), value, err_msg=key)
        assert found[key].flags.writeable and found[key].flags.c_contiguous


@both
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_truncated_file(tmp_path, name, share):
    whole = (GOLDEN / name).read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read .* truncated"):
        load_file(tmp_path / "pytorch_model.bin")


def test_damaged_bytes_of_a_storage(tmp_path):
    path = tmp_path / "damaged.bin"
    shutil.copy(GOLDEN / "torch-file.bin", path)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("torch-file/data/0")
    content = bytearray(path.read_bytes())
    content[content.index(archive_bytes(path, member.filename))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        load_file(path)


def archive_bytes(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cannot_run_code(tmp_path, zipped):
    path, made = tmp_path / "pytorch_model.bin", str(tmp_path / "made")
    write(path, collections.OrderedDict(weight=Harmful(made)), zipped)
    with pytest.raises(UserError, match="mkdir, which is no tensor"):
        load_file(path)
    assert not os.path.exists(made)


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, {"model": collections.OrderedDict()}])
@pytest.mark.parametrize("zipped", [True, False])
def test_anything_but_a_flat_state_dict(tmp_path, content, zipped):
    write(tmp_path / "other.bin", content, zipped)
    with pytest.raises(UserError, match="is no tensor|instead of a state dict"):
        load_file(tmp_path / "other.bin")


def test_another_file(tmp_path):
    (tmp_path / "other.bin").write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(UserError, match="not a file of torch.save"):
        load_file(tmp_path / "other.bin")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(UserError, match="without data.pkl"):
        load_file(tmp_path / "other.zip")


def write(path, content, zipped):
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    else:
        parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, []]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
