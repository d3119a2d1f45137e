"""Everything a step's time, guidance and pooled text decide, computed before the first step.

FLUX modulates every block by vectors that depend only on (time, guidance, pooled text). All three are known when a request is
admitted, so the vectors of all steps and all blocks are one table, made by one matrix product per block. The linears that make
it are 27 % of the model's parameters and are not needed afterwards.

Table layout, [steps, vectors, C]: 12 vectors per double block (image: shift, scale, gate before attention; shift, scale, gate
before the MLP; then the same for text), 3 per single block (shift, scale, gate), 2 for the final layer (shift, scale).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from uso_kernels.whole_vectors import silu

from .linear import Linear

DOUBLE_VECTORS = 12
SINGLE_VECTORS = 3
FINAL_VECTORS = 2
TIME_WIDTH = 256
LONGEST_PERIOD = 10_000.0


def sinusoidal_embedding(values: Tensor) -> Tensor:
    """Embed scalars (times between 0 and 1, guidance scales) as cosines and sines.

    Args:
        values: [N]. Their dtype is part of the result: a bfloat16 time is multiplied by 1000 in bfloat16, as the authors do.

    Returns:
        [N, TIME_WIDTH] in values' dtype.
    """
    half = TIME_WIDTH // 2
    # Constants in float64, rounded once: float32 `exp` differs between vector libraries by 5.7e-7, and 1000 times a guidance
    # scale makes 1e-5 of every tensor of that. Cosines and sines of the angles likewise.
    exponents = torch.arange(half, dtype=torch.float64) / half
    frequencies = torch.exp(-math.log(LONGEST_PERIOD) * exponents).to(torch.float32)
    angles = ((1000.0 * values)[:, None].float() * frequencies.to(values.device)).double()
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(values.dtype)


class Embedder(nn.Module):
    """Two layers with SiLU between, for time, guidance and pooled text."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_features, hidden_size)
        self.out_layer = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_features] to [N, C]."""
        return self.out_layer(silu(self.in_layer(x)))


class ModulationLinear(nn.Module):
    """The linear that turns a conditioning vector into a block's modulation vectors."""

    def __init__(self, hidden_size: int, vectors: int) -> None:
        super().__init__()
        self.lin = Linear(hidden_size, vectors * hidden_size)

    def forward(self, activated: Tensor) -> Tensor:
        """Map SiLU of the conditioning vectors, [N, C], to [N, vectors, C]."""
        return self.lin(activated).unflatten(-1, (-1, activated.shape[-1]))
