"""A request: its tokens, its state and who may change it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling, TokenLogprobs


class RequestState(enum.Enum):
    """Only the scheduler moves a request from one to another.

    WAITING → RUNNING when it is admitted; RUNNING → WAITING when it is preempted; either → FINISHED.
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request ended: a stop token or string; its token limit; abort(); or it failed alone."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the monotonic clock, 0 is not yet; and counts.

    Attributes:
        num_cached_tokens: prompt tokens that were not computed but found in the prefix cache, on whatever tier.
        num_restored_tokens: those of them that came back from host memory or disk.
    """

    arrival: float = field(default_factory=time.monotonic)
    first_scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from arrival to the first token; 0 without one."""
        return self.first_token - self.arrival if self.first_token else 0.0


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: a prompt and what is generated from it. (``n`` samples are n requests.)

    The engine's thread owns it from ``Engine.add`` on.

    Attributes:
        max_tokens: the most it may generate, the model's length already considered.
        paused: nobody takes its tokens at present, so that none are computed.
        streamed: someone waits for each token, not just for the last.
        num_computed: tokens whose KV is computed, or will be once the steps in flight are done.
        num_pending: sampled by a step in flight and not seen yet.
        num_in_flight: steps in flight that compute it.
        row, block_ids: on the shards; held while RUNNING, and until the last step in flight is done. -1 is none.
        key: tells the samples of one call apart.
        generated: tokens seen so far.
        token_blocks: its tokens in full blocks with their digests; None takes no part in the prefix cache.
        chain: the cached blocks that hold its first tokens; held while it holds blocks, and else only a guess.
        num_matched: how many of them were there when it was admitted.
        num_offered: full blocks that it has tried to share.
        num_verified: tokens after which it has sampled a finite one.
        attempt: counts the times it was started over; what a step computed for an earlier one is void.
        only_verified: it failed on blocks of another request that were not verified, and does without such now.
        awaits: the digest of a block that another request computes or restores.
        restoring: blocks are on their way to the device for it.
        restored_short: not all of them arrived; what is missing is computed.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    sampling: RowSampling
    max_tokens: int
    index: int = 0
    streamed: bool = True
    paused: bool = False
    state: RequestState = RequestState.WAITING
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    row: int = -1
    block_ids: list[int] = field(default_factory=list)
    token_blocks: TokenBlocks | None = None
    chain: list[CachedBlock] = field(default_factory=list)
    num_matched: int = 0
    num_offered: int = 0
    num_verified: int = 0
    attempt: int = 0
    only_verified: bool = False
    awaits: bytes | None = None
    restoring: bool = False
    restored_short: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        self.key = f"{self.request_id}#{self.index}"

    @property
    def num_tokens(self) -> int:
        """Prompt, generated and pending tokens."""
        return len(self.prompt_token_ids) + len(self.generated) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """How many tokens a step could compute now: none once the last token it may generate is on its way."""
        if len(self.generated) + self.num_pending >= self.max_tokens:
            return 0
        return self.num_tokens - self.num_computed
