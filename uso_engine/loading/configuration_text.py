"""A configuration as the TOML text that `load_config` reads back to the same: only what deviates from the defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping

from uso_engine.config import EngineConfig


def configuration_text(config: EngineConfig, title: str) -> str:
    """Write a configuration.

    Args:
        config: what to write; its relative paths start at its own folder, so they are written as they are.
        title: a first line of comment.
    """
    values = config.model_dump(mode="json", exclude_defaults=True)
    return "\n".join([f"# {title}", *_table("", values)]) + "\n"


def _table(path: str, values: Mapping[str, object]) -> list[str]:
    lines = [f"{key} = {_value(value)}" for key, value in values.items() if not _is_table(value) and value is not None]
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_table(name, value)]
        elif _is_table(value):
            assert isinstance(value, list)
            for entry in value:
                lines += ["", f"[[{name}]]", *_table(name, entry)]
    return lines


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _value(value: object) -> str:
    """JSON's strings, numbers, lists and booleans are TOML's, but for one escape."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
