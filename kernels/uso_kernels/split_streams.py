"""Bring rows in joint order back to the text and the image stream, as floats or quantised by rows.

    text[i] = joint[text_rows[i]]      image[i] = joint[image_rows[i]]

One read and one write of each row (one byte per element written when quantised), both streams in one launch. One sequence
without padding needs no such pass when its result stays in floats: both streams are views of the joint tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Generation, Launch, generation_of, jit, needs_gradient, tl
from .layer_norm_modulate import store_row
from .operands import check_matrix, check_row_index, result_like
from .quantize_rows import LAUNCH_LIMITS, check_row_width, quantize_rows_reference, quantized_result, row_config


def split_streams_reference(joint: Tensor, text_rows: Tensor, image_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch version of `split_streams`, with the same arguments."""
    return joint.index_select(0, text_rows), joint.index_select(0, image_rows)


@jit
def _split_streams_kernel(
    joint_ptr,  # [T, width]
    joint_stride,
    text_rows_ptr,  # [T_txt] int64
    image_rows_ptr,  # [T_img] int64
    text_ptr,  # [T_txt, width]
    text_stride,
    text_scale_ptr,  # [T_txt] float32, or None
    image_ptr,  # [T_img, width]
    image_stride,
    image_scale_ptr,  # [T_img] float32, or None
    text_count,
    width,
    LIMIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < width
    if program < text_count:
        source = tl.load(text_rows_ptr + program)
        values = tl.load(joint_ptr + source * joint_stride + columns, mask=mask, other=0.0).to(tl.float32)
        store_row(values, text_ptr, text_scale_ptr, program, text_stride, columns, mask, LIMIT)
    else:
        row = program - text_count
        source = tl.load(image_rows_ptr + row)
        values = tl.load(joint_ptr + source * joint_stride + columns, mask=mask, other=0.0).to(tl.float32)
        store_row(values, image_ptr, image_scale_ptr, row, image_stride, columns, mask, LIMIT)


def split_streams_launch(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    image: Tensor,
    text_scales: Tensor | None,
    image_scales: Tensor | None,
    generation: Generation,
) -> Launch:
    """Describe the launch that fills both streams, quantised if there are row scales."""
    arguments = {
        "joint_ptr": joint,
        "joint_stride": joint.stride(0),
        "text_rows_ptr": text_rows,
        "image_rows_ptr": image_rows,
        "text_ptr": text,
        "text_stride": text.stride(0),
        "text_scale_ptr": text_scales,
        "image_ptr": image,
        "image_stride": image.stride(0),
        "image_scale_ptr": image_scales,
        "text_count": text.shape[0],
        "width": joint.shape[1],
        "LIMIT": 0.0 if text_scales is None else LAUNCH_LIMITS[text.dtype],
    }
    grid = (text.shape[0] + image.shape[0],)
    return Launch("split_streams", _split_streams_kernel, grid, arguments, row_config(generation, joint.shape[1]))


def _launch(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    image: Tensor,
    text_scales: Tensor | None,
    image_scales: Tensor | None,
) -> None:
    split_streams_launch(joint, text_rows, image_rows, text, image, text_scales, image_scales, generation_of(joint)).run()


@torch.library.custom_op("uso_kernels::split_streams", mutates_args=("text", "image", "text_scales", "image_scales"))
def split_streams_op(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    image: Tensor,
    text_scales: Tensor | None,
    image_scales: Tensor | None,
) -> None:
    """Fill both streams, and the row scales if there are any."""
    for rows, target, scales in ((text_rows, text, text_scales), (image_rows, image, image_scales)):
        if scales is None:
            torch.index_select(joint, 0, rows, out=target)
        else:
            values, row_scales = quantize_rows_reference(joint.index_select(0, rows), target.dtype)
            target.copy_(values)
            scales.copy_(row_scales)


split_streams_op.register_kernel("cuda")(_launch)


@split_streams_op.register_fake
def _(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    image: Tensor,
    text_scales: Tensor | None,
    image_scales: Tensor | None,
) -> None:
    pass


def split_streams(
    joint: Tensor, text_rows: Tensor, image_rows: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Bring rows in joint order back to the two streams.

    Args:
        joint: [T, C], columns contiguous; C at most 16384.
        text_rows: int64 [T_txt], the joint row of each text row.
        image_rows: int64 [T_img], the joint row of each image row.
        out: where text and image go.

    Returns:
        [T_txt, C] and [T_img, C] in joint's dtype.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(joint):
        return split_streams_reference(joint, text_rows, image_rows)
    _check_operands(joint, text_rows, image_rows)
    shapes = [(rows.shape[0], joint.shape[1]) for rows in (text_rows, image_rows)]
    text, image = (result_like(joint, target, shape) for target, shape in zip(out or (None, None), shapes, strict=True))
    split_streams_op(joint, text_rows, image_rows, text, image, None, None)
    return text, image


def split_streams_quantized(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    dtype: torch.dtype,
    *,
    out: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`split_streams` with both results quantised by rows.

    Args:
        joint: [T, C], columns contiguous; C at most 16384.
        text_rows: int64 [T_txt].
        image_rows: int64 [T_img].
        dtype: `torch.float8_e4m3fn` or `torch.int8`.
        out: where values and row scales go, of text and of image.

    Returns:
        Values and row scales of the text stream, then of the image stream.

    Raises:
        ValueError: operands that do not fit together.
    """
    _check_operands(joint, text_rows, image_rows)
    text, image = (
        quantized_result(rows.shape[0], joint.shape[1], dtype, joint.device, target)
        for rows, target in zip((text_rows, image_rows), out or (None, None), strict=True)
    )
    split_streams_op(joint, text_rows, image_rows, text[0], image[0], text[1], image[1])
    return text, image


def _check_operands(joint: Tensor, text_rows: Tensor, image_rows: Tensor) -> None:
    check_matrix("joint", joint)
    check_row_width(joint.shape[1])
    check_row_index("text_rows", text_rows, None, joint.device)
    check_row_index("image_rows", image_rows, None, joint.device)
