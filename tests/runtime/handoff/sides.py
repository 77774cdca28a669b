"""An LLM and the engine that computes its prompts, in this process: ranks are threads, and what either side has can be
looked at and got hold of. The control goes over a TCP port, so that a prefill engine can come back at its address."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.runtime import LLM, start
from headwise.runtime.config import EngineConfig
from headwise.runtime.engine.engine import Engine
from headwise.runtime.handoff import link
from headwise.runtime.handoff.inbound import Inbound
from headwise.runtime.handoff.outbound import Outbound
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.sides import prefill_config
from headwise.runtime.start import PrefillSide
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.handoff_rank import HandoffRank
from headwise.workers.spec import ShardSpec
from tests.runtime.handoff.conftest import TcpServer, wait_until
from tests.thread_group import ThreadShardGroup, thread_groups

Block = tuple[int, str, int, int]
"""Layer, K or V, KV head of the model, place in the prompt."""


class Sides:
    """Prefill and decode. Close it.

    Attributes:
        llm: decode.
        prefill: the engine that is asked now.
        port: where.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        model: Path,
        *,
        prefill: dict[str, Any] | None = None,
        lease_s: float = 30.0,
        renew_s: float = 0.1,
        shared_memory: bool = True,
        **settings: Any,
    ) -> None:
        self._patch, self._ended = patch, list[PrefillSide]()
        self._prefills, self._decodes = list[ThreadShardGroup](), list[ThreadShardGroup]()
        patch.setattr(start, "make_factory", thread_groups(self._group))
        patch.setattr(start, "LocalServer", TcpServer)
        patch.setattr(start, "decode_config", partial(_decode_config, start.decode_config, lease_s))
        patch.setattr(start, "prefill_config", partial(_prefill_config, shared_memory))
        patch.setattr(link, "RENEW_S", renew_s)
        patch.setattr(link, "MAX_BACKOFF_S", 0.1)
        common = {"kv_memory": "16MiB", "max_model_len": 256, "handoff_min_tokens": 0, "quiet": True}
        self.llm = LLM(model, prefill=prefill or {}, **common | settings)
        assert self.llm._prefill is not None
        self.prefill = self.llm._prefill
        self.port = int(self.prefill.address.rpartition(":")[2])
        self._shared_memory = shared_memory

    @property
    def inbound(self) -> Inbound:
        inbound = self.llm._loop.engine.generation.inbound
        assert inbound is not None
        return inbound

    @property
    def outbound(self) -> Outbound:
        outbound = self.prefill.loop.engine.generation.outbound
        assert outbound is not None
        return outbound

    @property
    def decode_group(self) -> ThreadShardGroup:
        return self._decodes[-1]

    @property
    def prefill_group(self) -> ThreadShardGroup:
        return self._prefills[-1]

    def restart_prefill(self, while_down: Callable[[], None] = lambda: None) -> None:
        """Another generation, at the same address."""
        self._ended.append(self.prefill)
        self.prefill.close()
        while_down()
        self._patch.setattr(start, "LocalServer", partial(TcpServer, port=self.port))
        self.prefill = PrefillSide(_prefill_config(self._shared_memory, self.llm.config), True)

    def kill_prefill_ranks(self) -> None:
        """As if their processes were killed: their streams break off, and the group is dead."""
        for rank in handoff_ranks(self.prefill_group):
            rank.close()
        mailbox = self.prefill_group._mailbox
        assert mailbox is not None
        mailbox.declare_dead(0, "killed by a test")

    def kill_decode_ranks(self) -> None:
        for rank in handoff_ranks(self.decode_group):
            rank.close()
        mailbox = self.decode_group._mailbox
        assert mailbox is not None
        mailbox.declare_dead(0, "killed by a test")

    def settle(self) -> None:
        """Waits until nothing is on its way; then all blocks are free or idle, no fence is open, no push runs, and the
        books add up."""
        wait_until(lambda: not self._on_decode(lambda engine: engine.generation.ledger.busy or self.inbound.busy))
        self._on_decode(_check_free)
        stats = self.llm._loop.engine.generation.handoff_stats()
        assert (stats["in_flight"], stats["reserved_blocks"], stats["oldest_s"]) == (0, 0, 0.0)
        peers = self.inbound.peers
        assert not any(peer._tracked or peer._asking.total() for peer in peers)  # type: ignore[attr-defined]
        for rank in handoff_ranks(self.decode_group):
            assert not len(rank._fences)
        # A prompt that decode has asked for may come later than decode's end.
        wait_until(lambda: not (self.outbound.stats()["in_flight"] or self.outbound._transfers.running))
        wait_until(lambda: not self.prefill.loop.run(_prefill_is_busy))
        self.prefill.loop.run(_check_free)
        for rank in handoff_ranks(self.prefill_group):
            assert not rank._pusher._pushes

    def close(self) -> None:
        self.llm.close()
        for side in (self.prefill, *self._ended):
            side.close()

    def decode_kv(self, prompt: list[int], salt: str = "") -> dict[Block, bytes]:
        return self._on_decode(lambda engine: kv_of(engine, self.decode_group, self._blocks(prompt, salt)))

    def prefill_kv(self, prompt: list[int], salt: str = "") -> dict[Block, bytes]:
        return self.prefill.loop.run(lambda engine: kv_of(engine, self.prefill_group, self._blocks(prompt, salt)))

    def _blocks(self, prompt: list[int], salt: str) -> TokenBlocks:
        from headwise.runtime import SamplingParams

        params = SamplingParams(max_tokens=1)
        [request] = self.llm._inputs.requests("kv", prompt, params, 0, salt)
        assert request.token_blocks is not None
        return request.token_blocks

    def _on_decode(self, function: Callable[[Engine], Any]) -> Any:
        return self.llm._loop.run(function)

    def _group(self, spec: ShardSpec) -> ThreadShardGroup:
        group = ThreadShardGroup(spec)
        if spec.handoff is not None:  # else it is somebody else's
            (self._decodes if spec.handoff.receives else self._prefills).append(group)
        return group


def handoff_ranks(group: ThreadShardGroup) -> list[HandoffRank]:
    found = [shard._handoff for shard in group.shards if shard._handoff is not None]
    assert found, "the group has ended"
    return found


def caches(group: ThreadShardGroup) -> list[tuple[int, KVCache]]:
    """Of each rank its first KV head, and its cache."""
    return [(rank._heads[0], rank._pusher._kv_cache) for rank in handoff_ranks(group)]


def content(cache: KVCache, blocks: Iterable[int]) -> Tensor:
    """[blocks, layers, 2, heads, block, dim]"""
    blocks = list(blocks)
    found = torch.empty(len(blocks), *cache.block_shape, dtype=cache.dtype)
    cache.read_blocks(blocks, found)
    return found


def kv_of(engine: Engine, group: ThreadShardGroup, blocks: TokenBlocks) -> dict[Block, bytes]:
    """A hash of the KV of each of a prompt's cached blocks; where several ranks hold a head, all have the same."""
    found: dict[Block, bytes] = {}
    cached = [engine.cached_block(digest) for digest in blocks.digests]
    numbers = [node.block for node in cached if node is not None]
    for first, cache in caches(group):
        for place, block in enumerate(content(cache, numbers)):
            for layer, kv in enumerate(block):
                for name, heads in zip("KV", kv, strict=True):
                    for head, x_SD in enumerate(heads, first):
                        digest = hashlib.sha256(x_SD.contiguous().numpy().tobytes()).digest()
                        assert found.setdefault((layer, name, head, place), digest) == digest
    return found


def _check_free(engine: Engine) -> None:
    engine.check_integrity()
    cache = engine.generation.cache
    assert cache.num_available == cache.pool.num_blocks


def _prefill_is_busy(engine: Engine) -> bool:
    outbound = engine.generation.outbound
    assert outbound is not None
    return bool(engine.generation.ledger.busy or outbound.busy or engine.request_ids)


def _decode_config(
    make: Callable[[EngineConfig, str], EngineConfig], lease_s: float, config: EngineConfig, address: str
) -> EngineConfig:
    made = make(config, address)
    assert made.handoff is not None
    return made.model_copy(update={"handoff": made.handoff.model_copy(update={"lease_s": lease_s})})


def _prefill_config(shared_memory: bool, config: EngineConfig) -> EngineConfig:
    made = prefill_config(config)
    assert made.handoff is not None
    return made.model_copy(update={"handoff": made.handoff.model_copy(update={"shared_memory": shared_memory})})
