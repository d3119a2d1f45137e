"""A process that was forked: threads stay in the parent, and what they held stays held."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class LeftBehind(Protocol):
    """Something that threads work on."""

    def leave_behind(self) -> None:
        """In the child: nobody works on it any more, and no lock of it will be given back."""


_known: weakref.WeakSet[LeftBehind] = weakref.WeakSet()


def tell_after_fork(worked_on: LeftBehind) -> None:
    """Tell this in every child that is forked from now on, before the child does anything else."""
    _known.add(worked_on)


def _tell_all() -> None:
    for worked_on in tuple(_known):
        worked_on.leave_behind()


if hasattr(os, "register_at_fork"):  # Windows forks nothing.
    os.register_at_fork(after_in_child=_tell_all)
