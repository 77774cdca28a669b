"""AsyncLLM: a model in an asyncio program, on an engine of this process."""

from __future__ import annotations

import asyncio
from typing import Any

from headwise.runtime.async_model import AsyncModel
from headwise.runtime.config import EngineConfig
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.loop import EngineLoop, is_hung
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.start import handoff_service, run_engine, start_engine


class AsyncLLM(AsyncModel[Engine]):
    """A model that is loaded, for one asyncio event loop. The engine runs on a thread of its own."""

    def __init__(self, config: EngineConfig, *, max_queued_requests: int = 1024, quiet: bool = False) -> None:
        """Loads a model. That takes seconds and blocks the event loop: do it before anything is served.

        Args:
            max_queued_requests: most requests that may wait, for the first time or again after a preemption. Each of
                ``n`` samples counts as one. A tenant may have half of what other tenants leave free. Default: 1024.
            quiet: print nothing on stderr.

        Raises: as :class:`~headwise.runtime.llm.LLM`.
        """
        self._started = started = start_engine(config, quiet)
        super().__init__(config, started.model_path, started.spec.dtype, started.inputs, max_queued_requests)
        self._engine_loop = run_engine(started, self._fail)

    @property
    def _loop(self) -> EngineLoop:
        return self._engine_loop

    @property
    def engine(self) -> Engine:
        """The engine, for what may be read from any thread. Everything else goes through :meth:`run`."""
        return self._started.engine

    @property
    def num_blocks(self) -> int:
        """How many KV blocks each rank has, in the group of the KV policy whose blocks run out first."""
        return self.engine.generation.fullest.pool.num_blocks

    @property
    def max_running(self) -> int:
        return self.config.max_num_seqs

    @property
    def is_handing_over(self) -> bool:
        return self.engine.generation.handing_over

    @property
    def pause_reason(self) -> str | None:
        return "the shards are dead, and others are started" if self.engine.rebuilding else None

    @property
    def hang(self) -> str | None:
        return "a step makes no progress" if is_hung(self.engine) else None

    def handoff_service(self) -> HandoffService | None:
        if self.config.handoff is None or self.config.handoff.role != "prefill":
            return None
        return handoff_service(self._started, self._loop)

    async def reset_prefix_cache(self) -> None:
        if self._started.prefill is not None:
            self._started.prefill.reset_prefix_cache()
        await super().reset_prefix_cache()

    async def stats(self) -> dict[str, Any]:
        """As of any model; with a prefill engine of its own, ``prefill`` has what that one has done."""
        stats = await super().stats()
        if self._started.prefill is not None:
            stats["prefill"] = await asyncio.to_thread(self._started.prefill.stats)
        return stats

    def stats_within(self, timeout_s: float) -> dict[str, Any]:
        stats = super().stats_within(timeout_s)
        if self._started.prefill is not None:
            stats["prefill"] = self._started.prefill.stats()
        return stats

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self._started.close()

    def hurry(self) -> None:
        super().hurry()
        self._started.hurry()

    def _fail(self, error: BaseException) -> None:
        self.engine.events.close()
        super()._fail(error)
