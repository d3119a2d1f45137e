"""What a command does where torchrun has started several of it: one makes the engine, the others compute with that one."""

from __future__ import annotations

import os


def is_torchrun() -> bool:
    """Whether torchrun has started this process; asked without importing torch."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def follows(config: str, device: str | None, attention: str) -> bool:
    """Whether this process was one of the others, in which case it has computed with the first until its engine was closed.

    Args:
        config: a configuration's name or TOML file.
        device: as the command was given it.
        attention: as the command was given it.

    Raises:
        USOError: as for `uso_engine.follow_if_not_first`.
    """
    if not is_torchrun():
        return False
    from uso_engine.loading.torchrun import follow_if_not_first

    return follow_if_not_first(config, device=device, attention=attention)
