"""Between Pillow images and the autoencoder's pixel tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from uso_engine.errors import NumericsError


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into pixels from -1 to 1.

    Args:
        image: RGB.

    Returns:
        ``[1, 3, h, w]`` float32 on the CPU; 0 becomes -1 and 255 becomes 1.

    Raises:
        ValueError: the image is not RGB.
        Source: torchvision's ``to_tensor`` followed by ``* 2 - 1``, operation by operation.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode}")
    array = torch.from_numpy(np.array(image))  # a copy: Pillow's own buffer is read-only
    return array.permute(2, 0, 1).contiguous().to(torch.float32).div(255).mul(2).sub(1).unsqueeze(0)


def from_pixels(pixels: torch.Tensor, *, latents: torch.Tensor | None = None, tier: str = "") -> list[Image.Image]:
    """Turn the autoencoder's answer into images.

    Values are clamped to -1..1 and **truncated** to bytes, not rounded, as the reference does: 0.999 becomes 254.

    Args:
        pixels: ``[n, 3, h, w]``, any float dtype, any device.
        latents: what they were decoded from, for the message where they are not numbers.
        tier: in which the latents were computed, for the same message.

    Returns:
        n RGB images.

    Raises:
        ValueError: another shape.
        NumericsError: values that are not numbers; says whether the latents were.
        Source: USO, ``USOPipeline.forward``.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected pixels of shape [n, 3, h, w], got {list(pixels.shape)}")
    bad = int(pixels.isnan().sum())
    if bad:
        raise NumericsError(f"{bad} of {pixels.numel()} pixel values are not numbers{_cause(latents, tier)}")
    scaled = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    array = scaled.permute(0, 2, 3, 1).cpu().to(torch.uint8).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def _cause(latents: torch.Tensor | None, tier: str) -> str:
    """Which stage gave what is not a number, and what to try."""
    if latents is None:
        return ""
    bad = int(latents.numel() - latents.isfinite().sum())
    if not bad:
        return (
            '; the latents are numbers, so the autoencoder made them: try [autoencoder] decode_dtype = "float32", '
            "and `uso-engine check` for its file"
        )
    return (
        f"; {bad} of {latents.numel()} latent values are not either, so the denoising steps made them"
        f"{f', in tier {tier}' if tier else ''}: "
        "try tier bf16 or float32, a smaller guidance_scale or true_cfg_scale, and no LoRAs of your own; "
        "`uso-engine verify` says whether this machine computes what it should"
    )
