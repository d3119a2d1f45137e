"""Small classifiers that say which object, place and style a picture shows. They were trained on drawings only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.evaluation.drawings import KINDS, PLACE_NAMES, STYLE_NAMES

WEIGHTS = Path(__file__).parent / "classifiers.safetensors"
SIZE = 128
NEUTRAL_STYLE = "neutral"
STYLE_LABELS = (*STYLE_NAMES, NEUTRAL_STYLE)
_WIDTHS = (24, 48, 96, 128)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return y


class Classifiers(nn.Module):
    """One small convolutional network with three answers: kind of object, place, style."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        width = 3
        for i, following in enumerate(_WIDTHS):
            stages.append(nn.Conv2d(width, following, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1))
            stages.append(_Residual(following))
            width = following
        self.stages = nn.Sequential(*stages)
        counts = (len(KINDS), len(PLACE_NAMES), len(STYLE_LABELS))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, 96), nn.SiLU(), nn.Linear(96, n)) for n in counts)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classifies pictures.

        Args:
            pixels: [n, 3, 128, 128] in -1..1.

        Returns:
            Logits of kind [n, 12], place [n, 8] and style [n, 13].
        """
        x = F.silu(self.stages(pixels)).flatten(2)
        pooled = torch.cat((x.mean(2), x.amax(2)), dim=1)
        kind, place, style = (head(pooled) for head in self.heads)
        return kind, place, style


@dataclass(frozen=True)
class Reading:
    """What a picture shows, as the classifiers see it."""

    kind: str
    place: str
    style: str


def load_classifiers(path: Path = WEIGHTS) -> Classifiers:
    """Loads the shipped classifiers.

    Raises:
        MissingFileError: the file is not there.
        CheckpointError: its tensors are not these classifiers'.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingFileError(f"the classifiers' weights are not at {path}")
    model = Classifiers()
    try:
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold these classifiers: {error}") from error
    return model.eval().requires_grad_(False)


def picture_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as [1, 3, 128, 128] in -1..1, resized where it has another size."""
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_picture(model: Classifiers, picture: Image.Image) -> Reading:
    """Says what a picture shows."""
    with torch.no_grad():
        kind, place, style = (int(logits.argmax()) for logits in model(picture_pixels(picture)))
    return Reading(KINDS[kind], PLACE_NAMES[place], STYLE_LABELS[style])
