"""A server that does what a fetcher of pictures has to survive, and a resolver of names that lies."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from picture_files import chunk, encoded
from PIL import Image

PNG = encoded(Image.new("RGB", (3, 2), "red"), "PNG")
GZIP = gzip.compress(bytes(20_000_000))


def png_of(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x00\x00\x00\x00"
    return PNG[:8] + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_frames(count: int, kind: str) -> bytes:
    first, others = Image.new("P", (4, 4), 1), [Image.new("P", (4, 4), at % 2) for at in range(count - 1)]
    return encoded(first, kind, save_all=True, append_images=others, duration=1)


def animated_webp(count: int) -> bytes:
    """One frame repeated, put together by hand: an encoder would take minutes."""
    still = encoded(Image.new("RGB", (4, 4), "red"), "WEBP", lossless=True)[12:]
    frame = b"\0\0\0\0\0\0" + (3).to_bytes(3, "little") * 2 + (1).to_bytes(3, "little") + b"\0" + still
    parts = b"VP8X" + (10).to_bytes(4, "little") + b"\x02\0\0\0" + (3).to_bytes(3, "little") * 2
    parts += b"ANIM" + (6).to_bytes(4, "little") + bytes(6)
    parts += (b"ANMF" + len(frame).to_bytes(4, "little") + frame) * count
    return b"RIFF" + (len(parts) + 4).to_bytes(4, "little") + b"WEBP" + parts


BODIES: dict[str, tuple[str, bytes]] = {
    "svg": ("image/svg+xml", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "svg-with-prolog": (
        "image/png",
        b"\xef\xbb\xbf  <?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a SYSTEM 'file:///x'>]><svg/>",
    ),
    "html-as-png": ("image/png", b"<!DOCTYPE html><script>1</script>"),
    "gif-frames": ("image/gif", many_frames(10_000, "GIF")),
    "html-then-png": ("image/png", b"<html>" + PNG),
    "zip-then-png": ("image/png", b"PK\x03\x04" + PNG),
    "postscript": ("image/png", b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file"),
    "nothing": ("image/png", b""),
    "says-65535-squared": ("image/png", png_of(65_535, 65_535, zlib.compress(bytes(1000)))),
    "says-nothing-wide": ("image/png", png_of(0, 7, zlib.compress(bytes(100)))),
    "more-than-its-size": ("image/png", png_of(8, 8, zlib.compress(bytes(40_000_000)))),
    "text-bomb": (
        "image/png",
        png_of(2, 2, zlib.compress(bytes(6)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
    ),
    "profile-bomb": (
        "image/png",
        png_of(2, 2, zlib.compress(bytes(6)), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
    ),
    "webp-frames": ("image/webp", animated_webp(10_000)),
    "png-then-zip": ("image/png", PNG + b"PK\x03\x04" + bytes(5_000)),
    "png-then-html": ("image/png", PNG + b"<script>1</script>"),
}


@dataclass
class Hostile:
    """A running server: where it listens, what was asked of it, and the names that the test's resolver knows."""

    port: int
    redirect_to: str = ""
    seen: list[str] = field(default_factory=list)
    names: dict[str, list[list[str]]] = field(default_factory=dict)
    looked_up: list[str] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://pictures.test:{self.port}/{path}"

    def resolve(self, host: str, port: int, *arguments: object, **options: object) -> list[tuple[object, ...]]:
        """As `socket.getaddrinfo`: known names give their answers in turn, the last one for ever; others the system's."""
        if host not in self.names:
            return SYSTEM_LOOKUP(host, port, *arguments, **options)  # type: ignore[arg-type,return-value]
        self.looked_up.append(host)
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


SYSTEM_LOOKUP = socket.getaddrinfo


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hostile: Hostile

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is the point."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def head(self, status: int = 200, **fields: str) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.hostile.seen.append(name)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if name in BODIES:
                kind, body = BODIES[name]
                self.head(Content_Type=kind, Content_Length=str(len(body)))
                self.wfile.write(body)
            else:
                getattr(self, f"answer_{name.replace('-', '_')}")()

    def answer_redirect(self) -> None:
        self.head(302, Location=self.server.hostile.redirect_to, Content_Length="0")

    def answer_secret(self) -> None:
        self.head(Content_Type="image/png", Content_Length=str(len(PNG)))
        self.wfile.write(PNG)

    def answer_endless(self) -> None:
        self.head(Content_Type="image/png")
        while True:
            self.wfile.write(bytes(65_536))

    def answer_endless_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X-A: " + b"a" * 8_000 + b"\r\n")

    def answer_endless_header(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        while True:
            self.wfile.write(b"a" * 8_000)

    def answer_endless_continue(self) -> None:
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)

    def answer_endless_chunk_extension(self) -> None:
        self.head(Content_Type="image/png", Transfer_Encoding="chunked")
        self.wfile.write(b"1;")
        while True:
            self.wfile.write(b"a" * 8_000)

    def answer_too_short(self) -> None:
        self.head(Content_Type="image/png", Content_Length=str(len(PNG) + 1), Connection="close")
        self.wfile.write(PNG)

    def answer_too_long(self) -> None:
        self.head(Content_Type="image/png", Content_Length=str(len(PNG) - 30), Connection="close")
        self.wfile.write(PNG)

    def answer_two_lengths(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.send_header("Content-Length", str(len(PNG)))
        self.end_headers()
        self.wfile.write(PNG)

    def answer_minus_length(self) -> None:
        self.head(Content_Type="image/png", Content_Length="-1")
        self.wfile.write(PNG)

    def answer_gzip(self) -> None:
        self.head(Content_Type="image/png", Content_Encoding="gzip", Content_Length=str(len(GZIP)))
        self.wfile.write(GZIP)

    def answer_gzip_chunks(self) -> None:
        self.head(Content_Type="image/png", Transfer_Encoding="gzip, chunked")
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(GZIP), GZIP))

    def answer_html(self) -> None:
        self.head(Content_Type="text/html", Content_Length=str(len(PNG)))
        self.wfile.write(PNG)


@contextlib.contextmanager
def running_server() -> Iterator[Hostile]:
    """A hostile server on loopback; ``pictures.test`` is its name."""
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.hostile = Hostile(running.server_port, names={"pictures.test": [["127.0.0.1"]]})
        yield running.hostile
        running.shutdown()
        thread.join()
