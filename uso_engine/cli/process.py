"""The command line as a process: its streams, its signals, and its end."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from .console import fail, interrupts, said_by_the_system
from .exit_codes import EXIT_FAILED


def run() -> None:
    """Run the command that the arguments name and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name may hold bytes that are no text, and a terminal may lack letters that a prompt has.
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(_flushed(_exit_code()))


def _exit_code() -> int:
    """What the command ends with; every way of ending it is a number here."""
    try:
        Path.cwd()
    except OSError:  # Relative paths mean nothing then, and a library of PyTorch's ends the process with a word about itself.
        return fail("the working directory is not there any more; change to another one").exit_code
    try:
        from .app import app

        app(prog_name="uso-engine")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_FAILED if error.code else 0
    except KeyboardInterrupt:
        raise
    except OSError as error:  # Help and version are printed outside the commands, which catch their own.
        return fail(said_by_the_system(error)).exit_code
    except Exception:
        interrupts.check()
        raise
    return 0


def _flushed(code: int) -> int:
    """Write out what is still buffered: the interpreter would do it after the last chance to say that it failed."""
    # The work is done: an interrupt now would only show a traceback of the interpreter's own shutdown.
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if sys.stdout is not None:  # None: it was closed before the command started.
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            fail(said_by_the_system(error))
        return code or EXIT_FAILED
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    interrupts.seen = True
    raise KeyboardInterrupt
