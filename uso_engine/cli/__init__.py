"""The command line. Starts without torch: each command imports what it needs when it runs."""

from .app import main

__all__ = ["main"]
