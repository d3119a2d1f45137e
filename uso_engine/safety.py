"""Unsafe pictures become black ones: an image classifier looks at every result before anybody else does.

The classifier is any transformers image classifier that has a label for what must not be shown; Falconsai/nsfw_image_detection,
which hosted services use, calls it ``nsfw``. If it cannot give a clear answer, the images are withheld with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image

from uso_engine.conditioning.image_processor import ImageProcessor, check_processor
from uso_engine.conditioning.model_folder import require_files
from uso_engine.conditioning.offloadable_part import OffloadablePart, attention_working_bytes
from uso_engine.conditioning.pretrained import load_pretrained
from uso_engine.errors import CheckpointError, SafetyError
from uso_engine.process_state import clean_process_state
from uso_engine.weights.files.key_report import short_reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_WHAT = "safety checker"
_BLACK = (0, 0, 0)


class SafetyChecker:
    """A classifier, the label that it must not give, and how sure it has to be.

    Args:
        model: a transformers image classifier in evaluation mode.
        processor: its image processor, on Pillow.
        threshold: an image is flagged when the probability of the label is at least this; from 0 to 1.
        label: name of the unsafe label, whatever its case.

    Raises:
        SafetyError: the model has no such label, or no other one.
        ValueError: a threshold outside 0 to 1.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ImageProcessor, *, threshold: float = 0.5, label: str = "nsfw"
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        self.threshold = threshold
        self._model = model
        self._processor = processor
        self.part = OffloadablePart("safety classifier", [model], (), _working_bytes(model.config))
        self._label = _label_index({int(index): name for index, name in (model.config.id2label or {}).items()}, label)

    @classmethod
    def from_folder(
        cls, folder: Path, *, threshold: float = 0.5, label: str = "nsfw", device: torch.device | str = "cpu"
    ) -> SafetyChecker:
        """Load a classifier; nothing is downloaded.

        Args:
            folder: config.json, preprocessor_config.json and weights.
            threshold: as for the class.
            label: as for the class.
            device: where it runs; it is small, and on the CPU it leaves the GPU's memory alone.

        Returns:
            The checker.

        Raises:
            MissingFileError: the folder or a file in it is not there.
            CheckpointError: not an image classifier, or its weights are incomplete or do not fit.
            SafetyError: the model has no such label.
        """
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

        # From where it is defined: the package's own name for it wants torchvision before 5.23, whatever the backend.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        require_files(folder, _WHAT, [["config.json", "preprocessor_config.json"]])
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # Pillow by name, so that the answer does not depend on whether torchvision is installed.
            processor: ImageProcessor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:  # of any type: transformers reads foreign files and lets through what that raises
            raise CheckpointError(f"{_WHAT} in {folder} cannot be loaded: {short_reason(error)}") from error
        check_processor(processor, folder, f"{_WHAT}'s image processor")
        if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise CheckpointError(f"{_WHAT} in {folder}: a model of type {config.model_type!r} is no image classifier")
        choices = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        # Some types have several classifiers; the configuration names the one that was trained.
        classes = cast("tuple[type[PreTrainedModel], ...]", choices if isinstance(choices, tuple) else (choices,))
        named = config.architectures or []
        model_class = next((kind for kind in classes if kind.__name__ in named), classes[0])
        tower = model_class.base_model_prefix
        model = load_pretrained(
            model_class,
            folder,
            what=_WHAT,
            model_types=[config.model_type],
            harmless=(f"{tower}.pooler.", f"{tower}.embeddings.mask_token"),
            dtype=torch.float32,
            device=device,
        )
        return cls(model, processor, threshold=threshold, label=label)

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        """Probability of the unsafe label for each image, from 0 to 1.

        Args:
            images: RGB, of any sizes.

        Raises:
            SafetyError: the classifier could not run, or its answer is not a number.
        """
        found: list[float] = []
        for image in images:  # One by one: an image's verdict does not depend on its company.
            try:
                found.append(self._score_of(image))
            except Exception as error:  # whatever it was, these images have not been checked
                raise SafetyError(f"the safety checker could not run, so its images are withheld: {error}") from error
        if any(score != score for score in found):
            raise SafetyError("the safety checker's answer is not a number, so its images are withheld")
        return found

    def screen(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[bool, ...]]:
        """Replace what the classifier objects to.

        Args:
            images: RGB, of any sizes.

        Returns:
            The images that may be shown, black ones of the same size in the place of others; and which were replaced.

        Raises:
            SafetyError: the classifier could not give a clear answer; no image may be shown.
        """
        flagged = tuple(score >= self.threshold for score in self.scores(images))
        if any(flagged):
            logger.info("the safety checker replaced %d of %d images", sum(flagged), len(images))
        shown = [Image.new("RGB", image.size, _BLACK) if bad else image for image, bad in zip(images, flagged, strict=True)]
        return shown, flagged

    @clean_process_state()
    @torch.no_grad()
    def _score_of(self, image: Image.Image) -> float:
        inputs = self._processor([image], return_tensors="pt")
        with self.part.running():
            logits = self._model(pixel_values=inputs["pixel_values"].to(self._model.device, self._model.dtype)).logits
        if logits.shape != (1, self._model.config.num_labels):
            raise ValueError(f"expected an answer of {self._model.config.num_labels} labels, got {list(logits.shape)}")
        return float(logits.float().softmax(-1)[0, self._label])


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


def _label_index(labels: Mapping[int, str], wanted: str) -> int:
    found = [index for index, name in labels.items() if name.lower() == wanted.lower()]
    named = ", ".join(repr(name) for name in labels.values()) or "none"
    if len(found) != 1:
        raise SafetyError(f"the safety checker needs exactly one label {wanted!r}; the model's labels are {named}")
    if len(labels) < 2:
        raise SafetyError(f"the safety checker needs a label besides {wanted!r}: with one label its probability is always 1")
    return found[0]
