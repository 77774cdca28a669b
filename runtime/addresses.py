"""Targets and peers of gRPC: which of them are on this machine, and whose they are."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote, urlsplit

from headwise.workers.addresses import is_loopback


def leads_to_loopback(target: str) -> bool:
    """Whether what is sent to a target of gRPC stays on this machine. A target is ``host:port``, or has a scheme; see
    https://grpc.github.io/grpc/core/md_doc_naming.html."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if scheme in ("dns", "ipv4", "ipv6"):
        target = rest.removeprefix("///")
    try:
        return all(is_loopback(urlsplit(f"//{one}").hostname or "") for one in target.split(","))
    except ValueError:
        return False


def network_of(peer: str) -> str:
    """Whom a peer of gRPC's, such as ``ipv4:192.0.2.1:5000``, counts as: its host. Of IPv6 that is its /64 network, all
    of which one party has as a rule."""
    scheme, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket
        return scheme
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)
