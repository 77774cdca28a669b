"""KV events (runtime/kv/events.py) on the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Literal, TypeAlias

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.async_model import AsyncModel
from headwise.runtime.kv.events import Subscription, decode_events
from headwise.runtime.server.errors import OneEngineError, UnavailableError

Kind: TypeAlias = Literal["snapshot", "events"]

CAPACITY = 1024
"""Messages that may wait for a subscriber that names no other number."""

_INTERVAL_S = 0.02
"""How late a message may be; an engine's step takes about as long."""


async def kv_messages(llm: AsyncModel[Any], capacity: int = CAPACITY) -> AsyncGenerator[tuple[Kind, bytes]]:
    """Yields a snapshot, then the messages that follow. The first of them may tell changes that the snapshot already
    has. When more than ``capacity`` messages wait, another snapshot takes their place. See runtime/kv/events.py.

    Raises:
        OneEngineError: there are several engines.
        UnavailableError: the engine has ended.
    """
    if not isinstance(llm, AsyncLLM):
        raise OneEngineError("KV events are those of one engine, and this server routes to several by itself")
    with await _subscribe(llm, capacity) as subscription:
        yield "snapshot", await _snapshot(llm)
        while True:
            if (data := subscription.get(0)) is not None:
                behind = decode_events(data).resnapshot
                yield ("snapshot", await _snapshot(llm)) if behind else ("events", data)
            elif llm.failure is not None:
                raise UnavailableError("the engine has ended")
            else:
                # Not on a thread: waiting subscribers would keep those from tokenizing prompts.
                await asyncio.sleep(_INTERVAL_S)


async def _snapshot(llm: AsyncLLM) -> bytes:
    return await llm.run(lambda engine: engine.events.snapshot())


async def _subscribe(llm: AsyncLLM, capacity: int) -> Subscription:
    """Subscribes; closes the subscription again if the caller is cancelled meanwhile."""
    subscribed = llm.submit(lambda engine: engine.events.subscribe(capacity))
    try:
        return await asyncio.shield(asyncio.wrap_future(subscribed))
    except asyncio.CancelledError:
        subscribed.add_done_callback(lambda done: None if done.exception() else done.result().close())
        raise
