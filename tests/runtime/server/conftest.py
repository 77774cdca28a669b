"""A server in this process: its event loop on a thread, its ranks on others, a tiny model behind it."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import start as start_module
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.client import Client
from headwise.runtime.config import engine_config
from headwise.runtime.deployment.control import Control
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.server.serve import ServeOptions, Server
from tests.thread_group import ThreadShardGroup, thread_groups

DEADLINE_S = 60.0


class Running:
    """A server and what it said when it was ready.

    Attributes:
        llm: its engine; use it for what may be called from any thread.
        exit_code: done once the server has ended.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        options: ServeOptions,
        handoff: HandoffService | None = None,
        control: Control | None = None,
    ) -> None:
        self.llm, self._options, self._handoff, self._control = llm, options, handoff, control
        self._ready: Future[dict[str, Any]] = Future()
        self.exit_code: Future[int] = Future()
        self._thread = threading.Thread(target=self._serve, name="server", daemon=True)
        self._thread.start()
        self.about = self._ready.result(DEADLINE_S)
        self.address: str = self.about["address"]

    def client(self, **options: Any) -> Client:
        return Client(self.address, timeout=DEADLINE_S, **options)

    def stop(self) -> None:
        with suppress(RuntimeError):  # the server has ended by itself
            self.loop.call_soon_threadsafe(self.server.stop)

    def end(self) -> int:
        if not self.exit_code.done():
            self.stop()
        code = self.exit_code.result(DEADLINE_S)
        self._thread.join(DEADLINE_S)
        return code

    def stats(self) -> dict[str, Any]:
        return self.llm.submit(lambda engine: engine.stats()).result(DEADLINE_S)

    def metrics(self) -> str:
        """What a scrape gives; the server must have a metrics port."""
        with urllib.request.urlopen(f"http://{self.about['metrics']}/metrics", timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    def _serve(self) -> None:
        async def run() -> int:
            self.loop = asyncio.get_running_loop()
            self.server = Server(self.llm, self._options, self._handoff, self._control)
            return await self.server.run(self._ready.set_result)

        try:
            self.exit_code.set_result(asyncio.run(run()))
        except BaseException as error:
            self.exit_code.set_exception(error)
            if not self._ready.done():
                self._ready.set_exception(error)


@contextmanager
def steps_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No step ends before the event is set."""
    go_on, collect = threading.Event(), ThreadShardGroup.collect

    def held(group: ThreadShardGroup) -> object:
        assert go_on.wait(DEADLINE_S)
        return collect(group)

    monkeypatch.setattr(ThreadShardGroup, "collect", held)
    try:
        yield go_on
    finally:
        go_on.set()


@pytest.fixture
def serve(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """Starts servers, and ends them."""
    started: list[Running] = []
    monkeypatch.setattr(start_module, "make_factory", thread_groups())

    def start(model: Path | None = None, options: dict[str, Any] | None = None, **settings: Any) -> Running:
        queued, service = settings.pop("max_queued_requests", 1024), settings.pop("service", None)
        control = settings.pop("control", None)
        config = engine_config(model=str(model or checkpoint("gqa")), **{"kv_memory": "16MiB"} | settings)
        llm = AsyncLLM(config, max_queued_requests=queued, quiet=True)
        started.append(Running(llm, ServeOptions(**{"name": "tiny", "port": 0} | (options or {})), service, control))
        return started[-1]

    yield start
    for running in started:
        running.end()
