"""What a GPU's mover does with blocks: every bit arrives, in the order that streams and events promise."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.workers.collectives import Solo
from headwise.workers.cuda import kv_copy, kv_copy_kernels
from headwise.workers.cuda.kv_copy import BlockMover
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.copier import Copier
from headwise.workers.kv.format import BITS, KvFormat
from headwise.workers.kv.handoff import HandoffOp, Range
from headwise.workers.kv.store import HostStore
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult
from headwise.workers.plan import RowAdmit, RowSampling, StepPlan
from headwise.workers.shard import Shard
from tests.checkpoints import small_spec
from tests.effort import examples
from tests.workers.cuda.fake_gpu import FakeGpu, fake_gpu
from tests.workers.cuda.late_gpu import LateGpu
from tests.workers.kv.handoff_ranks import cut_chunks, fence_of, groups, ok
from tests.workers.kv.kv_blocks import key_of

__all__ = ["fake_gpu"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
RECORDS = tuple(KvFormat(kind, kind) for kind in BITS)
NUM_BLOCKS, NUM_LAYERS, NUM_HEADS = 7, 3, 4
DEADLINE_S = 60.0


class Pair:
    """A cache with a mover, and a plain one with the same random bits, of whose moves nobody doubts.

    Attributes:
        collected: the event that the mover finds.
    """

    def __init__(self, gpu: FakeGpu, kept: torch.dtype | KvFormat = torch.bfloat16, block_size: int = 4) -> None:
        sizes = (NUM_LAYERS, NUM_BLOCKS, NUM_HEADS, block_size, 8)
        format, dtype = (kept, torch.float32) if isinstance(kept, KvFormat) else (None, kept)
        self.cache, self.plain = (KVCache(*sizes, dtype, format=format) for _ in range(2))
        for ours, plain in zip(memory(self.cache), memory(self.plain), strict=True):
            ours.copy_(torch.randint(-128, 128, ours.shape, dtype=torch.int8))
            plain.copy_(ours)
        self.gpu, self.collected = gpu, None
        self.cache.mover = BlockMover(self.cache, gpu, lambda: self.collected)
        self.gpu.log.clear()

    def blocks(self, count: int) -> Tensor:
        """Room for so many, of random bits."""
        shape = (count, *self.cache.block_shape)
        bits = torch.randint(-128, 128, (*shape[:-1], shape[-1] * self.cache.dtype.itemsize), dtype=torch.int8)
        return bits.view(self.cache.dtype)

    def assert_alike(self) -> None:
        for ours, plain in zip(memory(self.cache), memory(self.plain), strict=True):
            assert torch.equal(ours, plain)


def memory(cache: KVCache) -> list[Tensor]:
    return [x.view(-1).view(torch.int8) for x in (cache.keys, cache.values)]


def alike(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int8), y.view(torch.int8))


@st.composite
def a_range(draw: st.DrawFn, length: int) -> Range:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@examples(15)
@given(
    kept=st.sampled_from(DTYPES + RECORDS),
    block_size=st.sampled_from([1, 3, 16]),
    read=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=9),
    written=st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True),
    heads=a_range(NUM_HEADS),
    layers=a_range(NUM_LAYERS),
)
def test_ranges_move_as_on_a_cpu(
    kept: torch.dtype | KvFormat, block_size: int, read: list[int], written: list[int], heads: Range, layers: Range
) -> None:
    pair = Pair(LateGpu(), kept, block_size)
    sizes = heads[1] - heads[0], layers[1] - layers[0]
    found, expected = (bytearray(pair.cache.range_bytes(len(read), *sizes)) for _ in range(2))
    pair.cache.read_range(read, heads, layers, found)
    pair.plain.read_range(read, heads, layers, expected)
    assert found == expected
    data = np.random.default_rng(0).bytes(pair.cache.range_bytes(len(written), *sizes))
    for cache in (pair.cache, pair.plain):
        cache.write_range(written, heads, layers, data)
    pair.assert_alike()


@pytest.mark.parametrize("pinned", [False, True], ids=["unpinned", "pinned"])
@pytest.mark.parametrize("kept", DTYPES + RECORDS, ids=str)
def test_blocks_move_in_pieces_as_on_a_cpu(
    kept: torch.dtype | KvFormat, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_copy, "STAGING_BYTES", 1)  # room for one block in a lane
    pair = Pair(LateGpu(), kept)
    assert pair.cache.blocks_at_once == 8
    blocks, out, expected = [6, 2, 3, 0, 5], pair.blocks(5), pair.blocks(5)
    if pinned:
        pair.gpu.pin(out)
    pair.cache.read_blocks(blocks, out)
    pair.plain.read_blocks(blocks, expected)
    assert alike(out, expected)
    for cache in (pair.cache, pair.plain):
        cache.write_blocks(blocks[::-1], out)
    pair.assert_alike()


def test_keys_and_values_of_different_sizes_are_refused() -> None:
    cache = KVCache(1, 2, 1, 4, 8, torch.float32, format=KvFormat("int8", "int4"))
    with pytest.raises(InvalidValueError, match=r"^kv_dtype='int8/int4'"):
        BlockMover(cache, LateGpu(), lambda: None)


class Step:
    """A step that adds one to everything a cache holds in a block."""

    def __init__(self, pair: Pair, gpu: LateGpu, block: int) -> None:
        self.done, self._pair, self._block = False, pair, block
        gpu.steps.work.append(self)
        self.event = gpu.new_event()
        self.event.record(gpu.steps)

    def __call__(self) -> None:
        self.done = True
        for x in (self._pair.cache.keys, self._pair.cache.values):
            x[:, self._block].view(torch.int16).add_(1)


def test_a_copy_comes_after_the_last_collected_step_and_waits_for_none_after_it() -> None:
    gpu = LateGpu()
    pair = Pair(gpu)
    collected, in_flight = Step(pair, gpu, 2), Step(pair, gpu, 3)
    pair.collected = collected.event
    out, before = pair.blocks(1), pair.blocks(1)
    pair.plain.read_blocks([2], before)
    for move in (pair.cache.read_blocks, pair.cache.write_blocks):
        move([2], out)
        assert collected.done and not in_flight.done
    assert torch.equal(out.view(torch.int16), before.view(torch.int16) + 1)
    waits = [what for what in gpu.log if what[0] == "wait"]
    streams = {stream for _, (stream, _) in waits}
    assert len(waits) == 4 and {event for _, (_, event) in waits} == {collected.event.name}
    assert "steps" not in streams and len(streams) == 2


def test_before_the_first_step_a_copy_comes_after_the_cache_was_made() -> None:
    gpu = LateGpu()
    made = []
    gpu.steps.work.append(lambda: made.append(True))
    Pair(gpu)
    assert made == [True]


@pytest.mark.parametrize("pinned", [False, True], ids=["unpinned", "pinned"])
def test_the_host_waits_for_copies_alone(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_copy, "STAGING_BYTES", 1)
    pair = Pair(LateGpu())
    out = pair.blocks(3)
    if pinned:
        pair.gpu.pin(out)
        pair.gpu.log.clear()
    block = pair.cache.range_bytes(1, NUM_HEADS, NUM_LAYERS)
    pair.cache.read_blocks([4, 1, 0], out)
    lanes = [stream for what, stream in pair.gpu.log if what == "kernel"]
    first, second = lanes[0][1], lanes[1][1]
    assert lanes == [("gather", first), ("gather", second), ("gather", first)] and first != second
    copies = [what for name, what in pair.gpu.log if name == "copy" and what[1] == block]
    assert copies == [(stream, block, "pinned") for stream in (first, second, first)]
    # The second block is on its way before the host waits for the first.
    order = [what for what, _ in pair.gpu.log if what in ("kernel", "sync event")]
    assert order == ["kernel", "kernel", "sync event", "kernel", "sync event", "sync event"]
    events = dict(about for what, about in pair.gpu.log if what == "record")
    assert all(what == "sync event" and events[event] != "steps" for what, event in pair.gpu.syncs)
    pair.gpu.log.clear()
    pair.cache.write_blocks([4, 1, 0], out)
    order = [what for what, about in pair.gpu.log if what in ("kernel", "sync event")]
    assert order == ["kernel", "kernel", "sync event", "kernel", "sync event", "sync event"]
    assert all(what == "sync event" for what, _ in pair.gpu.syncs)


def test_kernels_that_are_wrong_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kv_copy.launch
    for wrong in (kv_copy_kernels.gather, kv_copy_kernels.scatter):

        def launch(kernel: Any, *arguments: Any, wrong: Any = wrong) -> None:
            if kernel is not wrong:
                real(kernel, *arguments)

        monkeypatch.setattr(kv_copy, "launch", launch)
        with pytest.raises(InvalidValueError, match=r"^device='cpu'.*kernels"):
            Pair(FakeGpu())
    monkeypatch.setattr(kv_copy, "launch", real)
    Pair(FakeGpu()).assert_alike()


def test_memory_is_page_locked_once() -> None:
    gpu = FakeGpu()
    pair = Pair(gpu)
    store = HostStore(4, pair.cache.block_shape, pair.cache.dtype, gpu)
    assert [what for what in gpu.log if what[0] in ("pin", "pinned")] == [("pin", store.nbytes)]
    store.put([b"a", b"b"], lambda slots: pair.cache.read_blocks([1, 2], slots))
    held = [store.get(digest) for digest in (b"a", b"b")]
    assert all(one is not None and gpu.is_pinned(one) for one in held)
    assert len([what for what in gpu.log if what[0] in ("pin", "pinned")]) == 1
    store.close()
    store.close()
    assert [what for what in gpu.log if what[0] == "unpin"] == [("unpin", store.nbytes)]


def test_without_page_locked_memory_copies_are_right_and_a_warning_tells(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: FakeGpu, memory: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FakeGpu, "pinned", refuse)
    monkeypatch.setattr(FakeGpu, "pin", refuse)
    pair = Pair(LateGpu())
    assert len(caplog.records) == 1 and "page-locked" in caplog.text and "out of memory" in caplog.text
    store = HostStore(2, pair.cache.block_shape, pair.cache.dtype, pair.gpu)
    assert len(caplog.records) == 2 and f"{store.nbytes} bytes" in caplog.records[1].message
    expected = pair.blocks(2)
    pair.plain.read_blocks([5, 3], expected)
    store.put([b"a", b"b"], lambda slots: pair.cache.read_blocks([5, 3], slots))
    for digest, block in ((b"a", expected[0]), (b"b", expected[1])):
        held = store.get(digest)
        assert held is not None and alike(held, block)
    store.close()


def test_after_an_error_nothing_is_under_way_and_the_next_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a block could be written after it has got another owner."""
    monkeypatch.setattr(kv_copy, "STAGING_BYTES", 1)
    pair, real = Pair(LateGpu()), kv_copy.launch
    launches = []

    def launch(*arguments: Any) -> None:
        launches.append(1)
        if len(launches) == 2:
            raise RuntimeError("no such kernel")
        real(*arguments)

    for move in (pair.cache.write_blocks, pair.cache.read_blocks):
        launches.clear()
        monkeypatch.setattr(kv_copy, "launch", launch)
        data = pair.blocks(3)
        with pytest.raises(RuntimeError, match="no such kernel"):
            move([0, 1, 2], data)
        assert pair.gpu.log[-1][0] == "sync event"
        before = pair.blocks(NUM_BLOCKS)
        monkeypatch.setattr(kv_copy, "launch", real)
        pair.cache.read_blocks(range(NUM_BLOCKS), before)
        pair.plain.read_blocks(range(NUM_BLOCKS), (expected := pair.blocks(NUM_BLOCKS)))
        if move == pair.cache.write_blocks:
            expected[0] = data[0]
        assert alike(before[1:], expected[1:])


def test_threads_do_not_mix_their_blocks() -> None:
    pair = Pair(FakeGpu())
    expected = pair.blocks(NUM_BLOCKS)
    pair.plain.read_blocks(range(NUM_BLOCKS), expected)
    wrong: list[int] = []

    def read(block: int) -> None:
        out = pair.blocks(1)
        for _ in range(5):
            pair.cache.read_blocks([block], out)
            if not alike(out, expected[block : block + 1]):
                wrong.append(block)

    threads = [threading.Thread(target=read, args=(block,)) for block in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_job_of_the_host_tier_moves_its_blocks_together_and_fails_one_by_one() -> None:
    pair = Pair(LateGpu())
    store = HostStore(4, pair.cache.block_shape, pair.cache.dtype, pair.gpu)
    results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
    copier = Copier(pair.cache, store, None, results.put, lambda error: None)
    keys = [key_of(number) for number in range(5)]

    def run(op: Op, keys: list[BlockKey], blocks: list[int]) -> tuple[list[bytes], list[str]]:
        """The digests that failed, and what the GPU was given."""
        pair.gpu.log.clear()
        copier.submit(TransferJob(0, op, Tier.HOST, keys, blocks))
        failed = results.get(timeout=DEADLINE_S).failed
        return failed, [about[0] for what, about in pair.gpu.log if what == "kernel"]

    assert run(Op.SAVE, keys[:4], [6, 1, 4, 0]) == ([], ["gather"])
    assert run(Op.SAVE, keys, [6, 1, 4, 0, 2]) == ([key.digest for key in keys], [])  # no room for all of them
    assert run(Op.SAVE, keys[:3], [6, 1, 4]) == ([], ["gather"])
    assert run(Op.LOAD, [keys[2], keys[4], keys[0]], [3, 5, 2]) == ([keys[4].digest], ["scatter"])
    pair.plain.read_blocks([4, 6], (moved := pair.blocks(2)))
    pair.plain.write_blocks([3, 2], moved)
    pair.assert_alike()
    assert run(Op.LOAD, keys[4:], [5]) == ([keys[4].digest], [])
    assert copier.close()
    store.close()


@pytest.mark.parametrize("shared_memory", [False, True])
def test_a_handoff_moves_ranges_of_heads_between_gpus(shared_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two ranks to one, in messages of several blocks each."""
    real, alone = kv_copy.launch, threading.Lock()

    def launch(*arguments: Any) -> None:
        with alone:  # the interpreter runs one kernel at a time
            real(*arguments)

    monkeypatch.setattr(kv_copy, "launch", launch)
    cut_chunks(monkeypatch, 3000)
    with groups((9, 3), (2, 1), shared_memory) as (prefill, decode):
        for rank in (*prefill.ranks, *decode.ranks):
            rank.cache.mover = BlockMover(rank.cache, FakeGpu(), lambda: None)
        fence, blocks, places = fence_of(), [7, 0, 3, 11, 4], [1, 10, 2, 6, 5]
        others = [block for block in range(12) if block not in places]
        assert ok(decode.run(HandoffOp.OPEN, fence, blocks=places, sources=prefill.heads))
        filled = decode.begin(HandoffOp.FILL, fence)
        ends = {"destinations": decode.endpoints, "timeout_s": DEADLINE_S}
        assert ok(prefill.run(HandoffOp.PUSH, fence, blocks=blocks, **ends)) and ok(filled())
        content = decode.ranks[0].content()
        assert torch.equal(content[places], prefill.content[blocks])
        assert torch.equal(content[others], decode.content[others])


@pytest.mark.parametrize("tier", [None, *Tier])
def test_a_shard_has_a_mover_if_blocks_ever_move(
    checkpoint: Callable[..., Path], tmp_path: Path, fake_gpu: FakeGpu, tier: Tier | None
) -> None:
    tiers = {Tier.HOST: {"host_kv_blocks": 2}, Tier.DISK: {"disk_kv_path": str(tmp_path / "kv")}}
    spec = small_spec(checkpoint("gqa"), attention="reference", **(tiers[tier] if tier is not None else {}))
    results: queue.SimpleQueue[TransferResult] = queue.SimpleQueue()
    shard = Shard(spec, Solo(), 1, results.put)
    shard.load()
    shard.allocate(8)
    cache = shard._kv_cache
    assert cache is not None and (cache.mover is not None) == (tier is not None)
    admit = RowAdmit(0, list(range(3, 36)), 33, 0, [0, 1, 2], RowSampling())
    shard.step(StepPlan(0, admits=[admit], computes=[(0, 33)]))
    if tier is not None:
        for op, block in ((Op.SAVE, 1), (Op.LOAD, 5)):
            shard.transfer(TransferJob(0, op, tier, [key_of(0)], [block]))
            assert results.get(timeout=DEADLINE_S).failed == []
        assert cache.keys[:, 1].any() and torch.equal(cache.keys[:, 5], cache.keys[:, 1])
    mover = weakref.ref(cache.mover) if cache.mover is not None else lambda: None
    del cache
    shard.close()
    assert mover() is None
    pins = [what for what, _ in fake_gpu.log if what in ("pin", "unpin")]
    assert pins == (["pin", "unpin"] if tier == Tier.HOST else [])


def test_what_a_late_gpu_was_not_waited_for_is_not_there() -> None:
    gpu = LateGpu()
    source, target = torch.ones(4), torch.zeros(4)
    stream, event = gpu.new_stream(), gpu.new_event()
    with gpu.use(stream):
        target.copy_(source, non_blocking=True)
        source.fill_(2)
        event.record()
    assert not target.any()
    event.synchronize()
    assert torch.equal(target, source)
