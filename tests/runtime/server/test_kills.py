"""``headwise serve`` in a process of its own, whose ranks are killed while clients read: streams pause, and go on with
the tokens of a run in which nothing happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headwise.runtime import SamplingParams
from headwise.runtime.client import Client
from headwise.runtime.kv.events import Cleared, decode_events
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub

pytest.importorskip("smg")
openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow

DEADLINE_S = 240.0
PROMPTS = ["Once upon a time", "The capital of France is", "A short list of fruits:"]
GREEDY = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=7, max_tokens=160, ignore_eos=True)


@pytest.fixture
def server(smollm2: Path) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    command = [
        *(sys.executable, "-m", "headwise.runtime.cli", "serve", "--model", str(smollm2), "--name", "smollm2"),
        *("--tp", "2", "--port", "0", "--openai-port", "0", "--metrics-port", "0", "--max-model-len", "2048", "--json"),
        *("--kv-memory", "256MiB"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            about = json.loads(process.stdout.readline())
            yield psutil.Process(process.pid), about
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def ranks(server: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in server.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ShardActor" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@dataclass
class Reader:
    """Reads one stream; ``pieces`` are what it has of it."""

    pieces: list[Any] = field(default_factory=list)
    some: threading.Event = field(default_factory=threading.Event)

    def read(self, stream: Any) -> list[Any]:
        for piece in stream:
            self.pieces.append(piece)
            if len(self.pieces) == 5:
                self.some.set()
        return self.pieces


def grpc_tokens(items: list[Any]) -> list[int]:
    *increments, completion = items
    tokens = [token for increment in increments for token in increment.token_ids]
    assert completion.samples[0].token_ids == tokens and len(tokens) == 160
    return tokens


def openai_text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


class Clients:
    """Of one server, which read nine streams at a time."""

    def __init__(self, about: dict[str, Any], stack: ExitStack) -> None:
        self.about = about
        self.direct = stack.enter_context(Client(about["address"], timeout=DEADLINE_S, retries=0))
        url = about["openai"]
        self.openai = stack.enter_context(
            openai.OpenAI(base_url=url, api_key="none", timeout=DEADLINE_S, max_retries=0)
        )
        self.channel = stack.enter_context(grpc.insecure_channel(about["address"]))
        self.threads = stack.enter_context(ThreadPoolExecutor(32))

    def begin(self) -> tuple[list[Reader], list[Future[list[Any]]]]:
        options = {"max_tokens": 160, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
        streams = [self.direct.stream(prompt, params) for prompt in PROMPTS for params in (GREEDY, SEEDED)]
        streams += [self.openai.completions.create(model="smollm2", prompt=one, **options) for one in PROMPTS]
        readers = [Reader() for _ in streams]
        return readers, [self.threads.submit(one.read, stream) for one, stream in zip(readers, streams, strict=True)]

    def watch(self, states: list[int]) -> None:
        """Adds the states of the health service, until there are three."""
        request = health_pb2.HealthCheckRequest()
        for state in health_pb2_grpc.HealthStub(self.channel).Watch(request, timeout=DEADLINE_S):
            states.append(state.status)
            if len(states) == 3:
                return

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.direct.stats().json)
        return stats


def outcome(reading: list[Future[list[Any]]]) -> list[Any]:
    results = [one.result(DEADLINE_S) for one in reading]
    return [grpc_tokens(one) for one in results[:6]] + [openai_text(one) for one in results[6:]]


def test_streams_go_on_when_a_rank_is_killed(server: tuple[psutil.Process, dict[str, Any]]) -> None:
    process, about = server
    with ExitStack() as stack:
        clients = Clients(about, stack)
        undisturbed = outcome(clients.begin()[1])
        for number in range(2):
            one_rank_dies(process, clients, number, undisturbed)
        assert clients.stats()["recoveries"]["count"] == 2
    with urllib.request.urlopen(f"http://{about['metrics']}/metrics", timeout=DEADLINE_S) as answer:
        assert "headwise_recoveries_total 2.0" in answer.read().decode()


def one_rank_dies(server: psutil.Process, clients: Clients, number: int, undisturbed: list[Any]) -> None:
    states: list[int] = []
    watching = clients.threads.submit(clients.watch, states)
    request = pb.SubscribeKvEventsRequest()
    events = InferenceServiceStub(clients.channel).SubscribeKvEvents(request, timeout=DEADLINE_S)
    assert next(events).HasField("snapshot")
    epoch = clients.stats()["epoch"]
    readers, reading = clients.begin()
    assert all(reader.some.wait(DEADLINE_S) for reader in readers)
    assert not any(one.done() for one in reading)
    sorted(ranks(server), key=lambda one: one.pid)[number].kill()
    while len(states) < 2 and not watching.done():
        threading.Event().wait(0.01)
    with Client(clients.about["address"], timeout=DEADLINE_S, retries=0) as late:
        assert late.generate(PROMPTS[0], GREEDY).samples[0].token_ids == undisturbed[0]
    assert outcome(reading) == undisturbed
    watching.result(DEADLINE_S)
    assert states == [1, 2, 1]  # SERVING, NOT_SERVING, SERVING
    while (message := decode_events(next(events).events)).epoch == epoch:
        pass
    assert message.epoch > epoch and message.sequence == 0 and message.events == (Cleared(None),)
    events.cancel()
