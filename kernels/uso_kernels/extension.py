"""Optional packages with compiled parts: why one cannot be used here, in one sentence.

Such a package may be absent, or there and built for another CUDA, torch or system library. Then its import fails with whatever
its loader raises, or succeeds without its compiled part; either is a reason and never a crash.
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap

LOAD_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, NameError, TypeError, ValueError)
"""What importing a package built for another system raises: a missing library is an OSError, an operator that is registered
twice a RuntimeError, a name that moved an AttributeError."""


def extension_failure(module: str) -> str | None:
    """Import a module, and say why that fails; None where it does not.

    Args:
        module: dotted name of a module of the package, such as "xformers.ops".
    """
    package = module.partition(".")[0]
    try:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        importlib.import_module(module)
    except LOAD_ERRORS as error:
        return f"{package} cannot be loaded: {one_line(error)}"
    return None


def one_line(error: Exception) -> str:
    """The beginning of an error's message without its line breaks, or its type where it says nothing."""
    return textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
