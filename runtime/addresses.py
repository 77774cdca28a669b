"""Hosts and addresses: which of them are this machine's own, and how they are written."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def join(host: str, port: int) -> str:
    """``host:port``; an IPv6 address is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a host, which is a name or an IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
