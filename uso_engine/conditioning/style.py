"""Style image to style tokens: SigLIP's hidden states at three depths, projected to the transformer's width."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from uso_engine.conditioning.cache import hash_image, hash_tensor, tensor_bytes
from uso_engine.conditioning.docstrings import require_docstrings
from uso_engine.conditioning.image_processor import check_processor
from uso_engine.conditioning.model_folder import require_files
from uso_engine.conditioning.offloadable_part import OffloadablePart, attention_working_bytes
from uso_engine.conditioning.pretrained import fingerprint, load_pretrained
from uso_engine.conditioning.single_file import SIGLIP, load_encoder_file
from uso_engine.conditioning.storage import load_conditioning, save_conditioning
from uso_engine.errors import CheckpointError
from uso_engine.model.projector import StyleProjector
from uso_engine.weights.files.key_report import short_reason

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

logger = logging.getLogger(__name__)

_KIND = "style tokens"
# Counted from the end of [embeddings, after layer 1, …, after the last layer]: the projector's high, mid and low level.
LEVELS = (-2, -11, -20)


@dataclass(frozen=True, eq=False)
class StyleTokens:
    """What the transformer sees of one style image.

    Args:
        tokens: [3n, C] in the projector's dtype, the high level's n tokens first.
        image_hash: hash of the image and of the encoder that read it.
        encoder: identity of that encoder.
    """

    tokens: Tensor
    image_hash: str
    encoder: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return tensor_bytes(self.tokens)

    def save(self, path: str | Path) -> None:
        """Write the tokens to a safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        metadata = {"image_hash": self.image_hash, "encoder": self.encoder}
        save_conditioning(Path(path), _KIND, {"tokens": self.tokens}, metadata)

    @classmethod
    def load(cls, path: str | Path, *, width: int, encoder: str | None = None) -> StyleTokens:
        """Read tokens that ``save`` wrote.

        Args:
            path: the file.
            width: C of the transformer.
            encoder: identity of the encoder in use; another one in the file is logged as a warning, for the width fits.

        Raises:
            MissingFileError: no such file.
            CheckpointError: another kind of file, or made for a model of another width.
        """
        path = Path(path)
        tensors, metadata = load_conditioning(path, _KIND, ("tokens",))
        tokens = tensors["tokens"]
        if tokens.ndim != 2 or tokens.shape[1] != width:
            shape = list(tokens.shape)
            raise CheckpointError(f"{path} holds style tokens of shape {shape}; this model takes [tokens, {width}]")
        made_by = metadata.get("encoder", "")
        if encoder is not None and made_by != encoder:
            logger.warning("%s was made by another style encoder (%s) than the one in use (%s)", path, made_by, encoder)
        return cls(tokens, metadata.get("image_hash", ""), made_by)


def built_in_processor(side: int) -> SiglipImageProcessorPil:
    """SigLIP's own preprocessing: bicubic to a square, from -1 to 1. Source: its preprocessor_config.json."""
    from transformers import SiglipImageProcessorPil

    half = [0.5, 0.5, 0.5]
    return SiglipImageProcessorPil(
        do_resize=True,
        size={"height": side, "width": side},
        resample=3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=half,
        image_std=half,
    )


def scale_style(tokens: Tensor, scale: float) -> Tensor:
    """Strengthen or weaken style tokens by a factor.

    Every block normalises its input, so a factor does not scale the style's influence proportionally: it sets how far the
    blocks can move the style tokens from what the image gave. 1 changes nothing, not a bit.

    Args:
        tokens: [..., C].
        scale: at least 0; 0 leaves tokens without content.

    Raises:
        ValueError: negative or not finite.
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"style_scale must be a finite number of at least 0, got {scale}")
    return tokens if scale == 1 else tokens * scale


def load_vision_tower(folder: str | Path, *, device: torch.device | str) -> tuple[SiglipVisionModel, SiglipImageProcessorPil]:
    """Load a whole vision tower and its image processor; arguments and errors as for `StyleEncoder.from_folder`."""
    require_docstrings()
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    folder = Path(folder)
    if folder.is_file():
        vision = cast("SiglipVisionModel", load_encoder_file(SIGLIP, folder, dtype=torch.float32, device=device))
        side = vision.config.image_size
        assert isinstance(side, int)  # siglip_config says so
        return vision, built_in_processor(side)
    require_files(folder, "vision encoder's image processor", [["preprocessor_config.json"]])
    vision = load_pretrained(
        SiglipVisionModel,
        folder,
        what="vision encoder",
        model_types=("siglip_vision_model", "siglip"),
        harmless=SIGLIP.harmless,
        dtype=torch.float32,
        device=device,
    )
    try:
        # Pillow's by name: the plain class changes its answer when torchvision is installed.
        processor = SiglipImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any type: transformers reads a foreign file and lets through what that raises
        raise CheckpointError(f"the image processor in {folder} cannot be loaded: {short_reason(error)}") from error
    check_processor(processor, folder, "vision encoder's image processor")
    return vision, processor


class StyleEncoder:
    """SigLIP's vision tower, without its last layer and head, and the projector.

    The hidden states that are used stop before the last layer, so that layer and the pooling head are never run; the rest
    computes what the whole model would, bit for bit.

    Args:
        vision: in evaluation mode; at least 19 layers.
        projector: for this tower's patches and width.
        processor: resizes and normalises images; without it only preprocessed pixels can be encoded.

    Raises:
        CheckpointError: tower, projector and processor do not belong together.
    """

    def __init__(
        self, vision: SiglipVisionModel, projector: StyleProjector, processor: SiglipImageProcessorPil | None = None
    ) -> None:
        config = vision.config
        # Some releases of transformers 5 hold the tower one level deeper.
        tower = getattr(vision, "vision_model", vision)
        self._embeddings: nn.Module = tower.embeddings
        depth = len(tower.encoder.layers)
        problems = []
        if depth + 1 < -min(LEVELS):
            problems.append(f"the vision tower has {depth} layers, hidden state {min(LEVELS)} needs {-min(LEVELS) - 1}")
        side, patch = config.image_size, config.patch_size
        if not isinstance(side, int) or not isinstance(patch, int):
            raise CheckpointError(f"the vision tower must see squares, got image size {side} and patch size {patch}")
        patches = (side // patch) ** 2
        if (patches, config.hidden_size) != (projector.vision_tokens, projector.vision_width):
            problems.append(
                f"the vision tower gives {patches} tokens of width {config.hidden_size}, "
                f"the projector takes {projector.vision_tokens} of width {projector.vision_width}"
            )
        size = {} if processor is None else dict(processor.size)
        if processor is not None and (size.get("height"), size.get("width")) != (side, side):
            problems.append(f"the image processor gives {size}, the vision tower takes {side} pixels square")
        if problems:
            raise CheckpointError(f"the style encoder's parts do not fit: {'; '.join(problems)}")
        self._layers = nn.ModuleList(tower.encoder.layers[: depth + 1 + max(LEVELS)])
        self._wanted = [depth + 1 + level for level in LEVELS]
        self._projector = projector
        self._processor = processor
        self.image_side = side
        self.width = projector.hidden_size
        self.token_count = 3 * projector.style_tokens
        settings = processor.to_json_string() if processor is not None else ""
        self.identity = fingerprint([self._embeddings, self._layers, projector], settings)
        working = attention_working_bytes(
            patches,
            int(config.num_attention_heads),
            int(config.hidden_size),
            int(config.intermediate_size),
            next(self._embeddings.parameters()).element_size(),
        )
        modules = [self._embeddings, self._layers, projector]
        self._part = OffloadablePart("SigLIP and projector", modules, list(self._layers), working)

    @classmethod
    def from_folder(cls, folder: str | Path, projector: StyleProjector, *, device: torch.device | str = "cpu") -> StyleEncoder:
        """Load the vision tower (in float32, as the authors run it) and its image processor from a local folder.

        Args:
            folder: a SigLIP vision model, or a whole SigLIP, in the Hugging Face layout; or a file that holds one, for which
                the processor is built in.
            projector: on the same device.
            device: where the tower runs.

        Raises:
            MissingFileError: a file is not there; says which.
            CheckpointError: files that do not fit the model or each other.
        """
        vision, processor = load_vision_tower(folder, device=device)
        return cls(vision, projector, processor)

    @property
    def parts(self) -> tuple[OffloadablePart, ...]:
        """The tower with its projector, as a part of a memory plan."""
        return (self._part,)

    def to(self, device: torch.device | str) -> StyleEncoder:
        """Move the tower and the projector."""
        self._embeddings.to(device)
        self._layers.to(device)
        self._projector.to(device)
        return self

    def hash_source(self, source: Image | Tensor) -> str:
        """Hash a style image as read by this encoder: the cache's key."""
        return hash_tensor(source, self.identity) if isinstance(source, Tensor) else hash_image(source, self.identity)

    @torch.no_grad()
    def encode(self, source: Image | Tensor) -> StyleTokens:
        """Turn a style image into tokens.

        Args:
            source: an RGB image of any size, or pixels already resized and normalised, [1, 3, s, s] in -1..1.

        Returns:
            The tokens, [3n, C], on the encoder's device in the projector's dtype.

        Raises:
            ValueError: pixels of another shape, or an image where there is no image processor.
        """
        pixels = source if isinstance(source, Tensor) else self.preprocess(source)
        expected = (1, 3, self.image_side, self.image_side)
        if tuple(pixels.shape) != expected:
            raise ValueError(f"style pixels must have shape {list(expected)}, got {list(pixels.shape)}")
        with self._part.running():
            weight = next(self._embeddings.parameters())
            states = [self._embeddings(pixels.to(weight.device, weight.dtype))]
            for layer in self._layers:
                states.append(layer(states[-1], None))
            tokens = self._projector([states[index] for index in self._wanted])[0]
        return StyleTokens(tokens, self.hash_source(source), self.identity)

    def preprocess(self, image: Image) -> Tensor:
        """Resize and normalise a style image. Needs no model: any thread may do it while another one encodes.

        Args:
            image: RGB, of any size.

        Returns:
            [1, 3, s, s] in -1..1, float32 on the CPU.

        Raises:
            ValueError: this encoder has no image processor.
        """
        if self._processor is None:
            raise ValueError("this style encoder was made without an image processor: give it preprocessed pixels")
        return torch.from_numpy(self._processor(image.convert("RGB"), return_tensors="np")["pixel_values"])
