"""Dispatcher: sends requests to replicas, and hands out what they compute. No I/O, no clock of its own, one thread.

A request goes to a replica as its tokens so far, under a number of its own for each attempt. So it can go on with
another at any time, and what comes late for an earlier number is passed over: no token is handed out twice.

A request *waits* until a replica has computed a token for it. It is *held* while no replica takes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.runtime.deployment.blame import Blame
from headwise.runtime.deployment.instructions import Instruction, Send
from headwise.runtime.deployment.messages import Abort, Add, FirstToken, Pause, RequestDelta, SnapshotWanted
from headwise.runtime.engine.engine import Sink
from headwise.runtime.engine.request import Request, RequestState
from headwise.runtime.engine.text import Delta, TextStream, end, take_token
from headwise.runtime.output import FinishReason
from headwise.runtime.routing import router as routing
from headwise.runtime.routing.router import Router


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended.

    Attributes:
        since: when it came, or lost its replica.
        replica, number: where it is, by which number; "" and 0 while it is held.
        sent: when it was sent there.
        begun: whether that replica has computed a token for it.
    """

    request: Request
    text: TextStream | None
    sink: Sink
    since: float
    replica: str = ""
    number: int = 0
    sent: float = 0.0
    begun: bool = False


class Dispatcher:
    """The requests of a deployment. What is to be sent goes to ``out``."""

    def __init__(self, router: Router, out: list[Instruction]) -> None:
        self._router, self._out, self._blame = router, out, Blame()
        self._live: dict[str, _Live] = {}  # by key
        self._samples: dict[str, dict[str, _Live]] = {}  # by request id, then by key
        self._by_number: dict[int, _Live] = {}
        self._of: dict[str, dict[int, _Live]] = {}  # by replica, then by number; of those that have not left
        self._open: dict[str, int] = {}  # replicas that take requests, and the most tokens of one there
        self._idle: set[str] = set()  # replicas without shards
        self._held: dict[str, _Live] = {}  # by key, whose turn is next first
        self._alone: set[str] = set()  # keys of those that are to be computed alone, and are
        self._waiting: dict[str, _Live] = {}  # by key, the oldest first but for those that lost their replica
        self._waiting_of: Counter[str] = Counter()  # by tenant
        self._new: dict[Sink, list[Delta]] = {}
        self.now = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def num_waiting_of(self, tenant: str) -> int:
        return self._waiting_of[tenant]

    @property
    def num_running(self) -> int:
        """Requests whose tokens are generated."""
        return len(self._live) - len(self._waiting)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_blamed(self) -> int:
        """Requests that replicas have died of, as far as is known."""
        return len(self._blame)

    def longest_wait_s(self, token_s: Mapping[str, float]) -> float:
        """Of those whose tokens somebody takes, how long the request waits that waits for longest, but for the time
        that its own prompt takes: with more replicas, that would be no less.

        Args:
            token_s: by replica, the seconds that a token of a prompt takes there, where it is known.
        """
        return max((self._wait_s(live, token_s) for live in self._waiting.values()), default=0.0)

    def _wait_s(self, live: _Live, token_s: Mapping[str, float]) -> float:
        request = live.request
        if request.paused:
            return 0.0
        num_tokens = len(request.prompt_token_ids) + len(request.generated)
        return max(0.0, self.now - live.since - num_tokens * token_s.get(live.replica, 0.0))

    def num_requests(self, name: str) -> int:
        return len(self._of.get(name, ()))

    def num_begun(self, name: str) -> int:
        """Of the requests of a replica, those whose tokens it generates."""
        return sum(live.begun for live in self._of.get(name, {}).values())

    def add(self, request: Request, text: TextStream | None, sink: Sink) -> None:
        """A new request, whose key no other may have."""
        live = self._live[request.key] = _Live(request, text, sink, self.now)
        self._samples.setdefault(request.request_id, {})[request.key] = live
        request.state = RequestState.RUNNING
        self._wait(live)
        self._place(live)

    def abort(self, request_id: str) -> None:
        """Ends every sample of a request that has not ended. Unknown ids are ignored."""
        for live in [*self._samples.get(request_id, {}).values()]:
            self._finish(live, end(live.request, live.text, FinishReason.ABORT))

    def pause(self, request_id: str, paused: bool) -> None:
        """Has nothing computed for a request until it is called with False. Unknown ids are ignored."""
        for live in self._samples.get(request_id, {}).values():
            if live.request.paused != paused:
                live.request.paused = paused
                if live.number:
                    self._out.append(Send(live.replica, Pause(live.number, paused)))

    def output(self, name: str, deltas: Sequence[RequestDelta]) -> bool:
        """A replica has computed this. Returns whether any of it was waited for."""
        of_replica, known = self._of.get(name, {}), False
        for delta in deltas:
            if (live := of_replica.get(delta.number)) is not None:
                self._take(live, delta)
                known = True
        return known

    def fail(self, number: int, reason: str) -> None:
        """A request cannot be sent."""
        if (live := self._by_number.get(number)) is not None:
            live.request.error = reason
            self._finish(live, end(live.request, live.text, FinishReason.ERROR), tell=False)

    def joined(self, name: str, most_tokens: int) -> None:
        self._idle.discard(name)
        self._open[name] = most_tokens
        self._of.setdefault(name, {})
        self.follow(self._router.joined(name))
        for idle in [*self._idle]:
            self._move(idle, True)
        self.place_held()

    def draining(self, name: str) -> None:
        self._open.pop(name, None)
        self._router.draining(name)

    def rebuilding(self, name: str) -> None:
        """Its requests go on elsewhere, or else wait until it has shards again."""
        self._open.pop(name, None)
        self._idle.add(name)
        self._router.left(name)
        if self._open:
            self._move(name, True)

    def left(self, name: str, died: bool) -> None:
        self._open.pop(name, None)
        self._idle.discard(name)
        self._router.left(name)
        self._move(name, died, tell=False)
        self._of.pop(name, None)

    def follow(self, instructions: Sequence[routing.Instruction]) -> None:
        """What the router wants of a replica. (Requests that are to be routed again are known here.)"""
        for instruction in instructions:
            if isinstance(instruction, routing.SnapshotWanted):
                self._out.append(Send(instruction.replica, SnapshotWanted()))

    def place_held(self) -> None:
        """Sends the requests that are held, as far as there are replicas that take them."""
        if not self._open or not self._held:
            return
        alone = [self._live[key].request for key in self._alone]
        self._alone = {request.key for request in alone if self._blame.is_alone(request) and not request.paused}
        for live in sorted(self._held.values(), key=lambda live: not live.request.generated):
            self._place(live)

    def take_deltas(self) -> dict[Sink, list[Delta]]:
        """What is new since the last call."""
        new, self._new = self._new, {}
        return new

    def check(self) -> None:
        """
        Raises:
            AssertionError: the books do not add up.
        """
        placed = {live.number: live for live in self._live.values() if live.number}
        assert self._by_number == placed
        assert {n: live for of in self._of.values() for n, live in of.items()} == placed
        assert self._held == {key: live for key, live in self._live.items() if not live.number}
        assert self._waiting == {key: live for key, live in self._live.items() if not live.begun}
        assert +self._waiting_of == Counter(live.request.tenant for live in self._waiting.values())
        assert {key for samples in self._samples.values() for key in samples} == self._live.keys()
        assert all(self._samples.values()) and len(self._blame) <= len(self._live)
        assert self._alone <= self._live.keys() - self._held.keys()
        assert self._router.stats()["requests"] <= len(placed)

    def _wait(self, live: _Live) -> None:
        self._waiting[live.request.key] = live
        self._waiting_of[live.request.tenant] += 1

    def _wait_no_more(self, live: _Live) -> None:
        if self._waiting.pop(live.request.key, None) is not None:
            tenant = live.request.tenant
            self._waiting_of[tenant] -= 1
            if not self._waiting_of[tenant]:
                del self._waiting_of[tenant]

    def _place(self, live: _Live) -> None:
        """Sends a request to a replica, or holds it."""
        request = live.request
        digests: Sequence[bytes] = ()
        if (blocks := request.token_blocks) is not None:
            if request.generated:
                blocks = blocks.copy()
                blocks.extend(request.generated)
            digests = blocks.digests
        choice = None
        if self._open and not self._stands_back(request):
            num_tokens = len(request.prompt_token_ids) + len(request.generated)
            most = len(request.prompt_token_ids) + request.max_tokens
            too_small = [name for name, tokens in self._open.items() if tokens < most]
            choice = self._router.route(request.key, digests, num_tokens, too_small)
            if choice is None:  # and one of them will say what does not fit
                choice = self._router.route(request.key, digests, num_tokens)
        if choice is None:
            self._held[request.key] = live
            return
        self._held.pop(request.key, None)
        live.replica, live.number, live.sent = choice.replica, choice.number, self.now
        request.metrics.replica = choice.replica
        self._by_number[live.number] = self._of[live.replica][live.number] = live
        if self._blame.is_alone(request):
            self._alone.add(request.key)
        self._out.append(Send(live.replica, _message(live)))
        if request.paused:
            self._out.append(Send(live.replica, Pause(live.number, True)))

    def _stands_back(self, request: Request) -> bool:
        """Whether it waits for another to be computed alone."""
        return bool(self._alone) and self._blame.is_alone(request)

    def _displace(self, live: _Live) -> None:
        """Its replica does not compute it any more."""
        del self._by_number[live.number]
        self._of[live.replica].pop(live.number, None)
        live.replica, live.number = "", 0
        self._alone.discard(live.request.key)

    def _move(self, name: str, died: bool, tell: bool = True) -> None:
        """The requests of a replica go on elsewhere. Args: ``tell``: the replica, which lives."""
        moved = [*self._of.get(name, {}).values()]
        poisonous = self._blame.died([live.request for live in moved]) if died else None
        for live in moved:
            if tell:
                self._out.append(Send(name, Abort(live.number)))
            self._router.finished(live.request.key)
            self._displace(live)
            self._held[live.request.key] = live
            if live.begun:
                live.begun, live.since = False, self.now
                self._wait(live)
            if died:
                live.request.metrics.lose(self.now)
        if poisonous is not None:
            live = self._live[poisonous.key]
            poisonous.error = "replicas died whenever this request was computed, and as far as is known of no other"
            self._finish(live, end(poisonous, live.text, FinishReason.ERROR))
        if moved:
            self.place_held()

    def _take(self, live: _Live, delta: RequestDelta) -> None:
        request, last = live.request, len(delta.token_ids) - 1
        if delta.first is not None and not request.generated:
            self._note_first(live, delta.first)
        for index, token in enumerate(delta.token_ids):
            if not live.begun:
                live.begun = True
                self._wait_no_more(live)
                self._router.first_token(request.key)
                request.metrics.go_on(self.now)
            new = take_token(request, live.text, token, delta.logprobs[index] if delta.logprobs else None)
            self._blame.got_token(request)
            if new.finished:
                self._finish(live, new, tell=index < last or delta.finish_reason is None)
                return
            self._new.setdefault(live.sink, []).append(new)
        if delta.finish_reason is not None:
            request.error = delta.error
            request.stop_reason = delta.stop_reason
            self._finish(live, end(request, live.text, delta.finish_reason), tell=False)

    def _note_first(self, live: _Live, first: FirstToken) -> None:
        metrics = live.request.metrics
        metrics.num_cached_tokens, metrics.num_restored_tokens = first.num_cached_tokens, first.num_restored_tokens
        metrics.num_handoff_tokens, metrics.prefilled_by = first.num_handoff_tokens, first.prefilled_by
        metrics.first_scheduled = min(self.now, live.sent + first.queued_s)

    def _finish(self, live: _Live, delta: Delta, tell: bool = True) -> None:
        """A request's last delta. Args: ``tell``: the replica, which does not know."""
        request = live.request
        if live.number:
            if tell:
                self._out.append(Send(live.replica, Abort(live.number)))
            if request.finish_reason is FinishReason.ERROR:
                self._router.failed(request.key)
            else:
                self._router.finished(request.key)
            self._displace(live)
        self._held.pop(request.key, None)
        self._wait_no_more(live)
        self._blame.forget(request)
        del self._live[request.key]
        samples = self._samples[request.request_id]
        del samples[request.key]
        if not samples:
            del self._samples[request.request_id]
        request.state, request.metrics.finished = RequestState.FINISHED, self.now
        self._new.setdefault(live.sink, []).append(delta)


def _message(live: _Live) -> Add:
    request = live.request
    blocks, params = request.token_blocks, request.params
    return Add(
        live.number,
        request.prompt_token_ids,
        [*request.generated],
        request.sampling,
        request.max_tokens,
        params.min_tokens,
        tuple(params.stop_token_ids or ()),
        blocks.namespace if blocks is not None else None,
        blocks.owner if blocks is not None else None,
        request.tenant,
        request.streamed,
    )
