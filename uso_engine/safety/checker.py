"""Unsafe pictures become black ones: an image classifier looks at every result before anybody else does.

The classifier is any transformers image classifier that has a label for what must not be shown; Falconsai/nsfw_image_detection,
which hosted services use, calls it ``nsfw``. If it cannot give a clear answer, the images are withheld with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from uso_engine.conditioning.image_processor import ImageProcessor
from uso_engine.conditioning.offloadable_part import OffloadablePart
from uso_engine.errors import SafetyError
from uso_engine.process_state import clean_process_state

from .classifier import Classifier, TorchClassifier, load_model, read_settings
from .onnx_classifier import OnnxClassifier, Provider

logger = logging.getLogger(__name__)

_BLACK = (0, 0, 0)


class SafetyChecker:
    """A classifier, the label that it must not give, and how sure it has to be.

    Args:
        classifier: what is asked about each image.
        processor: its image processor, on Pillow.
        threshold: an image is flagged when the probability of the label is at least this; from 0 to 1.
        label: name of the unsafe label, whatever its case.

    Raises:
        SafetyError: the classifier has no such label, or no other one.
        ValueError: a threshold outside 0 to 1.
    """

    def __init__(
        self, classifier: Classifier, processor: ImageProcessor, *, threshold: float = 0.5, label: str = "nsfw"
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
        self.threshold = threshold
        self._classifier = classifier
        self._processor = processor
        self._label = _label_index(classifier.labels, label)

    @classmethod
    def from_folder(
        cls, folder: Path, *, threshold: float = 0.5, label: str = "nsfw", device: torch.device | str = "cpu"
    ) -> SafetyChecker:
        """Load a classifier that PyTorch runs; nothing is downloaded.

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
        config, processor = read_settings(folder)
        model = load_model(folder, config, device=device)
        return cls(TorchClassifier(model), processor, threshold=threshold, label=label)

    @classmethod
    def from_onnx(
        cls, path: Path, folder: Path, *, threshold: float = 0.5, label: str = "nsfw", provider: Provider = "cpu", gpu: int = 0
    ) -> SafetyChecker:
        """Load a classifier that ONNX Runtime runs.

        Args:
            path: a file that `uso_engine.safety.onnx_export` wrote.
            folder: what it was made from.
            threshold: as for the class.
            label: as for the class.
            provider: what ONNX Runtime runs it on.
            gpu: number of the GPU, for "cuda".

        Returns:
            The checker.

        Raises:
            MissingFileError: the file, the folder or a file in it is not there.
            CheckpointError: another file, or one that was made from another classifier.
            BackendError: ONNX Runtime is not here, or has no such provider.
            SafetyError: the model has no such label.
        """
        config, processor = read_settings(folder)
        classifier = OnnxClassifier.open(path, folder, config, provider=provider, gpu=gpu)
        return cls(classifier, processor, threshold=threshold, label=label)

    @property
    def part(self) -> OffloadablePart | None:
        """What a memory plan places; None where PyTorch does not run it."""
        return self._classifier.part

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
        logits = self._classifier.logits(self._processor([image], return_tensors="pt")["pixel_values"])
        count = len(self._classifier.labels)
        if logits.shape != (1, count):
            raise ValueError(f"expected an answer of {count} labels, got {list(logits.shape)}")
        return float(logits.float().softmax(-1)[0, self._label])


def _label_index(labels: Mapping[int, str], wanted: str) -> int:
    found = [index for index, name in labels.items() if name.lower() == wanted.lower()]
    named = ", ".join(repr(name) for name in labels.values()) or "none"
    if len(found) != 1:
        raise SafetyError(f"the safety checker needs exactly one label {wanted!r}; the model's labels are {named}")
    if len(labels) < 2:
        raise SafetyError(f"the safety checker needs a label besides {wanted!r}: with one label its probability is always 1")
    return found[0]
