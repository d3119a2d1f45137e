"""Opening the style projector's weights: USO's file, or ComfyUI's without the ``feature_embedder.`` prefix."""

from __future__ import annotations

from pathlib import Path

from uso_engine.errors import CheckpointError
from uso_engine.weights.files.checkpoint_files import open_checkpoint
from uso_engine.weights.files.key_report import bulleted, compare_shapes, key_count, summarise_keys
from uso_engine.weights.files.tensor_source import TensorSource, shapes_of, without_prefix

_PREFIX = "feature_embedder."


def projector_shapes(
    *, vision_tokens: int, vision_width: int, style_tokens: int, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the projector by canonical key, which is the file's without its prefix.

    Args:
        vision_tokens: tokens that the vision encoder gives for an image (729).
        vision_width: their width (1152).
        style_tokens: tokens that each of the three levels gives (64).
        hidden_size: width of the transformer (3072).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for level in ("high", "mid", "low"):
        shapes[f"{level}_embedding_linear.0.weight"] = (style_tokens, vision_tokens)
        shapes[f"{level}_embedding_linear.0.bias"] = (style_tokens,)
        shapes[f"{level}_layer_norm.weight"] = (vision_width,)
        shapes[f"{level}_layer_norm.bias"] = (vision_width,)
        shapes[f"{level}_projection.weight"] = (hidden_size, vision_width)
        shapes[f"{level}_projection.bias"] = (hidden_size,)
    return shapes


def open_projector_checkpoint(
    path: Path, *, vision_tokens: int, vision_width: int, style_tokens: int, hidden_size: int
) -> TensorSource:
    """Open a projector checkpoint under canonical keys.

    Args:
        path: a safetensors file, or a folder with one.
        vision_tokens: see :func:`projector_shapes`.
        vision_width: see :func:`projector_shapes`.
        style_tokens: see :func:`projector_shapes`.
        hidden_size: see :func:`projector_shapes`.

    Raises:
        MissingFileError: it is not there.
        CheckpointError: it is no USO projector, or one of other sizes; every key at fault is in the message.
    """
    expected = projector_shapes(
        vision_tokens=vision_tokens, vision_width=vision_width, style_tokens=style_tokens, hidden_size=hidden_size
    )
    source = open_checkpoint(path)
    try:
        keys = source.keys()
        prefixed = [key for key in keys if key.startswith(_PREFIX)]
        if prefixed and len(prefixed) < len(keys):
            beside = [key for key in keys if not key.startswith(_PREFIX)]
            raise CheckpointError(f"{path}: {key_count(beside)} left over beside {_PREFIX}*: {summarise_keys(beside)}")
        view = without_prefix(source, _PREFIX if prefixed else "")
        problems = compare_shapes(expected, shapes_of(view))
        if problems:
            raise CheckpointError(bulleted(f"{path} does not fit the projector of the configuration", problems))
        return view
    except BaseException:
        source.close()
        raise
