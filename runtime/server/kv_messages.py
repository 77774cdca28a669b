"""KV events on the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from headwise.runtime.aio import AsyncLLM
from headwise.runtime.kv.events import Subscription
from headwise.runtime.server.errors import UnavailableError

CAPACITY = 1024
"""Messages that may wait for a subscriber that names no other number."""

_INTERVAL_S = 0.02
"""How late a message may be; an engine's step takes about as long."""


async def kv_messages(llm: AsyncLLM, capacity: int = CAPACITY) -> AsyncGenerator[bytes]:
    """A snapshot, and then the messages; the first few may tell what it holds already. See runtime/kv/events.py.

    Raises:
        UnavailableError: the engine has ended.
    """
    with await _subscribe(llm, capacity) as subscription:
        yield await llm.call(lambda engine: engine.events.snapshot())
        while True:
            if (data := subscription.get(0)) is not None:
                yield data
            elif llm.failure is not None:
                raise UnavailableError("the engine has ended")
            else:
                # Not on a thread: waiting subscribers would keep those from tokenizing prompts.
                await asyncio.sleep(_INTERVAL_S)


async def _subscribe(llm: AsyncLLM, capacity: int) -> Subscription:
    """Closes it again if the caller is cancelled meanwhile."""
    subscribed = llm.submit(lambda engine: engine.events.subscribe(capacity))
    try:
        return await asyncio.shield(asyncio.wrap_future(subscribed))
    except asyncio.CancelledError:
        subscribed.add_done_callback(lambda done: None if done.exception() else done.result().close())
        raise
