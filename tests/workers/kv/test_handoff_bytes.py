"""What is handed over is what was computed, between groups of any two sizes, and nothing else changes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headwise.workers.kv.format import kv_format
from headwise.workers.kv.handoff import HandoffOp
from tests.effort import thorough
from tests.workers.kv.handoff_ranks import Group, cut_chunks, fence_of, groups, ok

MODELS = [(9, 3), (4, 1), (8, 8)]
FEW = {((9, 3), 1, 2, False), ((9, 3), 3, 2, True), ((4, 1), 4, 2, False), ((8, 8), 3, 4, True)}
CELLS = [
    (heads, source, target, shared)
    if (heads, source, target, shared) in FEW
    else thorough(heads, source, target, shared)
    for heads in MODELS
    for source in range(1, 5)
    for target in range(1, 5)
    for shared in (False, True)
]


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few blocks are several messages, and for a rank with many heads a block is more than one."""
    cut_chunks(monkeypatch, 3000)


@pytest.mark.parametrize(("heads", "source", "target", "shared_memory"), CELLS)
def test_every_byte_arrives_where_it_belongs(
    heads: tuple[int, int], source: int, target: int, shared_memory: bool, small_messages: None
) -> None:
    chance = random.Random(repr((heads, source, target)))
    layouts = chance.random() < 0.5, chance.random() < 0.5
    with groups(heads, (source, target), shared_memory, transposed=layouts) as (prefill, decode):
        blocks, places = (chance.sample(range(12), 8) for _ in range(2))
        fence, untouched = fence_of(), [rank.content() for rank in decode.ranks]
        assert ok(decode.run(HandoffOp.OPEN, fence, blocks=places, sources=prefill.heads))
        filled = decode.begin(HandoffOp.FILL, fence)
        cut = chance.randint(1, 7)  # as chunked prefill does
        ends = {"destinations": decode.endpoints, "timeout_s": 20.0}
        pushes = [
            prefill.begin(HandoffOp.PUSH, fence, blocks=blocks[start:stop], first=start, **ends)
            for start, stop in ((0, cut), (cut, 8))
        ]
        sent = [result for push in pushes for result in push()]
        received = filled()
        assert ok(sent) and ok(received)
        assert sum(result.num_bytes for result in sent) == sum(result.num_bytes for result in received)
        assert [result.num_bytes for result in received] == [8 * rank.cache.nbytes // 12 for rank in decode.ranks]
        expected = dict(hashes(prefill.content[blocks], 0))
        for rank, before in zip(decode.ranks, untouched, strict=True):
            after = rank.content()
            assert all(expected[key] == value for key, value in hashes(after[places], rank.heads[0]))
            others = [block for block in range(12) if block not in places]
            assert torch.equal(after[others], before[others])


def hashes(kv_NL2KSD: Tensor, first_head: int) -> Iterator[tuple[tuple[int, int, int, int], bytes]]:
    """By (block, layer, K or V, head of the model)."""
    for block, layer, part, head in torch.cartesian_prod(*map(torch.arange, kv_NL2KSD.shape[:4])).tolist():
        bits = kv_NL2KSD[block, layer, part, head].contiguous().view(torch.int8).numpy()
        yield (block, layer, part, head + first_head), hashlib.sha256(bits).digest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_dtype_travels(dtype: torch.dtype) -> None:
    with groups(dtype=dtype) as (prefill, decode):
        hand_over(prefill, decode, [3, 4], [5, 0])
        assert torch.equal(decode.ranks[0].content()[[5, 0]], prefill.content[[3, 4]])


@pytest.mark.parametrize("name", ["int8", "int4", "int4/int8"])
@pytest.mark.parametrize("sizes", [(1, 2), (3, 2), (2, 1)])
def test_records_travel_whole(name: str, sizes: tuple[int, int], small_messages: None) -> None:
    form = {"format": kv_format(name, 64), "head_dim": 64}
    with groups(tp=sizes, transposed=(False, True), **form) as (prefill, decode):
        before = [rank.content() for rank in decode.ranks]
        hand_over(prefill, decode, [3, 4, 9], [5, 0, 2])
        sent = {}
        for rank in prefill.ranks:
            sent |= {head: rank.numbers()[:, :, :, at] for at, head in enumerate(range(*rank.heads))}
        for rank, held in zip(decode.ranks, before, strict=True):
            for at, head in enumerate(range(*rank.heads)):
                assert torch.equal(rank.numbers()[[5, 0, 2], :, :, at], sent[head][[3, 4, 9]])
            others = [block for block in range(12) if block not in (5, 0, 2)]
            assert torch.equal(rank.content()[others], held[others])


def test_many_transfers_at_once_keep_apart(small_messages: None) -> None:
    with groups((9, 3), (2, 3)) as (prefill, decode):
        fences = [fence_of(number) for number in range(4)]
        for number, fence in enumerate(fences):
            places = list(range(3 * number, 3 * number + 3))
            assert ok(decode.run(HandoffOp.OPEN, fence, blocks=places, sources=prefill.heads))
        fills = [decode.begin(HandoffOp.FILL, fence) for fence in fences]
        ends = {"destinations": decode.endpoints, "timeout_s": 20.0}
        tables = [[number, 11 - number, number + 5] for number in range(4)]
        pushes = [
            prefill.begin(HandoffOp.PUSH, fence, blocks=table, **ends)
            for fence, table in zip(fences, tables, strict=True)
        ]
        assert all(ok(wait()) for wait in (*pushes, *fills))
        for rank in decode.ranks:
            expected = prefill.content[[block for table in tables for block in table]][:, :, :, slice(*rank.heads)]
            assert torch.equal(rank.content(), expected)


def test_a_transfer_of_nothing_is_filled_at_once() -> None:
    with groups((9, 3), (2, 2)) as (prefill, decode):
        hand_over(prefill, decode, [], [])


def hand_over(prefill: Group, decode: Group, blocks: list[int], places: list[int]) -> None:
    fence = fence_of()
    assert ok(decode.run(HandoffOp.OPEN, fence, blocks=places, sources=prefill.heads))
    filled = decode.begin(HandoffOp.FILL, fence)
    assert ok(prefill.run(HandoffOp.PUSH, fence, blocks=blocks, destinations=decode.endpoints, timeout_s=20.0))
    assert ok(filled()) and ok(decode.run(HandoffOp.CLOSE, fence))
