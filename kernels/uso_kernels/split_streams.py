"""Bring rows in joint order back to the text and the image stream, as floats or quantised by rows.

    text[i] = joint[text_rows[i]]      image[i] = joint[image_rows[i]]

One read and one write of each row (one byte per element written when quantised), both streams in one launch. One sequence
without padding needs no such pass when its result stays in floats: both streams are views of the joint tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .example import Example, Size
from .launch import Generation, Launch, jit, needs_gradient, strided, tl
from .operands import check_matrix, check_row_index
from .operation import operation
from .rows import Rows, check_row_width, new_rows, parts, row_config, store_limit, store_row, write_rows


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


def _launch(
    generation: Generation,
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    text_scales: Tensor | None,
    image: Tensor,
    image_scales: Tensor | None,
) -> Launch:
    arguments = strided(joint=joint, text=text, image=image) | {
        "text_rows_ptr": text_rows,
        "image_rows_ptr": image_rows,
        "text_scale_ptr": text_scales,
        "image_scale_ptr": image_scales,
        "text_count": text.shape[0],
        "width": joint.shape[1],
        "LIMIT": store_limit(text, text_scales),
    }
    grid = (text.shape[0] + image.shape[0],)
    return Launch("split_streams", _split_streams_kernel, grid, arguments, row_config(joint.shape[1]))


@operation(writes=("text", "text_scales", "image", "image_scales"), launch=_launch)
def split_streams_into(
    joint: Tensor,
    text_rows: Tensor,
    image_rows: Tensor,
    text: Tensor,
    text_scales: Tensor | None,
    image: Tensor,
    image_scales: Tensor | None,
) -> None:
    """Fill both streams, quantised where there are row scales."""
    for rows, out, row_scales in ((text_rows, text, text_scales), (image_rows, image, image_scales)):
        if row_scales is None:
            torch.index_select(joint, 0, rows, out=out)
        else:
            write_rows(joint.index_select(0, rows), out, row_scales)


def split_streams(joint: Tensor, text_rows: Tensor, image_rows: Tensor, dtype: torch.dtype | None = None) -> tuple[Rows, Rows]:
    """Bring rows in joint order back to the two streams.

    Args:
        joint: [T, C], columns contiguous; C at most 16384.
        text_rows: int64 [T_txt], the joint row of each text row.
        image_rows: int64 [T_img], the joint row of each image row.
        dtype: what the readers of the rows take: `torch.float8_e4m3fn`, `torch.int8`, or None for floats of joint's dtype.

    Returns:
        [T_txt, C] and [T_img, C].

    Raises:
        ValueError: operands that do not fit together.
    """
    if dtype is None and needs_gradient(joint):
        return joint.index_select(0, text_rows), joint.index_select(0, image_rows)
    check_matrix("joint", joint)
    check_row_width(joint.shape[1])
    check_row_index("text_rows", text_rows, None, joint.device)
    check_row_index("image_rows", image_rows, None, joint.device)
    text, image = (new_rows(len(rows), joint.shape[1], joint, dtype) for rows in (text_rows, image_rows))
    split_streams_into(joint, text_rows, image_rows, *parts(text), *parts(image))
    return text, image


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """An eighth of the rows to the text stream, the rest to the image's."""
    joint, order = size.normal(size.rows, size.width), torch.arange(size.rows, device=size.device)
    text_rows, image_rows = order[: size.rows // 8], order[size.rows // 8 :]
    endings = (size.endings(generation, len(rows), size.width) for rows in (text_rows, image_rows))
    for (ending, text), (_, image) in zip(*endings, strict=True):
        operands = (joint, text_rows, image_rows, *parts(text), *parts(image))
        yield Example(f"split_streams {ending}", split_streams_into, operands)
