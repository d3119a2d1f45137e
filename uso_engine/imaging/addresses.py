"""Which network addresses are public, so that a stranger's URL does not reach this machine's own networks."""

from __future__ import annotations

import ipaddress

# Addresses that carry an IPv4 address to which the packets go in the end (RFC 6052, RFC 8215).
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet.

    Args:
        address: as the system's lookup gives it; an IPv6 zone after ``%`` is not looked at.

    Returns:
        False for private, loopback, link-local, shared (100.64.0.0/10), multicast, reserved and unspecified addresses, for
        those that wrap an IPv4 address (mapped, 6to4, Teredo, NAT64), whatever they wrap, and for what is no address.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed.ipv4_mapped is not None
        or parsed.sixtofour is not None
        or parsed.teredo is not None
        or any(parsed in network for network in _TRANSLATED)
        or parsed.is_site_local
    ):
        return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)
