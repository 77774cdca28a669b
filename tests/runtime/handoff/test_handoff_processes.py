"""Servers of both roles, each a process of its own, that are killed, stopped and started again while prompts are handed
over. Every request has the right tokens in the end, or one clear error."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import psutil
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.client import Client, ServerError
from tests.checkpoints import SHAPES, write_checkpoint
from tests.runtime.handoff.conftest import wait_until

pytestmark = pytest.mark.slow

LEASE_S = 2.0
ANSWER_S = 30.0
"""For any request, whatever happens to prefill: computing here, after a lease, on a busy machine."""
START_S = 120.0
LENGTH = 1200
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 256) for _ in range(LENGTH)]


PROMPTS = [prompt(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), *SHAPES["uneven"], max_position_embeddings=2048)


@pytest.fixture(scope="module")
def right(model: Path) -> list[list[int]]:
    with LLM(model, executor="local", kv_memory="64MiB", quiet=True) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


class Server:
    """``headwise serve`` in a process, whose files and processes can be told from others' by its folder."""

    def __init__(self, model: Path, folder: Path, port: int, *arguments: str) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        folder.mkdir(exist_ok=True)
        common = ("--kv-memory", "64MiB", "--cpus-per-rank", "1")
        command = [sys.executable, "-m", "headwise.runtime.cli", "serve", "--model", str(model), "--json"]
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), *common, *arguments],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def ready(self) -> Server:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "log").read_text()
        assert json.loads(line)["address"] == self.address
        return self

    def shards(self) -> list[psutil.Process]:
        """The processes of its ranks, by rank as they were started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "ShardActor" in process.name() and process.cwd() == str(self.folder):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def running(self) -> int:
        with Client(self.address, timeout=5) as client:
            stats = client.stats()
        return int(stats.num_running + stats.num_waiting)

    def end(self) -> None:
        """By SIGTERM, then by SIGKILL."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.wait(10)
            assert self.process.stdout is not None
            self.process.stdout.close()


class Traffic:
    """Asks for prompts, two at a time, until it is told to stop; keeps what became of each."""

    def __init__(self, address: str, right: list[list[int]]) -> None:
        self._address, self._right = address, right
        self._stop, self._lock, self._next = threading.Event(), threading.Lock(), 0
        self.errors: list[ServerError] = []
        self.seconds: list[float] = []
        self.handed_over = 0
        self._threads = ThreadPoolExecutor(2)
        self._workers: list[Future[None]] = [self._threads.submit(self._ask) for _ in range(2)]

    @property
    def answered(self) -> int:
        return len(self.seconds) + len(self.errors)

    def more(self, count: int) -> None:
        """Waits until so many more are answered."""
        wanted, deadline = self.answered + count, time.monotonic() + count * ANSWER_S
        while self.answered < wanted:
            for worker in self._workers:
                assert not worker.done() or worker.exception() is None, worker.exception()
            assert time.monotonic() < deadline
            self._stop.wait(0.01)

    def end(self) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.result(2 * ANSWER_S)
        self._threads.shutdown()
        assert max(self.seconds) < ANSWER_S

    def _ask(self) -> None:
        with Client(self._address, timeout=2 * ANSWER_S) as client:
            while not self._stop.is_set():
                with self._lock:
                    number = self._next
                    self._next += 1
                begun = time.monotonic()
                # What was asked for before is cached, unless its salt is another.
                try:
                    answer = client.generate(PROMPTS[number % 24], PARAMS, cache_salt=str(number // 24))
                except ServerError as error:
                    self.errors.append(error)
                    self._stop.wait(0.05)
                    continue
                assert list(answer.samples[0].token_ids) == self._right[number % 24]
                self.handed_over += answer.cached_tokens > 0
                self.seconds.append(time.monotonic() - begun)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


LOCAL = ("--executor", "local")


class Bench:
    """A prefill and a decode server, and the traffic."""

    def __init__(self, model: Path, right: list[list[int]], folder: Path, stack: ExitStack, *arguments: str) -> None:
        self._model, self._folder, self._stack, self._arguments = model, folder, stack, arguments
        self.ports = free_port(), free_port()
        self.prefill, self.decode = self.start(0), self.start(1)
        for server in (self.prefill, self.decode):
            server.ready()
        self.traffic = Traffic(self.decode.address, right)
        stack.callback(self.traffic.end)
        self.hand_over()

    def start(self, side: int) -> Server:
        role = ("--role", "prefill")
        if side:
            role = ("--role", "decode", "--prefill", f"127.0.0.1:{self.ports[0]}", "--handoff-min-tokens", "0")
            role += ("--handoff-lease", str(LEASE_S))
        folder = self._folder / ("decode" if side else "prefill")
        server = Server(self._model, folder, self.ports[side], *role, *self._arguments)
        self._stack.callback(server.end)
        return server

    def hand_over(self) -> None:
        """Waits until prompts are handed over."""
        before = self.traffic.handed_over
        deadline = time.monotonic() + START_S
        while self.traffic.handed_over < before + 4:
            assert time.monotonic() < deadline
            self.traffic.more(1)

    def in_flight(self) -> None:
        """Waits until prefill computes something."""
        wait_until(self.prefill.running)


@contextmanager
def bench(model: Path, right: list[list[int]], folder: Path, *arguments: str) -> Iterator[Bench]:
    before = left_over()
    with ExitStack() as stack:
        yield Bench(model, right, folder, stack, *arguments)
    wait_until(lambda: not of(folder))
    assert left_over() <= before


def of(folder: Path) -> list[str]:
    """The processes that were started in a folder, and theirs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cwd().startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
    return found


def left_over() -> set[str]:
    folders = ("/dev/shm", "/tmp")
    return {
        f"{folder}/{name}" for folder in folders for name in os.listdir(folder) if name.startswith(("headwise", "hw-"))
    }


def test_a_prefill_server_that_is_killed_and_comes_back(model: Path, right: list[list[int]], tmp_path: Path) -> None:
    with bench(model, right, tmp_path, *LOCAL) as its:
        for _ in range(2):
            its.in_flight()
            its.prefill.process.kill()
            its.traffic.more(6)
            its.prefill = its.start(0).ready()
            its.hand_over()
        assert not its.traffic.errors


def test_a_prefill_server_that_is_stopped(model: Path, right: list[list[int]], tmp_path: Path) -> None:
    with bench(model, right, tmp_path, *LOCAL) as its:
        its.in_flight()
        its.prefill.process.send_signal(signal.SIGSTOP)
        its.traffic.more(8)
        its.prefill.process.send_signal(signal.SIGCONT)
        its.hand_over()
        assert not its.traffic.errors


def test_a_decode_server_that_is_killed_and_comes_back(model: Path, right: list[list[int]], tmp_path: Path) -> None:
    with bench(model, right, tmp_path, *LOCAL) as its:
        its.in_flight()
        its.decode.process.kill()
        wait_until(lambda: its.traffic.errors)
        assert {error.code for error in its.traffic.errors} == {grpc.StatusCode.UNAVAILABLE}
        wait_until(lambda: not its.prefill.running())  # within a lease
        its.decode = its.start(1).ready()
        its.hand_over()


def test_both_are_killed_and_come_back(model: Path, right: list[list[int]], tmp_path: Path) -> None:
    with bench(model, right, tmp_path, *LOCAL) as its:
        its.in_flight()
        for server in (its.prefill, its.decode):
            server.process.kill()
        wait_until(lambda: its.traffic.errors)
        its.prefill, its.decode = its.start(0), its.start(1)
        its.prefill.ready(), its.decode.ready()
        its.hand_over()
        assert {error.code for error in its.traffic.errors} == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_shard_of_prefill(model: Path, right: list[list[int]], tmp_path: Path, number: int) -> None:
    with bench(model, right, tmp_path, "--tp", "2") as its:
        its.in_flight()
        shard = its.prefill.shards()[1]
        shard.send_signal(number)
        its.traffic.more(8)
        if number == signal.SIGSTOP:
            shard.send_signal(signal.SIGCONT)
        its.hand_over()  # with the shards that came in the place of those that died
        assert not its.traffic.errors


def test_a_shard_of_decode(model: Path, right: list[list[int]], tmp_path: Path) -> None:
    with bench(model, right, tmp_path, "--tp", "2") as its:
        its.in_flight()
        its.decode.shards()[1].kill()
        its.traffic.more(8)
        wait_until(lambda: not its.prefill.running())
        its.hand_over()
        assert not its.traffic.errors
