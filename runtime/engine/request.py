"""A request: its tokens, its state and who may change it; and its seat, which it has while it is computed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headwise.runtime.engine.tables import NEVER, Table
from headwise.runtime.handoff.messages import TransferKey
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

    A step that computes the last of the ``num_given`` tokens samples one, and so does every step after it, which
    computes the token that was sampled before. So three numbers tell everything about the steps in flight:

        0 ... num_done ... num_computed      tokens whose KV is there | and those that steps in flight compute
                 num_given                   from here on, each token that is computed gives another

    Attributes:
        request: whose seat it is.
        row: on every shard.
        tables: the request's blocks in each group of heads.
        num_offered: full blocks that were offered to the prefix cache as verified.
        num_slots: tokens that there are blocks for in every group.
        num_given: tokens that the request had when it got the seat.
        num_wanted: how many of its tokens are ever computed: the last one that it generates is not.
        num_computed: tokens whose KV is computed, or will be once the steps in flight are done.
        num_done: tokens whose KV is computed.
        num_moving: jobs in flight that send its blocks to another engine.
        gives_at: the number of tokens done from which on a block has left a window.
    """

    request: Request
    row: int
    tables: list[Table]
    num_offered: int
    num_slots: int
    num_given: int
    num_wanted: int
    num_computed: int
    num_done: int
    num_moving: int = 0
    gives_at: int = NEVER

    @property
    def block_ids(self) -> list[int]:
        """Its blocks in group 0."""
        return self.tables[0].block_ids

    @property
    def num_uncomputed(self) -> int:
        """How many tokens a step could compute now: none once the last token it may generate is on its way."""
        return max(1, self.num_given - self.num_computed) if self.num_computed < self.num_wanted else 0

    @property
    def num_pending(self) -> int:
        """Tokens that steps in flight sample; nobody has seen them yet."""
        return max(0, self.num_computed - self.num_given + 1) - max(0, self.num_done - self.num_given + 1)

    @property
    def is_in_flight(self) -> bool:
        """Whether a step in flight computes the request."""
        return self.num_computed > self.num_done

    @property
    def is_used(self) -> bool:
        """Whether its blocks may not be given to others yet, though its request has left."""
        return self.is_in_flight or self.num_moving > 0


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
        if seat is None:
            return self.num_tokens
        return seat.num_uncomputed


def seat_of(request: Request) -> Seat:
    """The seat of a request that has one."""
    assert request.seat is not None, f"request {request.key} has no seat"
    return request.seat
