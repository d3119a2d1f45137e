"""Docstrings, which transformers reads of its own classes when their modules are imported, and which python -OO leaves out."""

from __future__ import annotations

import importlib
import sys

from uso_engine.errors import BackendError
from uso_engine.weights.files.key_report import short_reason

_A_MODEL = "transformers.models.clip.modeling_clip"


def require_docstrings() -> None:
    """Say so before anything is loaded where transformers' models cannot be imported for want of docstrings.

    Raises:
        BackendError: Python runs with -OO, and they cannot.
    """
    if sys.flags.optimize < 2:
        return
    try:
        importlib.import_module(_A_MODEL)
    except Exception as error:  # of any type: a package that looks for its documentation raises what it likes
        raise BackendError(
            "transformers' models cannot be imported without docstrings, which python -OO (or PYTHONOPTIMIZE=2) leaves out "
            f"({short_reason(error)}); run python, or python -O"
        ) from error
