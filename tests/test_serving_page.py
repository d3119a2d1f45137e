"""The page at ``/`` in headless Chromium, against a real server process with the tests' engine."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import Browser, browsing, missing_browser
from PIL import Image
from serving_process import Served, double_server, serving, wait_ready

KEY = "a-key-of-the-tests-0123456789"
CONTROL, ENTER, ESCAPE, RIGHT, TAB = "\ue009", "\ue007", "\ue00c", "\ue014", "\ue004"
RESULT = "!document.querySelector('#result').hidden && document.querySelectorAll('#figures img').length === arguments[0]"
CHARACTERS = "a \"house\" for $HOME, `date` and \\n 'quotes',\nüñ 🏠"

pytestmark = pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "keys").write_text(f"tests:{KEY}\n")
    with serving(
        double_server(folder, 0, f"keys={folder / 'keys'}", "max_steps=30", "max_pixels=300000", "page=1"), folder / "log"
    ) as running:
        wait_ready(running)
        yield running


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def page(window: Browser, served: Served) -> Browser:
    """The page as a visitor finds it who has typed the key: nothing kept from other tests."""
    window.resize(1280, 860)
    window.open(f"{served.url}/page/icon.svg")
    window.run("sessionStorage.setItem('uso-api-key', arguments[0]); indexedDB.deleteDatabase('uso-engine')", KEY)
    window.open(f"{served.url}/")
    window.until("document.body.dataset.started === 'yes'")
    window.log()
    return window


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    content, style = tmp_path / "house.png", tmp_path / "van gogh's $1.jpg"
    Image.new("RGB", (64, 48), "teal").save(content)
    Image.new("RGB", (30, 40), "gold").save(style)
    return content, style


def make_small(page: Browser, *, images: int = 1, seed: int = 41) -> None:
    """Fill in an own size of 64 x 64, the number of images and the seed."""
    for name, value in (("width", 64), ("height", 64), ("num_images", images), ("seed", seed)):
        page.type(f"#{name}", str(value), clear=True)


def test_everything_comes_from_the_server_itself(page: Browser, served: Served) -> None:
    page.open(f"{served.url}/")
    page.until("document.body.dataset.started === 'yes'")
    assert page.log() == []
    sources = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert isinstance(sources, list)
    assert {source for source in sources if not source.startswith(served.url)} == set()
    policy = httpx.get(f"{served.url}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # The policy is obeyed: a script in the page itself does not run.
    page.run("const script = document.createElement('script'); script.text = 'window.ran = true'; document.body.append(script)")
    assert page.run("return window.ran") is None
    assert any("Content Security Policy" in line for line in page.log())


def test_the_bounds_are_the_operators(page: Browser) -> None:
    bounds = page.run("return ['num_inference_steps', 'num_images', 'width'].map((name) => document.getElementById(name).max)")
    assert bounds == ["30", "4", "1024"]
    page.type("#width", "2000", clear=True)
    page.type("#seed", "1.5", clear=True)
    page.click("#generate")
    said = page.text("#errors")
    assert "Width must be a whole number from 64 to 1024, got 2000" in said
    assert "Seed must be a whole number from 1 to 9007199254740991, got 1.5" in said
    assert page.run("return [...document.querySelectorAll('[aria-invalid]')].map((input) => input.id)") == ["width", "seed"]
    assert page.run("return document.activeElement.id") == "width"
    page.type("#width", "1000", clear=True)
    page.type("#height", "304", clear=True)
    page.click("#generate")
    assert "1000×304 is more than 300,000 pixels, the most that this server makes" in page.text("#errors")
    sizes = page.run("return [...document.getElementById('image_size').options].map((option) => option.text)")
    assert sizes == ["square, 512×512", "own size"]


def test_from_pictures_to_pictures(page: Browser, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    """Chosen pictures are shown; the run is watched; the results are the API's, kept, and compared side by side."""
    for place, path in zip(("content-slot", "style-slot-1"), pictures, strict=True):
        page.type(f"#{place}-file", str(path))
    page.until("document.querySelectorAll('.face img').length === 2 && [...document.images].every((image) => image.complete)")
    assert page.text("#content-slot .caption").startswith("Content: house.png, 64×48")
    make_small(page, images=2)
    page.type("#prompt", "a house steps:30")
    page.press(CONTROL, ENTER)
    page.until(
        "document.querySelector('#bar').value > 3 && document.querySelector('#preview').src.startsWith('data:image/jpeg')"
    )
    assert page.text("#state").endswith("of 30")
    page.screenshot(tmp_path / "running.png")
    page.until(RESULT, 2)
    assert page.text("#figures").count("seed") == 4  # two captions, two buttons
    assert [Image.open(io.BytesIO(data)).getpixel((5, 5)) for data in page.downloads("#figures")] == [(41, 0, 7), (42, 0, 7)]
    assert page.run("return [...document.querySelectorAll('#figures a')].map((link) => link.download)") == [
        "uso-41.png",
        "uso-42.png",
    ]
    assert page.run("return document.querySelectorAll('#made-from img').length") == 2
    page.click("#compare")
    assert page.text("#viewer-title") == "2 pictures side by side"
    page.press(ESCAPE)
    page.click(".picture")
    page.press(RIGHT)
    assert page.text("#viewer-title").startswith("seed 42, 2 of 2")
    page.press(ESCAPE)
    page.screenshot(tmp_path / "result.png")
    assert page.log() == []


def test_earlier_pictures_outlive_the_page(page: Browser, served: Served, pictures: tuple[Path, Path]) -> None:
    page.type("#style-slot-1-file", str(pictures[1]))
    page.until("document.querySelectorAll('.face img').length === 1")
    make_small(page, seed=7)
    page.type("#prompt", "kept")
    page.click("#generate")
    page.until(RESULT, 1)
    page.open(f"{served.url}/")
    page.until("document.querySelectorAll('.entry').length === 1")
    page.click(".entry")
    page.until(RESULT, 1)
    assert page.text("#made-from").startswith("kept")
    page.click("#use-request")
    fields = page.run("return ['prompt', 'seed', 'width'].map((name) => document.getElementById(name).value)")
    assert fields == ["kept", "7", "64"]
    # A picture of another request beside it.
    make_small(page, seed=8)
    page.click("#generate")
    page.until("document.querySelectorAll('.entry').length === 2")
    assert page.run("return document.getElementById('compare').hidden")
    page.click(".entries li:nth-child(2) input")
    page.click("#compare")
    assert page.text("#viewer-pictures").split("\n") == ["seed 8", "seed 7"]
    page.press(ESCAPE)
    # A style without content stays a style.
    assert page.text("#style-slot-1 .caption").startswith("Style: van gogh's $1.jpg, 30×40")
    assert page.text("#content-slot .caption") == ""
    page.click(".entries .remove")
    page.until("document.querySelectorAll('.entry').length === 1")
    page.click(".entries .remove")
    page.until("document.querySelector('#earlier').hidden")


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_request_as_code_makes_the_same_picture(
    page: Browser, pictures: tuple[Path, Path], tmp_path: Path, language: str
) -> None:
    if language == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for place, path in zip(("content-slot", "style-slot-2"), pictures, strict=True):
        page.type(f"#{place}-file", str(path))
    page.until("document.querySelectorAll('.face img').length === 2")
    make_small(page, images=2, seed=300)
    page.run("document.getElementById('prompt').value = arguments[0]", CHARACTERS)
    page.click("#generate")
    page.until(RESULT, 2)
    page.click("#show-result-code")
    page.click(f"#tab-{language}")
    code = str(page.run("return document.getElementById('code-text').textContent"))
    command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    variables = {**os.environ, "USO_API_KEY": KEY}
    answer = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=60)
    urls = httpx.Response(200, text=answer.stdout).json()["images"] if language == "curl" else answer.stdout.split()
    found = [httpx.get(url["url"] if isinstance(url, dict) else url).content for url in urls]
    assert found == page.downloads("#figures")
    if language == "curl":
        assert httpx.Response(200, text=answer.stdout).json()["prompt"] == CHARACTERS


@pytest.mark.parametrize("by", ["escape", "button"])
def test_cancelling_ends_it_on_the_server(page: Browser, served: Served, by: str) -> None:
    before = len(served.lines())
    page.type("#prompt", "steps:900")
    page.click("#generate")
    page.until("document.querySelector('#bar').value > 1")
    page.press(ESCAPE) if by == "escape" else page.click("#cancel")
    page.until("!document.querySelector('#errors').hidden")
    assert page.text("#errors") == "Cancelled."
    assert page.run("return document.getElementById('generate').disabled") is False
    for _ in range(600):  # until the server has noticed
        outcomes = [line.get("outcome") for line in served.lines()[before:] if "generations" in str(line.get("path"))]
        if outcomes[-1:] == ["cancelled"]:
            return
        page.run("return new Promise((resolve) => setTimeout(resolve, 50))")
    raise AssertionError(outcomes)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("raise:image", "image_urls[0] (a file): not a picture"),
        ("raise:safety", "The safety checker could not run; the images are withheld."),
        ("raise:bug", "Internal server error"),
    ],
)
def test_the_servers_errors_are_shown(page: Browser, tmp_path: Path, prompt: str, says: str) -> None:
    page.type("#prompt", prompt)
    page.click("#generate")
    page.until("!document.querySelector('#errors').hidden")
    assert says in page.text("#errors")
    assert "secret" not in page.text("#errors")
    page.screenshot(tmp_path / "error.png")


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Browser, served: Served) -> None:
    page.type("#key", "not-a-key-that-is-known", clear=True)
    page.type("#prompt", "x")
    page.click("#generate")
    page.until("!document.querySelector('#errors').hidden")
    assert "Type a valid API key at the top of the page." in page.text("#errors")
    assert page.run("return document.activeElement.id") == "key"
    page.type("#key", KEY, clear=True)
    page.press(ENTER)
    page.type("#prompt", " y")
    make_small(page)
    page.click("#generate")
    page.until(RESULT, 1)
    page.open(f"{served.url}/")
    page.until("document.body.dataset.started === 'yes'")
    assert page.run("return document.getElementById('key').value") == KEY
    assert page.run("return JSON.stringify(localStorage)") == "{}"


def test_drops_and_pastes(page: Browser) -> None:
    """A GIF becomes PNG in the browser; a link stays a link; what is no picture is named."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "GIF")
    gif = base64.b64encode(buffer.getvalue()).decode()
    page.hand_over("drop", "#style-slot-1", "a.gif", "image/gif", gif)
    page.until("document.querySelector('#style-slot-1 .caption').innerText.startsWith('Style: a.png, 9×7')")
    page.hand_over("paste", "body", "b.gif", "image/gif", gif)
    page.until("document.querySelector('#content-slot .caption').innerText.startsWith('Content: b.png')")
    page.hand_over("drop", "body", None, None, "https://pictures.example/c.png?signature=secret")
    page.until("document.querySelector('#style-slot-2 .caption').innerText.includes('fetched by the server')")
    assert "signature" not in page.text("#style-slot-2 .caption")
    page.hand_over("drop", "#content-slot", "notes.txt", "text/plain", "AAAA")
    page.until("document.querySelector('#errors').innerText === 'notes.txt is no picture that this browser can read.'")
    page.click("#content-slot .remove")
    assert page.text("#content-slot .caption") == ""


def test_the_keyboard_reaches_everything(page: Browser) -> None:
    page.run("document.getElementById('key').focus()")
    reached: list[object] = []
    for _ in range(40):
        page.press(TAB)
        reached.append(page.run("return document.activeElement.id || document.activeElement.tagName"))
    wanted = ["content-slot-file", "style-slot-2-file", "prompt", "image_size", "num_inference_steps", "seed", "generate"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_and_can_be_read(page: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    """No sideways scrolling down to 320 pixels, and a contrast of 4.5 to 1 for every text (WCAG 2.2, 1.4.3)."""
    page.resize(width, 844, dark=dark)
    page.run("document.getElementById('more').open = true; document.getElementById('errors').hidden = false")
    page.run("document.getElementById('errors').append(document.createElement('p'))")
    assert page.run("return document.documentElement.scrollWidth") == width
    contrast, where = page.lowest_contrast()
    assert contrast >= 4.5, where
    background = page.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 22)" if dark else "rgb(250, 248, 243)")
    page.screenshot(tmp_path / f"{width}.png")
