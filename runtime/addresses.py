"""Targets and peers of gRPC: which of them are on this machine, and whose they are. Ports that can be listened on."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote, urlsplit

from headwise.workers.addresses import is_loopback, join
from headwise.workers.errors import InvalidValueError


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


def check_port(flag: str, host: str, port: int) -> None:
    """Binds an address that a server would listen on, and gives it back.

    Args:
        flag: that names the port, for the error.

    Raises:
        InvalidValueError: another process has the address, or this host does not have it.
    """
    failure = ""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                    return
                except OSError as error:
                    failure = failure or str(error.strerror)
    except OSError as error:
        failure = str(error.strerror)
    raise InvalidValueError(
        flag, join(host, port), f"cannot be bound: {failure}", "choose another, or 0 for a free one"
    )
