"""One Euler step of the packed latents, with true classifier-free guidance where an image has a negative prompt.

    v = v_neg + s (v_pos - v_neg)   where the row has a negative counterpart, else v_pos
    latent += delta * v             in float32

Reads and writes each latent once and reads each velocity once. Source: rectified flow (Liu et al. 2022); classifier-free
guidance (Ho and Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .example import Example, Size
from .launch import Config, Generation, Launch, jit, power_of_two, strided, tl
from .operands import check_matrix, check_row_index
from .operation import operation


def guide_reference(velocity: Tensor, rows: int, negative_rows: Tensor | None, guidance: Tensor | None) -> Tensor:
    """The velocity of the first `rows` rows in float32 or wider, guided where there is a negative row."""
    wide = torch.promote_types(velocity.dtype, torch.float32)
    positive = velocity[:rows].to(wide)
    if negative_rows is None or guidance is None:
        return positive
    negative = velocity.index_select(0, negative_rows.clamp(min=0)).to(wide)
    return torch.where(negative_rows[:, None] >= 0, torch.lerp(negative, positive, guidance[:, None]), positive)


@jit
def _euler_update_kernel(
    latents_ptr,  # [rows, width] float32
    latents_stride,
    velocity_ptr,  # [all rows, width]
    velocity_stride,
    delta_ptr,  # [rows] float32
    negative_rows_ptr,  # [rows] int64, or None
    guidance_ptr,  # [rows] float32, or None
    guided_ptr,  # [rows, width] float32
    guided_stride,
    rows,
    width,
    HAS_GUIDANCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    columns = tl.arange(0, BLOCK_C)[None, :]
    mask = row_mask[:, None] & (columns < width)
    positive = tl.load(velocity_ptr + row[:, None] * velocity_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_GUIDANCE:
        other = tl.load(negative_rows_ptr + row, mask=row_mask, other=-1)
        has_negative = (other >= 0)[:, None]
        scale = tl.load(guidance_ptr + row, mask=row_mask, other=1.0)[:, None]
        source = velocity_ptr + other[:, None] * velocity_stride + columns
        negative = tl.load(source, mask=mask & has_negative, other=0.0).to(tl.float32)
        positive = tl.where(has_negative, negative + scale * (positive - negative), positive)
    delta = tl.load(delta_ptr + row, mask=row_mask, other=0.0)[:, None]
    target = latents_ptr + row[:, None] * latents_stride + columns
    tl.store(guided_ptr + row[:, None] * guided_stride + columns, positive, mask=mask)
    tl.store(target, tl.load(target, mask=mask, other=0.0) + delta * positive, mask=mask)


def _launch(
    generation: Generation,
    latents: Tensor,
    velocity: Tensor,
    delta: Tensor,
    negative_rows: Tensor | None,
    guidance: Tensor | None,
    guided: Tensor,
) -> Launch:
    rows, width = latents.shape
    block = power_of_two(width)
    config = Config(num_warps=4, num_stages=1, blocks={"ROWS": max(1, 2048 // block), "BLOCK_C": block})
    arguments = strided(latents=latents, velocity=velocity, guided=guided) | {
        "delta_ptr": delta,
        "negative_rows_ptr": negative_rows,
        "guidance_ptr": guidance,
        "rows": rows,
        "width": width,
        "HAS_GUIDANCE": negative_rows is not None,
    }
    return Launch("euler_update", _euler_update_kernel, (-(-rows // config.blocks["ROWS"]),), arguments, config)


@operation(writes=("latents", "guided"), launch=_launch)
def euler_update_into(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None, guidance: Tensor | None, guided: Tensor
) -> None:
    """Advance `latents` and fill `guided`."""
    if negative_rows is None:
        guided.copy_(velocity[: latents.shape[0]])
    else:
        guided.copy_(guide_reference(velocity, latents.shape[0], negative_rows, guidance))
    latents.addcmul_(guided, delta[:, None])


def euler_update(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None = None, guidance: Tensor | None = None
) -> Tensor:
    """Advance packed latents by one Euler step, in place.

    Args:
        latents: float32 [T_pos, 64], changed in place.
        velocity: [T_out, 64], float32, bfloat16 or float16; the images' rows come first, then those of the negative prompts.
        delta: float32 [T_pos], next sigma minus sigma of each row.
        negative_rows: int64 [T_pos], the row of `velocity` under the negative prompt, -1 where there is none; None: nowhere.
        guidance: float32 [T_pos], s of each row; given exactly if `negative_rows` is.

    Returns:
        The guided velocity, float32 [T_pos, 64].

    Raises:
        ValueError: operands that do not fit together.
    """
    check_matrix("latents", latents)
    rows, width = latents.shape
    if latents.dtype != torch.float32:
        raise ValueError(f"latents must be float32 [rows, columns], got {latents.dtype} {tuple(latents.shape)}")
    check_matrix("velocity", velocity, width=width)
    if velocity.shape[0] < rows or velocity.device != latents.device:
        raise ValueError(f"velocity must have at least {rows} rows on {latents.device}, got {velocity.shape[0]}")
    if (negative_rows is None) != (guidance is None):
        raise ValueError("negative_rows and guidance are given together or not at all")
    for name, numbers in (("delta", delta), ("guidance", guidance)):
        if numbers is not None and (numbers.shape != (rows,) or numbers.dtype != torch.float32 or not numbers.is_contiguous()):
            raise ValueError(f"{name} must be contiguous float32 [{rows}], got {numbers.dtype} {tuple(numbers.shape)}")
    if negative_rows is not None:
        check_row_index("negative_rows", negative_rows, rows, latents.device)
    guided = torch.empty_like(latents)
    euler_update_into(latents, velocity, delta, negative_rows, guidance, guided)
    return guided


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """Images without negative prompts, and each with one."""
    latents, guided = size.normal(size.rows, 64, dtype=torch.float32), size.unwritten(size.rows, 64, dtype=torch.float32)
    velocity, delta = size.normal(2 * size.rows, 64), size.normal(size.rows, dtype=torch.float32)
    negative = torch.arange(size.rows, 2 * size.rows, device=size.device)
    yield Example("euler_update", euler_update_into, (latents, velocity[: size.rows], delta, None, None, guided))
    yield Example("euler_update guided", euler_update_into, (latents, velocity, delta, negative, delta + 2, guided))
