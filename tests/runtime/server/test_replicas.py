"""``headwise serve --replicas`` in a process of its own, on a Ray that it starts: replicas are killed, scaled and
restarted while clients read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.client import Client
from headwise.v1 import deployment_pb2 as pb

pytestmark = pytest.mark.slow

DEADLINE_S = 240.0
STREAMS = 16
PARAMS = [
    SamplingParams(temperature=0, max_tokens=400, ignore_eos=True),
    SamplingParams(temperature=1, seed=7, max_tokens=400, ignore_eos=True),
]
PROMPTS = [[3 + number, *range(5, 40 + number)] for number in range(STREAMS)]


@pytest.fixture
def server(checkpoint: Callable[..., Path]) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    command = [
        *(sys.executable, "-m", "headwise.runtime.cli", "serve", "--model", str(checkpoint("gqa")), "--replicas", "2"),
        *("--tp", "1", "--cpus-per-rank", "0.5", "--port", "0", "--metrics-port", "0", "--json"),
        *("--kv-memory", "16MiB", "--drain-timeout", "2"),
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


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def names(client: Client) -> set[str]:
    """Of the replicas that serve, if there are no others."""
    replicas = client.status().replicas
    serving = {one.name for one in replicas if one.state == pb.REPLICA_STATE_SERVING}
    return serving if len(serving) == len(replicas) else set()


def tokens_of(client: Client, begun: Callable[[], object] = lambda: None) -> list[list[int]]:
    """Of 16 streams at once. ``begun`` is called once each has a token."""
    barrier = threading.Barrier(STREAMS + 1)

    def read(number: int) -> list[int]:
        stream = client.stream(PROMPTS[number], PARAMS[number % 2])
        items = [next(iter(stream))]
        barrier.wait(DEADLINE_S)
        items += stream
        *increments, completion = items
        tokens = [token for increment in increments for token in increment.token_ids]  # type: ignore[union-attr]
        assert completion.samples[0].token_ids == tokens and len(tokens) == 400  # type: ignore[union-attr]
        return tokens

    with ThreadPoolExecutor(STREAMS) as threads:
        reading = [threads.submit(read, number) for number in range(STREAMS)]
        barrier.wait(DEADLINE_S)
        begun()
        return [one.result(DEADLINE_S) for one in reading]


def test_streams_go_on_when_a_replica_is_killed_and_while_all_are_restarted(
    server: tuple[psutil.Process, dict[str, Any]],
) -> None:
    with Client(server[1]["address"], timeout=DEADLINE_S, retries=0) as client:
        assert names(client) == {"replica-1", "replica-2"}
        expected = tokens_of(client)

        def kill() -> None:
            busiest = max(client.status().replicas, key=lambda one: one.running)
            assert busiest.running >= 4
            os.kill(busiest.pid, signal.SIGKILL)

        assert tokens_of(client, kill) == expected
        wait_until(lambda: len(names(client)) == 2)
        assert "replica-3" in names(client)
        before = names(client)
        assert tokens_of(client, client.restart) == expected
        wait_until(lambda: not client.status().restarting)
        assert len(names(client)) == 2 and not names(client) & before
        assert tokens_of(client, lambda: client.scale(1)) == expected
        wait_until(lambda: len(names(client)) == 1)
        assert tokens_of(client, lambda: client.scale(2)) == expected
        wait_until(lambda: len(names(client)) == 2)
