"""Our attention kernel: one pass over keys and values with a running maximum, for sequences of any lengths in one launch.

    out[i] = softmax(q[i] k^T / sqrt(D)) v      over the tokens of i's own sequence, not causal, no mask

4 L_q L_k D FLOPs per head and sequence; q read once, k and v once per tile of queries (mostly from L2), out written once. On
Hopper and Blackwell full blocks of keys come through host-made tensor descriptors (TMA); the last, partial block of a
sequence is always read through masked pointers, so that nothing of a neighbour, not even a NaN, can enter. Source:
FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from uso_kernels.example import Example, Size
from uso_kernels.launch import Config, Generation, Launch, TensorDescriptor, head_strided, jit, tl
from uso_kernels.operation import operation
from uso_kernels.ragged import Ragged

HEAD_DIMS = (64, 128)


def attend_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of one sequence: [L_q, H, D] with [L, H, D] to [L_q, H, D]."""
    dense_q, dense_k, dense_v = q.unsqueeze(0).transpose(1, 2), k.unsqueeze(0).transpose(1, 2), v.unsqueeze(0).transpose(1, 2)
    return F.scaled_dot_product_attention(dense_q, dense_k, dense_v).transpose(1, 2).squeeze(0)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Plain PyTorch version of `uso_kernels.attention.attention`: one dense call per sequence."""
    pieces: list[Tensor] = []
    for i in range(len(queries)):
        span, key_span = queries.span(i), keys.span(i)
        pieces.append(attend_sequence(q[span], k[key_span], v[key_span]))
        if queries.end(i) > span.stop:
            pieces.append(q.new_zeros(queries.end(i) - span.stop, *q.shape[1:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@jit
def _attend_block(q, k, v, key_mask, acc, row_max, row_sum, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one block of keys [N, D] and values [N, D] to the running softmax of queries [M, D]."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        products = tl.where(key_mask[None, :], products, float("-inf"))
    # The scale is positive, so it goes into one multiply-add beside the maximum's subtraction.
    new_max = tl.maximum(row_max, tl.max(products, axis=1) * scale)
    p = tl.exp2(products * scale - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@jit
def _attention_kernel(
    q_ptr,  # [T_q, heads, D]
    q_stride,
    q_head_stride,
    k_ptr,  # [T, heads, D]
    k_stride,
    k_head_stride,
    v_ptr,  # [T, heads, D]
    v_stride,
    v_head_stride,
    q_descriptor,  # [T_q, heads * D] in blocks of [BLOCK_M, D], or None
    k_descriptor,  # [T, heads * D] in blocks of [BLOCK_N, D], or None
    v_descriptor,  # [T, heads * D] in blocks of [BLOCK_N, D], or None
    out_ptr,  # [T_q, heads, D]
    out_stride,
    out_head_stride,
    query_bounds_ptr,  # [S + 1] int32
    query_lengths_ptr,  # [S] int32
    key_bounds_ptr,  # [S + 1] int32
    key_lengths_ptr,  # [S] int32
    scale,  # log2(e) / sqrt(D)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(2)
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_M
    query_start = tl.load(query_bounds_ptr + sequence)
    capacity = tl.load(query_bounds_ptr + sequence + 1) - query_start
    if first >= capacity:
        return
    query_length = tl.load(query_lengths_ptr + sequence)
    key_start = tl.load(key_bounds_ptr + sequence)
    key_length = tl.load(key_lengths_ptr + sequence)

    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    query_rows = (query_start + rows).to(tl.int64)
    if TMA:
        q = q_descriptor.load([query_start + first, head * D])
    else:
        q_tile = q_ptr + query_rows[:, None] * q_stride + head.to(tl.int64) * q_head_stride + columns[None, :]
        q = tl.load(q_tile, mask=(rows < query_length)[:, None], other=0.0)
    offsets = tl.arange(0, BLOCK_N)
    key_rows = (key_start + offsets).to(tl.int64)
    k_tile = k_ptr + key_rows[:, None] * k_stride + head.to(tl.int64) * k_head_stride + columns[None, :]
    v_tile = v_ptr + key_rows[:, None] * v_stride + head.to(tl.int64) * v_head_stride + columns[None, :]
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    key_mask = offsets < BLOCK_N
    whole = key_length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        if TMA:
            k = k_descriptor.load([key_start + start, head * D])
            v = v_descriptor.load([key_start + start, head * D])
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
            k_tile += BLOCK_N * k_stride
            v_tile += BLOCK_N * v_stride
        acc, row_max, row_sum = _attend_block(q, k, v, key_mask, acc, row_max, row_sum, scale, False, PRECISION)
    if whole < key_length:
        key_mask = whole + offsets < key_length
        if TMA:
            k_tile += whole.to(tl.int64) * k_stride
            v_tile += whole.to(tl.int64) * v_stride
        k = tl.load(k_tile, mask=key_mask[:, None], other=0.0)
        v = tl.load(v_tile, mask=key_mask[:, None], other=0.0)
        acc, row_max, row_sum = _attend_block(q, k, v, key_mask, acc, row_max, row_sum, scale, True, PRECISION)
    result = tl.where((rows < query_length)[:, None], acc / row_sum[:, None], 0.0)
    out_tile = out_ptr + query_rows[:, None] * out_stride + head.to(tl.int64) * out_head_stride + columns[None, :]
    tl.store(out_tile, result.to(out_ptr.dtype.element_ty), mask=(rows < capacity)[:, None])


_WIDE_TILES = Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 128})
_TILES = Config(8, 3, {"BLOCK_M": 128, "BLOCK_N": 64})
_SMALL_MEMORY_TILES = Config(8, 2, {"BLOCK_M": 128, "BLOCK_N": 64})

CONFIGS: Mapping[Generation, Mapping[int, Config]] = {
    "ampere": {64: _TILES, 128: _TILES},
    "ampere_consumer": {64: _SMALL_MEMORY_TILES, 128: _SMALL_MEMORY_TILES},
    "ada": {64: _SMALL_MEMORY_TILES, 128: _SMALL_MEMORY_TILES},
    "hopper": {64: _WIDE_TILES, 128: _WIDE_TILES},
    "blackwell": {64: _WIDE_TILES, 128: _WIDE_TILES},
    "blackwell_consumer": {64: _SMALL_MEMORY_TILES, 128: _SMALL_MEMORY_TILES},
}
"""By generation, then by head dimension. Chosen to fit shared memory without spilling; not yet measured on a GPU. There
is none for float32: every tile tried spilled 200 to 7500 bytes (`benchmarks/LOG.md`), so a GPU computes float32 by dense
calls."""
TMA_GENERATIONS: frozenset[Generation] = frozenset(("hopper", "blackwell"))


def _takes_descriptor(x: Tensor) -> bool:
    """Whether [T, H, D] is a matrix [T, H * D] that the tensor memory accelerator can address."""
    bytes_per_row = x.stride(0) * x.element_size()
    return x.stride(1) == x.shape[2] and x.data_ptr() % 16 == 0 and bytes_per_row % 16 == 0 and x.shape[0] < 2**31


def _describe(x: Tensor, block_rows: int) -> object:
    rows, heads, head_dim = x.shape
    return TensorDescriptor(x, [rows, heads * head_dim], [x.stride(0), 1], [block_rows, head_dim])


def _launch(
    generation: Generation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    query_lengths: Tensor,
    key_bounds: Tensor,
    key_lengths: Tensor,
    max_capacity: int,
    out: Tensor,
) -> Launch:
    heads, head_dim = q.shape[1:]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head dimensions {HEAD_DIMS} have kernels, got {head_dim}")
    if q.element_size() != 2 and q.device.type == "cuda":
        raise ValueError(f"the attention kernel takes float16 and bfloat16 on a GPU, got {q.dtype}")
    config = CONFIGS[generation][head_dim]
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    has_descriptors = generation in TMA_GENERATIONS and all(map(_takes_descriptor, (q, k, v)))
    arguments = head_strided(q=q, k=k, v=v, out=out) | {
        "q_descriptor": _describe(q, block_m) if has_descriptors else None,
        "k_descriptor": _describe(k, block_n) if has_descriptors else None,
        "v_descriptor": _describe(v, block_n) if has_descriptors else None,
        "query_bounds_ptr": query_bounds,
        "query_lengths_ptr": query_lengths,
        "key_bounds_ptr": key_bounds,
        "key_lengths_ptr": key_lengths,
        "scale": math.log2(math.e) / math.sqrt(head_dim),
        "TMA": has_descriptors,
        # The interpreter takes float32 too; "ieee" is a plain product there and means nothing to 16-bit operands.
        "PRECISION": "ieee",
        "D": head_dim,
    }
    grid = (-(-max_capacity // block_m), heads, query_lengths.shape[0])
    return Launch("attention", _attention_kernel, grid, arguments, config)


@operation(writes=("out",), launch=_launch)
def attention_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    query_lengths: Tensor,
    key_bounds: Tensor,
    key_lengths: Tensor,
    max_capacity: int,
    out: Tensor,
) -> None:
    """Fill `out`."""
    spans = zip(query_bounds.tolist(), query_lengths.tolist(), key_bounds.tolist(), key_lengths.tolist(), strict=False)
    out.zero_()
    for query_start, queries, key_start, keys in spans:
        rows, key_rows = slice(query_start, query_start + queries), slice(key_start, key_start + keys)
        out[rows] = attend_sequence(q[rows], k[key_rows], v[key_rows])


def triton_attention(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged) -> Tensor:
    """Attend within each sequence in one launch; operands as `uso_kernels.attention.attention` has checked them."""
    out = q.new_empty(q.shape)
    bounds = (queries.bounds_tensor, queries.lengths_tensor, keys.bounds_tensor, keys.lengths_tensor)
    attention_into(q, k, v, *bounds, queries.max_capacity, out)
    return out


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """One sequence with heads of 128 and of 64, and heads that are not side by side, which have no descriptor."""
    layout = Ragged.pack([size.rows], size.device)
    bounds = (layout.bounds_tensor, layout.lengths_tensor) * 2
    for head_dim in HEAD_DIMS:
        heads = size.width // head_dim
        q, k, v = size.normal(3, size.rows, heads, head_dim)
        apart = size.normal(size.rows, heads, 2 * head_dim)[:, :, :head_dim]
        flops = 4 * size.rows * size.rows * size.width
        # Older GPUs always take the pointer variant.
        for kind, query in (("", q), (" strided", apart)) if generation in TMA_GENERATIONS else (("", q),):
            operands = (query, k, v, *bounds, layout.max_capacity, size.unwritten(size.rows, heads, head_dim))
            is_hot = head_dim == 128 and not kind
            yield Example(f"attention {head_dim}{kind}", attention_into, operands, flops, is_hot)
