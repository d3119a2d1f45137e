"""Reading a picture from a URL that a stranger may have chosen.

One function, :func:`fetch`. One deadline covers the lookup of the name, connecting, TLS, every redirect, and every single read
of headers and body: it lives in the network stream under the HTTP library (``deadline.py``), so no slow drip gets past it.
Names become addresses in one place there, and the connection goes to the address that came out of it.
"""

from __future__ import annotations

import logging
import ssl

import httpcore
import httpx

from uso_engine.errors import FetchError
from uso_engine.imaging.deadline import Deadline, DeadlineBackend
from uso_engine.imaging.hosts import HostList

logger = logging.getLogger(__name__)

# What servers call a picture; object stores that were not told a type say octet-stream. Content decides later.
_MEDIA_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_FORBIDDEN = frozenset("\\ \t\r\n\0")  # parsers disagree about a backslash: one reads a host where another reads a path
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MOST_REDIRECTS = 5
_MAX_URL = 16_384  # signed URLs of object stores have 2,000 characters

# One text for a name that is unknown, a port that is closed, an address that is refused, a certificate that is bad, a server
# that does not speak HTTP, and every status but 200: whoever can tell them apart scans networks through us. The log has the
# reason.
_NOT_FETCHED = "could not be fetched (no connection, or no answer with status 200)"


def fetch(
    url: str,
    *,
    max_bytes: int = 50 * 2**20,
    deadline_s: float = 30.0,
    allow_http: bool = True,
    allow_private_addresses: bool = True,
    private_hosts: HostList | None = None,
    allowed_hosts: HostList | None = None,
) -> bytes:
    """Read the body behind a URL.

    Redirects are followed, each target checked like the first URL. No proxy, certificate path or credential comes from the
    environment. Compressed transfer is neither asked for nor accepted.

    Args:
        url: http or https, without credentials.
        max_bytes: the most bytes of body; reading stops there.
        deadline_s: the most seconds for everything together, redirects included.
        allow_http: whether plain http is accepted besides https, for redirects too.
        allow_private_addresses: whether addresses that are not public are connected to, for redirects too.
        private_hosts: hosts whose addresses need not be public where others' do.
        allowed_hosts: the only hosts that are fetched from, redirects included; None for all.

    Returns:
        The complete body.

    Raises:
        FetchError: refused or failed; the text says what, and nothing about the network behind this machine.
    """
    target = _checked(url, allow_http, "this URL", allowed_hosts)
    label = _shown(target)
    deadline = Deadline(deadline_s)
    backend = DeadlineBackend(
        deadline, allow_private_addresses=allow_private_addresses, private_hosts=private_hosts or HostList()
    )
    context: ssl.SSLContext | None = None
    for _ in range(_MOST_REDIRECTS + 1):
        if context is None and target.scheme == "https":  # reading the certificates takes 20 ms: not for plain http
            context = httpx.create_ssl_context(trust_env=False)
        try:
            with httpcore.ConnectionPool(ssl_context=context, network_backend=backend) as pool:
                answer = _get(pool, target, max_bytes, label)
        except httpcore.TimeoutException as error:
            raise FetchError(f"{label}: took longer than {deadline_s:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            logger.info("%s: %s: %s", label, type(error).__name__, error)
            raise FetchError(f"{label}: {_NOT_FETCHED}") from error
        if answer is None:
            raise FetchError(f"{label}: {_NOT_FETCHED}")
        if isinstance(answer, bytes):
            return answer
        target = _checked(
            _join(target, answer.location, label), allow_http, f"{label}: redirected to a URL that", allowed_hosts
        )
    raise FetchError(f"{label}: more than {_MOST_REDIRECTS} redirects")


class _Redirect:
    def __init__(self, location: str) -> None:
        self.location = location


def _get(pool: httpcore.ConnectionPool, target: httpx.URL, max_bytes: int, label: str) -> bytes | _Redirect | None:
    """One request: the body, or where it has gone; None for every other status."""
    # Parsed once, by httpx; httpcore gets the parts, so that what was checked is what is asked.
    url = httpcore.URL(
        scheme=target.raw_scheme,
        host=target.raw_host,
        port=_port(target),
        target=target.raw_path,
    )
    headers = [
        (b"Host", target.netloc),
        (b"Accept", b"image/png, image/jpeg, image/webp"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"uso-engine"),
    ]
    with pool.stream("GET", url, headers=headers) as response:
        fields = {name.decode("latin-1").lower(): value.decode("latin-1").strip() for name, value in response.headers}
        if response.status in _REDIRECTS and "location" in fields:
            return _Redirect(fields["location"])
        if response.status != 200:
            logger.info("%s: answered with status %d", label, response.status)
            return None
        _check_fields(fields, max_bytes, label)
        body = bytearray()
        try:
            for chunk in response.iter_stream():
                body += chunk
                if len(body) > max_bytes:
                    raise FetchError(f"{label}: more than {max_bytes:,} bytes, the most that is accepted for one image")
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise FetchError(f"{label}: the connection broke off before the answer was complete") from error
        return bytes(body)


def _check_fields(fields: dict[str, str], max_bytes: int, label: str) -> None:
    media_type = fields.get("content-type", "").partition(";")[0].strip().lower()
    if media_type and not media_type.startswith(_MEDIA_TYPES):
        raise FetchError(f"{label}: expected an image, the server says {media_type[:60]!r}")
    encoding = fields.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise FetchError(f"{label}: sent with content encoding {encoding[:20]!r}, which was not asked for and is not unpacked")
    length = fields.get("content-length", "")
    if length.isdecimal() and len(length) <= 20 and int(length) > max_bytes:
        raise FetchError(f"{label}: {int(length):,} bytes; at most {max_bytes:,} are accepted for one image")


def _port(target: httpx.URL) -> int:
    return target.port or _DEFAULT_PORTS[target.scheme]


def _checked(url: str, allow_http: bool, label: str, allowed_hosts: HostList | None) -> httpx.URL:
    """Parse a URL and refuse what is never fetched. Called for the first URL and for every redirect."""
    if len(url) > _MAX_URL:
        raise FetchError(f"{label} is not valid: it has {len(url):,} characters; at most {_MAX_URL:,} are accepted")
    if any(character in _FORBIDDEN for character in url):
        raise FetchError(f"{label} is not valid: it holds white space or a backslash")
    try:
        target = httpx.URL(url)
        # Looked at here, because they are decoded only when they are looked at.
        _, port = target.host, target.port
    except (httpx.InvalidURL, ValueError) as error:  # ValueError: half a surrogate pair; a host that IDNA does not allow
        raise FetchError(f"{label} is not valid") from error
    if port is not None and not 0 < port < 65536:
        raise FetchError(f"{label} is not valid: there is no port {port}")
    expected = "http or https" if allow_http else "https"
    if target.scheme not in expected.split(" or "):
        raise FetchError(f"{label} has the scheme {target.scheme[:20]!r}; expected {expected}")
    if not target.host:
        raise FetchError(f"{label} names no host")
    if target.userinfo:
        raise FetchError(f"{label} holds credentials; they are not sent")
    if allowed_hosts is not None and not allowed_hosts.holds(target.raw_host.decode("ascii"), _port(target)):
        raise FetchError(f"{label} names a host that pictures are not fetched from here")
    return target


def _join(base: httpx.URL, location: str, label: str) -> str:
    if any(character in _FORBIDDEN for character in location):
        raise FetchError(f"{label}: redirected to a URL that is not valid")
    try:
        return str(base.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError(f"{label}: redirected to a URL that is not valid") from error


def _shown(url: httpx.URL) -> str:
    """A URL for messages: without its query, which may hold a signature."""
    text = str(url.copy_with(query=None, fragment=None))
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 90 else f"{text[:44]}…{text[-44:]}"
