"""A transformers model's folder, checked before transformers reads it: which files, what kind of model, weights of what kind.

Folders come from anywhere. What is said here is said in the engine's own errors, and before memory is taken for sizes that a
damaged config.json asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.weights.files.foreign_quantization import foreign_quantization
from uso_engine.weights.files.key_report import key_count, short_key, short_reason, summarise_keys
from uso_engine.weights.files.safetensors_file import SafetensorsSource

# In the order transformers prefers them; an index names the shards beside it.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_JSON_BYTES = 25_000_000
_LARGEST_SIZE = 10_000_000
_MOST_LAYERS = 1_000
# Position ids and the like are stored as whole numbers by older versions of transformers; weights never are.
_WHOLE_NUMBERS = ("position_ids", "relative_position_index", "num_batches_tracked")


def require_files(folder: Path, what: str, choices: Sequence[Sequence[str]]) -> None:
    """Check that a folder holds at least one of several sets of files.

    Args:
        folder: where to look.
        what: what to call them in the message.
        choices: sets of file names; one complete set is enough.

    Raises:
        MissingFileError: no set is complete; names the folder and what is missing.
    """
    try:
        if not folder.is_dir():
            raise MissingFileError(f"{what} not found: no folder {folder}")
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            needed = " or ".join(" and ".join(names) for names in choices)
            raise MissingFileError(f"{what} in {folder} is incomplete: needs {needed}")
    except PermissionError as error:
        raise MissingFileError(f"{what}: {folder} cannot be looked into: {error.strerror}") from error


def require_model_files(folder: Path, what: str) -> tuple[Path, ...]:
    """Check that a model's configuration and all of its weights are there.

    Args:
        folder: where to look.
        what: what to call the model in the message.

    Returns:
        The files of its weights.

    Raises:
        MissingFileError: a file is not there; names all that are missing.
        CheckpointError: an index that is damaged, or names files elsewhere.
    """
    require_files(folder, f"{what} configuration", [["config.json"]])
    require_files(folder, f"{what} weights", [[name] for name in WEIGHT_FILES])
    name = next(name for name in WEIGHT_FILES if (folder / name).is_file())
    if not name.endswith(".index.json"):
        return (folder / name,)
    index = _read_json(folder / name, what)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{what}: {folder / name} has no weight_map from names of tensors to names of files")
    names = sorted(set(shards.values()))
    # A shard lies beside its index; transformers would follow a path to anywhere.
    foreign = [shard for shard in names if Path(shard).name != shard or "\0" in shard]
    if foreign:
        raise CheckpointError(f"{what}: {folder / name} names files that are not beside it: {summarise_keys(foreign)}")
    absent = [shard for shard in names if not (folder / shard).is_file()]
    if absent:
        raise MissingFileError(f"{what} in {folder} is incomplete: missing {summarise_keys(absent)}")
    return tuple(folder / shard for shard in names)


def check_config(folder: Path, what: str, model_types: Sequence[str]) -> None:
    """Check what config.json says of a model before it is believed.

    Raises:
        CheckpointError: not readable, another kind of model, quantised weights, or sizes that no such model has.
    """
    config = _read_json(folder / "config.json", what)
    found = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or found not in model_types:
        expected = " or ".join(map(repr, model_types))
        raise CheckpointError(f"{what}: {folder} holds a model of type {short_key(repr(found))}, expected {expected}")
    entries = list(_entries(config))
    for key, value in entries:
        if key.rpartition(".")[2] == "quantization_config" and value is not None:
            method = value.get("quant_method", "a method it does not name") if isinstance(value, dict) else value
            raise CheckpointError(
                f"{what}: the weights in {folder} are quantised by {short_key(str(method))} ({key} in config.json), which is "
                "not read; use an unquantised folder: T5 can be kept in 8 bits by [precision] text_encoder"
            )
    odd = [
        f"{key} = {short_key(str(value))}"
        for key, value in entries
        if isinstance(value, int) and abs(value) > (_MOST_LAYERS if "layers" in key.rpartition(".")[2] else _LARGEST_SIZE)
    ]
    if odd:
        raise CheckpointError(f"{what}: config.json in {folder} has sizes that no such model has: {', '.join(odd[:10])}")


def check_weights(files: Sequence[Path], what: str, parameters: int) -> None:
    """Check the stored tensors by their headers; pickles have none, for them the sizes of the files have to do.

    Args:
        files: as `require_model_files` found them.
        what: what to call the model in the message.
        parameters: numbers that the model has, by its config.json.

    Raises:
        CheckpointError: a damaged file, whole numbers for weights, or far fewer numbers than the model has: transformers would
            draw the rest at random, taking the memory for it.
    """
    keys: list[str] = []
    whole: list[str] = []
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            source = SafetensorsSource(file)
        except CheckpointError as error:
            raise CheckpointError(f"{what} in {file.parent} cannot be loaded: {error}") from error
        source.close()
        keys += source.keys()
        whole += [key for key in source.keys() if not source.dtype(key).is_floating_point]  # noqa: SIM118
    whole = [key for key in whole if not key.endswith(_WHOLE_NUMBERS)]
    problems = foreign_quantization(keys)
    if problems and not foreign_quantization(keys, reads_scales=True) and len(files) == 1 and what.endswith("encoder"):
        problems.append(f"or name the file itself, whose scales are read then: {files[0]}")
    if whole:
        problems.append(f"{key_count(whole)} of another type than floating point: {summarise_keys(whole)}")
    # A number takes a byte at least. The slack leaves small models to the report that names each missing weight.
    stored = sum(file.stat().st_size for file in files)
    if parameters > stored + _LARGEST_SIZE:
        problems.append(f"config.json describes a model of {parameters} parameters, the files have {stored} bytes")
    if problems:
        raise CheckpointError(f"{what} in {files[0].parent} cannot be used: {'; '.join(problems)}")


def _entries(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Every entry of nested objects with its path, lists' numbers too; the depth is that which JSON could be read to."""
    for key, value in config.items():
        name = f"{path}{key}"
        yield name, value
        if isinstance(value, dict):
            yield from _entries(value, f"{name}.")
        elif isinstance(value, list):
            yield from ((name, entry) for entry in value)


def _read_json(path: Path, what: str) -> object:
    def refuse(text: str) -> float:
        raise ValueError(f"{text} is not a number")

    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{what}: {path} is not readable JSON: {path.stat().st_size} bytes are too many")
        content: object = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: {path} is not readable JSON: {short_reason(error)}") from error
    return content
