"""Finding the safetensors files of a checkpoint: one file, an index with its shards, or a folder of either."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from uso_engine.errors import CheckpointError, MissingFileError, USOError

from .gguf_file import GGUFSource, is_gguf
from .key_report import bulleted, key_count, short_key, summarise_keys
from .safetensors_file import SafetensorsSource, is_pickle_name
from .tensor_source import TensorSource

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_MAX_INDEX_BYTES = 25_000_000


class ShardedSource:
    """Several files whose keys together make one checkpoint.

    Args:
        shards: the files; closed together with this source.
        name: what messages call the whole.

    Raises:
        CheckpointError: two files hold the same key.
    """

    def __init__(self, shards: Sequence[TensorSource], name: str) -> None:
        self._shards = tuple(shards)
        self._name = name
        self._where: dict[str, TensorSource] = {}
        twice = []
        for shard in self._shards:
            for key in shard.keys():  # noqa: SIM118 - a source is not a mapping
                if key in self._where:
                    twice.append(key)
                self._where[key] = shard
        if twice:
            self.close()
            raise CheckpointError(f"{name}: more than one of its files holds {summarise_keys(twice)}")

    def keys(self) -> tuple[str, ...]:
        return tuple(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._where[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._where[key].dtype(key)

    def read(self, key: str) -> Tensor:
        return self._where[key].read(key)

    def describe(self) -> str:
        return f"{self._name} ({len(self._shards)} files)"

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def open_checkpoint(path: Path, *, subfolder: str | None = None) -> TensorSource:
    """Open a checkpoint's tensors under the names that the files give them.

    Args:
        path: a safetensors file, a ``*.safetensors.index.json``, or a folder that holds one checkpoint.
        subfolder: in a folder without weights of its own, or with several, the part to look in (``transformer``, ``vae``).

    Raises:
        MissingFileError: the path, or a shard of it, is not there; the message names it.
        CheckpointError: not one checkpoint of safetensors files.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return _open_index(path) if path.name.endswith(".json") else open_weights_file(path)
        if subfolder is not None and (path / subfolder).is_dir():
            path = path / subfolder
        return _open_folder(path)
    except USOError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path}: there is no such file or folder") from error
    except (OSError, ValueError) as error:  # also a folder that may not be looked into
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error


def open_weights_file(path: Path) -> SafetensorsSource | GGUFSource:
    """Open one file of weights, safetensors or GGUF.

    Raises:
        MissingFileError, CheckpointError: as for `open_checkpoint`.
        BackendError: a GGUF file, and the library that reads it is not installed.
    """
    return GGUFSource(path) if is_gguf(path) else SafetensorsSource(path)


def _open_folder(folder: Path) -> TensorSource:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _open_index(indexes[0])
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    numbered = [file for file in files if _SHARD.fullmatch(file.name)]
    if not indexes and numbered and len(numbered) == len(files):
        return _open_numbered(folder, files)
    if not indexes and len(files) == 1:
        return SafetensorsSource(files[0])
    if not files and not indexes:
        pickles = sorted(file.name for file in folder.iterdir() if is_pickle_name(file))
        hint = f"; {', '.join(pickles[:5])} would be pickles, which can run code: convert them" if pickles else ""
        raise MissingFileError(f"{folder}: there is no .safetensors file in this folder{hint}")
    names = ", ".join(file.name for file in [*indexes, *files])
    raise CheckpointError(f"{folder}: several checkpoints lie in this folder, name the one you want: {names}")


def _open_numbered(folder: Path, files: Sequence[Path]) -> TensorSource:
    matches = [match for match in (_SHARD.fullmatch(file.name) for file in files) if match]
    series = {(match["stem"], int(match["count"])) for match in matches}
    if len(series) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder}: several checkpoints lie in this folder, name the one you want: {names}")
    stem, count = series.pop()
    present = {int(match["number"]) for match in matches}
    missing = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1) if n not in present]
    if missing:
        raise MissingFileError(f"{folder}: {len(missing)} of {count} shards are missing: {summarise_keys(missing)}")
    return _open_all(files, str(folder))


def _open_index(index: Path) -> TensorSource:
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    # A shard lies beside its index; a path that leads elsewhere is no shard.
    foreign = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if foreign:
        raise CheckpointError(f"{index}: expected names of .safetensors files beside it, got {summarise_keys(foreign)}")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise MissingFileError(f"{index}: {len(missing)} of {len(files)} shards are missing: {summarise_keys(missing)}")
    source = _open_all([index.parent / file for file in files], str(index))
    held = set(source.keys())
    problems = []
    if absent := [key for key in weight_map if key not in held]:
        problems.append(f"{key_count(absent)} in the index but in no shard: {summarise_keys(absent)}")
    if unlisted := [key for key in source.keys() if key not in weight_map]:  # noqa: SIM118 - a source is not a mapping
        problems.append(f"{key_count(unlisted)} in a shard but not in the index: {summarise_keys(unlisted)}")
    if problems:
        source.close()
        raise CheckpointError(bulleted(f"{index} does not fit its shards", problems))
    return source


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: {index.stat().st_size} bytes are too many for an index")
        content = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index: {short_key(str(error))}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: expected an object weight_map from tensor names to file names")
    return weight_map


def _open_all(files: Sequence[Path], name: str) -> TensorSource:
    shards: list[SafetensorsSource] = []
    try:
        for file in files:
            shards.append(SafetensorsSource(file))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return ShardedSource(shards, name)
