"""What cannot be sent to another process, and says so."""

from __future__ import annotations

from typing import NoReturn


class ProcessBound:
    """Something with threads and weights of its own: it is neither pickled nor copied."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} stays in its process, with its threads and weights; "
            "send its .config, which pickles, and load one there with from_config"
        )
