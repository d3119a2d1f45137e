"""An autoencoder computed in strips of whole rows, layer by layer, to the same result as all at once but for rounding.

A convolution reads a strip and the real rows next to it. A normalisation waits for the sums over its whole input, which are
taken while that is made. Attention in the middle has all keys and values and takes its queries strip by strip. What lies
between two layers is as large as the picture; what is computed from it is as large as a strip. `plane.py` says where the former
is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plane import Keeper, Plane

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
    from diffusers.models.upsampling import Upsample2D


@dataclass(frozen=True)
class Strips:
    """How to cut.

    Args:
        pixels: of a strip where layers are widest at full resolution; elsewhere strips have as many elements.
        on_host: whether what lies between two layers waits in host memory.
    """

    pixels: int
    on_host: bool = False


def decode_in_strips(decoder: Decoder, z: Tensor, strips: Strips, layout: torch.memory_format) -> tuple[Tensor, int]:
    """Decode one latent.

    Args:
        decoder: diffusers', on the latent's device and in its precision.
        z: [1, 16, h, w].
        strips: how to cut.
        layout: of the decoder's weights.

    Returns:
        Pixels [1, 3, 8h, 8w] as `decoder(z)` gives them, and the bytes copied between host and device.
    """
    walk = _Walk(Keeper(z.device, layout, strips.on_host), strips.pixels * _full_width(decoder.up_blocks[-1].resnets))
    plane = walk.convolve(walk.given(z), decoder.conv_in)
    plane = walk.middle(plane, decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            # An upsampling has no normalisation before it.
            plane = walk.resnet(plane, resnet)
        for layer in block.upsamplers or ():
            plane = walk.upsample(plane, layer)
    return walk.finish(plane, decoder.conv_norm_out, decoder.conv_out), walk.keeper.moved_bytes


def encode_in_strips(encoder: Encoder, pixels: Tensor, strips: Strips, layout: torch.memory_format) -> tuple[Tensor, int]:
    """Encode one image [1, 3, h, w] to the moments that `encoder(pixels)` gives; the bytes copied between host and device."""
    walk = _Walk(Keeper(pixels.device, layout, strips.on_host), strips.pixels * _full_width(encoder.down_blocks[0].resnets))
    plane = walk.convolve(walk.given(pixels), encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            plane = walk.resnet(plane, resnet)
        for layer in block.downsamplers or ():
            plane = walk.downsample(plane, layer)
    plane = walk.middle(plane, encoder.mid_block)
    return walk.finish(plane, encoder.conv_norm_out, encoder.conv_out), walk.keeper.moved_bytes


def _full_width(resnets: nn.ModuleList) -> int:
    """Channels of the widest layer at full resolution."""
    return max(layer.in_channels for resnet in resnets for layer in resnet.modules() if isinstance(layer, nn.Conv2d))


class _Walk:
    """One run through a decoder or encoder: planes in, planes out.

    Args:
        keeper: where planes lie.
        elements: of a strip, of its input or output, whichever is larger.
    """

    def __init__(self, keeper: Keeper, elements: int) -> None:
        self.keeper = keeper
        self._elements = elements

    def given(self, tensor: Tensor) -> Plane:
        """The input as a plane."""
        plane = Plane(Keeper(tensor.device, self.keeper.layout), *tensor.shape[1:], measured=False)
        plane.add(tensor)
        return plane

    def convolve(self, source: Plane, layer: nn.Conv2d) -> Plane:
        """A 3x3 convolution."""
        out = Plane(self.keeper, layer.out_channels, source.height, source.width)
        for start, stop in self._spans(out.height, _row_elements(out, source)):
            out.add(_convolved(source.window(start - 1, stop + 1), layer))
            source.forget_before(stop - 1)
        return out

    def resnet(self, source: Plane, layer: ResnetBlock2D) -> Plane:
        """Norm, SiLU, convolution, twice, and the input or its projection beside them."""
        norm, project = source.norm_factors(layer.norm1), layer.conv_shortcut
        hidden = Plane(self.keeper, layer.conv1.out_channels, source.height, source.width)
        beside = source
        if project is not None:
            beside = Plane(self.keeper, project.out_channels, source.height, source.width, measured=False)
        for start, stop in self._spans(hidden.height, _row_elements(hidden, source)):
            hidden.add(_convolved(source.window(start - 1, stop + 1, norm, silu=True), layer.conv1))
            if project is not None:
                beside.add(project(source.window(start, stop)))
                source.forget_before(stop - 1)
        source.let_go()
        norm = hidden.norm_factors(layer.norm2)
        out = Plane(self.keeper, layer.conv2.out_channels, source.height, source.width)
        for start, stop in self._spans(out.height, _row_elements(out, hidden)):
            rows = _convolved(hidden.window(start - 1, stop + 1, norm, silu=True), layer.conv2)
            beside.add_to(rows, start)
            out.add(rows.div_(layer.output_scale_factor))
            hidden.forget_before(stop - 1)
            beside.forget_before(stop)
        return out

    def upsample(self, source: Plane, layer: Upsample2D) -> Plane:
        """Every value four times, and a convolution."""
        out = Plane(self.keeper, layer.conv.out_channels, 2 * source.height, 2 * source.width)
        for start, stop in self._spans(out.height, 2 * source.width * max(out.channels, source.channels)):
            out.add(_convolved(self._doubled(source, start - 1, stop + 1), layer.conv))
            source.forget_before((stop - 1) // 2)
        return out

    def downsample(self, source: Plane, layer: Downsample2D) -> Plane:
        """A convolution of stride 2 with zeros below and to the right."""
        out = Plane(self.keeper, layer.conv.out_channels, source.height // 2, source.width // 2)
        for start, stop in self._spans(out.height, 2 * source.channels * source.width):
            rows = F.pad(source.window(2 * start, 2 * stop + 1), (0, 1))
            out.add(F.conv2d(rows, layer.conv.weight, layer.conv.bias, stride=2))
            source.forget_before(2 * stop)
        return out

    def middle(self, source: Plane, block: UNetMidBlock2D) -> Plane:
        """ResNet, attention, ResNet."""
        plane = self.resnet(source, block.resnets[0])
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            plane = self.resnet(plane if attention is None else self.attend(plane, attention), resnet)
        return plane

    def attend(self, source: Plane, layer: Attention) -> Plane:
        """Attention over all positions: keys and values of all of them, queries strip by strip."""
        norm = source.norm_factors(layer.group_norm)
        keys, values = (self._projections(source, norm, part) for part in (layer.to_k, layer.to_v))
        out = Plane(self.keeper, source.channels, source.height, source.width)
        # The scores of a strip's queries have no more elements than a strip, whether or not a kernel keeps them.
        for start, stop in self._spans(source.height, source.width * max(source.channels, keys.shape[1])):
            rows = source.window(start, stop, norm)
            query = layer.to_q(rows.flatten(2).transpose(1, 2))
            q, k, v = (_by_head(part, layer.heads) for part in (query, keys, values))
            attended = F.scaled_dot_product_attention(q, k, v)
            tokens = layer.to_out[0](attended.transpose(1, 2).flatten(2))
            rows.copy_(tokens.transpose(1, 2).view_as(rows))
            del query, q, attended, tokens
            source.add_to(rows, start)
            out.add(rows.div_(layer.rescale_output_factor))
            source.forget_before(stop)
        return out

    def finish(self, source: Plane, norm: nn.GroupNorm, layer: nn.Conv2d) -> Tensor:
        """The last norm, SiLU and convolution."""
        factors = source.norm_factors(norm)
        strips = []
        for start, stop in self._spans(source.height, _row_elements(source)):
            strips.append(_convolved(source.window(start - 1, stop + 1, factors, silu=True), layer))
            source.forget_before(stop - 1)
        return torch.cat(strips, 2)

    def _projections(self, source: Plane, norm: tuple[Tensor, Tensor], layer: nn.Linear) -> Tensor:
        """Keys or values of all positions, [1, H * W, C]."""
        weight = layer.weight
        rows = torch.empty(1, source.height * source.width, layer.out_features, dtype=weight.dtype, device=weight.device)
        for start, stop in self._spans(source.height, _row_elements(source)):
            tokens = source.window(start, stop, norm).flatten(2).transpose(1, 2)
            rows[:, start * source.width : stop * source.width] = layer(tokens)
        return rows

    def _doubled(self, source: Plane, start: int, stop: int) -> Tensor:
        """Rows of the plane made twice as large; rows outside it are zeros."""
        first, last = max(start, 0), min(stop, 2 * source.height)
        rows = source.window(first // 2, (last + 1) // 2)
        doubled = self.keeper.empty(source.channels, stop - start, 2 * source.width, rows.dtype)
        numbers = torch.arange(first, last, device=rows.device) // 2 - first // 2
        high = rows.index_select(2, numbers)
        del rows
        for column in (0, 1):
            doubled[:, :, first - start : last - start, column::2] = high
        doubled[:, :, : first - start].zero_()
        doubled[:, :, last - start :].zero_()
        return doubled

    def _spans(self, height: int, elements: int) -> Iterator[tuple[int, int]]:
        """First row and the row after the last of every strip, for rows of so many elements."""
        step = max(1, self._elements // elements)
        for start in range(0, height, step):
            yield start, min(start + step, height)


def _convolved(rows: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 convolution whose rows above and below are there already."""
    return F.conv2d(rows, layer.weight, layer.bias, padding=(0, 1))


def _row_elements(*planes: Plane) -> int:
    """Elements of a row of the largest of the planes."""
    return max(plane.channels * plane.width for plane in planes)


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """[1, L, C] as [1, H, L, D]."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)
