"""Where a configuration's weights lie: a path, or a hub repository that was downloaded before. Nothing is downloaded here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from uso_engine.errors import ConfigError, MissingFileError
from uso_engine.local_names import has_file_scheme, local_name

from .key_report import short_key

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9][\w.-]{{0,95}}))?(?:[:/](?P<inside>.+))?")
_REVISION = "main"
# A repository may be called almost anything, but nobody calls one like a file of weights.
_FILE_ENDINGS = (".safetensors", ".json", ".toml")


def resolve_path(
    text: str, *, what: str, base_dir: Path | None = None, cache_dir: Path | None = None, in_config: bool = True
) -> Path:
    """Find a file or folder that a configuration or a caller names.

    Args:
        text: an absolute path, ``~/...``, a path relative to the configuration's folder, each perhaps after ``file:``; or a hub
            id ``org/name``, ``org/name:file-or-subfolder`` or ``org/name/file-or-subfolder`` that is in the local hub cache,
            where ``org/name@revision`` picks a branch, a tag or a commit. A path that exists goes before a hub id.
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
        candidates += _in_cache(hub, what, cache_dir)
    for candidate in candidates:
        try:
            if candidate.exists():
                return candidate
        except OSError as error:
            raise MissingFileError(f"{what}: {candidate} cannot be looked at: {error.strerror or error}") from error
    places = ", ".join(map(str, candidates))
    raise MissingFileError(f"{what}: {short_key(text)} was not found; looked at {places}; {_advice(hub, in_config)}")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, a revision of it, and a file or folder inside.

    Args:
        repository: ``org/name``.
        revision: branch, tag or commit; the main branch if none is named.
        inside: path in the repository, or None for all of it.
    """

    repository: str
    revision: str | None = None
    inside: str | None = None


def split_hub_id(text: str) -> HubId | None:
    """What a text names on the hub, or None if it can only be a path.

    Args:
        text: see :func:`resolve_path`.
    """
    match = None if text.startswith((".", "~", "/")) or has_file_scheme(text) else _HUB_ID.fullmatch(text)
    if match is None or match["repo"].endswith(_FILE_ENDINGS):
        return None
    return HubId(match["repo"], match["revision"], match["inside"])


def _advice(hub: HubId | None, in_config: bool) -> str:
    """How to get what was not found; nothing is downloaded by itself."""
    if hub is None:
        return (
            "correct the path in the configuration, or name a hub id and run `uso-engine download CONFIG`"
            if in_config
            else "correct the path, or name a hub id (org/name:file) that is in the local cache"
        )
    revision = "" if hub.revision is None else f" --revision {hub.revision}"
    command = "uso-engine download CONFIG" if in_config else f"hf download {hub.repository}{revision}"
    return f"correct the path, or if it is a hub id download it with `{command}` (nothing is downloaded by itself)"


def local_path(text: str, *, what: str, base_dir: Path | None) -> Path:
    """The path that a text names, if it is a path; see :func:`resolve_path`."""
    try:
        path = local_name(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
    return path if path.is_absolute() else (base_dir or Path()).absolute() / path


def _in_cache(hub: HubId, what: str, cache_dir: Path | None) -> list[Path]:
    """Where the hub's cache keeps (a part of) a repository: models--org--name/snapshots/<commit of the revision>/."""
    repo, inside = hub.repository, hub.inside
    revision = hub.revision or _REVISION
    if inside is not None and (PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts):
        raise ConfigError(f"{what}: {inside!r} leads out of the repository {repo}")
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = Path(constants.HF_HUB_CACHE)
    folder = cache_dir / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        # A commit has no entry there. Otherwise not downloaded, or not as the hub library writes it: this is where it would be.
        commit = revision
    snapshot = folder / "snapshots" / (commit if re.fullmatch(r"\w[\w.-]*", commit) else revision)
    return [snapshot if inside is None else snapshot / inside]
