"""Opening the style projector's weights: USO's file, or ComfyUI's without the ``feature_embedder.`` prefix."""

from __future__ import annotations

from pathlib import Path

from uso_engine.errors import CheckpointError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.key_report import bulleted, compare_shapes, key_count, summarise_keys
from uso_engine.weights.files.tensor_source import TensorSource, shapes_of, without_prefix
from uso_engine.weights.model_shapes import module_shapes

_PREFIX = "feature_embedder."


def open_projector_checkpoint(path: Path, projector: StyleProjector) -> TensorSource:
    """Open a projector checkpoint under canonical keys, which are the file's without its prefix.

    Args:
        path: a safetensors file, or a folder with one.
        projector: whose weights it has to hold; usually on the meta device.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is no USO projector, or one of other sizes; every key at fault is in the message.
    """
    source = open_checkpoint(path)
    try:
        keys = source.keys()
        prefixed = [key for key in keys if key.startswith(_PREFIX)]
        if prefixed and len(prefixed) < len(keys):
            beside = [key for key in keys if not key.startswith(_PREFIX)]
            raise CheckpointError(f"{path}: {key_count(beside)} left over beside {_PREFIX}*: {summarise_keys(beside)}")
        view = without_prefix(source, _PREFIX if prefixed else "")
        problems = compare_shapes(module_shapes(projector), shapes_of(view))
        if problems:
            raise CheckpointError(bulleted(f"{path} does not fit the projector of the configuration", problems))
        return view
    except BaseException:
        source.close()
        raise
