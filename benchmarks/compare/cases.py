"""The requests that are compared, and the sizes of the models that they are compared on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from benchmarks.encoders import FULL, THOUSANDTH, EncoderSizes, small_encoders
from benchmarks.workload import SMALL, TINY
from uso_engine.model.params import TransformerParams
from uso_engine.model.roofline import Tokens
from uso_engine.sampling.latents import PIXELS_PER_TOKEN


@dataclass(frozen=True)
class Case:
    """A request.

    Args:
        width: of its pictures, in pixels.
        height: likewise.
        contents: content images, none or one.
        styles: style images, none to two.
        images: pictures that it makes.
        steps: instead of its size's.
    """

    width: int
    height: int
    contents: int
    styles: int
    images: int = 1
    steps: int | None = None

    @property
    def name(self) -> str:
        """What records and `--cases` call it."""
        parts = [*["content"] * self.contents, *["style"] * self.styles]
        extras = [f"{self.images}-images"] * (self.images > 1) + [f"{self.steps}-steps"] * (self.steps is not None)
        return "-".join([f"{self.width}x{self.height}", *parts, *extras])


@dataclass(frozen=True)
class Size:
    """Sizes of the models, and of what a request brings.

    Args:
        name: what records call it.
        params: of the transformer.
        encoders: of the others; None where all models are read from files.
        text: T5's tokens.
        style_tokens: of each of a style image's three levels.
        content_side: long side of a content image, in pixels.
        shapes: width and height of the core's pictures, the smaller first.
        other_shape: of the picture of the further cases.
        steps: denoising steps.
        few_steps: of the case with few.
        lora_rank: of the LoRA.
        guidance: of every request.
    """

    name: str
    params: TransformerParams
    encoders: EncoderSizes | None
    text: int
    style_tokens: int
    content_side: int
    shapes: tuple[tuple[int, int], tuple[int, int]]
    other_shape: tuple[int, int]
    steps: int
    few_steps: int
    lora_rank: int
    guidance: float = 4.0

    def tokens(self, case: Case) -> Tokens:
        """Tokens of one picture of a case."""
        image = case.width * case.height // PIXELS_PER_TOKEN**2
        content = case.contents * (self.content_side // PIXELS_PER_TOKEN) ** 2
        return Tokens(self.text, 3 * self.style_tokens * case.styles, image, content)

    def steps_of(self, case: Case) -> int:
        """Denoising steps of a case."""
        return self.steps if case.steps is None else case.steps

    def core(self) -> tuple[Case, ...]:
        """The six cases that every comparison has."""
        return tuple(Case(*shape, contents, styles) for shape in self.shapes for contents, styles in ((1, 0), (0, 1), (1, 1)))

    def rest(self) -> tuple[Case, ...]:
        """Further cases: another shape, several pictures, few steps, two styles."""
        small, large = self.shapes
        several = [Case(*small, 1, 1, images=count) for count in (2, 4)]
        return (Case(*self.other_shape, 1, 1), *several, Case(*large, 1, 1, steps=self.few_steps), Case(*large, 1, 2))


def _squares(small: int, large: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (small, small), (large, large)


_TINY_ENCODERS = replace(
    THOUSANDTH,
    t5={**THOUSANDTH.t5, "vocab_size": 4096},
    clip={**THOUSANDTH.clip, "vocab_size": 4096, "hidden_size": TINY.vec_in_dim},
)

# The small size divides width by 3, tokens by 4 and blocks by 6, and takes encoders whose part of a step and of a request is
# about that of full size.
SIZES = {
    "full": Size("full", TransformerParams(), FULL, 512, 64, 512, _squares(512, 1024), (1024, 576), 28, 4, 128),
    "small": Size(
        "small",
        TransformerParams(
            hidden_size=SMALL.hidden_size,
            num_heads=SMALL.num_heads,
            depth=SMALL.depth,
            depth_single_blocks=SMALL.depth_single_blocks,
            context_in_dim=512,
            vec_in_dim=256,
        ),
        small_encoders(text_width=512, pooled_width=256),
        128, 16, 256, _squares(256, 512), (512, 288), 2, 1, 43,
    ),
    "tiny": Size("tiny", TINY, _TINY_ENCODERS, 16, 16, 64, _squares(64, 128), (128, 64), 2, 1, 4),
}  # fmt: skip
"""By name."""

PROMPT = "a house by the sea, with a boat and a tree"


def pictures(case: Case, seed: int) -> list[Image.Image | None]:
    """The content and style images of a case, others for every seed, so that no cache has them; None for no content."""
    gradients = (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90))
    made: list[Image.Image | None] = []
    for i in range(case.contents + case.styles):
        shade = Image.new("L", gradients[0].size, (37 * seed + 91 * i) % 256)
        made.append(Image.merge("RGB", (gradients[i], shade, gradients[i - 1])))
    return made if case.contents else [None, *made]
