"""Starting from a picture instead of noise.

    latent = (1 - sigma) * picture + sigma * noise

Of n steps the last ceil(n * strength) are taken, and sigma is the schedule's where they begin: at strength 1 it is the
schedule's first, which for FLUX is 1, noise alone. The noise is what the run would have started from.

Source: SDEdit (Meng et al. 2021) for the idea; rectified flow's straight line from picture to noise for the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .latents import draw_noise


def last_steps(sigmas: Sequence[float], strength: float) -> tuple[float, ...]:
    """The end of a schedule that a strength leaves.

    Args:
        sigmas: n + 1 falling numbers.
        strength: over 0 and at most 1; the share of the steps.

    Returns:
        The last ceil(n * strength) + 1 of them: at least two, for at least one step.
    """
    steps = len(sigmas) - 1
    # Less than a millionth of a step is the rounding of 0.1 * 30, which is a little over 3.
    taken = max(1, math.ceil(steps * strength - 1e-6))
    return tuple(sigmas[steps - taken :])


def noised(picture: Tensor, sigma: float, seeds: Sequence[int]) -> Tensor:
    """A picture's latent on the line to each seed's noise.

    Args:
        picture: [16, h / 8, w / 8].
        sigma: from 0, the picture, to 1, the noise.
        seeds: one for each image.

    Returns:
        [n, 16, h / 8, w / 8], float32 on the CPU.
    """
    height, width = picture.shape[-2:]
    clean = picture.to("cpu", torch.float32)
    return torch.stack([(1 - sigma) * clean + sigma * draw_noise(8 * width, 8 * height, seed) for seed in seeds])
