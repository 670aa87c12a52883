"""Conformance with the published projects: one test per case of the golden manifests.

The manifests (`*.json`) drive the tests, not lists of names: put other cases of the same kinds into a directory and point
`QTX_GOLDEN_DIR` at it. A test's id is PROJECT/CASE, so `-k efficient` selects a project. A kind that no handler
knows is a failure; projects that wait for an issue are expected failures that name it.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import compiler

from tests.conftest import EMITTERS

GOLDEN = Path(os.environ.get("QTX_GOLDEN_DIR") or Path(__file__).parent / "golden")

# Their tolerances are met by the code that users run, with all of the compiler's optimizations; it takes twice as long to make.
OPTIMIZED = ("efficient-transformer-quantization",)


@functools.cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(path) as file:
        return dict(file)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case: its entry in the manifest, the manifest itself, and its arrays."""

    project: str
    entry: dict[str, Any]
    manifest: dict[str, Any]
    directory: Path
    section: str

    @property
    def id(self) -> str:
        return str(self.entry.get("id") or self.entry.get("case") or self.entry.get("name"))

    @property
    def kind(self) -> str:
        return str(self.entry.get("kind") or self.entry.get("case"))

    def file(self, suffix: str = "") -> dict[str, np.ndarray]:
        return arrays(self.directory / f"{self.project}{suffix}.npz")

    def values(self, part: str) -> dict[str, Any]:
        """Arrays and plain values of a part of an entry, in the layout that has `{"key": ...}` or `{"value": ...}` for each."""
        file = self.file()
        return {n: file[v["key"]] if "key" in v else v["value"] for n, v in self.entry.get(part, {}).items()}

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: self.file()[key] for name, key in self.entry["inputs"].items()}

    def expected(self) -> dict[str, np.ndarray]:
        return {name: self.file()[key] for name, key in self.entry["expected"].items()}


def collect() -> list[Case]:
    cases = []
    for path in sorted(GOLDEN.glob("*.json")):
        manifest = json.loads(path.read_text())
        for section in ("cases", "bert"):
            entries = manifest.get(section, [])
            entries = entries.get("cases", []) if isinstance(entries, dict) else entries
            cases += [Case(path.stem, entry, manifest, path.parent, section) for entry in entries]
    return cases


CASES = collect()


@pytest.fixture(scope="module")
def optimized():
    """Numbers are compared as users get them: with the compiler's settings that other tests do without."""
    options = compiler.get_compile_options

    def of_users(*args, **kwargs):
        made = options(*args, **kwargs)
        if EMITTERS in os.environ.get("XLA_FLAGS", ""):
            made.env_option_overrides = [*made.env_option_overrides, (EMITTERS, True)]
        return made

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "get_compile_options", of_users)  # the environment is read once
            jax.config.update("jax_disable_most_optimizations", False)
            yield
            jax.config.update("jax_disable_most_optimizations", True)

    jax.clear_caches()
    return context


def test_there_are_cases():
    assert CASES, f"{GOLDEN} holds no manifests"


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.project}/{case.id}") for case in CASES])
def test_case(case: Case, optimized):
    handlers = importlib.import_module(f"tests.conformance.{case.project.replace('-', '_')}")
    assert case.kind in handlers.HANDLERS, f"no handler for kind {case.kind!r} of {case.project}"
    with optimized() if case.project in OPTIMIZED else contextlib.nullcontext():
        handlers.HANDLERS[case.kind](case)


def test_bert_cases_within_the_strict_tolerance(optimized):
    cases = [case for case in CASES if case.kind == "bert_forward"]
    if not cases:
        pytest.skip(f"{GOLDEN} holds no whole-model cases")
    from tests.conformance import bert_cases

    with optimized():
        bert_cases.check_strict_shares(cases)
