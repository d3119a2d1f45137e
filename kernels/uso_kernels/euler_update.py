"""One Euler step of the packed latents, with true classifier-free guidance where an image has a negative prompt.

    v = v_neg + s (v_pos - v_neg)   where the row has a negative counterpart, else v_pos
    latent += delta * v             in float32

Reads and writes each latent once and reads each velocity once. Source: rectified flow (Liu et al. 2022); classifier-free
guidance (Ho and Salimans 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Config, Generation, Launch, generation_of, jit, power_of_two, tl
from .operands import check_matrix, check_row_index


def guide_reference(velocity: Tensor, rows: int, negative_rows: Tensor | None, guidance: Tensor | None) -> Tensor:
    """The velocity of the first `rows` rows in float32, guided where there is a negative row."""
    positive = velocity[:rows].float()
    if negative_rows is None or guidance is None:
        return positive
    negative = velocity.index_select(0, negative_rows.clamp(min=0)).float()
    return torch.where(negative_rows[:, None] >= 0, torch.lerp(negative, positive, guidance[:, None]), positive)


def euler_update_reference(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None, guidance: Tensor | None, guided: Tensor
) -> None:
    """Plain PyTorch version of `euler_update`, with the same arguments."""
    if negative_rows is None:
        guided.copy_(velocity[: latents.shape[0]])
    else:
        guided.copy_(guide_reference(velocity, latents.shape[0], negative_rows, guidance))
    latents.addcmul_(guided, delta[:, None])


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


def euler_update_launch(
    latents: Tensor,
    velocity: Tensor,
    delta: Tensor,
    negative_rows: Tensor | None,
    guidance: Tensor | None,
    guided: Tensor,
    generation: Generation,
) -> Launch:
    """Describe the launch that advances `latents` and fills `guided`."""
    rows, width = latents.shape
    block = power_of_two(width)
    config = Config(num_warps=4, num_stages=1, blocks={"ROWS": max(1, 2048 // block), "BLOCK_C": block})
    arguments = {
        "latents_ptr": latents,
        "latents_stride": latents.stride(0),
        "velocity_ptr": velocity,
        "velocity_stride": velocity.stride(0),
        "delta_ptr": delta,
        "negative_rows_ptr": negative_rows,
        "guidance_ptr": guidance,
        "guided_ptr": guided,
        "guided_stride": guided.stride(0),
        "rows": rows,
        "width": width,
        "HAS_GUIDANCE": negative_rows is not None,
    }
    return Launch("euler_update", _euler_update_kernel, (-(-rows // config.blocks["ROWS"]),), arguments, config)


def _launch(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None, guidance: Tensor | None, guided: Tensor
) -> None:
    euler_update_launch(latents, velocity, delta, negative_rows, guidance, guided, generation_of(velocity)).run()


@torch.library.custom_op("uso_kernels::euler_update", mutates_args=("latents", "guided"))
def euler_update_op(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None, guidance: Tensor | None, guided: Tensor
) -> None:
    """Advance `latents` and fill `guided`."""
    euler_update_reference(latents, velocity, delta, negative_rows, guidance, guided)


euler_update_op.register_kernel("cuda")(_launch)


@euler_update_op.register_fake
def _(
    latents: Tensor, velocity: Tensor, delta: Tensor, negative_rows: Tensor | None, guidance: Tensor | None, guided: Tensor
) -> None:
    pass


def euler_update(
    latents: Tensor,
    velocity: Tensor,
    delta: Tensor,
    negative_rows: Tensor | None = None,
    guidance: Tensor | None = None,
    *,
    guided: Tensor | None = None,
) -> Tensor:
    """Advance packed latents by one Euler step, in place.

    Args:
        latents: float32 [T_pos, 64], changed in place.
        velocity: [T_out, 64], float32, bfloat16 or float16; the images' rows come first, then those of the negative prompts.
        delta: float32 [T_pos], next sigma minus sigma of each row.
        negative_rows: int64 [T_pos], the row of `velocity` under the negative prompt, -1 where there is none; None: nowhere.
        guidance: float32 [T_pos], s of each row; given exactly if `negative_rows` is.
        guided: float32 [T_pos, 64], where the guided velocity goes.

    Returns:
        The guided velocity, float32 [T_pos, 64].

    Raises:
        ValueError: operands that do not fit together.
    """
    rows, width = latents.shape
    for name, tensor in (("latents", latents), ("guided", guided)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != latents.shape):
            raise ValueError(f"{name} must be float32 {tuple(latents.shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
    check_matrix("latents", latents)
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
    guided = torch.empty_like(latents) if guided is None else guided
    euler_update_op(latents, velocity, delta, negative_rows, guidance, guided)
    return guided
