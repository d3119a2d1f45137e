"""Content image to latent and latent to picture: diffusers' AutoencoderKL in FLUX's scaled and shifted latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uso_engine.conditioning.cache import hash_tensor
from uso_engine.conditioning.movable_part import MovablePart
from uso_engine.conditioning.pretrained import fingerprint
from uso_engine.sampling.noise import draw_normal

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

# Pixels are -1..1; an image that was merely never scaled from 0..255 must not pass, rounding may.
_LARGEST_PIXEL = 1.001


class Autoencoder:
    """Encodes to the mean of the posterior, scaled and shifted; decodes the same space.

    Encoder and decoder may run in different precisions. Content images are encoded in float32, as the authors do it.

    Args:
        module: in evaluation mode, with its weights.
        scale_factor: the latent space's factor (0.3611 for FLUX).
        shift_factor: its offset (0.1159).
        device: where it runs.
        encode_dtype: of the encoder's weights and compute.
        decode_dtype: of the decoder's weights and compute.
        tile_side: encode and decode images with a longer side in overlapping tiles of this many pixels, which bounds memory and
            changes the result at the seams; None never does.

    Raises:
        ValueError: a tile side that is not a positive multiple of four latent cells (32 pixels).
    """

    def __init__(
        self,
        module: AutoencoderKL,
        *,
        scale_factor: float,
        shift_factor: float,
        device: torch.device | str = "cpu",
        encode_dtype: torch.dtype = torch.float32,
        decode_dtype: torch.dtype = torch.float32,
        tile_side: int | None = None,
    ) -> None:
        self.scale_factor = scale_factor
        self.shift_factor = shift_factor
        self.latent_channels = int(module.config["latent_channels"])
        self.image_channels = int(module.config["in_channels"])
        self.downscale = 2 ** (len(module.config["block_out_channels"]) - 1)
        # A latent is packed in 2x2 squares, so an image side is a multiple of two latent cells.
        self.multiple = 2 * self.downscale
        self._module = module
        self.to(device)
        module.eval().requires_grad_(False)
        self._module.encoder.to(encode_dtype)
        self._module.decoder.to(decode_dtype)
        self._encode_dtype, self._decode_dtype = encode_dtype, decode_dtype
        # 16-bit convolutions run on tensor cores in this layout; in float32 it would change the order of sums for nothing.
        self._decode_layout = torch.contiguous_format if decode_dtype == torch.float32 else torch.channels_last
        self._module.decoder.to(memory_format=self._decode_layout)
        self._check_tiles(tile_side)
        self._encode_tile = self._decode_tile = tile_side
        settings = f"{scale_factor} {shift_factor} {encode_dtype} {tile_side}"
        self.identity = fingerprint([module.encoder], settings)
        self._part = MovablePart("autoencoder", [module])

    @property
    def parts(self) -> tuple[MovablePart, ...]:
        """Encoder and decoder as one, for whoever moves them."""
        return (self._part,)

    @property
    def tile_side(self) -> int | None:
        """The tiles that it was made with; a plan may decode in smaller ones."""
        return self._encode_tile

    @property
    def relative_working_size(self) -> tuple[float, float]:
        """Activations per pixel of encoder and decoder, FLUX's autoencoder in float32 being 1."""
        channels = int(self._module.config["block_out_channels"][0]) / 128
        return channels * self._encode_dtype.itemsize / 4, channels * self._decode_dtype.itemsize / 4

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the weights."""
        module: nn.Module = self._module
        module.to(device)
        return self

    def decode_in_tiles(self, tile_side: int) -> None:
        """Decode larger images in tiles of at most so many pixels from now on; how images are encoded does not change.

        Raises:
            ValueError: not a positive multiple of four latent cells (32 pixels).
        """
        self._check_tiles(tile_side)
        self._decode_tile = tile_side if self._decode_tile is None else min(tile_side, self._decode_tile)

    def hash_pixels(self, pixels: Tensor, sample_seed: int | None = None) -> str:
        """Hash pixels as read by this encoder: the cache's key."""
        return hash_tensor(pixels, f"{self.identity} {sample_seed}")

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, sample_seed: int | None = None) -> Tensor:
        """Turn one image into its latent.

        Args:
            pixels: [1, 3, h, w] in -1..1, sides multiples of 16.
            sample_seed: draw from the posterior with this seed (`uso_engine.sampling.noise`) instead of taking its mean.

        Returns:
            (z - shift) * scale, [16, h/8, w/8], float32 on the autoencoder's device.

        Raises:
            ValueError: pixels of another shape or range.
        """
        self._check_pixels(pixels)
        self._use_tiles(self._encode_tile)
        with self._part.running():
            device = next(self._module.encoder.parameters()).device
            posterior = self._module.encode(pixels.to(device, self._encode_dtype), return_dict=True).latent_dist
        latent: Tensor = posterior.mean[0].float()
        if sample_seed is not None:
            latent = latent + posterior.std[0].float() * draw_normal(latent.shape, sample_seed).to(device)
        return (latent - self.shift_factor) * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into pictures, one by one: a picture does not depend on its neighbours, nor memory on their number.

        Args:
            latents: [n, 16, h/8, w/8], scaled and shifted.

        Returns:
            Pixels [n, 3, h, w], float32, around -1..1 and not clipped.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents must have shape [n, {self.latent_channels}, h/8, w/8], got {list(latents.shape)}")
        self._use_tiles(self._decode_tile)
        pictures = []
        with self._part.running():
            device = next(self._module.decoder.parameters()).device
            for latent in latents.to(device).unbind():
                z = (latent[None].float() / self.scale_factor + self.shift_factor).to(self._decode_dtype)
                z = z.contiguous(memory_format=self._decode_layout)
                pictures.append(self._module.decode(z, return_dict=True).sample.float())
        return torch.cat(pictures)

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[:2] != (1, self.image_channels):
            raise ValueError(f"pixels must have shape [1, {self.image_channels}, h, w], got {list(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height < self.multiple or width < self.multiple or height % self.multiple or width % self.multiple:
            raise ValueError(f"image sides must be multiples of {self.multiple}, got {width}x{height} (width x height)")
        # A not-a-number fails this comparison too.
        largest = float(pixels.abs().amax())
        if not largest <= _LARGEST_PIXEL:
            raise ValueError(f"pixels must lie in -1..1, the largest magnitude is {largest:g}")

    def _check_tiles(self, tile_side: int | None) -> None:
        # Tiles overlap by a quarter, which has to fall on whole latent cells.
        step = 4 * self.downscale
        if tile_side is not None and (tile_side < step or tile_side % step):
            raise ValueError(f"tile_side must be a positive multiple of {step}, got {tile_side}")

    def _use_tiles(self, tile_side: int | None) -> None:
        self._module.use_tiling = tile_side is not None
        if tile_side is not None:
            self._module.tile_sample_min_size = tile_side
            self._module.tile_latent_min_size = tile_side // self.downscale
