"""Shared by all tests: CPU settings, and a tiny model with its tokenizer and data."""

import csv
import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the time of these tests is the compiler's, on programs that run for milliseconds. Conformance has its optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import jaxlib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Tracing makes and drops many objects, and walking through all that is kept takes seconds in the end: see `_collected`.
gc.set_threshold(100_000, 20, 20)

# The same examples every time, and no deadline: compiling is slow and machines are shared.
settings.register_profile("qtx", deadline=None, derandomize=True)
settings.load_profile("qtx")

# These emitters of code take longer than all else for small programs, and splitting small programs for a pool of threads costs
# more than it wins. XLA ends a process that gives it a flag it does not know, so the flags are for the versions they were tried
# with. Conformance does with the emitters.
EMITTERS = "xla_cpu_use_fusion_emitters"
if jaxlib.__version__.startswith("0.10.") and EMITTERS not in os.environ.get("XLA_FLAGS", ""):
    flags = (os.environ.get("XLA_FLAGS", ""), f"--{EMITTERS}=false", "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

jax.config.update("jax_default_matmul_precision", "highest")
# Many tests compile the same program, some of them in processes of their own. Small ones compile as fast as they load.
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

WORDS = "the a film was good bad great awful very quite plot actor it is not and house in city we have time".split()


# For `quant.overrides`, where a test is not about the sites: fewer of them, which compile in half the time.
FEWER_SITES = ", ".join(f"{name}=fp32" for name in "qkvpcgxihz")


def eight_devices() -> dict[str, str]:
    """Environment of a process with eight simulated devices.

    Each device takes a thread of a pool, which has as many as there are devices (jaxlib 0.10.2). One that is taken by anything
    else leaves programs in flight waiting for each other for ever; `NPROC` asks for a larger pool.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    }


def pytest_collection_modifyitems(items):
    """Conformance goes first: workers steal from the end, and its whole models are shared with the test of all of them."""
    items.sort(key=lambda item: item.path.name != "test_conformance.py")


@pytest.fixture(scope="module", autouse=True)
def _collected():
    """Behind every file garbage is collected, and what is left (compiled programs, most of it) is not looked at again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random BERT of one layer in the Hugging Face layout, with a word-level vocabulary."""
    from tests.models.hf import make_checkpoint

    return make_checkpoint(
        tmp_path_factory.mktemp("tiny") / "checkpoint", "bert", WORDS, num_layers=1, max_positions=32
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A directory with `train.csv` and `validation.csv`: columns text and label, easy to tell apart."""
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("validation", 48)):
        with open(directory / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(count):
                words = list(rng.choice(WORDS, rng.integers(2, 12)))
                words.insert(0, rng.choice(["good", "great"] if i % 2 else ["bad", "awful"]))
                writer.writerow([" ".join(words) + f" {i} {split}", "fresh" if i % 2 else "rotten"])
    return directory


@pytest.fixture
def tiny_config(tiny_checkpoint, tiny_data):
    """The default experiment on the tiny model and data."""
    return make_tiny_config(tiny_checkpoint, tiny_data)


def make_tiny_config(tiny_checkpoint: Path, tiny_data: Path):
    """Returns the default experiment on a tiny model and data, without dropout."""
    from qtx.experiments.config import base

    config = base()
    config.task = "table"
    config.model.name = str(tiny_checkpoint)
    config.data.train = str(tiny_data / "train.csv")
    config.data.validation = str(tiny_data / "validation.csv")
    config.data.max_length = 16
    config.data.buckets = config.data.eval_buckets = 1
    config.data.eval_batch_size = 16
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.calibration.batch_size = 8
    config.calibration.batches = 2
    for phase in config.phases.values():
        phase.batch_size = 8
        phase.steps = 4
        phase.optimizer.learning_rate = 1e-3
    return config
