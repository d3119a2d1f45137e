"""Where a configuration's weights lie: a path, or a hub repository that was downloaded before. Nothing is downloaded here."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from uso_engine.errors import ConfigError, MissingFileError
from uso_engine.weights.key_report import short_key

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:[:/](?P<inside>.+))?")
_REVISION = "main"
# A repository may be called almost anything, but nobody calls one like a file of weights.
_FILE_ENDINGS = (".safetensors", ".json", ".toml")


def resolve_path(
    text: str, *, what: str, base_dir: Path | None = None, cache_dir: Path | None = None, in_config: bool = True
) -> Path:
    """Find a file or folder that a configuration or a caller names.

    Args:
        text: an absolute path, ``~/...``, a path relative to the configuration's folder, or a hub id ``org/name``,
            ``org/name:file-or-subfolder`` or ``org/name/file-or-subfolder`` that is in the local hub cache. A path that exists
            goes before a hub id.
        what: what it is for, in messages (``"transformer checkpoint"``).
        base_dir: folder of the configuration; the working directory if not given.
        cache_dir: hub cache; the hub library's own (``HF_HUB_CACHE``, ``HF_HOME``) if not given.
        in_config: whether a configuration names it, for the advice in the message.

    Returns:
        An existing path.

    Raises:
        ConfigError: the text is empty or leads out of a repository.
        MissingFileError: there is no such file or folder; the message says where it was looked for and how to get it.
    """
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{what}: expected a path or a hub id, got {text!r}")
    candidates = [local_path(text, what=what, base_dir=base_dir)]
    hub = split_hub_id(text)
    if hub is not None:
        candidates += _in_cache(*hub, what, cache_dir)
    for candidate in candidates:
        try:
            if candidate.exists():
                return candidate
        except OSError as error:
            raise MissingFileError(f"{what}: {candidate} cannot be looked at: {error.strerror or error}") from error
    places = ", ".join(map(str, candidates))
    raise MissingFileError(
        f"{what}: {short_key(text)} was not found; looked at {places}; {_advice(None if hub is None else hub[0], in_config)}"
    )


def split_hub_id(text: str) -> tuple[str, str | None] | None:
    """The repository and the file or folder in it that a text names, or None if it can only be a path.

    Args:
        text: see :func:`resolve_path`.
    """
    match = None if text.startswith((".", "~", "/")) else _HUB_ID.fullmatch(text)
    if match is None or match["repo"].endswith(_FILE_ENDINGS):
        return None
    return match["repo"], match["inside"]


def _advice(repo: str | None, in_config: bool) -> str:
    """How to get what was not found; nothing is downloaded by itself."""
    if repo is None:
        return (
            "correct the path in the configuration, or name a hub id and run `uso-engine download CONFIG`"
            if in_config
            else "correct the path, or name a hub id (org/name:file) that is in the local cache"
        )
    command = "uso-engine download CONFIG" if in_config else f"hf download {repo}"
    return f"correct the path, or if it is a hub id download it with `{command}` (nothing is downloaded by itself)"


def local_path(text: str, *, what: str, base_dir: Path | None) -> Path:
    """The path that a text names, if it is a path; see :func:`resolve_path`."""
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}: the home folder in {text!r} is not known") from error
    return path if path.is_absolute() else (base_dir or Path()).absolute() / path


def _in_cache(repo: str, inside: str | None, what: str, cache_dir: Path | None) -> list[Path]:
    """Where the hub's cache keeps (a part of) a repository: models--org--name/snapshots/<commit of refs/main>/."""
    if inside is not None and (PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts):
        raise ConfigError(f"{what}: {inside!r} leads out of the repository {repo}")
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = Path(constants.HF_HUB_CACHE)
    folder = cache_dir / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / _REVISION).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        # Not there, or not as the hub library writes it: then this is where it would be.
        commit = _REVISION
    snapshot = folder / "snapshots" / (commit if re.fullmatch(r"[\w.-]+", commit) else _REVISION)
    return [snapshot if inside is None else snapshot / inside]
