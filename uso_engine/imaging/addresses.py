"""Which network addresses are public, so that a stranger's URL does not reach this machine's own networks."""

from __future__ import annotations

import ipaddress

# What the registries of special addresses hold besides what `ipaddress` knows in every Python from 3.11.0 on: its tables grew
# in later patch releases, and an answer here must not depend on the release.
_SPECIAL_4 = tuple(
    map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24"))  # protocol assignments, relays of 6to4
)
_SPECIAL_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, Teredo and ORCHID among them
            "2002::/16",  # 6to4, which wraps an IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)
# All that is assigned to the public internet. Mapped (::ffff:0:0/96) and NAT64 (64:ff9b::/96) addresses, in which an IPv4
# address is the real target, lie outside, with everything local (RFC 4291, 6052, 8215).
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


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
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed not in _GLOBAL_UNICAST or any(parsed in network for network in _SPECIAL_6):
            return False
    elif any(parsed in network for network in _SPECIAL_4):
        return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)
