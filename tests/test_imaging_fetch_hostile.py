"""A hostile server, met with the limits of a server that strangers use: nothing private is reached, nothing exceeds its bound.

Names come from a resolver in the test. ``pictures.test`` is the hostile server, which counts as public because an operator
named it; whatever else it leads to is refused, and `Hostile.seen` shows that nothing was asked there.
"""

from __future__ import annotations

import socket
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpcore
import pytest
from hostile_server import PNG, Hostile, running_server

from uso_engine.errors import FetchError, ImageError
from uso_engine.imaging.decode_pool import DecodePool
from uso_engine.imaging.open import ImageLimits, open_image

NOT_FETCHED = "could not be fetched (no connection, or no answer with status 200)"
PUBLIC = "93.184.216.34"


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    with running_server() as found:
        monkeypatch.setattr(socket, "getaddrinfo", found.resolve)
        yield found


@pytest.fixture(scope="module")
def limits() -> Iterator[ImageLimits]:
    """What a server that strangers use accepts."""
    with DecodePool(1) as pool:
        yield ImageLimits(
            max_bytes=2_000_000,
            max_pixels=4_000_000,
            deadline_s=20,
            allow_private_addresses=False,
            allow_paths=False,
            private_hosts=("pictures.test",),
            decode_pool=pool,
        )


def refused(url: str, limits: ImageLimits) -> str:
    with pytest.raises((FetchError, ImageError)) as caught:
        open_image(url, limits=limits, name="image_urls[0]")
    return str(caught.value)


# {port} is the hostile server's own, where "secret" would be answered.
PRIVATE_TARGETS = (
    "http://127.0.0.1:{port}/secret",
    "http://127.1:{port}/secret",
    "http://0x7f000001:{port}/secret",
    "http://2130706433:{port}/secret",
    "http://0177.0.0.1:{port}/secret",
    "http://0:{port}/secret",
    "http://0.0.0.0:{port}/secret",
    "http://①②⑦.⓪.⓪.①:{port}/secret",
    "http://localhost:{port}/secret",
    "http://LOCALHOST.:{port}/secret",
    "//127.0.0.1:{port}/secret",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]:{port}/secret",
    "http://[0:0:0:0:0:0:0:1]:{port}/secret",
    "http://[::]:{port}/secret",
    "http://[::ffff:127.0.0.1]:{port}/secret",
    "http://[::ffff:7f00:1]:{port}/secret",
    "http://[::127.0.0.1]:{port}/secret",
    "http://[64:ff9b::127.0.0.1]:{port}/secret",
    "http://[64:ff9b:1::7f00:1]:{port}/secret",
    "http://[2002:7f00:1::]:{port}/secret",
    "http://[fe80::1%25lo]:{port}/secret",
    "http://[fe80::1%lo]:{port}/secret",
    "http://[fd00::1]:{port}/secret",
    "http://127.0.0.1:{port}\\@pictures.test:{port}/secret",
    "http://pictures.test:{port}\\@127.0.0.1:{port}/secret",
    "http://pictures.test@127.0.0.1:{port}/secret",
    "http://pictures.test:{port}@127.0.0.1:{port}/secret",
    "http://127.0.0.1:{port}#@pictures.test/secret",
    "http://127.0.0.1:{port}?@pictures.test/secret",
    "http://pictures.test\t@127.0.0.1:{port}/secret",
    "http://@127.0.0.1:{port}/secret",
    "http:127.0.0.1:{port}/secret",
    "http:///127.0.0.1:{port}/secret",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_secret",
    "data:image/png;base64,AAAA",
)


@pytest.mark.parametrize("target", PRIVATE_TARGETS)
def test_nothing_private_is_reached(hostile: Hostile, limits: ImageLimits, target: str) -> None:
    """As the URL itself and as what a redirect leads to."""
    hostile.redirect_to = target.format(port=hostile.port)
    # Header fields are latin-1; a name in other characters arrives there as what a server would send.
    hostile.redirect_to = hostile.redirect_to.encode().decode("latin-1")
    refused(hostile.url("redirect"), limits)
    if not target.startswith(("//", "data:")):
        refused(target.format(port=hostile.port), limits)
    assert hostile.seen[0] == "redirect"
    assert "secret" not in hostile.seen


def test_private_redirects_read_like_closed_ports(hostile: Hostile, limits: ImageLimits) -> None:
    """Who chooses URLs learns nothing from the answers: an open port, a closed one and a missing name read alike."""
    texts = set()
    for target in (f"http://127.0.0.1:{hostile.port}/secret", "http://127.0.0.1:1/", "http://no-such-name.invalid/"):
        hostile.redirect_to = target
        texts.add(refused(hostile.url("redirect"), limits))
    assert len(texts) == 1
    assert "127.0.0.1" not in texts.pop()


def test_a_name_that_changes_its_answer(hostile: Hostile, limits: ImageLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public when it is first looked up, loopback ever after: the connection goes to the address that was looked at."""
    connected: list[str] = []

    def connect(self: object, host: str, port: int, **options: object) -> httpcore.NetworkStream:
        connected.append(host)
        raise httpcore.ConnectError("nobody there")

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    hostile.names["rebinding.test"] = [[PUBLIC], ["127.0.0.1"]]
    for _ in range(2):
        assert "rebinding.test" in refused(f"http://rebinding.test:{hostile.port}/secret", limits)
    assert connected == [PUBLIC]
    assert hostile.looked_up == ["rebinding.test", "rebinding.test"]


def test_one_private_address_among_public_ones_is_enough(hostile: Hostile, limits: ImageLimits) -> None:
    hostile.names["both.test"] = [[PUBLIC, "127.0.0.1"]]
    refused(f"http://both.test:{hostile.port}/secret", limits)
    assert hostile.seen == []


def test_named_hosts_may_be_private_on_the_port_that_was_named(hostile: Hostile, limits: ImageLimits) -> None:
    hostile.names["store.internal"] = [["127.0.0.1"]]
    url = f"http://store.internal:{hostile.port}/secret"
    refused(url, limits)
    refused(url, replace(limits, private_hosts=("store.internal:1",)))
    assert hostile.seen == []
    assert open_image(url, limits=replace(limits, private_hosts=(f"store.internal:{hostile.port}",))).size == (3, 2)


def test_only_named_hosts_are_fetched_from(hostile: Hostile, limits: ImageLimits) -> None:
    only = replace(limits, allowed_hosts=("pictures.test",))
    assert open_image(hostile.url("secret"), limits=only).size == (3, 2)
    hostile.redirect_to = "https://pictures.example/a.png"
    assert "redirected to a URL that names a host that pictures are not fetched from here" in refused(
        hostile.url("redirect"), only
    )
    nobody = replace(limits, allowed_hosts=())
    assert refused(hostile.url("secret"), nobody) == "this URL names a host that pictures are not fetched from here"
    assert hostile.seen == ["secret", "redirect"]
    assert hostile.looked_up == ["pictures.test", "pictures.test"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("endless", "more than 2,000,000 bytes"),
        ("endless-headers", NOT_FETCHED),
        ("endless-header", NOT_FETCHED),
        ("endless-chunk-extension", "broke off"),
        ("too-short", "the connection broke off before the answer was complete"),
        ("too-long", "truncated or damaged"),
        ("two-lengths", NOT_FETCHED),
        ("minus-length", NOT_FETCHED),
        ("gzip", "content encoding 'gzip', which was not asked for and is not unpacked"),
        ("gzip-chunks", NOT_FETCHED),
        ("html", "expected an image, the server says 'text/html'"),
        ("svg", "an SVG drawing; expected PNG, JPEG or WebP"),
        ("svg-with-prolog", "an XML document; expected PNG, JPEG or WebP"),
        ("html-as-png", "an HTML page; expected PNG, JPEG or WebP"),
        ("gif-frames", "a GIF image; expected PNG, JPEG or WebP"),
        ("html-then-png", "an HTML page; expected PNG, JPEG or WebP"),
        ("zip-then-png", "a zip archive; expected PNG, JPEG or WebP"),
        ("postscript", "not an image"),
        ("nothing", "empty (0 bytes)"),
        ("says-65535-squared", "65535x65535 is 4,294,836,225 pixels; at most 4,000,000 are accepted"),
        ("says-nothing-wide", "an image of 0x7 pixels; expected at least 1x1"),
    ],
)
def test_bodies_that_are_refused(hostile: Hostile, limits: ImageLimits, path: str, says: str) -> None:
    tracemalloc.start()
    try:
        text = refused(hostile.url(path), limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in text
    assert peak < 3 * limits.max_bytes  # both sides of the connection are in this process


def test_interim_answers_without_end_meet_the_deadline(hostile: Hostile, limits: ImageLimits) -> None:
    assert "took longer than 0.3 s" in refused(hostile.url("endless-continue"), replace(limits, deadline_s=0.3))


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("more-than-its-size", (8, 8)),
        ("text-bomb", (2, 2)),
        ("profile-bomb", (2, 2)),
        ("webp-frames", (4, 4)),
        ("png-then-zip", (3, 2)),
        ("png-then-html", (3, 2)),
    ],
)
def test_what_a_picture_carries_besides_its_pixels_costs_nothing(
    hostile: Hostile, limits: ImageLimits, path: str, size: tuple[int, int]
) -> None:
    """Read as the picture that it is; the rest is not unpacked, in this process (whose memory is measured) least of all."""
    tracemalloc.start()
    try:
        image = open_image(hostile.url(path), limits=replace(limits, decode_pool=None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert image.size == size
    assert image.info == {}
    assert peak < 3 * limits.max_bytes
    assert open_image(hostile.url(path), limits=limits).tobytes() == image.tobytes()


def test_local_paths_are_not_opened(tmp_path: Path, limits: ImageLimits) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    for source in (str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", f"FILE:{tmp_path}/a.png", "~/a.png", "a.png"):
        assert "local paths are not opened here; expected an http(s) URL or a data URI" in refused(source, limits)
