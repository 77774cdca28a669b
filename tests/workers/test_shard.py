"""A shard with tiers: what it computed comes back from them, in this run and the next."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import torch
from torch import Tensor

from headwise.workers import shard
from headwise.workers.collectives import Solo
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import Fence, HandoffJob, HandoffOp, HandoffSpec, KvEndpoint
from headwise.workers.kv.transfer import Op, Tier, TransferJob, TransferResult
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec
from tests.checkpoints import small_spec
from tests.workers.cuda.fake_gpu import FakeGpu
from tests.workers.kv.kv_blocks import key_of

KEYS = [key_of(0), key_of(1)]


class Running:
    """A shard of 8 blocks on a small checkpoint."""

    def __init__(self, spec: ShardSpec) -> None:
        self.results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
        self.shard = Shard(spec, Solo(), 1, self.results.put)
        self.shard.load()
        self.shard.allocate(8)

    def transfer(self, op: Op, tier: Tier, blocks: list[int]) -> list[bytes]:
        self.shard.transfer(TransferJob(0, op, tier, KEYS, blocks))
        return self.results.get(timeout=10).failed

    def block(self, number: int) -> Tensor:
        cache = self.shard._kv_cache
        assert cache is not None
        block = torch.empty(1, *cache.block_shape, dtype=cache.dtype)
        cache.read_blocks([number], block)
        return block


@pytest.fixture
def spec(checkpoint: Callable[..., Path], tmp_path: Path) -> ShardSpec:
    return small_spec(
        checkpoint("gqa"),
        host_kv_blocks=2,
        disk_kv_path=str(tmp_path / "kv"),
        kv_identity=b"model",
    )


@pytest.mark.parametrize(
    ("attention", "kv_policy", "kv_dtype"),
    [
        ("cpu", "dense", None),
        ("reference", "dense", None),
        ("reference", "sinks:4,20", "float16"),
        ("reference", "window:20", "int8"),
        ("reference", "dense", "int8/int4"),
    ],
)
def test_computed_blocks_come_back_from_both_tiers(
    spec: ShardSpec, attention: str, kv_policy: str, kv_dtype: str | None
) -> None:
    running = Running(replace(spec, attention=attention, kv_policy=kv_policy, kv_dtype=kv_dtype))
    tokens = list(range(3, 36))
    first = StepPlan(0, admits=[RowAdmit(0, tokens, 33, 0, [0, 1, 2], RowSampling())], computes=[(0, 33)])
    expected = running.shard.step(first).tokens[0][1]
    for tier in Tier:
        assert running.transfer(Op.SAVE, tier, [0, 1]) == []
    assert running.transfer(Op.LOAD, Tier.HOST, [3, 4]) == [] == running.transfer(Op.LOAD, Tier.DISK, [5, 6])
    for computed, *loaded in ((0, 3, 5), (1, 4, 6)):
        assert running.block(computed).any()
        assert all(torch.equal(running.block(computed), running.block(block)) for block in loaded)
    for step, blocks in enumerate(([3, 4, 7], [5, 6, 7]), start=1):
        admit = RowAdmit(step, tokens, 33, 32, blocks, RowSampling())
        assert running.shard.step(StepPlan(step, admits=[admit], computes=[(step, 1)])).tokens == [(step, expected)]
    stats = running.shard.stats()
    assert stats["disk_kv_blocks"] == 2 and stats["host_kv_bytes"] == stats["kv_bytes"] // 4
    running.shard.close()
    running.shard.close()


def test_the_next_run_finds_the_blocks_of_its_own_identity_only(spec: ShardSpec) -> None:
    running = Running(spec)
    assert running.transfer(Op.SAVE, Tier.DISK, [0, 1]) == []
    with pytest.raises(InvalidValueError, match=r"^disk_kv_path=.*another engine"):
        Running(spec)
    running.shard.close()
    expected = [(key.digest, key.namespace, key.parent, key.tokens) for key in KEYS]
    running = Running(spec)
    stored = running.shard.stored_blocks()
    assert stored == expected
    assert [tuple(entry) for entry in msgpack.unpackb(msgpack.packb(stored))] == expected
    assert running.transfer(Op.LOAD, Tier.DISK, [3, 4]) == []
    running.shard.close()
    others = [{"kv_identity": b"other"}, {"block_size": 32}, {"dtype": "bfloat16"}, {"kv_policy": "window:20"}]
    others += [{"kv_dtype": "int8"}, {"kv_dtype": "bfloat16"}]
    for other in [replace(spec, **changes) for changes in others]:
        running = Running(other)
        assert running.shard.stored_blocks() == [] and running.shard.stats()["disk_kv_blocks"] == 0
        running.shard.close()
        running = Running(spec)
        assert running.shard.stored_blocks() == []
        assert running.transfer(Op.SAVE, Tier.DISK, [0, 1]) == []
        running.shard.close()


def test_what_the_engine_cannot_be_told_of_is_deleted_and_logged(
    spec: ShardSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine would count neither its bytes nor find it."""
    running = Running(spec)
    assert running.transfer(Op.SAVE, Tier.DISK, [0, 1]) == []
    running.shard.close()
    monkeypatch.setattr("headwise.workers.shard.MAX_MESSAGE_BYTES", 1024 + 200)
    running = Running(spec)
    assert [digest for digest, *_ in running.shard.stored_blocks()] == [KEYS[1].digest]
    assert running.shard.stats()["disk_kv_blocks"] == 1
    running.shard.close()
    assert spec.disk_kv_path is not None
    assert [path.stem for path in Path(spec.disk_kv_path).rglob("*.kv")] == [KEYS[1].digest.hex()]
    assert "1 of 2 blocks" in caplog.text


def test_host_blocks_are_set_aside_before_a_fraction_is_taken(spec: ShardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "free_host_memory", lambda: 1 << 20)
    blocks = []
    for host_blocks in (0, 16):
        made = loaded(replace(spec, kv_memory=1.0, host_kv_blocks=host_blocks))
        blocks.append(made.affordable_blocks())
        made.close()
    assert blocks[0] - blocks[1] == 16 and blocks[1] > 0


def loaded(spec: ShardSpec, ranks_on_host: Sequence[int] = (0,)) -> Shard:
    made = Shard(spec, Solo(), 1, ranks_on_host=ranks_on_host)
    made.load()
    return made


BLOCK_BYTES = 2 * 2 * 4 * 16 * 16 * 4
"""Of K and V in 2 layers of 4 heads: 16 tokens, 16 floats wide."""


def test_memory_that_is_not_there_is_refused_before_it_is_taken(
    spec: ShardSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "free_host_memory", lambda: 16 * BLOCK_BYTES)
    spec = replace(spec, kv_memory=64 * BLOCK_BYTES, host_kv_blocks=0)
    made = loaded(spec)
    assert made.affordable_blocks() == 64
    needed = rf"17 blocks take {17 * BLOCK_BYTES} bytes, and rank 0 has {16 * BLOCK_BYTES} bytes of host memory"
    with pytest.raises(InvalidValueError, match=rf"^kv_memory={64 * BLOCK_BYTES}: {needed}.*--kv-memory"):
        made.allocate(17)
    made.allocate(16)  # num_blocks may ask for less than kv_memory
    made.close()


def test_the_ranks_of_a_host_share_its_memory(spec: ShardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "free_host_memory", lambda: 32 * BLOCK_BYTES)
    made = loaded(replace(spec, kv_memory=1.0, host_kv_blocks=4), ranks_on_host=(0, 0))
    assert made.affordable_blocks() == 12
    made.close()
    with pytest.raises(
        InvalidValueError, match=rf"^host_kv_memory='{17 * BLOCK_BYTES} bytes': rank 0 has {16 * BLOCK_BYTES} bytes"
    ):
        loaded(replace(spec, host_kv_blocks=17), ranks_on_host=(0, 0))


def test_ranks_share_memory_as_they_need_it(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three KV heads on two ranks, one has two: it needs two thirds of what both need together."""
    head_bytes = BLOCK_BYTES // 4
    monkeypatch.setattr(shard, "free_host_memory", lambda: 8 * 3 * head_bytes)
    spec = small_spec(checkpoint("uneven"), tensor_parallel_size=2, kv_memory=1.0, max_model_len=128)
    for rank in range(2):
        peers = Solo()
        peers.rank = rank
        made = Shard(spec, peers, 1, ranks_on_host=(0, 1))
        made.load()
        assert made.affordable_blocks() == 8
        made.allocate(8)
        made.close()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_memory_that_cannot_be_had_after_all_is_a_typed_error(
    spec: ShardSpec, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(**sizes: object) -> None:
        raise error

    monkeypatch.setattr(shard, "KVCache", fail)
    made = loaded(spec)
    with pytest.raises(InvalidValueError, match=r"^kv_memory='1MiB': 8 blocks take"):
        made.allocate(8)
    made.close()


def test_a_host_tier_that_cannot_be_reserved_is_a_typed_error(spec: ShardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*sizes: object) -> None:
        raise MemoryError

    monkeypatch.setattr(shard, "HostStore", fail)
    made = loaded(replace(spec, host_kv_blocks=4))
    with pytest.raises(
        InvalidValueError, match=r"^host_kv_memory='\d+ bytes': rank 0 cannot reserve.*--host-kv-memory"
    ):
        made.allocate(8)
    made.close()


def test_a_closed_shard_gives_its_gpu_memory_back(spec: ShardSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded(spec)
    made.allocate(8)
    assert made._model is not None and made._kv_cache is not None
    kept = [weakref.ref(made._model), weakref.ref(made._kv_cache)]
    alive: list[int] = []

    class Gpu(FakeGpu):
        def empty_cache(self) -> None:
            """Frees what no tensor uses any more, as torch's does."""
            alive.append(sum(reference() is not None for reference in kept))

    made._gpu = Gpu()
    made.close()
    assert alive == [0]


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_what_one_shard_computed_another_goes_on_from(spec: ShardSpec, kv_dtype: str) -> None:
    """Tiers beside it: results are told one at a time whoever has them."""
    spec = replace(spec, kv_dtype=kv_dtype, attention=None if kv_dtype == "float32" else "reference")
    prefill = Running(replace(spec, disk_kv_path=None, handoff=HandoffSpec()))
    decode = Running(replace(spec, disk_kv_path=None, handoff=HandoffSpec(receives=True)))
    assert prefill.shard.kv_endpoint() is None
    start, stop, address, host = decode.shard.kv_endpoint() or (0, 0, "", b"")
    fence = Fence(bytes(16), 1, 1, 1, bytes(32))
    tokens = list(range(3, 36))
    admit = RowAdmit(0, tokens, 33, 0, [0, 1, 2], RowSampling())
    expected = prefill.shard.step(StepPlan(0, admits=[admit], computes=[(0, 33)])).tokens[0][1]
    decode.shard.transfer(HandoffJob(1, HandoffOp.OPEN, fence, [5, 3], sources=[(start, stop)]))
    assert decode.results.get(timeout=10) == TransferResult(1)
    decode.shard.transfer(HandoffJob(2, HandoffOp.FILL, fence))
    ends = [KvEndpoint((start, stop), address, host)]
    prefill.shard.transfer(HandoffJob(1, HandoffOp.PUSH, fence, [0, 1], destinations=ends, timeout_s=10.0))
    pushed, filled = prefill.results.get(timeout=10), decode.results.get(timeout=10)
    assert (pushed.error, filled.error, filled.id) == ("", "", 2) and pushed.num_bytes == filled.num_bytes > 0
    admit = RowAdmit(0, tokens, 33, 32, [5, 3, 0], RowSampling())
    assert decode.shard.step(StepPlan(0, admits=[admit], computes=[(0, 1)])).tokens == [(0, expected)]
    assert decode.transfer(Op.SAVE, Tier.HOST, [5, 3]) == []
    for running in (prefill, decode):
        running.shard.close()
        running.shard.close()


def test_a_port_that_must_not_be_opened_is_refused(spec: ShardSpec) -> None:
    with pytest.raises(InvalidValueError, match=r"^host='192\.0\.2\.1': must be a loopback address"):
        Running(replace(spec, handoff=HandoffSpec(True, "192.0.2.1")))
