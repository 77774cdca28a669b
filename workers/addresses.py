"""Hosts, and how addresses are written."""

from __future__ import annotations

import ipaddress


def join(host: str, port: int) -> str:
    """``host:port``; an IPv6 address is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a host, which is a name or an IP address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
