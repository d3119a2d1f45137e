"""Output sizes: the hosted names for them, sizes of one's own, and the limits on those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from uso_engine.imaging.resize import GRID

SizePreset: TypeAlias = Literal["square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]

_PRESET_SIZES: dict[SizePreset, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
PRESETS: tuple[SizePreset, ...] = get_args(SizePreset)


@dataclass(frozen=True)
class ImageSize:
    """A size of one's own.

    Args:
        width: in pixels, as asked for.
        height: in pixels, as asked for.
    """

    width: int
    height: int

    def on_grid(self) -> tuple[int, int]:
        """Width and height rounded down to multiples of 16."""
        return self.width // GRID * GRID, self.height // GRID * GRID


def preset_size(preset: SizePreset) -> ImageSize:
    """Width and height behind a name."""
    return ImageSize(*_PRESET_SIZES[preset])


def preset_of(size: ImageSize) -> SizePreset | None:
    """The name of a size, if it has one."""
    return next((name for name, pair in _PRESET_SIZES.items() if pair == (size.width, size.height)), None)


@dataclass(frozen=True)
class SizeLimits:
    """Which output sizes are accepted.

    Args:
        min_side: the least width and height in pixels, for sizes of one's own.
        max_side: the most width and height in pixels.
        max_pixels: the most pixels of an image.

    Raises:
        ValueError: limits that contradict each other.
    """

    min_side: int = 256
    max_side: int = 2048
    max_pixels: int = 4_194_304

    def __post_init__(self) -> None:
        if not GRID <= self.min_side <= self.max_side:
            raise ValueError(f"expected {GRID} <= min_side <= max_side, got {self.min_side} and {self.max_side}")
        if self.max_pixels < self.min_side**2:
            raise ValueError(f"max_pixels {self.max_pixels} is less than the smallest image has, {self.min_side**2}")

    def problems(self, size: ImageSize) -> list[str]:
        """What is wrong with a size, as sentences that start with the field; empty if it is accepted."""
        wrong = [
            f"image_size.{side} must be from {self.min_side} to {self.max_side}, got {value}"
            for side, value in (("width", size.width), ("height", size.height))
            if not self.min_side <= value <= self.max_side
        ]
        return wrong or self._pixel_problems(size)

    def preset_problems(self, preset: SizePreset) -> list[str]:
        """What is wrong with a named size: it may be too large for a small model, never too small."""
        size = preset_size(preset)
        if max(size.width, size.height) > self.max_side:
            return [f"image_size {preset!r} is {size.width}x{size.height}; a side may have at most {self.max_side} pixels"]
        return self._pixel_problems(size)

    def _pixel_problems(self, size: ImageSize) -> list[str]:
        width, height = size.on_grid()
        if width * height <= self.max_pixels:
            return []
        return [f"image_size {width}x{height} is {width * height:,} pixels; at most {self.max_pixels:,} are accepted"]

    def json_schema(self) -> dict[str, object]:
        """The JSON schema of ``image_size`` under these limits."""
        side = {"type": "integer", "minimum": self.min_side, "maximum": self.max_side}
        own = {
            "type": "object",
            "properties": {"width": side, "height": side},
            "required": ["width", "height"],
            "additionalProperties": False,
            "description": f"Rounded down to multiples of {GRID}; at most {self.max_pixels} pixels.",
            # JSON Schema has no keyword for a product.
            "x-max-pixels": self.max_pixels,
        }
        return {"anyOf": [{"type": "string", "enum": [name for name in PRESETS if not self.preset_problems(name)]}, own]}
