"""A handoff meets every fault in every state: its request is slower then, or one clear error, and never different."""

from __future__ import annotations

import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from headwise.cluster.group import ShardGroupDied
from headwise.runtime import LLM, SamplingParams
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.request import seat_of
from headwise.runtime.handoff.service import HandoffService
from headwise.runtime.output import FinishReason
from headwise.workers.kv.fences import FenceStream
from tests.effort import thorough
from tests.runtime.handoff.conftest import DEADLINE_S, wait_until
from tests.runtime.handoff.failpoints import STATES, Failpoint, stopped_at
from tests.runtime.handoff.faults import (
    HARMLESS,
    KILLING,
    Cell,
    Outcome,
    Wire,
    calls_are_cancelled,
    client_cancels,
    decode_group_dies,
    flipped,
    lease_runs_out,
    logits_are_not_finite,
    prefill_group_dies,
    prefill_is_full,
    prefill_is_restarted,
    prompt,
    rubbish,
)
from tests.runtime.handoff.sides import Sides, caches, content, handoff_ranks

LEASE_S = 1.0
TABLE: dict[tuple[str, str], str] = {}
"""What came of each state and fault."""


def cells(faults: tuple[Callable[[Cell], None], ...]) -> list[Any]:
    """Every state with every fault; ``make test`` takes each fault once."""
    return [
        (state, fault) if (row + column) % len(STATES) == 3 else thorough(state, fault)
        for row, fault in enumerate(faults)
        for column, state in enumerate(STATES)
    ]


class Alone:
    """What an engine without handoffs gives, computed once."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._known = llm, dict[tuple[int, ...], list[int]]()

    def __call__(self, ids: list[int]) -> list[int]:
        if tuple(ids) not in self._known:
            [output] = self._llm.generate([ids], PARAMS)
            self._known[tuple(ids)] = output.outputs[0].token_ids
        return self._known[tuple(ids)]


PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(checkpoint: Callable[..., Path]) -> Iterator[Alone]:
    with LLM(checkpoint("uneven"), executor="local", kv_memory="16MiB", max_model_len=256, quiet=True) as llm:
        yield Alone(llm)


@contextmanager
def two_sides(model: Path, **settings: Any) -> Iterator[tuple[Sides, Wire]]:
    before = left_over()
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        prefill = {"tensor_parallel_size": 2, "max_num_batched_tokens": 32, "num_blocks": 48}
        sides = Sides(
            patch,
            model,
            **{"prefill": prefill, "tensor_parallel_size": 2, "num_blocks": 32, "lease_s": LEASE_S}
            | {"shared_memory": False}
            | settings,
        )
        try:
            yield sides, wire
        finally:
            sides.close()
    wait_until(lambda: not left_over() - before)


@pytest.fixture(scope="module")
def shared(checkpoint: Callable[..., Path]) -> Iterator[tuple[Sides, Wire]]:
    with two_sides(checkpoint("uneven")) as both:
        yield both


def left_over() -> Counter[str]:
    """Threads of ours by name, and sockets of this process."""
    sockets = psutil.Process().net_connections("all")
    names = (thread.name for thread in threading.enumerate())
    return Counter(
        [
            *(name for name in names if name.startswith("headwise")),
            *(f"socket {one.laddr} {one.raddr}" for one in sockets),
        ]
    )


def ask(sides: Sides, ids: list[int], name: str) -> Outcome:
    tokens: list[int] = []
    last = None
    for last in sides.llm.stream(ids, PARAMS, request_id=name):
        tokens += last.token_ids
    assert last is not None
    return Outcome(tokens, last.finish_reason, last.error)


@pytest.fixture(scope="module", autouse=True)
def print_table() -> Iterator[None]:
    """For whoever asks for it with ``-s``: by fault and state, what became of the handoff."""
    yield
    print("\n| fault | " + " | ".join(STATES) + " |\n" + "|---" * (len(STATES) + 1) + "|")
    for fault in (*HARMLESS, *KILLING):
        cells = [TABLE.get((state, fault.__name__), "-") for state in STATES]
        print(f"| {fault.__name__.replace('_', ' ')} | " + " | ".join(cells) + " |")


def run_cell(sides: Sides, wire: Wire, state: str, fault: Callable[[Cell], None], alone: Alone) -> Outcome | None:
    """Runs a cell of the table; returns what came of the request, None if decode died."""
    seed = zlib.crc32(f"{state} {fault.__name__}".encode())
    more: list[tuple[list[int], Future[Outcome]]] = []
    with ThreadPoolExecutor(8) as threads, pytest.MonkeyPatch.context() as patch:
        for name in ("answer", "_wait"):
            patch.setattr(HandoffService, name, getattr(HandoffService, name))  # and puts it back
        if not wire.seen:
            ask(sides, prompt(seed + 1), "before")
        wait_until(lambda: sides.inbound.peers[0].session)

        def others(ids: list[int]) -> Future[Outcome]:
            more.append((ids, threads.submit(ask, sides, ids, f"other {len(more)}")))
            return more[-1][1]

        with stopped_at(sides, state) as point:
            outcome = threads.submit(ask, sides, prompt(seed), "stopped")
            assert point.reached.wait(DEADLINE_S), f"no handoff comes to {state}"
            fault(Cell(sides, point, state, outcome, others, wire))
        if fault is decode_group_dies:
            with pytest.raises(ShardGroupDied):
                outcome.result(DEADLINE_S)
            return None
        for ids, other in more:
            assert other.result(DEADLINE_S).tokens == alone(ids)
        found = outcome.result(DEADLINE_S)
        if fault is client_cancels:
            assert found.reason is FinishReason.ABORT and alone(prompt(seed))[: len(found.tokens)] == found.tokens
        elif found.error is None:
            assert found.tokens == alone(prompt(seed))
        else:
            assert found.reason is FinishReason.ERROR and not found.tokens
        return found


def fallbacks(sides: Sides) -> dict[str, int]:
    """By cause, and those that were cancelled."""
    stats = sides.inbound.stats()
    return stats["causes"] | {"cancelled": stats["cancelled"]}


def record(state: str, fault: Callable[[Cell], None], sides: Sides, before: dict[str, int]) -> str:
    after = fallbacks(sides)
    causes = [name for name in after if after[name] > before[name]]
    TABLE[state, fault.__name__] = ", ".join(causes) or "committed"
    return TABLE[state, fault.__name__]


@pytest.mark.parametrize(("state", "fault"), cells(HARMLESS), ids=lambda value: getattr(value, "__name__", value))
def test_every_fault_in_every_state(
    shared: tuple[Sides, Wire], alone: Alone, state: str, fault: Callable[[Cell], None]
) -> None:
    sides, wire = shared
    group, before = sides.prefill_group, fallbacks(sides)
    limit = sides.outbound._transfers.limit
    try:
        found = run_cell(sides, wire, state, fault, alone)
    finally:
        sides.outbound._transfers.limit, wire.damage = limit, None
        group.__dict__.pop("collect", None)
        sides.inbound.peers[0].__dict__.pop("_renewable", None)
    assert found is not None and found.error is None
    sides.settle()
    record(state, fault, sides, before)


@pytest.mark.parametrize(("state", "fault"), cells(KILLING), ids=lambda value: getattr(value, "__name__", value))
def test_every_death_in_every_state(
    checkpoint: Callable[..., Path], alone: Alone, state: str, fault: Callable[[Cell], None]
) -> None:
    with two_sides(checkpoint("uneven")) as (sides, wire):
        before = fallbacks(sides)
        found = run_cell(sides, wire, state, fault, alone)
        TABLE[state, fault.__name__] = "one error"
        if found is not None:
            assert found.error is None
            record(state, fault, sides, before)
        sides.settle(decode=fault is not decode_group_dies, prefill=fault is not prefill_group_dies)
        if fault is prefill_is_restarted:  # the new one is of use
            wait_until(lambda: (now := sides.inbound.peers[0].session) and now.epoch == sides.outbound._epoch)
            committed = sides.inbound.stats()["committed"]
            assert ask(sides, prompt(77), "after").tokens == alone(prompt(77))
            assert sides.inbound.stats()["committed"] == committed + 1


HITS = [
    (flipped, "computing", "transport"),
    (prefill_is_full, "opening", "refused"),
    (rubbish, "asking", "peer"),
    (calls_are_cancelled, "asking", "unreachable"),
    (logits_are_not_finite, "between pushes", "(peer|transport)"),  # prefill says so, and ends its pushes
    (lease_runs_out, "filled", "lease"),
]


def test_where_a_handoff_must_not_fail_its_request_has_one_clear_error(
    checkpoint: Callable[..., Path], alone: Alone
) -> None:
    with two_sides(checkpoint("uneven"), on_handoff_failure="fail") as (sides, wire):
        for fault, state, cause in HITS:
            limit, group = sides.outbound._transfers.limit, sides.prefill_group
            found = run_cell(sides, wire, state, fault, alone)
            sides.outbound._transfers.limit = limit
            group.__dict__.pop("collect", None)
            sides.inbound.peers[0].__dict__.pop("_renewable", None)
            assert found is not None and found.error is not None
            assert re.search(f"computed by 127.0.0.1:{sides.port}: {cause}: .", found.error)
            sides.settle()
        wait_until(lambda: sides.inbound.peers[0].session)
        assert ask(sides, prompt(5), "after").tokens == alone(prompt(5))
        sides.settle()


@pytest.mark.parametrize("where", ["at the sender", "at the receiver"])
def test_what_is_late_does_not_touch_the_next_owner_of_the_blocks(
    checkpoint: Callable[..., Path], alone: Alone, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message is on its way while its handoff is cancelled, and every block of decode gets another owner."""
    with two_sides(checkpoint("uneven"), num_blocks=16) as (sides, _):
        point, receive = Failpoint(), FenceStream.receive

        def late(stream: FenceStream, message: bytes) -> None:
            if not point.reached.is_set():
                point.wait()
            receive(stream, message)

        with ThreadPoolExecutor(2) as threads, ExitStack() as undo:
            if where == "at the receiver":
                monkeypatch.setattr(FenceStream, "receive", late)
                undo.callback(point.release)
            else:
                point = undo.enter_context(stopped_at(sides, "pushing"))
            outcome = threads.submit(ask, sides, prompt(1), "stopped")
            assert point.reached.wait(DEADLINE_S)
            sides.llm.abort("stopped")
            assert outcome.result(DEADLINE_S).reason is FinishReason.ABORT
            wait_until(lambda: not sides.inbound.busy)
            monkeypatch.setattr(sides.inbound, "choose", lambda *arguments: None)
            owner = prompt(2, 240)
            assert ask(sides, owner, "owner").tokens == alone(owner)
            before, blocks = sides.decode_kv(owner), sides.llm.stats()["prefix_cache"]["cached_blocks"]
            assert blocks >= 15
            memory = [content(cache, range(16)) for _, cache in caches(sides.decode_group)]
            point.release()
            wait_until(lambda: not any(len(rank._pusher._pushes) for rank in handoff_ranks(sides.prefill_group)))
        sides.settle()
        assert sides.decode_kv(owner) == before
        for was, (_, cache) in zip(memory, caches(sides.decode_group), strict=True):
            assert torch.equal(was, content(cache, range(16)))


def test_keys_and_values_that_are_not_finite_are_never_read_at_decode(
    checkpoint: Callable[..., Path], alone: Alone
) -> None:
    """Those of a block that prefill pushes become what is no number, as by a fault of its memory."""
    with two_sides(checkpoint("uneven")) as (sides, _), ThreadPoolExecutor(1) as threads:
        ids = prompt(3)
        with stopped_at(sides, "between pushes") as point:
            outcome = threads.submit(ask, sides, ids, "stopped")
            assert point.reached.wait(DEADLINE_S)

            def poison(engine: Engine) -> None:
                [request] = [live.request for live in engine._live.values()]
                seat = seat_of(request)
                for _, cache in caches(sides.prefill_group):
                    size = cache.range_bytes(1, cache.num_kv_heads, 2)
                    nan = torch.full((size // 4,), float("nan")).numpy().tobytes()
                    cache.write_range(seat.block_ids[:1], (0, cache.num_kv_heads), (0, 2), nan)

            sides.prefill.loop.run(poison)
        assert outcome.result(DEADLINE_S).tokens == alone(ids)
        assert fallbacks(sides)["peer"] == 1
        sides.settle()
        assert not sides.prefill_kv(ids)
