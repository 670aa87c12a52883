"""What all launchers share: flags, one-line errors, several hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from qtx.errors import UserError


def _fail(message: object) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def define_flags(default_config: str, default_workdir: str | None) -> None:
    """Defines `--config`, `--workdir`, `--data_dir` and `--multihost`.

    Args:
      default_config: path of a config file, relative to the repository, with an argument after a colon.
      default_workdir: run directory; None makes the flag required.
    """
    root = Path(__file__).parents[2]
    config_flags.DEFINE_config_file(
        "config", str(root / default_config), "Config file, with its argument after a colon: configs/finetune.py:rte"
    )
    flags.DEFINE_string("workdir", default_workdir, "Run directory; a run that was interrupted goes on there.")
    flags.DEFINE_string("data_dir", None, "Directory of data sets; else config.data.dir, else $QTX_DATA_DIR.")
    flags.DEFINE_bool("multihost", False, "Join the other hosts of this job before anything else (jax.distributed).")
    if default_workdir is None:
        flags.mark_flag_as_required("workdir")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(list(argv))
    except (UserError, AttributeError, TypeError, ValueError, OSError) as error:
        _fail(str(error).strip().replace("\n", " "))


def launch(entry: Callable[[ConfigDict, str], Any]) -> None:
    """Parses the flags and calls `entry(config, workdir)`; a `UserError` ends as one line and exit status 1."""

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; flags start with --")
        # Orbax tells of every step of a save at INFO.
        logging.set_verbosity(logging.WARNING)
        if flags.FLAGS.multihost:
            jax.distributed.initialize()
        config = flags.FLAGS.config
        if flags.FLAGS.data_dir:
            config.data.dir = flags.FLAGS.data_dir
        config.lock()
        try:
            entry(config, flags.FLAGS.workdir)
        except UserError as error:
            _fail(error)

    app.run(main, flags_parser=_parse)
