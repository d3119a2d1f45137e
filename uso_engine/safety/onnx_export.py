"""The safety classifier as one ONNX file, compared with PyTorch before it is written."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from uso_engine.conditioning.image_processor import ImageProcessor
from uso_engine.errors import BackendError, CheckpointError
from uso_engine.imaging.atomic import write_atomically
from uso_engine.process_state import clean_process_state
from uso_engine.weights.files.key_report import short_reason

from .classifier import WHAT, load_model, read_settings
from .onnx_classifier import INPUT, MADE_FROM, OUTPUT, folder_digest, open_session, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_DIFFERENCE = 1e-4
"""How far a probability may be from PyTorch's. Both compute in float32, so they differ by the order of their sums."""
_SIZES = ((1024, 1024), (576, 1024), (37, 911), (16, 16))


@dataclass(frozen=True)
class Export:
    """A file that was written.

    Args:
        pictures: how many pictures both runtimes classified.
        largest_difference: of any label's probability.
    """

    pictures: int
    largest_difference: float


class _Logits(nn.Module):
    """A transformers classifier as a function from pixels to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


@clean_process_state()
def export_classifier(folder: Path, path: Path) -> Export:
    """Export a classifier, run the file on ONNX Runtime's CPU provider, and write it if the answers are PyTorch's.

    Args:
        folder: a transformers image classifier: config.json, preprocessor_config.json and weights.
        path: where the file goes; it holds the weights, and the digest of the folder.

    Returns:
        What was compared.

    Raises:
        MissingFileError: a file of the folder is not there.
        CheckpointError: not an image classifier, one that cannot be exported, or one whose answers differ; nothing is written.
        BackendError: a package that exporting needs is not here.
        OutputError: the file cannot be written.
    """
    config, processor = read_settings(folder)
    model = _Logits(load_model(folder, config, device="cpu")).eval()
    inputs = [_pixels(processor, image) for image in _pictures()]
    shapes = {tuple(pixels.shape) for pixels in inputs}
    if len(shapes) != 1:
        found = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise CheckpointError(f"{WHAT} in {folder}: pictures of different sizes become inputs of different sizes ({found})")
    exported = _exported(model, inputs[0], folder_digest(folder), folder)
    session = open_session(exported, "the exported file", provider="cpu")
    largest = _largest_difference(model, lambda pixels: run(session, pixels), inputs)
    if not largest <= MOST_DIFFERENCE:  # NaN too
        raise CheckpointError(
            f"{WHAT} in {folder}: on ONNX Runtime a probability is {largest:.1e} from PyTorch's, where at most "
            f"{MOST_DIFFERENCE:.0e} is expected; nothing is written"
        )
    write_atomically(path, exported)
    return Export(len(inputs), largest)


def _pixels(processor: ImageProcessor, image: Image.Image) -> Tensor:
    return processor([image], return_tensors="pt")["pixel_values"].to(torch.float32)


def _pictures() -> Iterator[Image.Image]:
    """Flat colours, waves and noise, in sizes and proportions that images have."""
    random = np.random.default_rng(15)
    for width, height in _SIZES:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        waves = [127.5 + 127.5 * np.sin(x / (9 + c) + c) * np.cos(y / 15 - c) for c in range(3)]
        yield Image.fromarray(np.stack(waves, -1).astype(np.uint8))
        yield Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        yield Image.new("RGB", (width, height), tuple(int(value) for value in random.integers(0, 256, 3)))


def _exported(model: nn.Module, pixels: Tensor, digest: str, folder: Path) -> bytes:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise BackendError(f"exporting needs {package}: {short_reason(error)}; install the extra `export`") from error
    buffer = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (pixels,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props[MADE_FROM] = digest
            buffer.write(program.model_proto.SerializeToString())
    except Exception as error:  # of any type: an operator without an equivalent, a graph over protobuf's 2 GB
        raise CheckpointError(f"{WHAT} in {folder} cannot be exported: {short_reason(error)}") from error
    return buffer.getvalue()


def _largest_difference(model: nn.Module, other: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> float:
    with torch.no_grad():
        differences = [(model(pixels).softmax(-1) - other(pixels).softmax(-1)).abs().max() for pixels in inputs]
    return float(torch.stack(differences).max())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what is deprecated inside itself and on packages that are not installed."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)
