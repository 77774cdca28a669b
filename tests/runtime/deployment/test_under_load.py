"""Replicas come, go and die while clients ask: no request fails, and each has the tokens of one engine."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.cluster.channel import Kind
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.deployment.messages import KvEvents, KvSnapshot, Output, RequestDelta, encode
from headwise.runtime.deployment.model import DeployedModel
from tests.local_replicas import LocalReplicas
from tests.runtime.deployment.deployed import Asked, Deployed, ask, ask_all, greedy, settled, wait_until


def load(llm: DeployedModel, asked: Asked, over: threading.Event) -> list[Any]:
    """Eight clients that ask the same again and again until it is over. Returns what each got, by what it asked."""

    async def client(number: int) -> list[Any]:
        found: list[Any] = []
        for turn in itertools.count():
            if over.is_set() and turn:
                return found
            name, prompt, params = asked[(number + turn) % len(asked)]
            found.append((name, await ask(llm, f"{name}-{number}-{turn}", prompt, params)))
        raise AssertionError

    async def run() -> list[Any]:
        return [one for got in await asyncio.gather(*map(client, range(8))) for one in got]

    return asyncio.run(run())


def under_load(llm: DeployedModel, one: AsyncLLM, work: Callable[[], None]) -> None:
    """Has work done while clients ask; each gets what one engine computes."""
    asked = greedy(6, 30)
    expected = dict(zip([name for name, *_ in asked], ask_all(one, asked), strict=True))
    over, errors = threading.Event(), list[BaseException]()

    def do() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    worker = threading.Thread(target=do)
    worker.start()
    got = load(llm, asked, over)
    worker.join()
    assert errors == []
    assert len(got) >= 8 and all(samples == expected[name] for name, samples in got)
    settled(llm)


def test_scaling_1_3_1_under_load_fails_no_request(one: AsyncLLM, deployed: Deployed) -> None:
    llm = deployed(1, drain_timeout_s=0.2)

    def work() -> None:
        llm.scale(3)
        wait_until(lambda: [*deployed.states().values()] == ["serving"] * 3)
        wait_until(lambda: all(replica["generated_tokens"] for replica in llm.status()["replicas"]))
        llm.scale(1)
        wait_until(lambda: [*deployed.states().values()] == ["serving"])

    under_load(llm, one, work)
    assert deployed.factory.wanted_nodes == [1, 3, 1]


@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rolling_restart_under_load_fails_no_request(
    one: AsyncLLM, deployed: Deployed, replicas: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = deployed(replicas, drain_timeout_s=0.2)
    before = set(deployed.states())
    monkeypatch.setattr(LocalReplicas, "has_room", lambda *_: room)

    def work() -> None:
        assert "one after another" in llm.restart()
        wait_until(lambda: not llm.status()["restarting"])

    under_load(llm, one, work)
    assert [*deployed.states().values()] == ["serving"] * replicas and not before & deployed.states().keys()


def test_replicas_die_again_and_again_under_load(one: AsyncLLM, deployed: Deployed) -> None:
    llm, killed = deployed(2), list[str]()

    def work() -> None:
        wait_until(lambda: any(r["running"] for r in llm.status()["replicas"]))
        for _ in range(2):  # a third death would be blamed on a request that has seen all of them
            wait_until(lambda: [*deployed.states().values()].count("serving") == 2)
            busy = next((r["name"] for r in llm.status()["replicas"] if r["running"]), None)
            if busy is not None:
                deployed.kill(busy)
                killed.append(busy)

    under_load(llm, one, work)
    assert killed and not set(killed) & deployed.states().keys()


def test_a_replica_whose_shards_die_hands_its_requests_on(one: AsyncLLM, deployed: Deployed) -> None:
    llm = deployed(2)

    def work() -> None:
        wait_until(lambda: any(r["running"] for r in llm.status()["replicas"]))
        busy = next(r["name"] for r in llm.status()["replicas"] if r["running"])
        replica = next(replica for replica in deployed.factory.started if replica.name == busy)
        replica.host._started.engine.generation.group.give_up("killed")
        wait_until(lambda: sum(r["recoveries"] for r in llm.status()["replicas"]) == 1)
        wait_until(lambda: [*deployed.states().values()] == ["serving"] * 2)

    under_load(llm, one, work)
    assert deployed.states() == {"replica-1": "serving", "replica-2": "serving"}


def test_a_replica_with_other_weights_does_not_join(
    deployed: Deployed, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the model's files were changed under the server."""
    llm = deployed(2)
    start, other = LocalReplicas.start, str(checkpoint("mha"))
    monkeypatch.setattr(
        LocalReplicas, "start", lambda self, name, settings, died: start(self, name, settings | {"model": other}, died)
    )
    llm.restart()
    wait_until(lambda: not llm.status()["restarting"])
    assert deployed.states() == {"replica-1": "serving", "replica-2": "serving"}
    assert "the weights of a new replica" in llm.status()["replicas"][0]["problem"]
    assert ask_all(llm, greedy(2, 4))


def test_a_replica_that_dies_as_it_starts_is_ended(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = deployed(1)
    start, told = LocalReplicas.start, threading.Event()

    def dies(self: LocalReplicas, name: str, settings: dict[str, Any], died: Any) -> Any:
        def tell(name: str, cause: str) -> None:
            died(name, cause)
            told.set()

        replica = start(self, name, settings, tell)
        if name == "replica-2":
            replica.die()
            assert told.wait(30)  # the front hears of the death before it knows that there was a start
        return replica

    monkeypatch.setattr(LocalReplicas, "start", dies)
    llm.scale(2)
    wait_until(lambda: deployed.states() == {"replica-1": "serving", "replica-3": "serving"})
    assert llm._front._replicas.keys() == {"replica-1", "replica-3"}


@pytest.mark.parametrize(
    "data",
    [b"", b"no message", encode(Output([RequestDelta(1, [256])])), encode(KvEvents(b"none")), encode(KvSnapshot(b""))],
)
def test_a_replica_that_talks_nonsense_is_replaced(one: AsyncLLM, deployed: Deployed, data: bytes) -> None:
    llm = deployed(2)

    def work() -> None:
        deployed.factory.started[0].channel.rank(0).send(Kind.OUTPUT, data)
        name = deployed.factory.started[0].name
        wait_until(lambda: name not in deployed.states() and [*deployed.states().values()] == ["serving"] * 2)

    under_load(llm, one, work)
