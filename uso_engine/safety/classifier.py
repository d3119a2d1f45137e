"""An image classifier that a safety checker asks, read from a transformers folder and run by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch

from uso_engine.conditioning.docstrings import require_docstrings
from uso_engine.conditioning.image_processor import ImageProcessor, check_processor
from uso_engine.conditioning.model_folder import require_files
from uso_engine.conditioning.offloadable_part import OffloadablePart, attention_working_bytes
from uso_engine.conditioning.pretrained import load_pretrained
from uso_engine.errors import CheckpointError
from uso_engine.weights.files.key_report import short_reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WHAT = "safety checker"


class Classifier(Protocol):
    """What a safety checker asks about one picture at a time."""

    @property
    def labels(self) -> Mapping[int, str]:
        """Name of each answer."""

    @property
    def part(self) -> OffloadablePart | None:
        """What a memory plan places; None for what is no PyTorch module."""

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Classify a picture.

        Args:
            pixels: [1, 3, height, width] float32 on the CPU, as the image processor makes them.

        Returns:
            [1, labels].
        """


class TorchClassifier:
    """A transformers image classifier.

    Args:
        model: in evaluation mode, on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.labels = labels_of(model.config)
        self.part = OffloadablePart("safety classifier", [model], (), _working_bytes(model.config))

    @torch.no_grad()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        with self.part.running():
            return self._model(pixel_values=pixels.to(self._model.device, self._model.dtype)).logits


def labels_of(config: PreTrainedConfig) -> dict[int, str]:
    """Name of each answer, as a classifier's configuration has it."""
    return {int(index): name for index, name in (config.id2label or {}).items()}


def read_settings(folder: Path) -> tuple[PreTrainedConfig, ImageProcessor]:
    """Read a classifier's configuration and image processor; nothing is downloaded.

    Args:
        folder: config.json and preprocessor_config.json.

    Raises:
        MissingFileError: the folder or a file in it is not there.
        CheckpointError: not an image classifier, or settings that make no pixels.
        BackendError: transformers cannot be imported under this Python's options.
    """
    require_docstrings()
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    # From where it is defined: the package's own name for it wants torchvision before 5.23, whatever the backend.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    require_files(folder, WHAT, [["config.json", "preprocessor_config.json"]])
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Pillow by name, so that the answer does not depend on whether torchvision is installed.
        processor: ImageProcessor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:  # of any type: transformers reads foreign files and lets through what that raises
        raise CheckpointError(f"{WHAT} in {folder} cannot be loaded: {short_reason(error)}") from error
    check_processor(processor, folder, f"{WHAT}'s image processor")
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise CheckpointError(f"{WHAT} in {folder}: a model of type {config.model_type!r} is no image classifier")
    return config, processor


def load_model(folder: Path, config: PreTrainedConfig, *, device: torch.device | str) -> PreTrainedModel:
    """Load a classifier's weights in float32.

    Args:
        folder: where they are.
        config: what `read_settings` read there.
        device: where the model goes.

    Raises:
        MissingFileError: no weights.
        CheckpointError: weights that are incomplete or do not fit.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    choices = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    # Some types have several classifiers; the configuration names the one that was trained.
    classes = cast("tuple[type[PreTrainedModel], ...]", choices if isinstance(choices, tuple) else (choices,))
    named = config.architectures or []
    model_class = next((kind for kind in classes if kind.__name__ in named), classes[0])
    tower = model_class.base_model_prefix
    return load_pretrained(
        model_class,
        folder,
        what=WHAT,
        model_types=[config.model_type],
        harmless=(f"{tower}.pooler.", f"{tower}.embeddings.mask_token"),
        dtype=torch.float32,
        device=device,
    )


def _working_bytes(config: PreTrainedConfig) -> int:
    """Activations of one image in float32; ViT-B/16's sizes stand for those that another classifier does not name."""

    def size(name: str, otherwise: int) -> int:
        found = getattr(config, name, None)
        return found if isinstance(found, int) else otherwise

    tokens = (size("image_size", 224) // size("patch_size", 16)) ** 2 + 1
    heads, width, inner = (
        size(name, otherwise)
        for name, otherwise in (("num_attention_heads", 12), ("hidden_size", 768), ("intermediate_size", 3072))
    )
    return attention_working_bytes(tokens, heads, width, inner, torch.float32.itemsize)
