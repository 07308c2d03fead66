"""Who is at the other end: what counts as one client."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=4096)
def network_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 that an IPv6 host may choose its addresses from. Anything else as it is."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))


@lru_cache(maxsize=4096)
def is_loopback(address: str) -> bool:
    """Whether a peer is on this machine."""
    try:
        return ipaddress.ip_address(network_of(address).partition("/")[0]).is_loopback or address == "::1"
    except ValueError:
        return False
