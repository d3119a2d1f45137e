"""Hosts that an operator names: the only ones that pictures are fetched from, or private ones that may be fetched from."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_EXPECTED = "expected 'host', 'host:port', '*.domain', an IPv4 address or '[IPv6 address]'"


@dataclass(frozen=True)
class HostPattern:
    """One entry: a host or every host below a domain, on one port or on all.

    Args:
        host: a lower-case name or an address in its shortest form.
        below: whether hosts below ``host`` are meant instead of itself.
        port: the only port that is meant; None for all.
    """

    host: str
    below: bool
    port: int | None

    @classmethod
    def parse(cls, text: str) -> HostPattern:
        """Read an entry.

        Args:
            text: ``pictures.example``, ``*.example:8443``, ``10.0.0.7``, ``[fd00::7]:9000``; ASCII, so ``xn--…`` for others.

        Raises:
            ValueError: anything else.
        """
        host, port = _split_port(text)
        below = host.startswith("*.")
        host = normal_host(host.removeprefix("*."))
        try:
            is_address = bool(ipaddress.ip_address(host))
        except ValueError:
            is_address = False
        if (below and is_address) or not (is_address or _NAME.fullmatch(host)):
            raise ValueError(f"{text!r:.100} is no host; {_EXPECTED}")
        return cls(host, below, port)

    def matches(self, host: str, port: int) -> bool:
        """Whether a host on a port is meant.

        Args:
            host: as `normal_host` gives it.
            port: the port that is connected to.
        """
        if self.port is not None and port != self.port:
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


class HostList:
    """Entries, of which one has to match.

    Args:
        entries: as `HostPattern.parse` reads them.

    Raises:
        ValueError: an entry that is no host.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._patterns = tuple(HostPattern.parse(entry) for entry in entries)

    def holds(self, host: str, port: int) -> bool:
        """Whether a URL's host and port are on the list.

        The spelling is compared, not what a lookup makes of it: ``127.1`` is not on a list that holds ``127.0.0.1``.

        Args:
            host: name or address, as a parsed URL has it, ASCII.
            port: the port that is connected to.
        """
        host = normal_host(host)
        return any(pattern.matches(host, port) for pattern in self._patterns)


def normal_host(host: str) -> str:
    """A host in the one spelling in which hosts are compared.

    Args:
        host: a name, or an address with or without brackets.

    Returns:
        Lower case, without the dot that ends an absolute name, an IPv6 address in its shortest form without brackets.
    """
    host = host.lower().removesuffix(".")
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        return host


def _split_port(text: str) -> tuple[str, int | None]:
    head, colon, tail = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text, None
    if not (tail.isascii() and tail.isdecimal() and len(tail) <= 5 and 0 < int(tail) < 65536):
        raise ValueError(f"{text!r:.100} is no host; {_EXPECTED}")
    return head, int(tail)
