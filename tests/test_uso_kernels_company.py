"""What passes over rows compute on a CPU: a row's bits depend on the row, not on rows beside it, where it lies, or threads."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from several_threads import drawn, threads
from torch import Tensor

from uso_kernels.attention.quantize_heads import quantize_heads
from uso_kernels.euler_update import euler_update
from uso_kernels.gated_residual import gated_residual
from uso_kernels.gelu_concat import gelu_concat
from uso_kernels.layer_norm_modulate import layer_norm_modulate
from uso_kernels.qk_norm_rope import qk_norm_rope
from uso_kernels.quantize_rows import quantize_rows
from uso_kernels.ragged import Ragged
from uso_kernels.rows import QuantizedRows
from uso_kernels.split_streams import split_streams

# Together they are enough for several threads; the last tile is what a block of rows leaves over.
LENGTHS = (48, 320, 16, 32)
# Not even, even but no multiple of four, and one of whole vectors.
WIDTHS = (97, 250, 512)
# PyTorch divides a pass over many numbers into equal parts, which for 3 and 5 threads are seldom of whole vectors.
THREADS = (1, 3, 5)
QUANTIZED = (None, torch.int8, torch.float8_e4m3fn)
Compute = Callable[[slice, Sequence[Tensor]], object]
"""Of rows of the packed order, given what is theirs of the operands."""


def elsewhere(x: Tensor) -> Tensor:
    """The same numbers at an odd place in memory, in rows that an odd number of others stands between."""
    held = x.new_zeros(3 + x.shape[0] * (x[0].numel() + 5))[3:].view(x.shape[0], -1)
    return held[:, : x[0].numel()].copy_(x.flatten(1)).view_as(x) if x.ndim < 3 else x.clone()


def tensors_of(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, tuple)
    return [tensor for entry in result if entry is not None for tensor in tensors_of(entry)]


def as_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dtype.itemsize == 1 else x


def check_alone(name: str, compute: Compute, operands: Sequence[Tensor], rows: Sequence[slice]) -> None:
    """Rows alone, where they lie and elsewhere, have the bits that they have among all."""
    together = tensors_of(compute(slice(0, operands[0].shape[0]), operands))
    for part in rows:
        for move in (lambda x: x, elsewhere):
            alone = tensors_of(compute(part, [move(x[part]) for x in operands]))
            for one, other in zip(alone, together, strict=True):
                different = int((as_bits(one) != as_bits(other[part])).sum())
                assert not different, (
                    f"{name}: {different} numbers of rows {part} differ, with {torch.get_num_threads()} threads"
                )


def check_norms(width: int, dtype: torch.dtype) -> None:
    layout = Ragged.pack(LENGTHS)
    x, y = drawn(2, layout.rows, width, dtype=dtype)
    shift, scale, gate = drawn(len(layout), 3, width, dtype=dtype, seed=1).unbind(1)

    def tiles(rows: slice) -> Tensor:
        return layout.tile_sequence[rows.start // 16 : rows.stop // 16]

    for ending in QUANTIZED:

        def norm(rows: slice, given: Sequence[Tensor], ending: torch.dtype | None = ending) -> object:
            return layer_norm_modulate(given[0], shift, scale, tiles(rows), ending)

        def residual(rows: slice, given: Sequence[Tensor], ending: torch.dtype | None = ending) -> object:
            return gated_residual(given[0], given[1], gate, tiles(rows), (shift, scale), ending)

        check_alone(f"norm of {width} to {ending}", norm, [x], layout.row_slices)
        check_alone(f"addition of {width} to {ending}", residual, [x, y], layout.row_slices)


def check_activation(width: int, dtype: torch.dtype) -> None:
    layout = Ragged.pack(LENGTHS)
    rows = (*layout.row_slices, *(slice(i, i + 1) for i in (0, 7, 350, layout.rows - 1)))
    hidden, attended = drawn(layout.rows, width, dtype=dtype), drawn(layout.rows, 33, dtype=dtype, seed=1) / 8
    # The largest number of a row, which its scale is made of, is the last, which a vector leaves over.
    hidden[:, -1] += 4
    for ending in QUANTIZED:

        def activate(_: slice, given: Sequence[Tensor], ending: torch.dtype | None = ending) -> object:
            return gelu_concat(given[1] if len(given) > 1 else None, given[0], ending)

        check_alone(f"GELU of {width} to {ending}", activate, [hidden], rows)
        check_alone(f"GELU of {width} beside others to {ending}", activate, [hidden, attended], rows)
        if ending is not None:
            check_alone(f"rows of {width} to {ending}", lambda _, x, e=ending: quantize_rows(x[0], e), [hidden], rows)  # type: ignore[misc]

    def over(_: slice, given: Sequence[Tensor]) -> object:
        x = given[0].clone()
        return gelu_concat(None, x, out=x)

    check_alone(f"GELU of {width} over itself", over, [hidden], rows)


def check_heads(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    layout = Ragged.pack(LENGTHS)
    qkv = drawn(layout.rows, 3 * heads * head_dim, dtype=dtype)
    angles = drawn(layout.rows, head_dim // 2, dtype=torch.float32, seed=1) * 6
    scales = drawn(2, head_dim, dtype=dtype, seed=2)
    name = f"{heads} heads of {head_dim}"

    def turn(_: slice, given: Sequence[Tensor], *, scattered: bool) -> object:
        count = given[0].shape[0]
        q, k, v = (given[0].new_empty(count, heads, head_dim) for _ in range(3))
        places = torch.arange(count).flip(0)
        cos, sin = (table.flip(0) if scattered else table for table in given[1:])
        qk_norm_rope(given[0], scales[0], scales[1], cos, sin, places if scattered else None, q, k, v)
        return tuple(x.flip(0) for x in (q, k, v)) if scattered else (q, k, v)

    for scattered in (False, True):
        check_alone(name, partial(turn, scattered=scattered), [qkv, angles.cos(), angles.sin()], layout.row_slices)

    def quantize(_: slice, given: Sequence[Tensor]) -> object:
        q, q_scale, k, k_scale = quantize_heads(given[0], given[1])
        return q, q_scale.t(), k, k_scale.t()

    check_alone(name, quantize, qkv.view(-1, 3, heads, head_dim).unbind(1)[:2], layout.row_slices)


def check_movement(dtype: torch.dtype) -> None:
    layout = Ragged.pack(LENGTHS)
    latents, velocity = drawn(layout.rows, 64, dtype=torch.float32), drawn(2, layout.rows, 64, dtype=dtype, seed=1)
    numbers = drawn(2, layout.rows, dtype=torch.float32, seed=2)

    def step(_: slice, given: Sequence[Tensor]) -> object:
        now, positive, negative, delta, guidance = (x.contiguous() for x in given)
        count, now = len(now), now.clone()
        below = torch.arange(count, 2 * count)
        guided = euler_update(now, torch.cat((positive, negative)), delta.squeeze(1), below, guidance.squeeze(1) * 3)
        return now, guided

    operands = [latents, *velocity, *numbers[:, :, None]]
    check_alone("Euler's step", step, operands, layout.row_slices)

    def split(_: slice, given: Sequence[Tensor]) -> object:
        order = torch.arange(len(given[0]))
        text, image = split_streams(given[0], order[:16], order[16:], torch.int8)
        assert isinstance(text, QuantizedRows)
        assert isinstance(image, QuantizedRows)
        return tuple(torch.cat(pair) for pair in zip(text, image, strict=True))

    check_alone("split", split, [velocity[0]], [rows for rows in layout.row_slices if rows.stop - rows.start > 16])


@torch.no_grad()
def check_rows(count: int, dtype: torch.dtype) -> None:
    """Every pass over rows, by so many threads."""
    with threads(count):
        for width in WIDTHS:
            check_norms(width, dtype)
            check_activation(width, dtype)
        # Heads of the model, of vectors that are not whole, and a single one, whose columns stand for all of a row.
        for heads, head_dim in ((7, 128), (3, 20), (1, 500)):
            check_heads(heads, head_dim, dtype)
        check_movement(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", THREADS)
def test_a_rows_bits_depend_on_nothing_but_the_row(count: int, dtype: torch.dtype) -> None:
    check_rows(count, dtype)


@pytest.mark.parametrize("count", [3, 5])
def test_the_rotations_bits_are_the_same_where_autograd_could_record(count: int) -> None:
    """Gradients that nobody asks for change nothing; one that is asked for is there."""
    heads, head_dim, rows = 7, 128, 329
    qkv, scales = drawn(rows, 3 * heads * head_dim, dtype=torch.float32), drawn(2, head_dim, dtype=torch.float32, seed=2)
    angles = drawn(rows, head_dim // 2, dtype=torch.float32, seed=1) * 6

    def turned(given: Tensor) -> Tensor:
        q, k, v = (given.new_empty(rows, heads, head_dim) for _ in range(3))
        qk_norm_rope(given, scales[0], scales[1], angles.cos(), angles.sin(), None, q, k, v)
        return torch.stack((q, k, v))

    with threads(count):
        with torch.no_grad():
            expected = turned(qkv)
        assert torch.equal(turned(qkv), expected)
        leaf = qkv.clone().requires_grad_()
        turned(leaf).square().sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum(1).min() > 0
