"""A request: its tokens, its state and who may change it; and its seat, which it has while it is computed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headwise.runtime.handoff.messages import TransferKey
from headwise.runtime.kv.eviction import CachedBlock
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.output import FinishReason, RequestMetrics
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling, TokenLogprobs


class RequestState(enum.Enum):
    """Only the scheduler moves a request from one state to another.

    WAITING → RUNNING when it is admitted; RUNNING → WAITING when it is preempted; either → FINISHED.
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Seat:
    """A request's place in one generation of shards: made when the request is admitted, and thrown away once no step
    in flight computes the request any more, and no job sends its blocks. What a request is and has generated outlives
    its seat.

    Attributes:
        row: on every shard.
        block_ids: the request's block table.
        chain: the cached blocks that hold its first tokens. Usually they are the first of ``block_ids``; where another
            request computed the same block first, both blocks are held.
        num_offered: full blocks that were offered to the prefix cache.
        num_computed: tokens whose KV is computed, or will be once the steps in flight are done.
        num_pending: tokens that steps in flight sample; nobody has seen them yet.
        num_in_flight: steps in flight that compute the request.
        num_moving: jobs in flight that send its blocks to another engine.
    """

    row: int
    block_ids: list[int]
    chain: list[CachedBlock]
    num_offered: int
    num_computed: int
    num_pending: int = 0
    num_in_flight: int = 0
    num_moving: int = 0

    @property
    def is_used(self) -> bool:
        """Whether its blocks may not be given to others yet, though its request has left."""
        return self.num_in_flight > 0 or self.num_moving > 0


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: a prompt and what is generated from it. (``n`` samples are n requests.)

    The engine's thread owns it from ``Engine.add`` on.

    Attributes:
        max_tokens: the most it may generate, the model's length already considered.
        streamed: someone waits for each token, not just for the last.
        paused: nobody takes its tokens at present, so that none are computed.
        tenant: who asked for it; requests of several tenants take turns. Empty where tenants are not told apart.
        token_blocks: its tokens in full blocks with their digests; None takes no part in the prefix cache.
        transfer: for whom its prompt is computed, where that is another engine.
        generated: tokens seen so far.
        seat: while it runs, and after that until the last step and job in flight that use its blocks are done.
        key: tells the samples of one request apart.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    sampling: RowSampling
    max_tokens: int
    index: int = 0
    streamed: bool = True
    paused: bool = False
    tenant: str = ""
    token_blocks: TokenBlocks | None = None
    transfer: TransferKey | None = None
    state: RequestState = RequestState.WAITING
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    seat: Seat | None = None
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
        seat = self.seat  # which the engine's thread may take while another counts
        return len(self.prompt_token_ids) + len(self.generated) + (seat.num_pending if seat else 0)

    @property
    def num_uncomputed(self) -> int:
        """How many tokens a step could compute now: none once the last token it may generate is on its way."""
        seat = self.seat
        if len(self.generated) + (seat.num_pending if seat else 0) >= self.max_tokens:
            return 0
        return self.num_tokens - (seat.num_computed if seat else 0)


def seat_of(request: Request) -> Seat:
    """The seat of a request that has one."""
    assert request.seat is not None, f"request {request.key} has no seat"
    return request.seat
