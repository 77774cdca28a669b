"""How a prefill replica is reached by decode replicas of its deployment, and how these find the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.runtime.config import HandoffConfig
from headwise.runtime.handoff.links import NamedPeer
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.tls import server_credentials
from headwise.workers.addresses import is_loopback

_UNIX = "unix:"


def serve_decode(service: HandoffService, handoff: HandoffConfig, node_address: str | None) -> LocalServer:
    """Serves decode replicas: on this host by a socket that only this user can connect to, and on others by TLS, where
    both sides show a certificate, if there are certificates. The authority of these may have others, such as those of
    clients, so decode also shows the deployment's token.

    Args:
        node_address: of this host; None where there are no others.

    Raises:
        InvalidValueError: a file of the certificates cannot be used.
    """
    if node_address is None or handoff.tls_cert is None or handoff.tls_key is None or handoff.ca is None:
        return LocalServer(service, token=handoff.token)
    credentials = server_credentials(Path(handoff.tls_cert), Path(handoff.tls_key), Path(handoff.ca))
    return LocalServer(service, node_address, credentials, handoff.token)


def on_node(handoff: HandoffConfig, node_address: str | None) -> HandoffConfig:
    """The settings of a replica on a host: with certificates, where others can reach that, ranks of decode take keys
    and values at its address, unless another was named; where they cannot, both sides do without certificates.

    Args:
        node_address: of its host; None where there are no others.
    """
    if node_address is None or is_loopback(node_address):
        return handoff.model_copy(update={"ca": None, "tls_cert": None, "tls_key": None})
    encrypted = None not in (handoff.tls_cert, handoff.tls_key, handoff.ca)
    if not encrypted or handoff.role != "decode" or not is_loopback(handoff.host):
        return handoff
    return handoff.model_copy(update={"host": node_address})


def handoff_address(server: LocalServer) -> str:
    """All ways to reach it, for :func:`reachable`: ``host:port,unix:path`` or ``unix:path``."""
    ways = (server.remote_address, server.address)
    return ",".join(way for way in ways if way is not None)


def reachable(peers: Sequence[tuple[str, str]]) -> tuple[list[NamedPeer], list[str]]:
    """The prefill replicas that can be reached from here, each in the best way, and the names of the others.

    Args:
        peers: the name and the :func:`handoff_address` of each.
    """
    found: list[NamedPeer] = []
    missing: list[str] = []
    for name, ways in peers:
        remote, _, socket = ways.partition(_UNIX)
        remote = remote.removesuffix(",")
        if socket and Path(socket).exists():
            found.append(NamedPeer(name, _UNIX + socket))
        elif remote:
            found.append(NamedPeer(name, remote))
        else:
            missing.append(name)
    return found, missing
