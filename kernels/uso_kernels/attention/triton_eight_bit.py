"""Our attention kernel with both products in 8 bits, for sequences of any lengths in one launch.

    p = exp(q_scale k_scale q k^T / sqrt(D) - m)      m: the row's largest exponent so far
    out = v_scale (e4m3(448 p) v) / sum 448 p         q and k in int8 with scales of a token's head (`quantize_heads`),
                                                      v in e4m3 with scales of a sequence's channel (`quantize_values`)

4 L_q L_k D FLOPs per head and sequence, on units that do twice as many as in 16 bits; q, k and v are read as the 16-bit kernel
reads them, at half the bytes. Queries and keys are of one size after their norm, so that 7 bits below a common scale say more
of them than e4m3's 3; weights of attention differ by orders of magnitude, so p is better off in e4m3, and v has p's type.
Scores, exponentials, maxima and sums are float32. Tensor cores before Blackwell keep 14 bits of an e4m3 product's sum, so each
block of keys has a sum of its own, which is added to the others in float32.

Nothing overflows that would not in 16 bits: sums of integers are below 2^14 D, those of floats below 2^18 L. The rounded p may
add up to more than the p, so a mean of values is cut off at the largest of them, 448. What is not finite in q, k or v is not
finite in the result; a neighbour's never reaches it.

Sources: FlashAttention-2 (Dao 2023); SageAttention2 (Zhang et al. 2024) for the types, scales of channels and sums in two
levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, TensorDescriptor, head_strided, jit, tl
from uso_kernels.operation import operation
from uso_kernels.ragged import Ragged
from uso_kernels.rows import SMALLEST_AMAX

from .quantize_heads import GENERATIONS, HEAD_DIMS, check_head_dim, quantize_heads
from .quantize_values import ELEMENT, quantize_values
from .triton import TMA_GENERATIONS

LIMIT = 448.0
LOG2_LIMIT = math.log2(LIMIT)


@jit
def _rounded(p, DTYPE: tl.constexpr):
    """Non-negative float32 as e4m3; in float32, which the interpreter has in its place, the numbers that e4m3 has."""
    if DTYPE.is_fp32():
        # Adding and taking away 1.5 * 2^14 rounds to multiples of 2^-9, Veltkamp's splitting to four bits.
        small = (p + 24576.0) - 24576.0
        split = p * 1048577.0
        result = tl.where(p < 0.015625, small, split - (split - p))
    else:
        result = p.to(DTYPE)
    return result


@jit
def _attend_block(q, k, v, k_scale, key_mask, acc, row_max, row_sum, row_scale, MASKED: tl.constexpr):
    """Add one block of keys [N, D] and values [D, N] to the running softmax of queries [M, D]."""
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * k_scale[None, :]
    if MASKED:
        scores = tl.where(key_mask[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * row_scale)
    # 8.8... is the logarithm of 448 to base 2.
    p = tl.exp2(scores * row_scale[:, None] - (new_max - 8.807354922057604)[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, axis=1)
    acc = acc * correction[:, None] + tl.dot(_rounded(p, v.dtype), tl.trans(v), input_precision="ieee")
    return acc, new_max, row_sum


@jit
def _mean_of_values(acc, row_sum, amax):
    """Sums [M, D] over those of their weights, cut off at the largest value, times the scale of each channel."""
    # Not maxima and minima, which drop NaN.
    v_scale = tl.div_rn(tl.where(amax < 1e-30, 1e-30, amax), 448.0)
    mean = acc / row_sum[:, None]
    mean = tl.where(mean > 448.0, 448.0, tl.where(mean < -448.0, -448.0, mean))
    return mean * v_scale[None, :]


@jit
def _eight_bit_attention_kernel(
    q_ptr,  # [T_q, heads, D] int8
    q_scale_ptr,  # [heads, T_q] float32
    q_count,  # T_q
    k_ptr,  # [T, heads, D] int8
    k_scale_ptr,  # [heads, T] float32
    v_ptr,  # [heads, D, T] e4m3
    v_amax_ptr,  # [S, heads, D] float32
    k_count,  # T
    q_descriptor,  # [T_q, heads * D] in blocks of [BLOCK_M, D], or None
    k_descriptor,  # [T, heads * D] in blocks of [BLOCK_N, D], or None
    v_descriptor,  # [heads * D, T] in blocks of [D, BLOCK_N], or None
    out_ptr,  # [T_q, heads, D]
    out_stride,
    out_head_stride,
    query_bounds_ptr,  # [S + 1] int32
    query_lengths_ptr,  # [S] int32
    key_bounds_ptr,  # [S + 1] int32
    key_lengths_ptr,  # [S] int32
    heads,
    scale,  # log2(e) / sqrt(D)
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence, head, first = tl.program_id(2), tl.program_id(1), tl.program_id(0) * BLOCK_M
    query_start = tl.load(query_bounds_ptr + sequence)
    capacity = tl.load(query_bounds_ptr + sequence + 1) - query_start
    if first >= capacity:
        return
    query_length, key_length = tl.load(query_lengths_ptr + sequence), tl.load(key_lengths_ptr + sequence)
    # Said, so that values, whose keys lie side by side, are read by more than a byte at a time.
    key_start = tl.multiple_of(tl.load(key_bounds_ptr + sequence), 16)
    rows, columns, offsets = first + tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, BLOCK_N)
    is_query = rows < query_length
    wide_head = head.to(tl.int64)
    query_rows = (query_start + rows).to(tl.int64)
    row_scale = tl.load(q_scale_ptr + wide_head * q_count + query_rows, mask=is_query, other=1.0) * scale
    if TMA:
        q = q_descriptor.load([query_start + first, head * D])
    else:
        q_tile = q_ptr + (query_rows[:, None] * heads + wide_head) * D + columns[None, :]
        q = tl.load(q_tile, mask=is_query[:, None], other=0)
    key_rows = (key_start + offsets).to(tl.int64)
    scale_tile = k_scale_ptr + wide_head * k_count + key_rows
    k_tile = k_ptr + (key_rows[:, None] * heads + wide_head) * D + columns[None, :]
    v_tile = v_ptr + (wide_head * D + columns)[:, None] * k_count + key_rows[None, :]
    acc, row_sum = tl.zeros((BLOCK_M, D), dtype=tl.float32), tl.zeros((BLOCK_M,), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    key_mask = offsets < BLOCK_N
    whole = key_length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        k_scale = tl.load(scale_tile + start)
        if TMA:
            k = k_descriptor.load([key_start + start, head * D])
            v = v_descriptor.load([head * D, key_start + start])
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
            k_tile += BLOCK_N * heads * D
            v_tile += BLOCK_N
        acc, row_max, row_sum = _attend_block(q, k, v, k_scale, key_mask, acc, row_max, row_sum, row_scale, False)
    if whole < key_length:
        key_mask = whole + offsets < key_length
        if TMA:
            k_tile += whole.to(tl.int64) * heads * D
            v_tile += whole
        k_scale = tl.load(scale_tile + whole, mask=key_mask, other=0.0)
        k = tl.load(k_tile, mask=key_mask[:, None], other=0)
        v = tl.load(v_tile, mask=key_mask[None, :], other=0.0)
        acc, row_max, row_sum = _attend_block(q, k, v, k_scale, key_mask, acc, row_max, row_sum, row_scale, True)
    amax = tl.load(v_amax_ptr + (sequence * heads + head) * D + columns)
    result = tl.where(is_query[:, None], _mean_of_values(acc, row_sum, amax), 0.0)
    out_tile = out_ptr + query_rows[:, None] * out_stride + wide_head * out_head_stride + columns[None, :]
    tl.store(out_tile, result.to(out_ptr.dtype.element_ty), mask=(rows < capacity)[:, None])


_WIDE_TILES = Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 128})
_TILES = Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 64})

CONFIGS: Mapping[Generation, Mapping[int, Config]] = {
    "ada": {64: _TILES, 128: _TILES},
    "hopper": {64: _WIDE_TILES, 128: _WIDE_TILES},
    "blackwell_consumer": {64: _TILES, 128: _TILES},
}
"""By generation, then by head dimension: the largest tiles without spills (Triton 3.6: of 16 bytes). Not yet measured."""
REFERENCE_KEYS = 128
"""Keys after which the reference, too, rounds against a new maximum; as Hopper's tiles do."""


def _describe(x: Tensor, block: list[int]) -> object:
    """A contiguous 8-bit matrix as the tensor memory accelerator addresses it."""
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block)


def _launch(
    generation: Generation,
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_amax: Tensor,
    query_bounds: Tensor,
    query_lengths: Tensor,
    key_bounds: Tensor,
    key_lengths: Tensor,
    max_capacity: int,
    out: Tensor,
) -> Launch:
    heads, head_dim = q.shape[1:]
    check_head_dim(head_dim)
    if generation not in CONFIGS:
        raise ValueError(f"8-bit attention has kernels for {', '.join(GENERATIONS)}, got {generation}")
    config = CONFIGS[generation][head_dim]
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    by_descriptor = generation in TMA_GENERATIONS
    arguments = {
        "q_ptr": q,
        "q_scale_ptr": q_scale,
        "q_count": q.shape[0],
        "k_ptr": k,
        "k_scale_ptr": k_scale,
        "v_ptr": v,
        "v_amax_ptr": v_amax,
        "k_count": k.shape[0],
        "q_descriptor": _describe(q.flatten(1), [block_m, head_dim]) if by_descriptor else None,
        "k_descriptor": _describe(k.flatten(1), [block_n, head_dim]) if by_descriptor else None,
        "v_descriptor": _describe(v.flatten(0, 1), [head_dim, block_n]) if by_descriptor else None,
        **head_strided(out=out),
        "query_bounds_ptr": query_bounds,
        "query_lengths_ptr": query_lengths,
        "key_bounds_ptr": key_bounds,
        "key_lengths_ptr": key_lengths,
        "heads": heads,
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        "TMA": by_descriptor,
        "D": head_dim,
    }
    grid = (-(-max_capacity // block_m), heads, query_lengths.shape[0])
    return Launch("eight_bit_attention", _eight_bit_attention_kernel, grid, arguments, config)


def _attend_sequence(q: Tensor, row_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor) -> Tensor:
    """One sequence: q [H, L_q, D], k [H, L, D], v [H, L, D] in 8 bits, row_scale [H, L_q], k_scale [H, L], v_scale [H, D]."""
    wide = row_scale.dtype
    queries = q.to(wide)
    total = queries.new_zeros(queries.shape)
    row_max = torch.full_like(row_scale, -math.inf)
    row_sum = torch.zeros_like(row_scale)
    for start in range(0, k.shape[1], REFERENCE_KEYS):
        keys = slice(start, start + REFERENCE_KEYS)
        scores = (queries @ k[:, keys].to(wide).mT).mul_(k_scale[:, None, keys]).mul_(row_scale[:, :, None])
        new_max = torch.maximum(row_max, scores.amax(2))
        p = scores.sub_(new_max[:, :, None]).add_(LOG2_LIMIT).exp2_()
        correction = (row_max - new_max).exp2_()
        row_sum.mul_(correction).add_(p.sum(2))
        rounded = p.clamp_(max=LIMIT).to(ELEMENT).to(wide)
        total.mul_(correction[:, :, None]).add_(rounded @ v[:, keys].to(wide))
        row_max = new_max
    return (total / row_sum[:, :, None]).clamp_(-LIMIT, LIMIT).mul_(v_scale[:, None])


@operation(writes=("out",), launch=_launch)
def eight_bit_attention_into(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_amax: Tensor,
    query_bounds: Tensor,
    query_lengths: Tensor,
    key_bounds: Tensor,
    key_lengths: Tensor,
    max_capacity: int,
    out: Tensor,
) -> None:
    """Fill `out` from values and scales as `quantize_heads` and `quantize_values` make them."""
    wide = torch.promote_types(out.dtype, torch.float32)
    v_scale = (v_amax.clamp(min=SMALLEST_AMAX) / LIMIT).to(wide)
    scale = math.log2(math.e) / math.sqrt(q.shape[2])
    spans = zip(query_bounds.tolist(), query_lengths.tolist(), key_bounds.tolist(), key_lengths.tolist(), strict=False)
    out.zero_()
    for i, (query_start, queries, key_start, keys) in enumerate(spans):
        rows, key_rows = slice(query_start, query_start + queries), slice(key_start, key_start + keys)
        result = _attend_sequence(
            q[rows].transpose(0, 1),
            q_scale[:, rows].to(wide) * scale,
            k[key_rows].transpose(0, 1),
            k_scale[:, key_rows].to(wide),
            v[:, :, key_rows].mT,
            v_scale[i],
        )
        out[rows] = result.transpose(0, 1).to(out.dtype)


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """One sequence with heads of 128 and of 64."""
    if generation not in GENERATIONS:
        return
    layout = Ragged.pack([size.rows], size.device)
    bounds = (layout.bounds_tensor, layout.lengths_tensor) * 2
    for head_dim in HEAD_DIMS:
        heads = size.width // head_dim
        q, k, v = size.normal(3, size.rows, heads, head_dim)
        operands = (*quantize_heads(q, k), *quantize_values(v, layout), *bounds, layout.max_capacity)
        out = size.unwritten(size.rows, heads, head_dim)
        flops = 4 * size.rows * size.rows * size.width
        yield Example(f"eight_bit_attention {head_dim}", eight_bit_attention_into, (*operands, out), flops, head_dim == 128)
