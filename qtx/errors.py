"""The one exception that users see, the near-miss helper behind its hints, and warnings."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that names the thing and the remedy.

    Library callers can catch it as a `ValueError`; the launchers print it without a traceback and exit with status 1.
    """


def near_misses(name: str, options: Iterable[str], count: int = 3) -> str:
    """Returns a hint such as `; did you mean 'rte' or 'sst2'?` — or the options themselves when none is close.

    Args:
      name: what the user wrote.
      options: what would have been accepted.
      count: how many suggestions at most.
    """
    options = list(dict.fromkeys(str(option) for option in options))
    close = difflib.get_close_matches(str(name), options, n=count, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(option) for option in close) + "?"
    if not options:
        return ""
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"; choose from: {shown}"


def warn(message: str) -> None:
    """Prints a warning as one line on standard error."""
    print(f"warning: {message}", file=sys.stderr)
