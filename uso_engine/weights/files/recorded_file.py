"""A file as it was when something was made from it: where it lay, its size, its content's hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from uso_engine.errors import CheckpointError, MissingFileError


@dataclass(frozen=True)
class RecordedFile:
    """A file or folder as it was when something was made from it.

    Args:
        path: as the configuration resolved it.
        bytes: of all its safetensors files.
        sha256: of the one file; of all their names and hashes where there are several.
        weight: a LoRA's strength; None for other files.
    """

    path: str
    bytes: int
    sha256: str
    weight: float | None = None

    @classmethod
    def of(cls, path: Path, weight: float | None = None) -> RecordedFile:
        """Record a file, or a folder of safetensors files, as it is now; reads all of it.

        Raises:
            MissingFileError: nothing there.
            CheckpointError: it cannot be read.
        """
        hashes = []
        try:
            files = _weight_files(path)
            size = sum(file.stat().st_size for file in files)
            for file in files:
                with file.open("rb") as stream:
                    hashes.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not files:
            raise MissingFileError(f"{path}: there is no such file, or no safetensors file in it")
        if len(hashes) == 1:
            return cls(str(path), size, hashes[0][1], weight)
        return cls(str(path), size, hashlib.sha256(repr(hashes).encode()).hexdigest(), weight)

    def locate(self, folder: Path | None) -> Path | None:
        """Where it is now: at its path, or under its name in another folder; None where it is at neither."""
        path = Path(self.path)
        candidates = [path] if folder is None else [path, folder / path.name]
        return next((candidate for candidate in candidates if _exists(candidate)), None)

    def is_same(self, path: Path) -> bool:
        """Whether a file is the recorded one: by content where it is there, else by name."""
        if not _exists(path):
            return Path(self.path).name == path.name
        now = RecordedFile.of(path, self.weight)
        return (now.bytes, now.sha256) == (self.bytes, self.sha256)

    def __str__(self) -> str:
        strength = "" if self.weight is None else f" at weight {self.weight:g}"
        return f"{self.path}{strength} ({self.bytes} bytes, sha256 {self.sha256[:12]}…)"


def _weight_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or sorted(path.glob("transformer/*.safetensors"))
    if path.name.endswith(".json"):
        return sorted(path.parent.glob("*.safetensors"))
    return [path] if path.is_file() else []


def _exists(path: Path) -> bool:
    """Whether a path can be looked at; one in a folder that is closed to us is as good as gone."""
    try:
        return path.exists()
    except OSError:
        return False
