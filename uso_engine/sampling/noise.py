"""Normal noise from a seed, the same on every device, and another for every seed.

torch's CPU generator is a Mersenne twister that starts from the lowest 32 bits of its seed and passes over the rest. Seeds that
fit those bits draw from it, as the authors do. A larger one starts the same twister the way its inventors start it from several
words (``init_by_array``), which numpy's ``RandomState`` does for a list and promises not to change:

    RandomState([seed % 2**32, seed // 2**32]).standard_normal(shape), rounded to float32

For a fixed number of words that start can be computed back to them step by step, so no two of these seeds share a state.
Source: M. Matsumoto, T. Nishimura, mt19937ar.c, 2002; NumPy enhancement proposal 19.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

_WORD = 2**32


def draw_normal(shape: Sequence[int], seed: int) -> Tensor:
    """Draw independent standard normal numbers.

    Args:
        shape: of the result.
        seed: from 0 to 2^64 - 1.

    Returns:
        float32, on the CPU.

    Raises:
        ValueError: a seed outside that range, or not a whole number.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < _WORD**2:
        raise ValueError(f"a seed of noise must be a whole number from 0 to 2^64 - 1, got {seed!r}")
    if seed < _WORD:
        generator = torch.Generator("cpu").manual_seed(int(seed))
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    drawn = np.random.RandomState([int(seed) % _WORD, int(seed) // _WORD]).standard_normal(tuple(shape))
    return torch.from_numpy(drawn).to(torch.float32)
