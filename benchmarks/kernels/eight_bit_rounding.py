"""How far 8-bit attention is off when nothing but rounding is wrong, computed from its operands.

Every rounding is taken as noise of its own, as large as half a step is on average:

    q, k in int8      a step s = max|row| / 127, noise s / sqrt(12); of a score: ds^2 = (s_q^2 |k|^2 + s_k^2 |q|^2) / 12 D
    p, v in e4m3      noise r = 2^-4 / sqrt(3) / sqrt(2) of the number: half a step of its binade, numbers spread evenly in it
    out               sum over keys of p^2 ((v - out)^2 ds^2 + 2 r^2 v^2), and the rounding of both results to their type
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _of_type(bits: int) -> float:
    """Relative noise of numbers that keep so many bits behind the first."""
    return 2.0 ** -(bits + 1) / math.sqrt(3) / math.sqrt(2)


_E4M3 = _of_type(3)
_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def rounding_of_attention(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The relative error, of one sequence by both norms, that rounding to 8 bits makes probable.

    Args:
        q: [L_q, H, D].
        k: [L, H, D].
        v: [L, H, D].
    """
    noise = size = 0.0
    for head in range(q.shape[1]):
        queries, keys, values = (x[:, head].double() for x in (q, k, v))
        dim = queries.shape[1]
        weights = (queries @ keys.t() / math.sqrt(dim)).softmax(1)
        out = weights @ values
        step_q, step_k = (x.abs().amax(1).square() / 127**2 / 12 for x in (queries, keys))
        of_score = torch.outer(step_q, keys.square().sum(1)) + torch.outer(queries.square().sum(1), step_k)
        squares = weights.square_()
        by_score = squares * of_score.div_(dim)
        # sum_j w_j (v_j - out)^2, without making every difference.
        spread = by_score @ values.square() - 2 * out * (by_score @ values) + out.square() * by_score.sum(1, keepdim=True)
        noise += float((spread + 2 * _E4M3**2 * (squares @ values.square())).sum())
        size += float(out.square().sum())
    return math.sqrt(noise / size + 2 * _of_type(_BITS[q.dtype]) ** 2)
