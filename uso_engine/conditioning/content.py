"""Content image to latent and latent to picture: diffusers' AutoencoderKL in FLUX's scaled and shifted latent space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uso_engine.conditioning.cache import hash_tensor
from uso_engine.conditioning.offloadable_part import OffloadablePart
from uso_engine.conditioning.pretrained import fingerprint
from uso_engine.conditioning.strips import Strips, decode_in_strips, encode_in_strips
from uso_engine.sampling.noise import draw_normal

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

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
        tile_side: compute images of more pixels than a square with this side in strips of so many, which bounds memory;
            results differ by rounding. None never does.

    Raises:
        ValueError: a tile side that is less than two latent cells (16 pixels).
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
        if tile_side is not None and tile_side < self.multiple:
            raise ValueError(f"tile_side must be at least {self.multiple}, got {tile_side}")
        self.strip_pixels = None if tile_side is None else tile_side**2
        self.moved_bytes = 0
        """Copied between host and device while decoding in strips that wait on the host, so far."""
        settings = f"{scale_factor} {shift_factor} {encode_dtype} {tile_side}"
        self.identity = fingerprint([module.encoder], settings)
        self._part = OffloadablePart("autoencoder", [module])

    @property
    def parts(self) -> tuple[OffloadablePart, ...]:
        """Encoder and decoder as one part of a memory plan."""
        return (self._part,)

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
        with self._part.running():
            device = next(self._module.encoder.parameters()).device
            posterior = self._encode(pixels.to(device, self._encode_dtype))
        latent: Tensor = posterior.mean[0].float()
        if sample_seed is not None:
            latent = latent + posterior.std[0].float() * draw_normal(latent.shape, sample_seed).to(device)
        return (latent - self.shift_factor) * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor, strips: Strips | None = None) -> Tensor:
        """Turn latents into pictures, one by one: a picture does not depend on its neighbours, nor memory on their number.

        Args:
            latents: [n, 16, h/8, w/8], scaled and shifted.
            strips: decode pictures of more pixels than a strip in strips; None for what the autoencoder was made with.

        Returns:
            Pixels [n, 3, h, w], float32, around -1..1 and not clipped.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(f"latents must have shape [n, {self.latent_channels}, h/8, w/8], got {list(latents.shape)}")
        if strips is None and self.strip_pixels is not None:
            strips = Strips(self.strip_pixels)
        pictures = []
        with self._part.running():
            device = next(self._module.decoder.parameters()).device
            for latent in latents.to(device).unbind():
                z = (latent[None].float() / self.scale_factor + self.shift_factor).to(self._decode_dtype)
                z = z.contiguous(memory_format=self._decode_layout)
                pictures.append(self._decode(z, strips).float())
        return torch.cat(pictures)

    def _encode(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        if self.strip_pixels is None or pixels.shape[2] * pixels.shape[3] <= self.strip_pixels:
            return self._module.encode(pixels, return_dict=True).latent_dist
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        moments, _ = encode_in_strips(self._module.encoder, pixels, Strips(self.strip_pixels), torch.contiguous_format)
        if self._module.quant_conv is not None:
            moments = self._module.quant_conv(moments)
        return DiagonalGaussianDistribution(moments)

    def _decode(self, z: Tensor, strips: Strips | None) -> Tensor:
        if strips is None or z.shape[2] * z.shape[3] * self.downscale**2 <= strips.pixels:
            whole: Tensor = self._module.decode(z, return_dict=True).sample
            return whole
        if self._module.post_quant_conv is not None:
            z = self._module.post_quant_conv(z)
        picture, moved = decode_in_strips(self._module.decoder, z, strips, self._decode_layout)
        self.moved_bytes += moved
        return picture

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
