"""How far two pictures are apart: PSNR over all channels, SSIM of the luma, and the share of pixels whose colour is another."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 11
_SIGMA = 1.5
# sRGB's primaries in XYZ, D65, IEC 61966-2-1.
_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
OTHER_COLOUR = 5.0
"""A distance in CIELAB at which two colours beside each other are told apart at a glance; 2.3 is just noticeable."""


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures in decibels; infinite if they are the same.

    Raises:
        ValueError: pictures of different sizes.
    """
    x, y = _pixels(a, b)
    error = float((x - y).square().mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two pictures' luma, 1 if they are the same.

    Args:
        a: at least 11 pixels on each side.
        b: of the same size.

    Raises:
        ValueError: pictures of different sizes, or smaller than the window.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, with its constants and Gaussian window; windows inside the picture only.
    """
    if min(a.size) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} pixels on each side, got {a.size}")
    x, y = (_luma(pixels) for pixels in _pixels(a, b))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def coloured_otherwise(a: Image.Image, b: Image.Image, distance: float = OTHER_COLOUR) -> float:
    """The share of two pictures' pixels whose colours are further apart than a distance in CIELAB.

    Args:
        a: RGB, taken as sRGB.
        b: of the same size.
        distance: Euclidean, in CIELAB (CIE 1976).

    Raises:
        ValueError: pictures of different sizes.
    """
    x, y = (_lab(pixels) for pixels in _pixels(a, b))
    return float(((x - y).norm(dim=-1) > distance).double().mean())


def _lab(pixels: Tensor) -> Tensor:
    """CIELAB [H, W, 3] of sRGB [H, W, 3] in 0..255, white at D65."""
    share = pixels / 255
    linear = torch.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_XYZ, dtype=pixels.dtype)
    xyz = linear @ matrix.T / matrix.sum(1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-1)


def _pixels(a: Image.Image, b: Image.Image) -> tuple[Tensor, Tensor]:
    if a.size != b.size:
        raise ValueError(f"pictures of different sizes cannot be compared: {a.size} and {b.size}")
    x, y = (torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float64)) for image in (a, b))
    return x, y


def _luma(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma [H, W] of [H, W, 3]."""
    return pixels @ torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype)


def _blurred(x: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(x[None, None], weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1))[0, 0]
