"""The command line. Starts without torch: each command imports what it needs when it runs."""

from __future__ import annotations

import sys

from .exit_codes import EXIT_INTERRUPTED


def main() -> None:
    """Entry point of ``uso-engine``; Ctrl-C ends it with one line, also while it is still importing itself."""
    try:
        from .process import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


__all__ = ["main"]
