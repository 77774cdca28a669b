"""What decode wants of its connection to a prefill engine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from headwise.runtime.handoff.link import Answer
from headwise.runtime.handoff.messages import Ask, HelloAnswer, Load, Status, TransferKey


class Peer(Protocol):
    """A connection to a prefill engine; see :class:`headwise.runtime.handoff.link.PrefillLink`, whose methods these
    are. Answers come on other threads."""

    @property
    def name(self) -> str: ...

    @property
    def session(self) -> HelloAnswer | None: ...

    @property
    def problem(self) -> str | None: ...

    @property
    def load(self) -> Load: ...

    @property
    def digests(self) -> Collection[bytes]: ...

    def wait(self, timeout_s: float) -> bool: ...

    def ask(self, ask: Ask, answered: Callable[[Answer], None]) -> None: ...

    def commit(self, key: TransferKey, answered: Callable[[Answer], None]) -> None: ...

    def abort(self, key: TransferKey, reason: str) -> None: ...

    def track(self, key: TransferKey, renewed: Callable[[TransferKey, Status | None], None]) -> None: ...

    def untrack(self, key: TransferKey) -> None: ...

    def close(self) -> None: ...
