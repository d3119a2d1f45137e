"""Sizes of the autoencoder, and the names and shapes of its weights as Black Forest Labs' ``ae.safetensors`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AutoencoderParams:
    """Sizes of the autoencoder; the defaults are FLUX.1's.

    Args:
        ch: channels of the first level.
        ch_mult: channels of every level, in multiples of ``ch``.
        num_res_blocks: residual blocks of an encoder level; a decoder level has one more.
        z_channels: channels of the latent.
        scale_factor: latent = scale_factor * (mean - shift_factor).
        shift_factor: see ``scale_factor``.
        in_channels: of the image that is encoded.
        out_ch: of the image that is decoded.
        resolution: side in pixels that it was trained on; changes no weight.
        norm_groups: groups of every group normalisation; divides every level's channels. FLUX.1's 32 would normalise single
            channels in a small autoencoder, and a channel without its mean cannot carry a flat colour.

    Raises:
        ValueError: a size is not possible.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    in_channels: int = 3
    out_ch: int = 3
    resolution: int = 256
    norm_groups: int = 32

    def __post_init__(self) -> None:
        channels = (self.z_channels, self.in_channels, self.out_ch)
        sizes = (self.ch, *self.ch_mult, self.num_res_blocks, *channels, self.resolution, self.norm_groups)
        if not self.ch_mult or min(sizes) < 1:
            raise ValueError(f"every size of the autoencoder must be at least 1, got {self}")
        if any(self.ch * m % self.norm_groups for m in self.ch_mult):
            raise ValueError(
                f"ch * ch_mult must be multiples of {self.norm_groups}, the number of norm groups; "
                f"got {self.ch} * {self.ch_mult}"
            )
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor must be above 0, got {self.scale_factor}")


def autoencoder_shapes(params: AutoencoderParams) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of an autoencoder by Black Forest Labs' key.

    Args:
        params: its sizes.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)

    def middle(name: str, channels: int) -> None:
        resnet(f"{name}.block_1", channels, channels)
        norm(f"{name}.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", channels, channels, kernel=1)
        resnet(f"{name}.block_2", channels, channels)

    widths = [params.ch * m for m in params.ch_mult]
    conv("encoder.conv_in", params.in_channels, params.ch)
    for level, (inputs, outputs) in enumerate(zip([params.ch, *widths], widths, strict=False)):
        for block in range(params.num_res_blocks):
            resnet(f"encoder.down.{level}.block.{block}", outputs if block else inputs, outputs)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", outputs, outputs)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 2 * params.z_channels)

    conv("decoder.conv_in", params.z_channels, widths[-1])
    middle("decoder.mid", widths[-1])
    for level, inputs, outputs in _decoder_levels(widths):
        for block in range(params.num_res_blocks + 1):
            resnet(f"decoder.up.{level}.block.{block}", outputs if block else inputs, outputs)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", outputs, outputs)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], params.out_ch)
    return shapes


def _decoder_levels(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Level, inputs and outputs of the decoder's levels, from the lowest resolution up."""
    levels = []
    inputs = widths[-1]
    for level in reversed(range(len(widths))):
        levels.append((level, inputs, widths[level]))
        inputs = widths[level]
    return levels
