"""Links: makes the connections of one generation of a decode engine to its prefill engines, which may change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grpc

from headwise.runtime.handoff.link import OWN_PREFILL, PrefillLink
from headwise.runtime.handoff.messages import Hello
from headwise.runtime.handoff.peer import Peer


class NamedPeer(NamedTuple):
    """A prefill engine.

    Attributes:
        name: for people; tells it apart from the others.
        address: ``host:port`` or ``unix:path``.
    """

    name: str
    address: str

    @classmethod
    def at(cls, address: str) -> NamedPeer:
        """One that is named by its address, or is the only one of the same program."""
        return cls(OWN_PREFILL if address.startswith("unix:") else address, address)


class Links:
    def __init__(
        self,
        hello: Hello,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        on_change: Callable[[], None],
        lease_s: float,
    ) -> None:
        """Args: as :class:`~headwise.runtime.handoff.link.PrefillLink`; a Unix socket is connected to in clear text."""
        self._hello, self._credentials, self._token = hello, credentials, token
        self._on_change, self._lease_s = on_change, lease_s

    def to(self, peers: Sequence[NamedPeer], present: Sequence[Peer] = ()) -> list[Peer]:
        """A connection to each of some engines. Those of ``present`` that lead to one of them stay.

        Raises:
            InvalidValueError: the token would go to another machine in clear text; nothing is connected.
        """
        known = {(link.name, link.address): link for link in present if isinstance(link, PrefillLink)}
        links: list[Peer] = []
        with contextlib.ExitStack() as undo:
            for peer in peers:
                if (link := known.get(peer)) is None:
                    link = self._connect(peer)
                    undo.callback(link.close)
                links.append(link)
            undo.pop_all()
        return links

    def _connect(self, peer: NamedPeer) -> PrefillLink:
        credentials = None if peer.address.startswith("unix:") else self._credentials
        hello, token, lease_s = self._hello, self._token, self._lease_s
        return PrefillLink(peer.address, hello, credentials, token, self._on_change, lease_s, peer.name)
