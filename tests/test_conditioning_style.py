import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoders import TINY, copied, edit_json, fill
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from uso_engine.conditioning.style import StyleEncoder, scale_style
from uso_engine.errors import CheckpointError, MissingFileError
from uso_engine.model.projector import StyleProjector
from uso_engine.verification.measure import relative_error

SIDE, WIDTH, HIDDEN, TOKENS = 28, 24, 32, 3
SETTINGS = {
    "image_size": SIDE,
    "patch_size": 14,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 21,
}


def vision_model(**changes: int) -> SiglipVisionModel:
    model = SiglipVisionModel(SiglipVisionConfig.from_dict(SETTINGS | changes))
    fill(model, "style-test")
    return model.train(False).requires_grad_(False)


def projector(patches: int = 4, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> StyleProjector:
    module = StyleProjector(patches, width, TOKENS, HIDDEN)
    fill(module, "style-test")
    return module.to(dtype).requires_grad_(False)


def processor(side: int = SIDE) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": side, "width": side})


def gradient(width: int = 50, height: int = 31) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1)
    return Image.fromarray(values.astype(np.uint8))


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equals_the_whole_model_bit_for_bit() -> None:
    model, project = vision_model(), projector()
    states = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    expected = project([states[-2], states[-11], states[-20]])[0]
    found = StyleEncoder(model, project).encode(pixels())
    assert found.tokens.shape == (3 * TOKENS, HIDDEN)
    assert torch.equal(found.tokens, expected)


def test_neither_the_last_layer_nor_the_head_is_run() -> None:
    model = vision_model()
    run: list[str] = []
    for name, part in model.named_modules():
        part.register_forward_hook(lambda *_, name=name: run.append(name))
    StyleEncoder(model, projector()).encode(pixels())
    layers = {name for name in run if re.fullmatch(r".*layers\.\d+", name)}
    assert layers == {f"encoder.layers.{index}" for index in range(20)}
    assert not [name for name in run if "head" in name or "post_layernorm" in name]


def test_an_image_is_resized_bicubically_and_normalised_by_a_half() -> None:
    encoder = StyleEncoder(vision_model(), projector(), processor())
    resized = gradient().resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(resized).astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
    assert relative_error(encoder.encode(gradient()).tokens, encoder.encode(values).tokens) < 1e-6


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_takes_any_image(mode: str, size: tuple[int, int]) -> None:
    # The published configuration leaves do_convert_rgb empty.
    unconverting = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_convert_rgb=None)
    encoder = StyleEncoder(vision_model(), projector(), unconverting)
    assert bool(encoder.encode(gradient(*size).convert(mode)).tokens.isfinite().all())


def test_the_projector_s_dtype_is_the_answer_s_and_the_tower_stays_in_float32() -> None:
    model = vision_model()
    found = StyleEncoder(model, projector(dtype=torch.bfloat16)).encode(pixels())
    assert found.tokens.dtype == torch.bfloat16
    expected = StyleEncoder(model, projector()).encode(pixels()).tokens
    assert relative_error(found.tokens, expected) < 0.02


def test_the_source_is_hashed_with_the_encoder() -> None:
    encoder = StyleEncoder(vision_model(), projector(), processor())
    found = encoder.encode(gradient())
    assert found.image_hash == encoder.hash_source(gradient())
    assert found.encoder == encoder.identity
    other_weights = vision_model()
    other_weights.get_parameter("encoder.layers.0.mlp.fc1.weight").mul_(2)
    others = [StyleEncoder(other_weights, projector(), processor()), StyleEncoder(vision_model(), projector())]
    assert len({x.hash_source(gradient()) for x in (encoder, *others)}) == 3
    assert encoder.hash_source(pixels(0)) != encoder.hash_source(pixels(1))


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \[1, 3, 28, 28\], got \[1, 3, 28, 27\]"):
        StyleEncoder(vision_model(), projector()).encode(pixels()[..., :27])


def test_an_image_without_a_processor_is_refused() -> None:
    with pytest.raises(ValueError, match="give it preprocessed pixels"):
        StyleEncoder(vision_model(), projector()).encode(gradient())


def test_parts_that_do_not_fit_are_listed_together() -> None:
    with pytest.raises(CheckpointError) as caught:
        StyleEncoder(vision_model(num_hidden_layers=18), projector(width=20), processor(30))
    message = str(caught.value)
    assert "has 18 layers, hidden state -20 needs 19" in message
    assert "gives 4 tokens of width 24, the projector takes 4 of width 20" in message
    assert "the vision tower takes 28 pixels square" in message


def test_nineteen_layers_are_just_enough() -> None:
    model, project = vision_model(num_hidden_layers=19), projector()
    states = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    assert torch.equal(StyleEncoder(model, project).encode(pixels()).tokens, project([states[-2], states[-11], states[-20]])[0])


def test_loads_the_vision_half_of_a_whole_siglip(tmp_path: Path) -> None:
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = SiglipModel(SiglipConfig(vision_config=SETTINGS, text_config=text)).train(False)
    fill(whole, "whole siglip")
    whole.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    project = projector()
    with torch.no_grad():
        states = whole.vision_model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    expected = project([states[-2], states[-11], states[-20]])[0]
    assert torch.equal(StyleEncoder.from_folder(tmp_path, project).encode(pixels()).tokens, expected)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("preprocessor_config.json", "vision encoder's image processor in .* needs preprocessor_config.json"),
        ("config.json", "vision encoder configuration in .* needs config.json"),
        ("model.safetensors", "vision encoder weights in .* needs model.safetensors"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, file: str, message: str) -> None:
    folder = copied("vision", tmp_path)
    (folder / file).unlink()
    with pytest.raises(MissingFileError, match=message):
        StyleEncoder.from_folder(folder, tiny_projector())


def test_a_processor_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = copied("vision", tmp_path)
    edit_json(folder / "preprocessor_config.json", size={"height": 32, "width": 32})
    with pytest.raises(CheckpointError, match="the vision tower takes 64 pixels square"):
        StyleEncoder.from_folder(folder, tiny_projector())


def tiny_projector() -> StyleProjector:
    config = json.loads((TINY / "vision" / "config.json").read_text(encoding="utf-8"))
    patches = (config["image_size"] // config["patch_size"]) ** 2
    module = StyleProjector(patches, config["hidden_size"], 2, HIDDEN)
    fill(module, "tiny")
    return module


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_style_is_scaled_by_a_factor(scale: float) -> None:
    tokens = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    assert torch.equal(scale_style(tokens, scale), tokens * scale)
    assert scale_style(tokens, scale).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_style_scale_that_is_no_strength_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="style_scale must be a finite number of at least 0"):
        scale_style(torch.zeros(1, 2), scale)


def test_moving_moves_every_part() -> None:
    encoder = StyleEncoder(vision_model(), projector()).to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        encoder.encode(pixels()).tokens.tolist()
