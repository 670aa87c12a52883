"""Augmenting a task's data by command, and training on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qtx import models
from qtx.errors import UserError
from qtx.experiments import augment as module
from qtx.experiments.augment import augment, default_settings
from qtx.experiments.classification import load_dataset
from qtx.models.masked_lm import MASKED_LM
from qtx.nn import BertConfig
from tests.conftest import WORDS
from tests.models.hf import make_tokenizer
from tests.nn import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(tmp_path):
    """A tiny random masked language model that lacks one of the words, and a file of vectors that has it."""
    family, tokenizer = MASKED_LM["bert"], make_tokenizer("bert", [*WORDS[:-1], "ti", "##me"])
    config = BertConfig(len(tokenizer), 16, 1, 2, 32, max_positions=32)
    params = tiny.random_params(family.module(config=config))
    models.save(tmp_path / "lm", family, config, params, tokenizer)
    rng = np.random.default_rng(0)
    lines = [" ".join([word, *map(str, rng.standard_normal(4))]) for word in ("time", "hour", "clock", "day")]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    return {"masked_lm": str(tmp_path / "lm"), "vectors": str(tmp_path / "vectors.txt")}


def test_augment_and_train_on_it(tiny_config, parts, tmp_path, monkeypatch):
    workdir, train = tmp_path / "run", Path(tiny_config.data.train)
    flags = [f"--{name}={value}" for name, value in parts.items()] + ["--copies=3", "--candidates=4"]
    flags += [f"--config.data.{name}={tiny_config.data[name]}" for name in ("train", "validation")]
    done = subprocess.run(
        [sys.executable, "launch/augment.py", f"--workdir={workdir}", "--config.task=table", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((workdir / "augmentation.json").read_text())
    assert record["examples"] == 96 and record["copies"] == 3 and record["probability"] == 0.4
    assert "augment table: 96/96" in done.stderr and str(record["rows"]) in done.stdout
    assert sorted(path.name for path in workdir.iterdir()) == [
        "augmentation.json",
        "config.json",
        "report.csv",
        "report.md",
        "train_aug.tsv",
    ]

    originals = load_dataset(tiny_config).splits["train"]
    tiny_config.data.augmented, tiny_config.data.limit_train = str(workdir), 10
    with pytest.raises(UserError, match="data.limit_train is 10, but data.augmented holds"):
        load_dataset(tiny_config)
    tiny_config.data.limit_train = 0
    found = load_dataset(tiny_config).splits
    augmented = found["train"]
    assert len(augmented) == record["rows"] > 2 * len(originals) and len(found["validation"]) == 48
    # The number in each text tells which example it is of: digits are never replaced.
    of_text = {text.split()[-2]: (text, label) for text, label in zip(*originals.texts, originals.labels, strict=True)}
    known = set(WORDS) | {"ti", "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "hour", "clock", "day", "train"}
    seen = set()
    for text, label in zip(*augmented.texts, augmented.labels, strict=True):
        words = text.split()
        original, its_label = of_text[words[-2]]
        assert label == its_label and len(words) == len(original.split()) and set(words[:-2]) <= known
        seen |= set(words) - set(original.split())
    assert seen & {"hour", "clock", "day"} and seen & set(WORDS)

    # Done already: nothing is computed again. Another seed is another file.
    tiny_config.data.augmented, tiny_config.data.train = "", str(train)
    settings = default_settings(tiny_config, copies=3, candidates=4)
    before = (workdir / "train_aug.tsv").read_bytes()

    def fails(*args, **kwargs):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_augmented", fails)
        assert augment(tiny_config, workdir, **parts, settings=settings) == record
        with pytest.raises(AssertionError, match="computed again"):
            augment(tiny_config, workdir, **parts, settings=default_settings(tiny_config, copies=3, seed=1))
    assert (workdir / "train_aug.tsv").read_bytes() == before


def test_copies_of_a_task_are_the_published_ones(tiny_config):
    tiny_config.task = "mnli"
    assert default_settings(tiny_config).copies == 10 and default_settings(tiny_config, copies=2).copies == 2
    tiny_config.task = "film_reviews"
    assert (default_settings(tiny_config).copies, default_settings(tiny_config).seed) == (30, tiny_config.seed)
