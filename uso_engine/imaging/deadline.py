"""A network backend for httpcore with one deadline for connecting, sending and reading together."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable

import httpcore

from uso_engine.imaging.addresses import is_public
from uso_engine.imaging.hosts import HostList


class Deadline:
    """The moment at which everything must have ended.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining_s(self) -> float:
        """Seconds left, more than 0.

        Raises:
            httpcore.ReadTimeout: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left


class DeadlineBackend(httpcore.NetworkBackend):
    """Connects to the addresses that :func:`resolve_host` gives, and to nothing else; every wait ends at the deadline.

    Args:
        deadline: shared by all connections made through this backend.
        allow_private_addresses: whether addresses that are not public are connected to. The rule holds for the address that
            the connection goes to, so a name cannot mean one address when it is checked and another when it is used.
        private_hosts: hosts for which that rule is not asked.
    """

    def __init__(self, deadline: Deadline, *, allow_private_addresses: bool, private_hosts: HostList) -> None:
        self._deadline = deadline
        self._private_hosts = private_hosts
        self._allow_private_addresses = allow_private_addresses
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of ``host`` that answers; Host header and TLS name stay those of the URL."""
        addresses = resolve_host(host, port, self._deadline)
        may_be_private = self._allow_private_addresses or self._private_hosts.holds(host, port)
        if not may_be_private and not all(map(is_public, addresses)):
            raise httpcore.ConnectError("not a public address")
        for tried, address in enumerate(addresses):
            # An even share for each address: one that swallows packets must not use up the time of the next.
            share_s = self._deadline.remaining_s() / (len(addresses) - tried)
            try:
                return _DeadlineStream(self._sockets.connect_tcp(address, port, timeout=share_s), self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if tried == len(addresses) - 1:
                    raise
        raise httpcore.ConnectError("no address")


class _DeadlineStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, timeout=self._deadline.remaining_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout=self._deadline.remaining_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, timeout=self._deadline.remaining_s())
        return _DeadlineStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


def resolve_host(host: str, port: int, deadline: Deadline) -> list[str]:
    """Turn a host into addresses. The one place where names are looked up.

    Args:
        host: a name or a literal address.
        port: the port, for the lookup.
        deadline: when to stop waiting; the system's lookup itself knows no limit.

    Returns:
        Addresses in the system's order, each once.

    Raises:
        httpcore.ConnectError: no such name.
        httpcore.ReadTimeout: no answer before the deadline.
    """
    answers: queue.Queue[list[str] | Exception] = queue.Queue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(address[0]) for *_, address in found)))
        except (OSError, ValueError, OverflowError) as error:  # ValueError: a label of more than 63 characters, a null byte
            answers.put(error)

    # A daemon, because a lookup cannot be interrupted: it is left behind and ends by itself.
    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.remaining_s())
    except queue.Empty as error:
        raise httpcore.ReadTimeout("no address before the deadline") from error
    if isinstance(answer, Exception):
        raise httpcore.ConnectError("no such host") from answer
    return answer
