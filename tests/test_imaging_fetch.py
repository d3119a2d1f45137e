"""A fetcher that meets servers which are slow, endless, lying, or send it somewhere else."""

from __future__ import annotations

import contextlib
import gzip
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from uso_engine.errors import FetchError, ImageError
from uso_engine.imaging import deadline as deadline_module
from uso_engine.imaging.fetch import fetch
from uso_engine.imaging.open import ImageLimits, open_image

BODY = b"picture bytes " * 20
DEADLINE_S = 0.6
NOT_FETCHED = r"could not be fetched \(no connection, or no answer with status 200\)"


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def answer(self, status: int = 200, body: bytes = BODY, **fields: str) -> None:
        self.send_response(status)
        given = {"Content-Type": "image/png", "Content-Length": str(len(body))}
        given.update({name.replace("_", "-"): value for name, value in fields.items()})
        for name, value in given.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, lines: bytes, pause_s: float = 0.1) -> None:
        for at in range(200):
            self.wfile.write(lines[at % len(lines) : at % len(lines) + 1])
            self.wfile.flush()
            time.sleep(pause_s)

    def do_GET(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough, which is the point
            self.routes()[self.path.split("?")[0]]()

    def routes(self) -> dict[str, Callable[[], None]]:
        redirects = {f"/hop{n}": lambda n=n: self.answer(302, b"", Location=f"/hop{n - 1}") for n in range(1, 8)}
        return redirects | {
            "/hop0": self.answer,
            "/ok": self.answer,
            "/untyped": lambda: self.answer(Content_Type=""),
            "/octets": lambda: self.answer(Content_Type="binary/octet-stream"),
            "/missing": lambda: self.answer(404),
            "/broken": lambda: self.answer(500),
            "/loop": lambda: self.answer(302, b"", Location="/loop"),
            "/nowhere": lambda: self.answer(302),
            "/to-file": lambda: self.answer(302, b"", Location="file:///etc/passwd"),
            "/to-user": lambda: self.answer(307, b"", Location="http://user:pass@127.0.0.1/"),
            "/to-backslash": lambda: self.answer(301, b"", Location="http://127.0.0.1\\@evil/"),
            "/html": lambda: self.answer(body=b"<html>not found</html>", Content_Type="text/html; charset=utf-8"),
            "/short": lambda: self.answer(Content_Length=str(len(BODY) + 100), Connection="close"),
            "/says-large": lambda: self.answer(Content_Length="99999999999"),
            "/hangs-up": lambda: setattr(self, "close_connection", True),
            "/no-http": self.speak_something_else,
            "/endless": self.endless,
            "/gzip": lambda: self.answer(body=gzip.compress(bytes(5_000_000)), Content_Encoding="gzip"),
            "/slow-body": self.slow_body,
            "/slow-headers": lambda: self.drip(b"HTTP/1.1 200 OK\r\nX-A: "),
            "/silent": lambda: time.sleep(3),
            "/gif": lambda: self.answer(body=gif(), Content_Type="image/gif"),
            "/png": lambda: self.answer(body=png()),
        }

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"4000\r\n" + bytes(0x4000) + b"\r\n")

    def speak_something_else(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        self.close_connection = True

    def slow_body(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", "200")
        self.end_headers()
        self.drip(b"x")


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (3, 3)).save(buffer, "GIF")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up, or speaks TLS to this, is part of the test."""


@pytest.fixture
def server() -> Iterator[str]:
    with QuietServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/ok", "/untyped", "/octets", "/hop5", "/ok?signature=a%20b"])
def test_what_is_there_is_read(server: str, path: str) -> None:
    assert fetch(server + path) == BODY


def test_open_image_fetches(server: str) -> None:
    assert open_image(server + "/png").size == (3, 2)
    with pytest.raises(ImageError, match="/gif: a GIF image; expected PNG, JPEG or WebP"):
        open_image(server + "/gif")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing", rf"/missing: {NOT_FETCHED}$"),
        ("/broken", rf"/broken: {NOT_FETCHED}$"),
        ("/nowhere", rf"/nowhere: {NOT_FETCHED}$"),
        ("/hangs-up", rf"/hangs-up: {NOT_FETCHED}$"),
        ("/no-http", rf"/no-http: {NOT_FETCHED}$"),
        ("/loop", r"more than 5 redirects"),
        ("/hop6", r"more than 5 redirects"),
        ("/to-file", r"redirected to a URL that has the scheme 'file'; expected http or https"),
        ("/to-user", r"redirected to a URL that holds credentials"),
        ("/to-backslash", r"redirected to a URL that is not valid"),
        ("/html", r"expected an image, the server says 'text/html'"),
        ("/short", r"broke off before the answer was complete"),
        ("/says-large", r"99,999,999,999 bytes; at most 100,000 are accepted"),
        ("/endless", r"more than 100,000 bytes"),
        ("/gzip", r"content encoding 'gzip', which was not asked for"),
    ],
)
def test_what_is_wrong_is_named(server: str, path: str, says: str) -> None:
    with pytest.raises(FetchError, match=says):
        fetch(server + path, max_bytes=100_000, deadline_s=20)


def test_a_body_of_exactly_the_limit_is_read(server: str) -> None:
    assert fetch(server + "/ok", max_bytes=len(BODY)) == BODY
    with pytest.raises(FetchError, match=f"{len(BODY)} bytes; at most {len(BODY) - 1}"):
        fetch(server + "/ok", max_bytes=len(BODY) - 1)


@pytest.mark.parametrize("path", ["/slow-body", "/slow-headers", "/silent"])
def test_one_deadline_covers_every_drip(server: str, path: str) -> None:
    """Each single read of a drip stays far under the deadline: with a time-out per read this would succeed, or break off."""
    with pytest.raises(FetchError, match=rf"{path}: took longer than {DEADLINE_S} s"):
        fetch(server + path, deadline_s=DEADLINE_S)


def test_the_deadline_covers_name_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*args: object, **options: object) -> list[object]:
        released.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(FetchError, match=r"took longer than 0\.2 s"):
        fetch("http://pictures.invalid/a.png", deadline_s=0.2)
    released.set()


def test_names_are_resolved_in_one_place_and_kept_for_the_host_header(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(server.rpartition(":")[2])
    asked: list[tuple[str, int]] = []
    seen: list[str] = []

    def resolve(host: str, at: int, limit: deadline_module.Deadline) -> list[str]:
        asked.append((host, at))
        return ["127.0.0.2", "127.0.0.1"]  # nobody listens on the first: the second is tried

    original = Handler.do_GET

    def keep(self: Handler) -> None:
        seen.append(self.headers["Host"])
        original(self)

    monkeypatch.setattr(deadline_module, "resolve_host", resolve)
    monkeypatch.setattr(Handler, "do_GET", keep)
    assert fetch(f"http://pictures.example:{port}/ok") == BODY
    assert asked == [("pictures.example", port)]
    assert seen == [f"pictures.example:{port}"]


def test_unreachable_hosts_all_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a port is closed or a name unknown is nobody's business outside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    with pytest.raises(FetchError, match=rf"/a: {NOT_FETCHED}$"):
        fetch(f"http://127.0.0.1:{closed}/a")

    def unknown(*args: object, **options: object) -> list[object]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match=rf"/a: {NOT_FETCHED}$"):
        fetch("http://no.such.host.invalid/a")
    with pytest.raises(FetchError, match=rf"{NOT_FETCHED}$|not valid"):
        fetch(f"http://{'x' * 70}.invalid/a")


def test_private_addresses_can_be_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ImageLimits(allow_private_addresses=False)
    assert open_image(server + "/png").size == (3, 2)
    with pytest.raises(FetchError, match=rf"/png: {NOT_FETCHED}$"):
        open_image(server + "/png", limits=limits)
    port = int(server.rpartition(":")[2])

    def resolve(host: str, at: int, limit: deadline_module.Deadline) -> list[str]:
        return {"rebound.example": ["127.0.0.1"], "both.example": ["8.8.8.8", "127.0.0.1"]}[host]

    monkeypatch.setattr(deadline_module, "resolve_host", resolve)
    for host in ("rebound.example", "both.example"):
        with pytest.raises(FetchError, match=rf"{host}:{port}/png: {NOT_FETCHED}$"):
            open_image(f"http://{host}:{port}/png", limits=limits)
    assert open_image(f"http://rebound.example:{port}/png").size == (3, 2)


def test_redirects_to_private_addresses_are_refused_like_the_first_url(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that counts as public sends on to one that does not."""
    port = int(server.rpartition(":")[2])
    seen: list[str] = []

    def public(address: str) -> bool:
        seen.append(address)
        return len(seen) == 1

    monkeypatch.setattr(deadline_module, "is_public", public)
    with pytest.raises(FetchError, match=rf"/hop1: {NOT_FETCHED}$"):
        fetch(f"http://127.0.0.1:{port}/hop1", allow_private_addresses=False)
    assert seen == ["127.0.0.1", "127.0.0.1"]


def test_the_log_has_the_reason(server: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="uso_engine"), pytest.raises(FetchError):
        fetch(server + "/missing")
    assert "/missing: answered with status 404" in caplog.text


def test_a_tls_server_that_speaks_http_is_unreachable(server: str) -> None:
    with pytest.raises(FetchError, match=NOT_FETCHED):
        fetch(server.replace("http://", "https://") + "/ok")


def test_no_proxy_from_the_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(server + "/ok") == BODY


def test_https_only_holds_for_redirects_too(server: str) -> None:
    with pytest.raises(FetchError, match="scheme 'http'; expected https"):
        fetch(server + "/ok", allow_http=False)


def test_queries_stay_out_of_messages(server: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(server + "/missing?signature=secret")
    assert "secret" not in str(caught.value)


def test_limits_reach_the_fetcher(server: str) -> None:
    with pytest.raises(FetchError, match="at most 10 are accepted"):
        open_image(server + "/png", limits=ImageLimits(max_bytes=10))
    with pytest.raises(FetchError, match=r"took longer than 0\.3 s"):
        open_image(server + "/silent", limits=ImageLimits(deadline_s=0.3))
