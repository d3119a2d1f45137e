"""A prompt's padding as few rows: which rows become one, and what a request and its picture say of it."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run as run_command
from command_line import small_picture
from PIL import Image
from streamed_engines import plain_and_streamed

from uso_engine import ResearchOptions, USOEngine
from uso_engine.comparison.image_metrics import psnr
from uso_engine.conditioning.text import TextEmbedding
from uso_engine.conditioning.text_padding import group_padding, merge_padding
from uso_engine.config import load_config, parse_config
from uso_engine.sampling.step import Step

REQUEST: dict[str, Any] = {"prompt": "the object in the forest", "seed": 3, "image_size": {"width": 64, "height": 64}}
REQUEST |= {"num_inference_steps": 4}
MERGE = ResearchOptions(text_padding="merge")


def test_near_rows_become_their_mean_and_far_ones_stay_apart() -> None:
    text = torch.cat(
        (torch.tensor([[9.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.02, 0.0], [-1.0, 0.0], [0.98, 0.0]]))
    )
    groups = group_padding(text, 5)
    assert groups == ((0, 2, 4), (1,), (3,))
    merged = merge_padding(text, 5, groups)
    assert torch.allclose(merged.tokens, torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    assert merged.merged == ((1, 3),)
    assert merged.spread == pytest.approx(math.sqrt(2 * 0.02**2 / (3 + 1.02**2 + 0.98**2)), rel=1e-5)
    assert merged.record() == {"rows": 6, "padding": 5, "kept": 4, "spread": 0.0126}
    nothing = merge_padding(text, 0, group_padding(text, 0))
    assert torch.equal(nothing.tokens, text) and not nothing.merged and nothing.spread == 0
    # What is too little to pay for the copies of keys is left alone.
    few = torch.cat((text[1:2], text[1:2], 2 * torch.eye(2).repeat(4, 1) * torch.arange(1, 9)[:, None]))
    assert group_padding(few, 10) == tuple((row,) for row in range(10))
    # However many rows there are, none is merged with one beyond the bound.
    rows = 1 + 0.2 * torch.randn(14, 32, generator=torch.Generator().manual_seed(0))
    near = torch.cdist(rows.double(), rows.double()) / rows.double().square().sum(1).mean().sqrt()
    for bound in (0.05, 0.15, 0.3):
        for group in group_padding(rows, 14, bound):
            assert min(float(near[list(group)][:, leader].max()) for leader in group) <= bound


def test_a_request_chooses_and_its_picture_says_so(engine: USOEngine, content: Image.Image) -> None:
    base = {**REQUEST, "images": [content], "negative_prompt": "blue"}
    plain = engine.generate(**base)
    assert not [name for name in plain.parameters if "text" in name]
    made = engine.generate(**base, research=MERGE)
    assert made.parameters["text_padding"] == "merge"
    assert made.parameters["text_rows"] == {"rows": 20, "padding": 14, "kept": 7, "spread": pytest.approx(0.007, abs=0.003)}
    against = made.parameters["negative_text_rows"]
    assert isinstance(against, dict)
    assert against["kept"] < against["rows"] == 20
    json.dumps(made.parameters)
    assert made.tokens_used == plain.tokens_used - 4 * (13 + 20 - against["kept"])
    assert made.images[0].tobytes() != plain.images[0].tobytes()
    # Rounding to bfloat16 in products of other lengths, doubled by true CFG; one step fewer gives 20 dB here.
    assert psnr(made.images[0], plain.images[0]) > 35
    again = engine.generate(**base, research=ResearchOptions(text_padding="keep"))
    assert again.images[0].tobytes() == plain.images[0].tobytes()


def test_weights_that_come_from_the_host_give_the_same_picture(content: Image.Image) -> None:
    base = {**REQUEST, "images": [content], "negative_prompt": "blue"}
    with plain_and_streamed("int8", "cpu") as engines:
        made = [engine.generate(**base, research=MERGE).images[0].tobytes() for engine in engines]
    assert made[0] == made[1]


def test_a_request_that_is_cancelled_midway_leaves_the_others_their_bits(engine: USOEngine) -> None:
    choices = [MERGE, ResearchOptions(), MERGE]
    alone = [engine.generate(**REQUEST, research=choice).images[0].tobytes() for choice in choices]

    def cancel(step: Step) -> None:
        if step.index == 1:
            raise KeyError("enough")

    def ask(place: int) -> bytes | None:
        if place == len(choices):
            with pytest.raises(KeyError, match="enough"):
                engine.generate(**{**REQUEST, "prompt": "other"}, research=MERGE, on_step=cancel)
            return None
        return engine.generate(**REQUEST, research=choices[place]).images[0].tobytes()

    with ThreadPoolExecutor(len(choices) + 1) as threads:
        together = list(threads.map(ask, range(len(choices) + 1)))
    assert together[: len(choices)] == alone


def test_a_configuration_chooses_for_requests_that_do_not() -> None:
    tables = parse_config({"name": "x", "transformer": {"checkpoint": "y"}, "sampling": {"text_padding": "merge"}})
    config = load_config("uso-tiny").model_copy(update={"sampling": tables.sampling})
    with USOEngine.from_config(config, device="cpu") as engine:
        engine.warmup()
        assert engine.generate(**REQUEST).parameters["text_padding"] == "merge"
        assert "text_padding" not in engine.generate(**REQUEST, research=ResearchOptions(text_padding="keep")).parameters
        with pytest.raises(ValueError, match="but text_padding is 'merge'; give text_padding='keep' with it"):
            engine.generate(**REQUEST, research=ResearchOptions(reference_numerics=True))


def test_a_saved_embedding_knows_its_padding_or_says_that_it_does_not(engine: USOEngine, tmp_path: Path) -> None:
    made = engine.pipeline.encode_prompt(REQUEST["prompt"])
    assert made.padding == 14
    path = tmp_path / "prompt.safetensors"
    made.save(path)
    research = ResearchOptions(text_padding="merge", prompt_embedding=path)
    same = engine.generate(**REQUEST, research=research)
    assert same.images[0].tobytes() == engine.generate(**REQUEST, research=MERGE).images[0].tobytes()
    unknown = TextEmbedding(made.tokens, made.pooled, "", "")
    unknown.save(path)
    for embedding in (path, unknown):
        with pytest.raises(ValueError, match="has to know which rows of a prompt embedding are padding"):
            engine.generate(**REQUEST, research=replace(research, prompt_embedding=embedding))


@pytest.mark.parametrize("value", ["drop", True, 1])
def test_wrong_choices_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("research.text_padding must be 'keep' or 'merge', got")):
        ResearchOptions(text_padding=value)


def test_the_command_line_chooses_too(tmp_path: Path) -> None:
    path = tmp_path / "made.png"
    arguments = small_picture(path)
    code, printed = run_command(*arguments, "--text-padding", "merge", "--parameters")
    assert code == 0, printed
    with Image.open(path) as picture:
        written = f"{dict(picture.getexif())} {picture.info}"
    assert '"text_padding": "merge"' in written
    code, printed = run_command(*arguments, "--text-padding", "drop")
    assert code != 0
    assert "must be 'keep' or 'merge', got 'drop'" in printed
