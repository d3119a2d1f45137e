"""The command line. Starts without torch: each command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys

from .exit_codes import EXIT_INTERRUPTED


def main() -> None:
    """Entry point of ``uso-engine``; Ctrl-C ends it with one line, also while it is still importing itself."""
    if os.environ.get("COLUMNS", "").strip() == "0":
        # What containers and editors say where they know no width; taken as a width, nothing would be printed, not even errors.
        del os.environ["COLUMNS"]
    try:
        from .process import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


__all__ = ["main"]
