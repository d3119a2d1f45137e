"""OpenAI's client, pointed at the server: generate, edit, models, and what it says of refusals."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image
from serving_process import HTTP, Served, double_server, serving, wait_ready

SMALL = "64x64"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai")
    with serving(double_server(folder, 0, "max_images=3"), folder / "log") as running:
        wait_ready(running)
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_generate_gives_urls(client: openai.OpenAI, served: Served) -> None:
    answer = client.images.generate(model="bytedance/uso", prompt="a house", n=2, size=SMALL, user="someone")
    assert answer.created > 1_700_000_000
    assert answer.data is not None and answer.model_extra is not None
    images = [Image.open(io.BytesIO(HTTP.get(image.url or "").content)) for image in answer.data]
    assert [image.size for image in images] == [(64, 64)] * 2
    assert answer.model_extra["has_nsfw_concepts"] == [False, False]


def test_generate_gives_the_bytes_and_takes_the_engines_fields(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="uso",
        prompt="a house",
        response_format="b64_json",
        size="auto",
        extra_body={"seed": 9, "num_inference_steps": 3, "output_format": "jpeg", "image_urls": [None]},
    )
    assert answer.data is not None and answer.data[0].b64_json is not None and answer.data[0].url is None
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert (image.format, image.size) == ("JPEG", (128, 128))
    assert answer.model_extra is not None and answer.model_extra["seed"] == 9


@pytest.mark.parametrize("count", [1, 3])
def test_edit_takes_files_and_looks_at_no_name(client: openai.OpenAI, served: Served, count: int) -> None:
    files = [("../../escape.png", png(colour), "text/html") for colour in ("red", "green", "blue")[:count]]
    answer = client.images.edit(
        model="bytedance/uso",
        image=files if count > 1 else files[0],
        prompt="a house",
        n=2,
        size=SMALL,
        response_format="b64_json",
        extra_body={"seed": 4, "enable_safety_checker": True},
    )
    assert answer.data is not None and len(answer.data) == 2
    assert "escape" not in served.log.read_text()


def refused(call: openai.BadRequestError) -> tuple[list[str], str]:
    body = call.body
    assert isinstance(body, dict)
    return body["fields"], body["errors"][0]


def test_what_is_wrong_is_named_in_openais_words(client: openai.OpenAI) -> None:
    for given, field, part in (
        ({"model": "dall-e-3"}, "model", "model must be one of bytedance/uso, uso, got 'dall-e-3'"),
        ({"n": 4}, "n", "n must be a whole number from 1 to 3, got 4"),
        ({"size": "63x64"}, "size", "size.width must be from 64 to 1024, got 63"),
        ({"size": "large"}, "size", "size must be 'auto' or WIDTHxHEIGHT"),
        ({"response_format": "png"}, "response_format", "response_format must be 'url' or 'b64_json'"),
        ({"quality": "hd"}, "quality", "'quality' is not a field here"),
        ({"extra_body": {"num_images": 2}}, "num_images", "did you mean 'n'?"),
        ({"extra_body": {"sync_mode": True}}, "sync_mode", "did you mean 'response_format'?"),
        ({"user": "x" * 300}, "user", "user must be a string of at most 256 characters"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.images.generate(**{"model": "bytedance/uso", "prompt": "a house", **given})  # type: ignore[call-overload]
        fields, message = refused(error.value)
        assert fields == [field] and part in message, message


def test_forms_that_are_none_are_refused(client: openai.OpenAI, served: Served) -> None:
    url = f"{served.url}/v1/images/edits"
    form = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n1\r\n'
    for content, headers, status in (
        (b"{}", {"content-type": "application/json"}, 415),
        (b"--x--\r\n", {"content-type": "multipart/form-data"}, 400),
        (b"nothing of a form", form, 400),
        (part % b"prompt" + b"--x--\r\n", form, 400),
        (part % b"n" + part % b"n" + b"--x--\r\n", form, 400),
        (b"".join(part % b"f%d" % i for i in range(60)) + b"--x--\r\n", form, 400),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", form, 400),
        (part % b"n" + b"--x--\r\n", {"content-type": "multipart/form-data; boundary=x; charset=zip"}, 400),
    ):
        assert HTTP.post(url, content=content, headers=headers).status_code == status, content[:80]
    many = [("image[]", ("a.png", png("red"))) for _ in range(4)]
    answer = HTTP.post(url, files=many, data={"prompt": "x"})
    assert (answer.status_code, "Too many files" in answer.text) == (400, True)
    masked = HTTP.post(url, files={"image": png("red"), "mask": png("red")}, data={"prompt": "x"})
    assert (masked.status_code, masked.json()["fields"]) == (400, ["mask"])


def test_a_full_queue_is_what_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        client.images.generate(model="bytedance/uso", prompt="raise:full")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bytedance/uso", "uso"]
