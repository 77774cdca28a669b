"""The service for the gateway, asked without one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.client import Client
from headwise.runtime.server.health import HealthMonitor
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.runtime.server.conftest import DEADLINE_S, Running
from tests.runtime.server.test_service import PROMPT

pytest.importorskip("smg_grpc_proto")
from smg_grpc_proto.generated import vllm_engine_pb2

from headwise.runtime.server import vllm_engine, vllm_kv_events

Serve = Callable[..., Running]
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


class Context:
    """What a call has of gRPC, and what was sent to it."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:1") -> None:
        self.sent: list[Any] = []
        self.code = grpc.StatusCode.OK
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    async def write(self, message: Any) -> None:
        self.sent.append(message)

    async def abort(self, code: grpc.StatusCode, *about: object) -> None:
        self.code = code
        raise grpc.aio.AbortError


def tokenizers(running: Running, count: int) -> list[Context]:
    """So many calls for the tokenizer, side by side."""

    async def get() -> list[Context]:
        sessions = running.server.sessions
        service = vllm_engine.VllmEngineService(sessions, HealthMonitor(sessions, []), "tiny")
        contexts = [Context() for _ in range(count)]
        await asyncio.gather(*[service.GetTokenizer(None, one) for one in contexts], return_exceptions=True)  # type: ignore[arg-type]
        return contexts

    return asyncio.run_coroutine_threadsafe(get(), running.loop).result(DEADLINE_S)


def test_the_tokenizer_is_zipped_once(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    running, made, make = serve(tmp_path), [], zipfile.ZipFile
    monkeypatch.setattr(vllm_engine.zipfile, "ZipFile", lambda *about: made.append(about) or make(*about))
    contexts = tokenizers(running, 5)
    data = b"".join(chunk.data for chunk in contexts[0].sent)
    assert contexts[0].sent[-1].sha256 == hashlib.sha256(data).hexdigest()
    assert {"tokenizer.json", "config.json"} <= set(make(io.BytesIO(data)).namelist())
    assert all(one.sent == contexts[0].sent for one in contexts) and len(made) == 1


def test_callers_that_leave_do_not_have_the_tokenizer_zipped_anew(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    running, begun, go_on, make = serve(tmp_path), [], threading.Event(), vllm_engine._zipped_tokenizer

    def zipped(folder: Path) -> Any:
        begun.append(folder)
        assert go_on.wait(DEADLINE_S)
        return make(folder)

    monkeypatch.setattr(vllm_engine, "_zipped_tokenizer", zipped)

    async def storm() -> Context:
        sessions = running.server.sessions
        service = vllm_engine.VllmEngineService(sessions, HealthMonitor(sessions, []), "tiny")
        for _ in range(5):
            with suppress(TimeoutError):
                await asyncio.wait_for(service.GetTokenizer(None, Context()), 0.05)  # type: ignore[arg-type]
        go_on.set()
        await service.GetTokenizer(None, last := Context())  # type: ignore[arg-type]
        assert not sessions.num_calls
        return last

    try:
        last = asyncio.run_coroutine_threadsafe(storm(), running.loop).result(DEADLINE_S)
    finally:
        go_on.set()
    assert last.sent and len(begun) == 1


def test_a_tokenizer_that_is_not_there_or_too_large_is_not_sent(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenizers(serve(), 1)[0].code is grpc.StatusCode.UNAVAILABLE
    write_byte_tokenizer(write_checkpoint(tmp_path, 8, 4, vocab_size=VOCAB))
    monkeypatch.setattr(vllm_engine, "MAX_TOKENIZER_BYTES", 1000)
    assert tokenizers(serve(tmp_path), 1)[0].code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:1", "ipv6:%5Bfd00::2%5D:1", "ipv4:127.0.0.1:1", "ipv6:%5B::1%5D:1"])
def test_strangers_are_not_told_of_the_prompts_of_others(serve: Serve, peer: str) -> None:
    running, is_told = serve(options={"host": "0.0.0.0", "insecure": True}), "127" in peer or "::1" in peer
    with Client(f"127.0.0.1:{running.address.rpartition(':')[2]}", timeout=DEADLINE_S) as client:
        for _ in range(2):
            client.generate(PROMPT, SHORT)

    async def ask() -> tuple[Context, float]:
        sessions = running.server.sessions
        service = vllm_engine.VllmEngineService(sessions, HealthMonitor(sessions, []), "tiny")
        asked = Context(peer)
        events = asyncio.create_task(service.SubscribeKvEvents(None, asked))  # type: ignore[arg-type]
        while not asked.sent and not events.done():
            await asyncio.sleep(0.01)
        events.cancel()
        await asyncio.gather(events, return_exceptions=True)
        loads = await service.GetLoads(None, Context(peer))  # type: ignore[arg-type]
        return asked, loads.loads[0].cache_hit_rate

    asked, hit_rate = asyncio.run_coroutine_threadsafe(ask(), running.loop).result(DEADLINE_S)
    assert asked.code is (grpc.StatusCode.OK if is_told else grpc.StatusCode.PERMISSION_DENIED)
    assert bool(asked.sent) is (hit_rate > 0) is is_told
    assert not running.server.sessions._num_subscribers


def test_a_handoff_of_a_gateways_choice_is_refused(serve: Serve) -> None:
    running, context = serve(), Context()
    request = vllm_engine_pb2.GenerateRequest(
        request_id="one", text="hello", kv_transfer_params_json='{"do_remote_prefill": true}'
    )

    async def ask() -> str:
        sessions = running.server.sessions
        service = vllm_engine.VllmEngineService(sessions, HealthMonitor(sessions, []), "tiny")
        with suppress(grpc.aio.AbortError):
            await service.Generate(request, context)  # type: ignore[arg-type]
        return str(await service.GetServerInfo(None, context))  # type: ignore[arg-type]

    about = asyncio.run_coroutine_threadsafe(ask(), running.loop).result(DEADLINE_S)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT and not context.sent
    assert "kv_connector" not in about and "kv_role" not in about


def test_numbers_of_batches_grow_from_epoch_to_epoch() -> None:
    numbers = vllm_kv_events._Numbers()
    told = [(7, 4), (7, 5), (7, 9), (8, 0), (8, 1), (30, 2)]
    assert [numbers.of(*one) for one in told] == [5, 6, 10, 11, 12, 15]
