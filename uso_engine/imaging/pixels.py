"""Between Pillow images and the autoencoder's pixel tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


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


def from_pixels(pixels: torch.Tensor) -> list[Image.Image]:
    """Turn the autoencoder's answer into images.

    Values are clamped to -1..1 and **truncated** to bytes, not rounded, as the reference does: 0.999 becomes 254.

    Args:
        pixels: ``[n, 3, h, w]``, any float dtype, any device.

    Returns:
        n RGB images.

    Raises:
        ValueError: another shape, or values that are not numbers.
        Source: USO, ``USOPipeline.forward``.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected pixels of shape [n, 3, h, w], got {list(pixels.shape)}")
    bad = int(pixels.isnan().sum())
    if bad:
        raise ValueError(f"{bad} of {pixels.numel()} pixel values are not numbers; a byte cannot say so")
    scaled = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    array = scaled.permute(0, 2, 3, 1).cpu().to(torch.uint8).numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]
