"""Whatever is handed to an engine ends in a result, a USOError or a ValueError, and leaves the engine as it was."""

from __future__ import annotations

import datetime
import decimal
import fractions
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from uso_engine import GenerationRequest, GenerationResult, ResearchOptions, USOEngine, USOError
from uso_engine.api.diffusers_call import PromptResults
from uso_engine.conditioning.style import StyleTokens
from uso_engine.conditioning.text import TextEmbedding

# Of configs/uso-tiny.toml: widths of the tokens and of the pooled embedding, and of the transformer.
TEXT_WIDTH, POOLED_WIDTH, WIDTH = 64, 64, 192

PICTURE = Image.linear_gradient("L").convert("RGB").resize((40, 32))
BASE: dict[str, Any] = {
    "prompt": "a cup",
    "image_size": {"width": 64, "height": 64},
    "num_inference_steps": 1,
    "enable_safety_checker": False,
}


_files = [io.BytesIO(), io.BytesIO()]
PICTURE.save(_files[0], "PNG")
PICTURE.save(_files[1], "JPEG")
PNG, JPEG = (file.getvalue() for file in _files)

WORDS = "7 nan null none [1,2] {prompt} %s [bold] $HOME"
TEXTS = st.sampled_from(["", " ", "a", "\0", "\ud800", "😀" * 40, "x" * 5000, "\n", *WORDS.split()])
# Nothing here is looked up on a network: every address is refused, or is no address.
PLACES = """/ . .. ~ /dev/null /dev/zero /proc/self/mem /proc/1/environ no/such.png C:\\a.png //host/a file:///etc/passwd ftp://host/a
http:// https:///a.png http://xn--/ http://[::1 http://127.0.0.1:1/a.png data: data:, data:image/png;base64,AA"""
PATHS = st.sampled_from([*PLACES.split(), "a\0b.png", "x" * 300, "\udce4.png", "http://\ud800/", "http://a b/"])
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 7, 51, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400, True, False, -0.0, 0.5, 1e308]),
    st.floats(),
    st.integers(),
    st.sampled_from([np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.uint8(255)]),
    st.sampled_from([decimal.Decimal("0.5"), decimal.Decimal("NaN"), fractions.Fraction(1, 2), complex(1, 2)]),
)
DTYPES = st.sampled_from(["uint8", "bool", "int64", "float32", "float64", "float16", "complex64"])
SHAPES = st.sampled_from(
    [(), (0,), (1,), (3,), (40, 32), (40, 32, 3), (3, 40, 32), (40, 32, 4), (1, 1, 1), (2, 40, 32, 3), (0, 4, 3)]
)
FILLS = st.sampled_from([0.0, 1.0, 255.0, -1.0, float("nan"), float("inf")])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        return np.full(draw(SHAPES), draw(FILLS)).astype(draw(DTYPES))


ODD_TENSORS = [torch.zeros(3, 4, 4, device="meta"), torch.zeros(4, 4).to_sparse(), torch.ones(16, 8, 8).bfloat16()]
TENSORS = arrays().map(torch.from_numpy) | st.sampled_from([*ODD_TENSORS, torch.zeros(1, 16, 8, 8)])
PLAIN_OBJECTS = [
    None,
    object(),
    Ellipsis,
    b"",
    bytearray(b"x"),
    memoryview(b"abcd")[::2],
    set(),
    {1},
    range(3),
    slice(1),
    Path(),
]
FOREIGN_OBJECTS = [
    datetime.date(2026, 1, 1),
    io.StringIO("text"),
    io.BytesIO(b""),
    iter([1]),
    ValueError("x"),
    ResearchOptions(),
]
CALLABLES = [object, print, len, lambda: None]
OBJECTS = st.sampled_from([*PLAIN_OBJECTS, *FOREIGN_OBJECTS, *CALLABLES, torch.float32, torch.Generator()])
CLOSED = io.BytesIO(PNG)
CLOSED.close()
ODD_PICTURES = [
    Image.new("L", (1, 1)),
    Image.new("P", (5, 4)),
    Image.new("F", (4, 4), float("nan")),
    Image.new("RGBA", (999, 2)),
    Image.new("RGB", (1, 40)),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data, at = draw(st.sampled_from([PNG, JPEG])), draw(st.integers(0, 90))
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


PICTURES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([PICTURE, PNG, JPEG, bytearray(PNG), memoryview(JPEG), PNG[:60], PNG[:8], JPEG[:200], CLOSED]),
    st.sampled_from(ODD_PICTURES),
    st.builds(io.BytesIO, st.sampled_from([PNG, JPEG, b"", b"GIF89a"])),
    damaged(),
    st.binary(max_size=40),
    PATHS,
    PATHS.filter(lambda text: "\0" not in text).map(Path),
    arrays(),
    TENSORS,
)
ODD: st.SearchStrategy[Any] = st.recursive(
    st.one_of(TEXTS, PATHS, NUMBERS, OBJECTS, arrays(), TENSORS, st.just(PICTURE)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3),
    ),
    max_leaves=4,
)
SIZES = st.one_of(
    st.sampled_from(["square_xl", "portrait_4_3 ", 64, (64, 64), [64, 64], {}, {"width": 64}, {"width": 80.0, "height": 64}]),
    st.fixed_dictionaries({"width": NUMBERS | TEXTS, "height": NUMBERS | st.just(64)}),
)
# What each field may well be, beside what it certainly is not.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("bytedance/uso") | TEXTS,
    "prompt": TEXTS,
    "images": PICTURES | st.lists(PICTURES, max_size=4),
    "image_urls": st.lists(PICTURES | st.none(), max_size=3),
    "image_size": SIZES,
    "negative_prompt": TEXTS,
    "num_inference_steps": st.sampled_from([1, 2, 1.0, 0, 51, 1.5]),
    "guidance_scale": NUMBERS,
    "keep_size": st.booleans(),
    "num_images": st.sampled_from([1, 2, 2.0, 0, 5]),
    "seed": NUMBERS,
    "sync_mode": st.booleans(),
    "enable_safety_checker": st.booleans(),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "PNG"]),
    "true_cfg_scale": NUMBERS,
    "style_scale": NUMBERS,
    "content_long_side": st.sampled_from([64, 63, 96.0, 0]),
}
# A valid value of these costs seconds: sizes and step counts drawn from everything could be large and legal.
COSTLY = {"image_size", "num_inference_steps", "content_long_side", "num_images"}
OTHER_NAMES = st.sampled_from(
    ["width", "steps", "self", "request", "on_step", "progress", "fields", "model_config", "", "\ud800"]
)
# Called by the engine, a function ends in what it raises itself.
NOT_CALLABLE = ODD.filter(lambda value: not callable(value))


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(sorted(LIKELY)), max_size=4, unique=True))
    drawn = {name: draw(LIKELY[name] if name in COSTLY else LIKELY[name] | ODD) for name in chosen}
    if draw(st.integers(0, 9)) == 0:
        drawn[draw(OTHER_NAMES)] = draw(NOT_CALLABLE)
    return {**BASE, **drawn}


def embedding(tokens: Any, pooled: Any) -> TextEmbedding:
    return TextEmbedding(tokens, pooled, "", "")


RESEARCH: dict[str, st.SearchStrategy[Any]] = {
    "latents": TENSORS | arrays(),
    "sigmas": st.lists(NUMBERS, max_size=4)
    | st.sampled_from([(1.0, 0.5, 0.0), [1, 0], np.linspace(1, 0, 3), (0.5, 0.0), (1, 1)]),
    "strength": NUMBERS | st.floats(0, 1),
    "prompt_embedding": st.builds(
        embedding,
        TENSORS
        | ODD
        | st.sampled_from([torch.zeros(5, TEXT_WIDTH), torch.zeros(0, TEXT_WIDTH), torch.full((2, TEXT_WIDTH), 1e30)]),
        TENSORS | ODD | st.just(torch.zeros(POOLED_WIDTH)),
    )
    | PATHS
    | st.just(embedding(torch.zeros(5, TEXT_WIDTH), torch.zeros(POOLED_WIDTH))),
    "style_tokens": st.lists(
        st.builds(lambda tokens: StyleTokens(tokens, "", ""), TENSORS | st.just(torch.zeros(3, WIDTH))) | PATHS, max_size=2
    ),
    "content_images": PICTURES | st.lists(PICTURES, max_size=2),
    "style_images": PICTURES | st.lists(PICTURES, max_size=2),
    "posterior_seed": NUMBERS,
    "reference_numerics": st.booleans(),
}


@st.composite
def research(draw: st.DrawFn) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(sorted(RESEARCH)), max_size=3, unique=True))
    return {name: draw(RESEARCH[name] | ODD) for name in chosen}


DIFFUSERS = """image style_image width height generator callback_on_step_end output_type num_images_per_prompt seed
negative_prompt guidance_scale true_cfg_scale style_scale strength progress prompt_embeds"""
Call = Callable[[USOEngine], object]


def generate(given_fields: dict[str, Any], options: dict[str, Any] | Any) -> Call:
    def call(engine: USOEngine) -> object:
        # The fields that are the method's own, too: what a caller unpacks may be anything.
        chosen = ResearchOptions(**options) if isinstance(options, dict) and set(options) <= set(RESEARCH) else options
        arguments: dict[str, Any] = {"research": chosen, **given_fields}
        if "self" in arguments:
            return engine.generate(GenerationRequest(**arguments))
        return engine.generate(**arguments)

    return call


def generate_request(given_fields: Mapping[str, Any]) -> Call:
    def call(engine: USOEngine) -> object:
        if "self" in given_fields:
            return engine.generate(GenerationRequest.model_validate(given_fields))
        return engine.generate(GenerationRequest(**given_fields))

    return call


def called_like_diffusers(prompt: Any, arguments: dict[str, Any]) -> Call:
    base: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 1, "enable_safety_checker": False}
    return lambda engine: engine(prompt, **{**base, **arguments})


CALLS: st.SearchStrategy[Call] = st.one_of(
    st.builds(generate, fields(), st.just({})),
    st.builds(generate, fields(), research()),
    st.builds(
        generate, st.fixed_dictionaries({"images": st.lists(PICTURES, max_size=3)}).map(lambda x: {**BASE, **x}), research()
    ),
    st.builds(generate, st.just(BASE), ODD),
    st.builds(generate_request, fields()),
    st.builds(lambda request: lambda engine: engine.generate(request), ODD),
    st.builds(
        called_like_diffusers,
        TEXTS | ODD | st.lists(TEXTS, max_size=3),
        st.dictionaries(st.sampled_from(DIFFUSERS.split()), NOT_CALLABLE | PICTURES | st.just([1, 2]), max_size=2),
    ),
    st.builds(lambda prompt: lambda engine: engine.encode_prompt(prompt), TEXTS | ODD),
    st.builds(lambda picture: lambda engine: engine.encode_style(picture), PICTURES | ODD),
    st.builds(lambda picture: lambda engine: engine.encode_content(picture), PICTURES | ODD),
    st.builds(
        lambda loras: lambda engine: engine.set_loras(loras), ODD | st.lists(PATHS | st.tuples(PATHS, NUMBERS), max_size=2)
    ),
    st.builds(lambda step, image: lambda engine: engine.preview(step, image), ODD, NUMBERS),
)


def check(engine: USOEngine, call: Call) -> str:
    """Make one call; anything but a result, a USOError or a ValueError is raised on. Returns what it ended in.

    Of ValueErrors only those that this code raises: one of a library's own kinds (a UnicodeError) is a raw exception, too.
    """
    try:
        result = call(engine)
    except (USOError, ValueError) as error:
        if not isinstance(error, (USOError, ValidationError)) and type(error) is not ValueError:
            raise
        message = str(error)
        assert message.strip(), "an error without a word"
        return type(error).__name__
    assert result is None or isinstance(result, (GenerationResult, PromptResults, TextEmbedding, StyleTokens, torch.Tensor))
    return "result"


ENDS: dict[str, int] = {}


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(call=CALLS)
def test_every_call_ends_in_a_result_or_in_an_error_of_ours(engine: USOEngine, call: Call) -> None:
    end = check(engine, call)
    ENDS[end] = ENDS.get(end, 0) + 1


def test_the_engine_is_as_it_was(engine: USOEngine) -> None:
    # After the calls above, whichever they were: another engine gives the same bits.
    assert ENDS.get("result", 0) > 20 and sum(ENDS.values()) - ENDS["result"] > 100, ENDS
    with USOEngine.from_config("uso-tiny", device="cpu", dtype=torch.float32) as fresh:
        expected, found = (each.generate(images=PICTURE, seed=5, **BASE) for each in (fresh, engine))
    assert found.images[0].tobytes() == expected.images[0].tobytes()
