"""Where configurations lie: those that come with the engine, by name, and files."""

from __future__ import annotations

import difflib
from importlib.resources import files
from os import PathLike
from pathlib import Path

from .errors import ConfigError, MissingFileError
from .local_names import local_name
from .weights.model_sizes import shown


def config_folder() -> Path:
    """Where the named configurations lie: inside the installed package, or beside it in a checkout."""
    package = Path(str(files("uso_engine")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_configs() -> list[str]:
    """Names of the configurations that come with the engine."""
    return sorted(path.stem for path in config_folder().glob("*.toml"))


def locate_config(name_or_path: str | Path) -> Path:
    """The file of a configuration.

    Args:
        name_or_path: a name from `list_configs`, or a path to a TOML file.

    Raises:
        MissingFileError: no such name or file; the nearest name is named.
        ConfigError: an argument of another type.
    """
    known = list_configs()
    if isinstance(name_or_path, str) and name_or_path in known:
        return config_folder() / f"{name_or_path}.toml"
    if not isinstance(name_or_path, str | PathLike):
        raise ConfigError(f"expected a configuration's name or the path of a TOML file, got {type(name_or_path).__name__}")
    try:
        path = local_name(name_or_path) if isinstance(name_or_path, str) else Path(name_or_path).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # the home of a user whom nobody knows
        raise MissingFileError(f"configuration {shown(str(name_or_path))}: {error}") from error
    hint = suggestion(str(name_or_path), known) or f"; known names: {', '.join(known)}"
    raise MissingFileError(f"no configuration named {shown(str(name_or_path))} and no such file{hint}")


def suggestion(key: str, known: list[str]) -> str:
    """The end of a message about a name that nobody knows: the nearest that is known, if one is near.

    Args:
        key: what was written.
        known: what could have been meant.
    """
    near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
