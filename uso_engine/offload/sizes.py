"""Bytes of everything an engine keeps on a GPU, computed from tensors on the meta device: nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from uso_engine.model.params import TransformerParams
from uso_engine.model.projector import StyleProjector
from uso_engine.precision.tiers import TIERS, Format, TextTierName, linear_classes
from uso_engine.precision.transformer import is_modulation, linears, quantized_transformer
from uso_kernels.ragged import round_up_to_tile

from .autoencoder_sizes import CUTS, FLUX_DECODER, FLUX_ENCODER, CoderSizes, Cut

ROW_WIDTHS = 12
"""Activations alive at once in a block, in units of [T, C], for a model whose MLP is four times as wide, at the most: 9, as
docs/performance.md writes it out, and 3 more where an attention backend copies q, k and v without their padding rows.
tests/test_memory_plan.py and tests/test_hot_loop.py count every live tensor."""

ROW_WIDTHS_OF_EIGHT_BITS = 16
"""The same where products read 8-bit rows: 13 and 3 more."""


@dataclass(frozen=True)
class ComponentSizes:
    """One part beside the transformer.

    Args:
        name: as plans show it.
        weight_bytes: all of its weights.
        fixed_bytes: the part of them that stays while its layers are streamed through.
        largest_layer_bytes: largest unit that is moved at once.
        working_bytes: activations while it runs, without those that grow with the image.
    """

    name: str
    weight_bytes: int
    fixed_bytes: int
    largest_layer_bytes: int
    working_bytes: int = 0


@dataclass(frozen=True)
class TransformerSizes:
    """The transformer in bytes.

    Args:
        hidden_size: C.
        vectors: rows of the modulation table per step.
        always: embedders and the last projection.
        double_blocks: each double block without its modulation linears.
        single_blocks: each single block without its modulation linear.
        modulation: each modulation linear.
        scratch: the largest weight that is turned back into bfloat16 for a product; 0 where none is.
        itemsize: bytes of an activation.
        row_widths: activations alive at once, in units of [T, C].
    """

    hidden_size: int
    vectors: int
    always: int
    double_blocks: tuple[int, ...]
    single_blocks: tuple[int, ...]
    modulation: tuple[int, ...]
    scratch: int
    itemsize: int = 2
    row_widths: int = ROW_WIDTHS

    @property
    def without_modulation(self) -> int:
        """What is resident while modulation linears are not."""
        return self.always + sum(self.double_blocks) + sum(self.single_blocks)

    @property
    def total(self) -> int:
        """All of it."""
        return self.without_modulation + sum(self.modulation)


@dataclass(frozen=True)
class EngineSizes:
    """Everything: the transformer, and those of the parts around it that there are, by name.

    Args:
        transformer: its sizes.
        components: "T5", "CLIP", "SigLIP and projector", "autoencoder", "safety classifier".
        encoder: live tensors of the autoencoder's encoder.
        decoder: those of its decoder.
        strip_pixels: of the strips that the configuration asks for in both; None where it asks for none.
    """

    transformer: TransformerSizes
    components: Mapping[str, ComponentSizes]
    encoder: CoderSizes = FLUX_ENCODER
    decoder: CoderSizes = FLUX_DECODER
    strip_pixels: int | None = None

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The ways in which pictures may be decoded, from the fastest to the smallest."""
        return CUTS if self.strip_pixels is None else CUTS[1:]

    @property
    def encoding(self) -> Cut:
        """How content images are encoded: they are small, and cut only where the configuration says so."""
        return self.cuts[0]


@dataclass(frozen=True)
class RequestSize:
    """What is to fit: one request.

    Args:
        width: of the images, in pixels.
        height: of the images, in pixels.
        images: made at once.
        steps: denoising steps.
        text_tokens: of the prompt.
        contents: content images, taken as square.
        content_side: their long side in pixels.
        start_pixels: of the picture that the run starts from, where it does not start from noise.
        styles: style images.
        style_tokens: tokens of each.
        negative: whether a negative prompt is computed beside the prompt.
    """

    width: int = 1024
    height: int = 1024
    images: int = 1
    steps: int = 28
    text_tokens: int = 512
    contents: int = 1
    content_side: int = 512
    start_pixels: int = 0
    styles: int = 1
    style_tokens: int = 192
    negative: bool = False

    @property
    def sequences(self) -> int:
        """Sequences in the batch."""
        return self.images * (2 if self.negative else 1)

    @property
    def rows(self) -> int:
        """Packed rows of the transformer."""
        text = round_up_to_tile(self.text_tokens + self.styles * self.style_tokens)
        image = (self.width // 16) * (self.height // 16) + self.contents * (self.content_side // 16) ** 2
        return self.sequences * (text + round_up_to_tile(image))


def transformer_sizes(
    params: TransformerParams, formats: Mapping[str, Format], *, dtype: torch.dtype = torch.bfloat16
) -> TransformerSizes:
    """Sizes of a transformer whose matrices have the given formats; see `layer_formats`."""
    module = quantized_transformer(params, formats, dtype=dtype)
    blocks: dict[str, int] = {}
    modulation: dict[str, int] = {}
    always = 0
    for key, tensor in module.state_dict().items():
        path = key.rpartition(".")[0]
        if is_modulation(path):
            modulation[path] = modulation.get(path, 0) + tensor.nbytes
        elif key.startswith(("double_blocks.", "single_blocks.")):
            block = ".".join(key.split(".")[:2])
            blocks[block] = blocks.get(block, 0) + tensor.nbytes
        else:
            always += tensor.nbytes
    scratch = max(
        (
            layer.in_features * layer.out_features * dtype.itemsize
            for name, layer in linears(params).items()
            if restores_weight(formats[name])
        ),
        default=0,
    )
    return TransformerSizes(
        hidden_size=params.hidden_size,
        vectors=module.modulation_vectors,
        always=always,
        double_blocks=tuple(size for name, size in blocks.items() if name.startswith("double")),
        single_blocks=tuple(size for name, size in blocks.items() if name.startswith("single")),
        modulation=tuple(modulation.values()),
        scratch=scratch,
        itemsize=dtype.itemsize,
        row_widths=ROW_WIDTHS_OF_EIGHT_BITS if any(map(reads_eight_bits, formats.values())) else ROW_WIDTHS,
    )


def reads_eight_bits(chosen: Format) -> bool:
    """Whether a product in a format reads 8-bit rows."""
    return chosen != "float" and linear_classes()[chosen].takes is not None


def restores_weight(chosen: Format) -> bool:
    """Whether a product in a format needs memory for the whole weight in floating point."""
    return chosen != "float" and linear_classes()[chosen].restores_weight


@dataclass(frozen=True)
class PublicModels:
    """Parameters of the public models around FLUX.1-dev, from their configurations on the meta device.

    T5 v1.1 XXL's encoder, CLIP ViT-L/14's text half, SigLIP so400m/14 at 384, FLUX's autoencoder, Falconsai's ViT-B/16
    classifier.
    """

    t5_blocks: int = 24
    t5_block_matrices: tuple[tuple[int, int], ...] = (*[(4096, 4096)] * 4, (10240, 4096), (10240, 4096), (4096, 10240))
    t5_block_others: int = 8_192
    t5_others: int = 131_799_040
    clip: int = 123_060_480
    clip_block: int = 7_087_872
    vision: int = 428_225_600
    vision_block: int = 15_239_504
    autoencoder: int = 83_819_683
    safety: int = 85_800_194
    projector_params: tuple[int, int, int] = field(default=(729, 1152, 64))


def public_engine_sizes(
    params: TransformerParams,
    formats: Mapping[str, Format],
    *,
    text_encoder: TextTierName = "bf16",
    dtype: torch.dtype = torch.bfloat16,
) -> EngineSizes:
    """Sizes of an engine for FLUX.1-dev and the public models around it.

    Args:
        params: the transformer's sizes.
        formats: of its matrices, see `layer_formats`.
        text_encoder: how T5's matrices are kept.
        dtype: of what stays in floating point in transformer, projector and text encoders.
    """
    public = PublicModels()
    size = dtype.itemsize
    tokens, width, style_tokens = public.projector_params
    with torch.device("meta"):
        projector = StyleProjector(
            vision_tokens=tokens, vision_width=width, style_tokens=style_tokens, hidden_size=params.hidden_size
        )
    projector_bytes = size * sum(parameter.numel() for parameter in projector.parameters())
    components = (
        _t5_sizes(public, TIERS[text_encoder].text_encoder or "float", dtype),
        ComponentSizes(
            "CLIP", size * public.clip, size * (public.clip - 12 * public.clip_block), size * public.clip_block, 20_000_000
        ),
        ComponentSizes(
            "SigLIP and projector",
            4 * public.vision + projector_bytes,
            4 * (public.vision - 27 * public.vision_block) + projector_bytes,
            4 * public.vision_block,
            180_000_000,
        ),
        ComponentSizes("autoencoder", 4 * public.autoencoder, 4 * public.autoencoder, 0),
        ComponentSizes(
            "safety classifier",
            4 * public.safety,
            4 * public.safety,
            0,
            170_000_000,
        ),
    )
    return EngineSizes(transformer_sizes(params, formats, dtype=dtype), {component.name: component for component in components})


def _t5_sizes(public: PublicModels, chosen: Format, dtype: torch.dtype) -> ComponentSizes:
    """T5 with its matrices in a format; the rest is of a floating type."""
    matrices = sum(_matrix_bytes(chosen, rows, columns, dtype) for rows, columns in public.t5_block_matrices)
    largest = max(rows * columns for rows, columns in public.t5_block_matrices)
    return ComponentSizes(
        "T5",
        public.t5_blocks * matrices + dtype.itemsize * public.t5_others,
        dtype.itemsize * public.t5_others,
        matrices + dtype.itemsize * public.t5_block_others,
        dtype.itemsize * (165_000_000 + (largest if restores_weight(chosen) else 0)),
    )


def _matrix_bytes(chosen: Format, rows: int, columns: int, dtype: torch.dtype) -> int:
    if chosen == "float":
        return rows * columns * dtype.itemsize
    return sum(layout.size_bytes for layout in linear_classes()[chosen].layout(columns, rows).values())
