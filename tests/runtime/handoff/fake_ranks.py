"""Ranks of decode that hold numbers instead of keys and values, and what is written to them, on behalf of whom."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.handoff.receiving import Receiving

RANKS, BLOCKS = 2, 24

Prompt = tuple[int, ...]
"""A number for each block."""

Content = tuple[Prompt, int, bool]
"""What a rank holds in a block: of all blocks up to this one, the rank's heads; whether it is finite."""


@dataclass(eq=False)
class Wish:
    """A prompt somebody wants; the last of its attempts decides.

    Attributes:
        spare: attempts that may follow the first.
        blocks: where the prompt is, published or computed here.
    """

    prompt: Prompt
    first_block: int
    sound: bool
    spare: int
    deadline: float | None
    transfer: bytes
    outcome: str = ""
    cancelled: bool = False
    blocks: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Attempt:
    key: TransferKey
    wish: Wish
    machine: Receiving
    blocks: list[int]
    fence: int
    reports: dict[str, int] = field(default_factory=dict)
    accepted: bool = False
    commit_waits_until: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """A block for a rank of decode; ``place`` counts the blocks of the transfer, ``push`` the pushes of prefill."""

    key: TransferKey
    fence: int
    rank: int
    place: int
    content: Content
    push: int
    damaged: bool = False


@dataclass(eq=False)
class Stranger:
    """Somebody else who uses blocks of decode, and has written None into them."""

    blocks: list[int] = field(default_factory=list)


class Rank:
    """A rank of decode: runs its jobs in order, and takes chunks beside them."""

    def __init__(self, index: int, owners: list[object]) -> None:
        self.index, self.owners = index, owners
        self.memory: list[Content | None] = [None] * BLOCKS
        self.fences: dict[int, tuple[Attempt, set[int]]] = {}  # with the places that are missing
        self.jobs: deque[tuple[str, Attempt]] = deque()
        self.results: deque[tuple[str, Attempt, str]] = deque()
        self.fails_next = False

    def run(self) -> None:
        op, attempt = self.jobs.popleft()
        if op == "close":
            if self.fences.pop(attempt.fence, None):
                self.results.append(("filled", attempt, "closed"))
            self.results.append(("closed", attempt, ""))
        elif self.fails_next:
            self.fails_next = False
            self.results.append(("opened", attempt, "no memory"))
        else:
            self.fences[attempt.fence] = (attempt, set(range(len(attempt.blocks))))
            self.results.append(("opened", attempt, ""))

    def take(self, chunk: Chunk) -> str:
        """Writes a chunk that is right; returns what is wrong with it."""
        attempt, missing = self.fences.get(chunk.fence, (None, set()))
        if attempt is None or attempt.key != chunk.key:
            return "no such fence"
        if chunk.damaged:
            return "checksum"
        if chunk.place in missing:
            block = attempt.blocks[chunk.place]
            assert self.owners[block] is attempt, f"a byte of {chunk} is written to a block of {self.owners[block]}"
            self.memory[block] = chunk.content
            missing.remove(chunk.place)
            if not missing:
                del self.fences[chunk.fence]
                self.results.append(("filled", attempt, ""))
        return ""

    def break_fill(self, fence: int) -> None:
        """Its FILL fails, while the fence stays open."""
        self.results.append(("filled", self.fences[fence][0], "reset"))
