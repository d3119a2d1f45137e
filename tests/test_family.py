"""The rules around the transformer: chosen by the configuration, used by the run; UNO is one of them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from picture_files import gradient
from PIL import Image

from uso_engine import ResearchOptions, USOEngine, load_config
from uso_engine.conditioning.text import TextEmbedding
from uso_engine.config import parse_config
from uso_engine.errors import BackendError, ConfigError
from uso_engine.imaging.pixels import to_pixels
from uso_engine.imaging.resize import resize_content
from uso_engine.loading.assembly import load_pipeline
from uso_engine.model.params import FamilyName, TransformerParams
from uso_engine.model.rope import content_positions
from uso_engine.sampling.admission import Conditions, admit
from uso_engine.sampling.family import FAMILIES, Family
from uso_engine.sampling.settings import DenoiseSettings
from uso_engine.verification.case import CaseSettings
from uso_engine.verification.small_model import write_small_model
from uso_engine.weights.files.safetensors_file import write_safetensors
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw

SMALL: dict[str, Any] = {"image_size": {"width": 64, "height": 96}, "num_inference_steps": 2, "seed": 3}
CASE = CaseSettings(
    width=64, height=96, refs=(), styles=0, steps=2, guidance=4.0, seed=3, guidance_embed=True, lora=True, salt="uno"
)
TEXT = 7


@pytest.fixture(scope="module")
def tiny() -> Iterator[USOEngine]:
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def uno(tmp_path_factory: pytest.TempPathFactory) -> Iterator[USOEngine]:
    """A small UNO: transformer and LoRA of the reference cases, uso-tiny's autoencoder, and no style projector."""
    folder = tmp_path_factory.mktemp("uno")
    written = write_small_model(CASE, folder)
    config = parse_config(
        {
            "name": "small-uno",
            "transformer": {**dict(written.transformer), "family": "uno"},
            "loras": written.loras,
            "autoencoder": load_config("uso-tiny").autoencoder,
            "limits": {"min_side": 64},
            "base_folder": folder,
        }
    )
    with USOEngine.from_config(config, device="cpu", dtype=torch.float32) as loaded:
        yield loaded


def research(**options: Any) -> ResearchOptions:
    """Options with a prompt embedding: the small UNO has no text encoders."""
    made = draw("text", (TEXT, 128), "family", torch.float32), draw("pooled", (96,), "family", torch.float32)
    return ResearchOptions(prompt_embedding=TextEmbedding(*made, "", ""), **options)


def generate(engine: USOEngine, **fields: Any) -> Any:
    return engine.generate(prompt="", enable_safety_checker=False, **(SMALL | fields))


@pytest.fixture(scope="module")
def pictures() -> tuple[Image.Image, Image.Image]:
    return gradient(96, 64), gradient(40, 90)


def test_every_family_has_rules_under_its_name() -> None:
    assert set(FAMILIES) == set(get_args(FamilyName))
    assert all(family.name == name for name, family in FAMILIES.items())


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    *others, last = (repr(name) for name in get_args(FamilyName))
    with pytest.raises(
        ConfigError, match=rf"transformer\.family: Input should be {', '.join(others)} or {last}, got 'kontext'"
    ):
        parse_config({"name": "x", "transformer": {"checkpoint": "a", "family": "kontext"}})


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_familys_sigmas_fall_from_noise_to_picture_in_as_many_steps(family: Family, steps: int) -> None:
    for size in ((256, 256), (1024, 1024), (2048, 512)):
        sigmas = family.sigmas(steps, *size)
        assert len(sigmas) == steps + 1
        assert (sigmas[0], sigmas[-1]) == (1, 0)
        assert all(before > after for before, after in pairwise(sigmas))


@pytest.mark.parametrize(("references", "side"), [(0, 512), (1, 512), (2, 320), (4, 320)])
def test_reference_sizes_are_the_authors(references: int, side: int) -> None:
    assert FAMILIES["uno"].reference_long_side(references, 512) == side
    assert FAMILIES["uso"].reference_long_side(references, 512) == 512


def test_uno_is_a_configuration_without_a_projector() -> None:
    uno, uso = load_config("uno-flux-dev"), load_config("uso-flux-dev")
    assert uno.transformer.family == "uno" and uso.transformer.family == "uso"
    assert uno.projector is None and uno.vision is None
    assert uno.transformer.checkpoint == uso.transformer.checkpoint
    assert [lora.path for lora in uno.loras] == ["bytedance-research/UNO:dit_lora.safetensors"]
    assert (uno.t5, uno.clip, uno.autoencoder) == (uso.t5, uso.clip, uso.autoencoder)
    assert (uno.defaults.width, uno.defaults.height, uno.defaults.steps, uno.defaults.guidance) == (512, 512, 25, 4.0)
    assert uno.content.long_side == 512


def test_unos_references_are_smaller_in_company(uno: USOEngine, pictures: tuple[Image.Image, Image.Image]) -> None:
    one = generate(uno, images=[pictures[0]], research=research())
    two = generate(uno, images=[pictures[0]], research=research(content_images=(pictures[1],)))
    # 96x64 is 512x341, cut to 512x336, and in company 320x213, cut to 320x208; 40x90 is then 142x320, cut to 128x320.
    assert one.tokens_used == 2 * (TEXT + 4 * 6 + 32 * 21)
    assert two.tokens_used == 2 * (TEXT + 4 * 6 + 20 * 13 + 8 * 20)
    assert (one.parameters["content_long_side"], two.parameters["content_long_side"]) == (512, 320)

    pipeline = uno.pipeline
    contents = [pipeline.encode_content(to_pixels(resize_content(picture, long_side=320))) for picture in pictures]
    text = research().prompt_embedding
    assert isinstance(text, TextEmbedding)
    settings = DenoiseSettings(width=64, height=96, seeds=(3,), steps=2)
    expected = pipeline.denoise(Conditions(text.tokens, text.pooled, content=tuple(contents)), settings)
    assert torch.equal(two.latents, expected.latents)
    assert not torch.equal(one.latents, two.latents)


def test_a_reference_size_that_is_asked_for_stays(uno: USOEngine, pictures: tuple[Image.Image, Image.Image]) -> None:
    more = research(content_images=(pictures[1],))
    for side in (512, 64):
        result = generate(uno, images=[pictures[0]], research=more, content_long_side=side)
        assert result.parameters["content_long_side"] == side
    same = generate(uno, images=[pictures[0]], research=more, content_long_side=320)
    ruled = generate(uno, images=[pictures[0]], research=more, progress=True)
    assert torch.equal(same.latents, ruled.latents)


def test_uno_has_no_style_references(uno: USOEngine, pictures: tuple[Image.Image, Image.Image]) -> None:
    with pytest.raises(BackendError, match="no style encoder"):
        generate(uno, images=list(pictures), research=research())


def test_a_run_follows_its_familys_rules(tiny: USOEngine, pictures: tuple[Image.Image, Image.Image]) -> None:
    def latents(**fields: Any) -> torch.Tensor:
        made = generate(tiny, images=[pictures[0]], **fields).latents
        assert isinstance(made, torch.Tensor)
        return made

    own, usual, strength = tiny.pipeline.family, latents(), ResearchOptions(strength=0.5)
    sigmas, by_rows = ResearchOptions(sigmas=(1.0, 0.3, 0.0)), ResearchOptions(position_offset="h")
    expected = latents(research=sigmas), latents(research=by_rows), latents(research=replace(sigmas, strength=0.5))
    assert not any(torch.equal(usual, other) for other in expected)
    try:
        tiny.pipeline.family = replace(own, sigmas=lambda steps, width, height: [1.0, 0.3, 0.0])
        assert torch.equal(latents(), expected[0])
        assert torch.equal(latents(research=strength), expected[2])
        tiny.pipeline.family = replace(own, position_offset="h")
        assert torch.equal(latents(), expected[1])
        assert torch.equal(latents(research=ResearchOptions(position_offset="d")), usual)
        tiny.pipeline.family = replace(
            own,
            content_positions=lambda target, contents, mode="d", *, axes=3: content_positions(target, contents, "h", axes=axes),
        )
        assert torch.equal(latents(), expected[1])
    finally:
        tiny.pipeline.family = own
    assert torch.equal(latents(), usual)


def test_a_familys_sigmas_are_counted(tiny: USOEngine) -> None:
    own = tiny.pipeline.family
    try:
        tiny.pipeline.family = replace(own, sigmas=lambda steps, width, height: [1.0, 0.7, 0.3, 0.0])
        with pytest.raises(ValueError, match="family uso has 4 sigmas for 2 steps, expected 3"):
            generate(tiny)
        settings = DenoiseSettings(width=64, height=96, seeds=(3,), steps=2)
        with pytest.raises(ValueError, match="family uso has 4 sigmas for 2 steps, expected 3"):
            tiny.pipeline.denoise(tiny.pipeline.conditions(tiny.pipeline.encode_prompt("")), settings)
    finally:
        tiny.pipeline.family = own


@pytest.mark.parametrize("offset", ["h", "w", "o"])
def test_researchers_place_content_elsewhere(tiny: USOEngine, pictures: tuple[Image.Image, Image.Image], offset: Any) -> None:
    result = generate(tiny, images=[pictures[0]], research=ResearchOptions(position_offset=offset))
    pipeline = tiny.pipeline
    text, content = pipeline.encode_prompt(""), pipeline.encode_content(to_pixels(resize_content(pictures[0], long_side=128)))
    settings = DenoiseSettings(width=64, height=96, seeds=(3,), steps=2, position_offset=offset)
    expected = pipeline.denoise(pipeline.conditions(text, content=[content]), settings)
    assert torch.equal(result.latents, expected.latents)
    assert result.parameters["position_offset"] == offset
    assert "position_offset" not in generate(tiny, images=[pictures[0]]).parameters


def test_channels_and_axes_are_the_transformers(tmp_path: Path) -> None:
    params = TransformerParams(
        in_channels=32, vec_in_dim=24, context_in_dim=32, hidden_size=128, num_heads=2, depth=1, depth_single_blocks=1,
        axes_dim=(8, 16, 24, 16),
    )  # fmt: skip
    tensors = {key: draw(key, shape, "", torch.float32) for key, shape in transformer_shapes(params).items()}
    write_safetensors(tmp_path / "flux.safetensors", tensors)
    table = {"checkpoint": "flux.safetensors", "params": {**vars(params), "axes_dim": list(params.axes_dim)}}
    config = parse_config({"name": "other", "transformer": table, "base_folder": tmp_path})
    pipeline = load_pipeline(config, device="cpu", tier="float32")
    conditions = Conditions(torch.ones(5, 32), torch.ones(24), content=(torch.ones(8, 4, 6),))
    settings = DenoiseSettings(width=48, height=32, seeds=(1, 2), steps=2)
    result = pipeline.denoise(conditions, settings)
    assert result.latents.shape == (2, 8, 4, 6)
    assert result.tokens == 2 * 2 * (5 + 6 + 6)
    assert result.latents.isfinite().all()
    with pytest.raises(ValueError, match=r"latents must have shape \[2, 8, 4, 6\], got \[2, 16, 4, 6\]"):
        pipeline.denoise(conditions, replace(settings, latents=torch.zeros(2, 16, 4, 6)))

    sequence = admit(pipeline.transformer, conditions, (2, 3), [1.0, 0.0], 4.0)
    assert sequence.cos.shape == (17, 32)
    assert torch.equal(sequence.cos[:5], torch.ones(5, 32))  # text stands at the origin
    assert torch.equal(sequence.cos[:, 24:], torch.ones(17, 8))  # and nothing leaves it on the fourth axis
    assert not torch.equal(sequence.cos[5:, 12:24], torch.ones(12, 12))
    pipeline.close()


def test_latents_of_other_channels_do_not_fit() -> None:
    other = {"checkpoint": "a", "params": {"z_channels": 32}}
    with pytest.raises(ConfigError, match=r"z_channels is 32, but the transformer takes latents of 16 channels"):
        parse_config({"name": "x", "transformer": {"checkpoint": "a"}, "autoencoder": other})
    params = {"in_channels": 128}
    parse_config({"name": "x", "transformer": {"checkpoint": "a", "params": params}, "autoencoder": other})
