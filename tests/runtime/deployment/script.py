"""A deployment whose replicas, clock and clients are a test's: it says what happens, and sees what is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from headwise.runtime.deployment.deployment import Deployment
from headwise.runtime.deployment.instructions import AskForNodes, CancelStart, EndReplica, GiveUp, Send, StartReplica
from headwise.runtime.deployment.messages import (
    Abort,
    Add,
    FrontMessage,
    Output,
    Pause,
    Peers,
    Report,
    RequestDelta,
    ResetPrefixCache,
    SnapshotWanted,
)
from headwise.runtime.deployment.options import ReplicaOptions
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.kv.events import KvMessage, KvSnapshot
from headwise.runtime.output import FinishReason
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.plan import RowSampling

BLOCK, ROWS, BLOCKS = 4, 8, 100
REPORT = Report(0, 0, 0, 0, None, None, False, 1, BLOCKS, BLOCKS)


class FakeReplica:
    """Computes token after token of what it was sent: the number of the token, after those that came with it.

    Attributes:
        requests: that run, by number.
        paused: numbers of those that are.
        aborted: numbers.
        resets: of the prefix cache.
        peers: the names of the prefill replicas, each time it was told.
    """

    def __init__(self) -> None:
        self.requests: dict[int, Add] = {}
        self.paused, self.aborted, self.resets, self.snapshots = set[int](), list[int](), 0, 0
        self.peers: list[list[str]] = []

    def take(self, message: FrontMessage) -> None:
        match message:
            case Add():
                assert message.number not in self.requests
                self.requests[message.number] = message
            case Abort(number):
                self.aborted.append(number)
                self.requests.pop(number, None)
            case Pause(number, paused):
                (self.paused.add if paused else self.paused.discard)(number)
            case ResetPrefixCache():
                self.resets += 1
            case SnapshotWanted():
                self.snapshots += 1
            case Peers(peers):
                self.peers.append([name for name, _ in peers])

    def step(self, numbers: Sequence[int] | None = None) -> Output:
        """A token for these requests; None: for all that are not paused."""
        deltas = []
        for number, add in [*self.requests.items()]:
            if number in self.paused if numbers is None else number not in numbers:
                continue
            token = len(add.generated)
            self.requests[number] = add = dataclasses.replace(add, generated=[*add.generated, token])
            ends = len(add.generated) >= add.max_tokens
            deltas.append(RequestDelta(number, [token], finish_reason=FinishReason.LENGTH if ends else None))
            if ends:
                del self.requests[number]
        return Output(deltas)


class Script:
    """
    Attributes:
        replicas: those that have started, and are not closed.
        starting, ending: names, in order.
        cancelled: names of those that started, and are not wanted any more.
        asked: so many nodes, each time.
        got: the tokens of each request, by key.
        ended: the requests that have ended, by key.
    """

    def __init__(self, replicas: int = 2, **options: Any) -> None:
        self.now = 100.0
        self.deployment = Deployment(
            ReplicaOptions(replicas, **{"drain_timeout_s": 30.0} | options), BLOCK, ROWS, lambda: self.now
        )
        self.replicas: dict[str, FakeReplica] = {}
        self.starting: list[StartReplica] = []
        self.ending: list[EndReplica] = []
        self.asked: list[int] = []
        self.cancelled: list[str] = []
        self.over: str | None = None
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, Request] = {}
        self.follow()

    @classmethod
    def serving(cls, replicas: int = 2, **options: Any) -> Script:
        """One whose replicas have all started."""
        script = cls(replicas, **options)
        script.start_all()
        return script

    @property
    def names(self) -> list[str]:
        """Of the replicas that are to be started."""
        return [one.name for one in self.starting]

    def states(self) -> dict[str, str]:
        return {replica["name"]: replica["state"] for replica in self.deployment.status()["replicas"]}

    def problems(self) -> dict[str, str]:
        return {r["name"]: r["problem"] for r in self.deployment.status()["replicas"] if r["problem"]}

    def follow(self) -> None:
        """Does what the deployment wants done."""
        out = self.deployment.out
        while out:
            match instruction := out.pop(0):
                case StartReplica():
                    self.starting.append(instruction)
                case CancelStart(name):
                    self.cancelled.append(name)
                case EndReplica():
                    self.ending.append(instruction)
                case AskForNodes(replicas):
                    self.asked.append(replicas)
                case GiveUp(reason):
                    self.over = reason
                case Send(name, message):
                    if name in self.replicas:
                        self.replicas[name].take(message)
        for deltas in self.deployment.take_deltas().values():
            self._take(deltas)
        self.deployment.check()

    def start(self, name: str, max_model_len: int = 1 << 20, num_blocks: int = BLOCKS) -> None:
        self.starting = [one for one in self.starting if one.name != name]
        self.replicas[name] = FakeReplica()
        about: dict[str, Any] = {"num_blocks": num_blocks, "block_size": BLOCK, "tensor_parallel_size": 1, "shards": []}
        about |= {"max_model_len": max_model_len}
        about["handoff_address"] = f"unix:/{name}"
        self.deployment.started(name, "here", 1, about)
        self.follow()

    def start_all(self) -> None:
        for name in self.names:
            self.start(name)

    def fail_start(self, name: str, problem: str = "no model", no_room: bool = False) -> None:
        self.starting = [one for one in self.starting if one.name != name]
        self.deployment.start_failed(name, problem, no_room)
        self.deployment.closed(name)
        self.follow()

    def die(self, name: str, cause: str = "killed") -> None:
        self.deployment.died(name, cause)
        self.follow()

    def close_all(self) -> None:
        """What is to end has ended."""
        while self.ending:
            name = self.ending.pop(0).name
            self.replicas.pop(name, None)
            self.deployment.closed(name)
            self.follow()

    def report(self, name: str, **fields: Any) -> None:
        self.deployment.heard(name, dataclasses.replace(REPORT, **fields))
        self.follow()

    def say(self, name: str, message: Output | KvMessage | KvSnapshot) -> None:
        self.deployment.heard(name, message)
        self.follow()

    def step(self, *names: str) -> None:
        """These replicas compute a token for each of their requests; none: all replicas."""
        for name in names or [*self.replicas]:
            self.say(name, self.replicas[name].step())

    def wait(self, seconds: float, reports: bool = True) -> None:
        """Time goes by, and replicas report."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.25)
            for name in self.replicas if reports else ():
                self.report(name)
            self.deployment.tick()
            self.follow()

    def add(self, name: str, max_tokens: int = 1000, prompt: Sequence[int] = (7, 8, 9), tenant: str = "") -> Request:
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(name, [*prompt], params, RowSampling(), max_tokens, tenant=tenant)
        self.deployment.add(request, None, self._take)
        self.follow()
        return request

    def where(self, request: Request) -> str:
        """The replica that computes a request; empty: none."""
        [live] = self.deployment._dispatcher._samples[request.request_id].values()
        return live.replica

    def _take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = delta.request.key
            assert key not in self.ended, "nothing comes after the end"
            tokens = self.got.setdefault(key, [])
            assert delta.token_ids == [*range(len(tokens), len(tokens) + len(delta.token_ids))], "each once, in order"
            tokens += delta.token_ids
            if delta.finished:
                self.ended[key] = delta.request
