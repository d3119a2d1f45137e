"""What the autoencoder keeps alive: all at once, in strips, or in strips with what lies between layers on the host.

Counted with every live tensor, as other formulas here (tests/test_strips.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cut = Literal["whole", "strips", "host strips"]
"""How a picture is decoded."""

CUTS: tuple[Cut, ...] = ("whole", "strips", "host strips")
"""From the fastest to the smallest. The last two give the same bits; the first differs from them by rounding."""

STRIP_PIXELS = 32768
"""Pixels of a strip: 32 rows of 1024. What is computed from it fills a GPU, and takes 32 MiB a tensor in FLUX's decoder."""

_CHUNK_BYTES = 16 << 20
"""What normalisations and sums take in float32 and float64, a chunk of a strip at a time."""

_STRIPS_ON_DEVICE, _STRIPS_OF_HOST, _STRIPS_OF_ATTENTION = 3.2, 4.2, 3.2
"""Strips alive at once: a convolution's input and output, and a plane's strip that has not gone yet; from the host one more."""


@dataclass(frozen=True)
class CoderSizes:
    """Live tensors of the autoencoder's encoder or decoder; all zero where there is none.

    Args:
        whole: bytes per pixel of the picture, all at once.
        kept: bytes per pixel of what lies between layers while strips are computed.
        attention: bytes per pixel of the keys and values.
        strip: bytes per pixel of a strip.
        moved: bytes per pixel copied between host and device, either way, where planes lie on the host.
    """

    whole: float = 0
    kept: float = 0
    attention: float = 0
    strip: float = 0
    moved: float = 0

    def scaled(self, factor: float) -> CoderSizes:
        """The same of a coder with so many times as many channels."""
        return CoderSizes(*(factor * size for size in (self.whole, self.kept, self.attention, self.strip, self.moved)))

    def peak_bytes(self, cut: Cut, pixels: int, strip_pixels: int = STRIP_PIXELS) -> int:
        """Bytes alive at most while a picture is encoded or decoded; one no larger than a strip is not cut."""
        if cut == "whole" or pixels <= strip_pixels:
            return int(self.whole * pixels)
        strip = self.strip * strip_pixels
        if cut == "strips":
            return int(self.kept * pixels + _STRIPS_ON_DEVICE * strip) + _CHUNK_BYTES
        attending = self.attention * pixels + _STRIPS_OF_ATTENTION * strip
        return int(max(attending, _STRIPS_OF_HOST * strip)) + _CHUNK_BYTES

    def moved_bytes(self, cut: Cut, pixels: int, strip_pixels: int = STRIP_PIXELS) -> int:
        """Bytes copied between host and device for one picture."""
        return int(self.moved * pixels) if cut == "host strips" and pixels > strip_pixels else 0


FLUX_ENCODER = CoderSizes(whole=2572, kept=1024, attention=96, strip=512, moved=12_400)
FLUX_DECODER = CoderSizes(whole=3073, kept=1024, attention=96, strip=1024, moved=19_100)
"""Of FLUX's autoencoder in float32."""
