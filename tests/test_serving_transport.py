"""Clients that mean no good, before anything is understood: slow, endless, too large, of other sites, too many."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from serving_process import HTTP, Served, double_server, serving, wait_ready

PATH = "/v1/images/generations"
SMALL = {"model": "bytedance/uso", "prompt": "", "image_urls": [], "image_size": {"width": 64, "height": 64}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("transport")
    bounds = ["max_body_bytes=100000", "max_held_bytes=150000", "header_timeout_s=0.5", "body_timeout_s=1.0"]
    bounds += ["idle_timeout_s=0.4", "max_connections=20", "keep_alive_s=1"]
    with serving(double_server(folder, 0, *bounds), folder / "log") as running:
        wait_ready(running)
        yield running


def connected(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def head(served: Served, *lines: str, path: str = PATH) -> bytes:
    host = f"Host: 127.0.0.1:{served.port}"
    return "\r\n".join((f"POST {path} HTTP/1.1", host, "Content-Type: application/json", *lines, "", "")).encode()


def everything(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def ended(connection: socket.socket) -> bool:
    """Whether the server ends a connection; one that it goes on holding times out."""
    with suppress(ConnectionError):
        everything(connection)
    return True


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_headers_that_do_not_end_are_not_waited_for(served: Served) -> None:
    with connected(served) as silent, connected(served) as slow, connected(served) as second:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-A:")
        # One whole request, then half of another on the same connection.
        second.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert second.recv(12) == b"HTTP/1.1 200"
        second.sendall(b"GET /healthz HTTP/1.1\r\n")
        for connection in (silent, slow, second):
            assert ended(connection)


def test_headers_that_are_too_long_are_refused(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 40_000)
        assert status(everything(connection)) == 400


@pytest.mark.parametrize("lines", [("Content-Length: 5000",), ("Transfer-Encoding: chunked",)])
def test_bodies_that_do_not_come_are_408(served: Served, lines: tuple[str, ...]) -> None:
    with connected(served) as connection:
        connection.sendall(head(served, *lines))
        answer = everything(connection)
    assert status(answer) == 408 and b"connection: close" in answer.lower()


def test_a_body_that_drips_ends_with_its_time(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(head(served, "Content-Length: 50000"))
        connection.settimeout(0.2)
        for _ in range(40):
            connection.sendall(b" ")
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
    assert status(answer) == 408


def test_bodies_that_are_too_large_are_413(served: Served) -> None:
    told = HTTP.post(f"{served.url}{PATH}", content=b" " * 100_001, headers={"content-type": "application/json"})
    assert (told.status_code, told.json()["errors"]) == (413, ["at most 100000 bytes are taken, got 100001"])
    with connected(served) as connection, suppress(ConnectionError):
        connection.sendall(head(served, "Transfer-Encoding: chunked", "X-Request-ID: without-end"))
        for _ in range(200):  # It is told, and the connection closed, before all of it was sent.
            connection.sendall(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
    assert served.line_of("without-end")["status"] == 413


def test_what_follows_a_body_of_two_lengths_is_not_answered(served: Served) -> None:
    """A proxy that goes by the other length would have taken it for a part of the body: it was never checked."""
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(served) as connection:
        connection.sendall(head(served, "Transfer-Encoding: chunked", "Content-Length: 55") + b"0\r\n\r\n" + smuggled)
        answer = everything(connection)
    assert status(answer) == 400 and b"both a Content-Length and a Transfer-Encoding" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_junk_after_an_answer_ends_the_connection_quietly(served: Served) -> None:
    with connected(served) as connection:
        connection.sendall(head(served, "Transfer-Encoding: chunked", path="/nothing"))
        assert status(connection.recv(65536)) == 404
        connection.sendall(b"XYZ\r\n")
        assert ended(connection)
    assert HTTP.get(f"{served.url}/healthz", headers={"connection": "upgrade", "upgrade": "websocket"}).status_code == 200
    told = served.lines("request") and served.log.read_text()
    assert "Fatal error" not in told and "upgrade" not in told


def test_bodies_that_are_held_are_bounded_together(served: Served) -> None:
    with connected(served) as first:
        first.sendall(head(served, "Content-Length: 90000") + b" ")
        busy = HTTP.post(f"{served.url}{PATH}", content=b" " * 90_000, headers={"content-type": "application/json"})
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    assert HTTP.post(f"{served.url}{PATH}", json=SMALL).status_code == 201


def test_a_client_that_reads_nothing_is_left(served: Served) -> None:
    # Prompts come back in the answer; here as events, which go on until nothing more fits into the sockets.
    body = json.dumps({**SMALL, "prompt": "steps:1000000 noise"}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", served.port))
        stream = f"{PATH}?stream=true&previews=true"
        connection.sendall(head(served, f"Content-Length: {len(body)}", "X-Request-ID: reads-nothing", path=stream) + body)
        line = served.line_of("reads-nothing")
    assert (line["outcome"], line["waited_s"], line["client"]) == ("unread", 0.4, "127.0.0.1")
    assert isinstance(line["sent_bytes"], int) and line["sent_bytes"] > 0
    assert HTTP.get(f"{served.url}/healthz").status_code == 200
    assert "traceback" not in served.log.read_text() and "ASGI" not in served.log.read_text()


def test_connections_are_bounded(served: Served) -> None:
    held = [connected(served) for _ in range(20)]
    try:
        with connected(served) as over, suppress(ConnectionError):
            over.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert over.recv(1) == b""
    finally:
        for connection in held:
            connection.close()
    assert HTTP.get(f"{served.url}/healthz").status_code == 200


def test_foreign_hosts_are_refused(served: Served) -> None:
    for host, expected in (("evil.example", 421), (f"localhost:{served.port}", 200), ("", 400), ("127.0.0.1@evil", 400)):
        assert HTTP.get(f"{served.url}/healthz", headers={"host": host}).status_code == expected, host
    with connected(served) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert status(everything(connection)) == 400


def test_pages_of_other_origins_are_refused(served: Served) -> None:
    own = HTTP.post(f"{served.url}{PATH}", json=SMALL, headers={"origin": served.url})
    assert own.status_code == 201 and "access-control-allow-origin" not in own.headers
    for origin in ("https://evil.example", "null"):
        answer = HTTP.post(f"{served.url}{PATH}", json=SMALL, headers={"origin": origin})
        assert answer.status_code == 403
    asked = HTTP.options(f"{served.url}{PATH}", headers={"origin": "https://evil.example"})
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers


def test_what_is_no_http_is_400(served: Served) -> None:
    for junk in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ):
        with connected(served) as connection:
            connection.sendall(junk)
            answer = everything(connection)
        assert answer == b"" or status(answer) == 400
