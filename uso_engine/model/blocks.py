"""The two kinds of transformer block, on a packed batch.

A block receives each residual stream together with its normalised, modulated form, and ends by adding its output and preparing
that form for the block that follows: gated addition and the next LayerNorm are one pass over the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from uso_kernels.attention import attention
from uso_kernels.qk_norm_rope import qk_norm_rope
from uso_kernels.quantize_rows import lend_quantized
from uso_kernels.ragged import Ragged
from uso_kernels.split_streams import split_streams_quantized

from .activation import Activation, Norm, QuantizedRows, Stream, activate, add_and_norm, input_dtype, multiply
from .linear import Linear
from .modulation import DOUBLE_VECTORS, SINGLE_VECTORS, ModulationLinear
from .packing import PackedBatch, select_rows
from .params import TransformerParams
from .workspace import NARROW, WIDE, Workspace


@dataclass(frozen=True)
class Run:
    """What every block of one evaluation shares.

    Args:
        batch: where the sequences lie.
        workspace: buffers to write to.
        attention: the attention backend, see `uso_kernels.attention`.
    """

    batch: PackedBatch
    workspace: Workspace = field(default_factory=lambda: Workspace(reuse=False))
    attention: str = "auto"


class HeadScale(nn.Module):
    """RMSNorm weight of one head dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width), requires_grad=False)


class QKNorm(nn.Module):
    """RMSNorm weights of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = HeadScale(head_dim)
        self.key_norm = HeadScale(head_dim)


class SelfAttention(nn.Module):
    """Fused q/k/v projection, norms and output projection of one stream."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.qkv = Linear(width, 3 * width, bias=params.qkv_bias)
        self.norm = QKNorm(params.head_dim)
        self.proj = Linear(width, width)


def feed_forward(params: TransformerParams) -> nn.ModuleDict:
    """The two layers of an MLP under their checkpoint names."""
    return nn.ModuleDict({"0": Linear(params.hidden_size, params.mlp_width), "2": Linear(params.mlp_width, params.hidden_size)})


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, attending to each other."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        self.heads, self.head_dim = params.num_heads, params.head_dim
        self.img_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.img_attn = SelfAttention(params)
        self.img_mlp = feed_forward(params)
        self.txt_mod = ModulationLinear(params.hidden_size, DOUBLE_VECTORS // 2)
        self.txt_attn = SelfAttention(params)
        self.txt_mlp = feed_forward(params)

    def modulation_vectors(self, activated: Tensor) -> Tensor:
        """Image's six vectors, then text's, of N conditioning vectors: [N, C] to [N, 12, C]."""
        return torch.cat((self.img_mod(activated), self.txt_mod(activated)), dim=1)

    def first_norms(self, modulation: Tensor) -> tuple[Norm, Norm]:
        """The norms before attention, of text and of image, from this block's [S, 12, C]."""
        text = Norm(modulation[:, 6], modulation[:, 7], input_dtype(self.txt_attn.qkv))
        return text, Norm(modulation[:, 0], modulation[:, 1], input_dtype(self.img_attn.qkv))

    def forward(
        self, text: Stream, image: Stream, modulation: Tensor, run: Run, following: tuple[Norm, Norm] | None
    ) -> tuple[Stream, Stream]:
        """Run the block.

        Args:
            text: streams of [T_txt, C].
            image: streams of [T_img, C].
            modulation: [S, 12, C].
            run: the batch, and what to compute it with.
            following: the next block's norms of text and image; None after the last double block.

        Returns:
            Both streams after the block.
        """
        batch = run.batch
        q, k, v = _joint_buffers(run, image.x, self.heads, self.head_dim)
        for stream, layer, layout, place in (
            (text, self.txt_attn, batch.text, batch.text_place),
            (image, self.img_attn, batch.image, batch.image_place),
        ):
            scales = layer.norm.query_norm.scale, layer.norm.key_norm.scale
            targets = (x[place.span] for x in (batch.cos, batch.sin, q, k, v))
            cos, sin, stream_q, stream_k, stream_v = targets
            assert stream.normed is not None
            qkv = multiply(layer.qkv, stream.normed, layout, run.workspace, WIDE)
            qk_norm_rope(qkv, *scales, cos, sin, place.rows, stream_q, stream_k, stream_v)
        out = run.workspace.take("attended", q.shape, q)
        attended = _attend(q, k, v, run, batch.joint, out)
        text_attended, image_attended = self._split(attended, run)
        text_next, image_next = following if following is not None else (None, None)
        image = self._finish(image.x, image_attended, modulation[:, :6], run, image_next, "image")
        text = self._finish(text.x, text_attended, modulation[:, 6:], run, text_next, "text")
        return text, image

    def _split(self, attended: Tensor, run: Run) -> tuple[Activation, Activation]:
        batch, dtype = run.batch, input_dtype(self.txt_attn.proj)
        if dtype is None or dtype != input_dtype(self.img_attn.proj):
            return batch.split(attended, run.workspace)
        rows, width = (batch.text_joint_rows, batch.image_joint_rows), attended.shape[1]
        text_out, image_out = (
            lend_quantized(run.workspace.take, f"{name}.attended", (layout.rows, width), attended, dtype)
            for name, layout in (("text", batch.text), ("image", batch.image))
        )
        text, image = split_streams_quantized(attended, *rows, dtype, out=(text_out, image_out))
        return QuantizedRows(*text), QuantizedRows(*image)

    def _finish(
        self, x: Tensor, attended: Activation, modulation: Tensor, run: Run, following: Norm | None, name: str
    ) -> Stream:
        """Output projection, MLP and the two gated additions of one stream; modulation is its [S, 6, C]."""
        is_image = name == "image"
        proj, mlp = (self.img_attn.proj, self.img_mlp) if is_image else (self.txt_attn.proj, self.txt_mlp)
        layout = run.batch.image if is_image else run.batch.text
        tiles = layout.tile_sequence
        _, _, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(1)
        middle = Norm(mlp_shift, mlp_scale, input_dtype(mlp["0"]))
        y = multiply(proj, attended, layout, run.workspace, NARROW)
        x, normed = add_and_norm(x, y, attention_gate, tiles, middle, run.workspace, name)
        assert normed is not None
        hidden = multiply(mlp["0"], normed, layout, run.workspace, WIDE)
        activated = activate(None, hidden, mlp["2"], run.workspace, hidden)
        y = multiply(mlp["2"], activated, layout, run.workspace, NARROW)
        return add_and_norm(x, y, mlp_gate, tiles, following, run.workspace, name)


class SingleBlock(nn.Module):
    """One joint stream; attention and MLP side by side, sharing their first and last matrix."""

    def __init__(self, params: TransformerParams) -> None:
        super().__init__()
        width = params.hidden_size
        self.heads, self.head_dim, self.width = params.num_heads, params.head_dim, width
        self.linear1 = Linear(width, 3 * width + params.mlp_width)
        self.linear2 = Linear(width + params.mlp_width, width)
        self.norm = QKNorm(params.head_dim)
        self.modulation = ModulationLinear(width, SINGLE_VECTORS)

    def modulation_vectors(self, activated: Tensor) -> Tensor:
        """Shift, scale and gate of N conditioning vectors: [N, C] to [N, 3, C]."""
        vectors: Tensor = self.modulation(activated)
        return vectors

    def first_norm(self, modulation: Tensor) -> Norm:
        """The norm before this block, from its [S, 3, C]."""
        return Norm(modulation[:, 0], modulation[:, 1], input_dtype(self.linear1))

    def forward(self, stream: Stream, modulation: Tensor, run: Run, following: Norm) -> Stream:
        """Run the block on every row.

        Args:
            stream: streams of [T, C].
            modulation: [S, 3, C].
            run: the batch, and what to compute it with.
            following: the next block's norm.

        Returns:
            The stream after the block.
        """
        assert stream.normed is not None
        projected = multiply(self.linear1, stream.normed, run.batch.joint, run.workspace, WIDE)
        q, k, v = self._queries_keys_values(projected[:, : 3 * self.width], run)
        y = self._output(q, k, v, projected[:, 3 * self.width :], run, run.batch.joint)
        return add_and_norm(stream.x, y, modulation[:, 2], run.batch.joint.tile_sequence, following, run.workspace, "joint")

    def forward_output_rows(self, stream: Stream, modulation: Tensor, run: Run, following: Norm) -> Stream:
        """Run the last block: only the rows of the images being made leave it, so only they are computed.

        Keys and values need every row; queries, MLP and output do not. Arguments as for `forward`, but `stream` must hold
        floats; returns [T_out, C] streams.
        """
        rows, layout, workspace = run.batch.output_joint_rows, run.batch.output, run.workspace
        assert isinstance(stream.normed, Tensor)
        q, k, v = self._queries_keys_values(
            multiply(self.linear1, stream.normed, run.batch.joint, workspace, WIDE, slice(0, 3 * self.width)), run
        )
        normed = select_rows(stream.normed, rows, workspace, NARROW)
        hidden = multiply(self.linear1, normed, layout, workspace, WIDE, slice(3 * self.width, None))
        y = self._output(select_rows(q, rows, workspace, NARROW), k, v, hidden, run, layout)
        # The double blocks' image stream is no longer needed, and has at least as many rows.
        x = select_rows(stream.x, rows, workspace, "image.x")
        return add_and_norm(x, y, modulation[:, 2], layout.tile_sequence, following, workspace, "image")

    def _queries_keys_values(self, qkv: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _joint_buffers(run, qkv, self.heads, self.head_dim)
        scales = self.norm.query_norm.scale, self.norm.key_norm.scale
        qk_norm_rope(qkv, *scales, run.batch.cos, run.batch.sin, None, q, k, v)
        return q, k, v

    def _output(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, run: Run, queries: Ragged) -> Tensor:
        """Attention, MLP activation and the matrix that reads both; attention writes into that matrix's operand of floats."""
        if input_dtype(self.linear2) is None:
            operand = run.workspace.take("operand", (q.shape[0], self.width + hidden.shape[1]), q)
            out = operand[:, : self.width].unflatten(1, (self.heads, self.head_dim))
        else:
            operand, out = None, run.workspace.take("attended", q.shape, q)
        attended = _attend(q, k, v, run, queries, out)
        activated = activate(attended, hidden, self.linear2, run.workspace, operand)
        return multiply(self.linear2, activated, queries, run.workspace, NARROW)


def _attend(q: Tensor, k: Tensor, v: Tensor, run: Run, queries: Ragged, out: Tensor) -> Tensor:
    """Attention to the joint order's keys: [T_q, C]."""
    attended = attention(q, k, v, queries, run.batch.joint, backend=run.attention, out=out, scratch=run.workspace.take)
    return attended.flatten(1)


def _joint_buffers(run: Run, like: Tensor, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the joint order, each [T, H, D], to be written."""
    shape = (run.batch.joint.rows, heads, head_dim)
    return run.workspace.take("q", shape, like), run.workspace.take("k", shape, like), run.workspace.take("v", shape, like)
