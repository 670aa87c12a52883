"""What all launchers share: flags, one-line errors, several hosts."""

from __future__ import annotations

import os
import platform
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Only its tokenizers and configurations are used; it would tell every user that torch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from qtx.errors import UserError, near_misses
from qtx.experiments.config import unknown_field
from qtx.experiments.heap import keep_freed_memory


def _fail(error: object) -> NoReturn:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A config file that raises reaches us as a formatted traceback; its last line is what the author wrote.
    text = lines[-1].split("Error: ", 1)[-1] if any("Traceback" in line for line in lines) else " ".join(lines)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


def _define_flags(default_config: str, default_workdir: str | None) -> None:
    root = Path(__file__).parents[2]
    _check_config(sys.argv, str(root / default_config))
    flags.DEFINE_string("workdir", default_workdir, "Run directory; a run that was interrupted goes on there.")
    flags.DEFINE_string("data_dir", None, "Directory of data sets; else config.data.dir, else $QTX_DATA_DIR.")
    flags.DEFINE_bool(
        "multihost", False, "Join the other hosts of this job; TPU pods, Slurm and the like are detected."
    )
    flags.DEFINE_string("coordinator", None, "ADDRESS:PORT of the first host, where --multihost detects nothing.")
    flags.DEFINE_integer("num_hosts", None, "How many hosts there are, with --coordinator.")
    flags.DEFINE_integer("host", None, "The number of this host, from 0, with --coordinator.")
    if default_workdir is None:
        flags.mark_flag_as_required("workdir")
    config_flags.DEFINE_config_file(
        "config",
        str(root / default_config),
        "Config file, with its argument after a colon (configs/finetune.py:rte). --config.FIELD=VALUE changes a field; "
        "qtx/experiments/config.py lists all fields, and what each means.",
    )


def fields_given(argv: Sequence[str]) -> list[str]:
    """Returns the dotted names of the fields of the configuration that a command line changes."""
    return [found[1] for argument in argv if (found := re.match(r"--?config\.([\w.]+)(=|$)", argument))]


def _check_config(argv: Sequence[str], config: str) -> None:
    """Raises a `UserError` if there is no such config file (`config` by default) or no such field in it."""
    names = fields_given(argv)
    for number, argument in enumerate(argv):
        if re.match(r"--?config(=|$)", argument):
            config = argument.partition("=")[2] if "=" in argument else "".join(argv[number + 1 : number + 2])
    path, _, setting = config.partition(":")
    if not os.path.isfile(path):
        near = near_misses(path, sorted(map(str, Path(path).parent.glob("*.py"))))
        raise UserError(f"--config={config}: there is no file {path}{near}")
    if not names:
        return
    fields = runpy.run_path(path)["get_config"](*[setting] * (":" in config))
    for name in names:
        if problem := unknown_field(fields, name):
            raise UserError(f"--config.{name}: {problem}")


def keep_compiled(directory: str | Path) -> None:
    """Keeps compiled programs in a directory, for this process and those that follow; call it before the first one.

    One below it for each machine: code that is compiled for a processor may not run on another. Does nothing if JAX has such a
    cache already (`JAX_COMPILATION_CACHE_DIR`).
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(Path(directory) / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(entry: Callable[[], Any], define: Callable[[], None]) -> None:
    """Parses the flags and calls `entry()`; bad input ends as one line and exit status 1.

    Args:
      entry: what to run.
      define: defines its flags.
    """

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags start with --")
        # Orbax tells of every step of a save at INFO, and of every save that the next one waits for at WARNING.
        logging.set_verbosity(logging.ERROR)
        try:
            entry()
        except UserError as error:
            _fail(error)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(list(argv))
        except Exception as error:  # whatever a config file raises, too
            _fail(error)

    keep_freed_memory()
    others = set(flags.FLAGS)
    try:
        define()
    except Exception as error:  # a config file and its overrides are read when the flag is defined
        _fail(error)
    for name in set(flags.FLAGS) - others:  # --help shows the flags of the main module alone
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.run(main, flags_parser=parse)


def launch(entry: Callable[[ConfigDict, str], Any], default_config: str, default_workdir: str | None = None) -> None:
    """`run` for an experiment: calls `entry(config, workdir)`.

    Args:
      entry: what to run.
      default_config: path of a config file, relative to the repository.
      default_workdir: run directory; None makes `--workdir` required.
    """

    def main() -> None:
        if flags.FLAGS.multihost:
            try:
                jax.distributed.initialize(flags.FLAGS.coordinator, flags.FLAGS.num_hosts, flags.FLAGS.host)
            except (ValueError, RuntimeError) as error:
                _fail(f"--multihost: {error}; give --coordinator, --num_hosts and --host where no cluster is detected.")
            if jax.process_index() > 0:
                sys.stdout = open(os.devnull, "w")  # the first host speaks for all
        config = flags.FLAGS.config
        config.lock()
        if flags.FLAGS.data_dir:
            config.data.dir = flags.FLAGS.data_dir
        entry(config, flags.FLAGS.workdir)

    run(main, lambda: _define_flags(default_config, default_workdir))
