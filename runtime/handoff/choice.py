"""TEMP"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

DEFAULT_MIN_TOKENS = 64


class LocalLoad(NamedTuple):
    queued_tokens: int = 0
    streams: bool = False


class Choice:
    def __init__(self, min_tokens: int | None, unworthy: int) -> None:
        self.min_tokens = min_tokens
        self.token_s: float | None = None

    def choose(self, peers: Sequence[Any], digests: Sequence[bytes], first: int, size: int, load: LocalLoad) -> Any:
        up = [peer for peer in peers if peer.session is not None]
        if not up or (len(digests) - first) * size < (self.min_tokens or 0):
            return None
        return up[0]

    def saw_handoff(self, name: str, tokens: int, seconds: float) -> None:
        pass
