"""The collectives: the same bits on every rank, whatever the transport, and no waiting for the dead."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.cuda._utils import _get_device_index

from headwise.workers.collectives import (
    CollectiveMismatchError,
    Collectives,
    Rendezvous,
    RendezvousError,
    Solo,
    connect,
    open_rendezvous,
    spin,
)
from headwise.workers.collectives.shared_memory import SLOT_BYTES, SharedMemory
from headwise.workers.collectives.spin import CONTROL_BYTES
from headwise.workers.collectives.torch_distributed import TorchDistributed
from headwise.workers.errors import InvalidValueError, PeerDiedError
from tests.effort import examples, thorough
from tests.workers.processes import FORKED

DEADLINE_S = 30
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8)


# --- ranks as threads of this process, and as processes of their own


def in_threads(world_size: int, act: Callable[[Collectives], Any], kind: str = "shared_memory") -> list[Any]:
    """What ``act`` returned on each rank; a rank's error is returned in its place."""
    rendezvous = open_rendezvous(kind, world_size)

    def rank_thread(rank: int) -> Any:
        at = rendezvous if rank == 0 else rendezvous.publish()
        group = connect(at, rank, world_size, DEADLINE_S)
        try:
            return act(group)
        except Exception as error:
            return error
        finally:
            group.close()

    with ThreadPoolExecutor(world_size) as pool:
        waiting = [pool.submit(rank_thread, rank) for rank in range(world_size)]
        return [future.result(DEADLINE_S) for future in waiting]


class RankProcess:
    """One rank in its own process."""

    def __init__(self, act: Callable[..., Any], kind: str, rank: int, world_size: int) -> None:
        self.pipe, theirs = FORKED.Pipe()
        self.process = FORKED.Process(target=_rank_main, args=(theirs, act, kind, rank, world_size), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        assert self.pipe.poll(DEADLINE_S), "a rank did not answer in time"
        return self.pipe.recv()


def _rank_main(pipe: Connection, act: Callable[..., Any], kind: str, rank: int, world_size: int) -> None:
    rendezvous: Rendezvous | dict[str, Any]
    if rank == 0:
        rendezvous = open_rendezvous(kind, world_size)
        pipe.send(rendezvous.publish())
    else:
        rendezvous = pipe.recv()
    group = connect(rendezvous, rank, world_size, DEADLINE_S)
    pipe.send("connected")
    try:
        result = act(group)
    except BaseException as error:
        result = (type(error).__name__, getattr(error, "rank", None), str(error), time.monotonic())
    pipe.send(result)
    pipe.recv()  # no rank leaves before the test has every answer
    group.close()


@pytest.fixture
def processes() -> Iterator[Callable[..., list[RankProcess]]]:
    started: list[RankProcess] = []

    def start(world_size: int, act: Callable[..., Any], kind: str = "shared_memory") -> list[RankProcess]:
        ranks = [RankProcess(act, kind, rank, world_size) for rank in range(world_size)]
        started.extend(ranks)
        published = ranks[0].receive()
        for rank in ranks[1:]:
            rank.pipe.send(published)
        assert [rank.receive() for rank in ranks] == ["connected"] * world_size
        assert not os.path.exists(published["address"])
        return ranks

    yield start
    for rank in started:
        if rank.process.is_alive():
            rank.pipe.send("leave")
    for rank in started:
        rank.process.join(5)
        rank.process.kill()
        rank.process.join(DEADLINE_S)
        rank.pipe.close()


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.randint(0, 60, shape, generator=generator).to(dtype)


def rank_order_sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].float() if parts[0].dtype in FLOATS else parts[0].clone()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).equal(b.contiguous().view(-1))


# --- values


def test_one_rank_keeps_its_tensors() -> None:
    group = connect(open_rendezvous("solo", 1), 0, 1)
    assert isinstance(group, Solo)
    x = torch.arange(6.0).view(2, 3)
    group.all_reduce_(x)
    group.broadcast_(x)
    assert same_bits(group.all_gather(x, [3]), torch.arange(6.0).view(2, 3))
    assert group.gather(x, [3]) is x
    with pytest.raises(InvalidValueError, match="sizes"):
        group.all_gather(x, [1, 2])


@examples(40)
@given(
    world_size=st.integers(1, 4),
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_all_reduce_is_the_rank_order_sum(world_size: int, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    parts = [random_tensor(shape, dtype, seed + rank) for rank in range(world_size)]

    def act(group: Collectives) -> Tensor:
        x = parts[group.rank].clone()
        group.all_reduce_(x)
        return x

    expected = rank_order_sum(parts)
    assert all(same_bits(x, expected) for x in in_threads(world_size, act))


@examples(40)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    lead=st.lists(st.integers(0, 5), max_size=2),
    dtype=st.sampled_from((*DTYPES, torch.bool)),
    seed=st.integers(0, 2**20),
)
def test_gathers_concatenate_by_rank(sizes: list[int], lead: list[int], dtype: torch.dtype, seed: int) -> None:
    parts = [random_tensor([*lead, size], dtype, seed + rank) for rank, size in enumerate(sizes)]
    expected = torch.cat(parts, dim=-1)

    def act(group: Collectives) -> tuple[Tensor, Tensor | None]:
        return group.all_gather(parts[group.rank], sizes), group.gather(parts[group.rank], sizes)

    everywhere, at_rank_0 = zip(*in_threads(len(sizes), act), strict=True)
    assert all(same_bits(x, expected) for x in everywhere)
    assert same_bits(at_rank_0[0], expected) and at_rank_0[1:] == (None,) * (len(sizes) - 1)


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_the_buffer(kind: str, dtype: torch.dtype) -> None:
    count = 2 * SLOT_BYTES // dtype.itemsize + 17
    parts = [random_tensor([count], dtype, rank) for rank in range(3)]
    sizes = [count, 0, 5]

    def act(group: Collectives) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        total, own = parts[group.rank].clone(), parts[group.rank][: sizes[group.rank]]
        group.all_reduce_(total)
        first = parts[group.rank].clone()
        group.broadcast_(first, source=2)
        return total, group.all_gather(own, sizes), group.gather(own, sizes), first

    expected = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    for rank, (total, gathered, at_rank_0, first) in enumerate(in_threads(3, act, kind)):
        assert same_bits(total, rank_order_sum(parts))
        assert same_bits(gathered, expected)
        assert at_rank_0 is None if rank else same_bits(at_rank_0, expected)
        assert same_bits(first, parts[2])


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_strided_tensors(kind: str) -> None:
    parts = [random_tensor([6, 10], torch.float32, rank) for rank in range(2)]

    def act(group: Collectives) -> tuple[Tensor, Tensor, Tensor]:
        own = parts[group.rank].clone()
        group.all_reduce_(own.t()[2:5])
        sent = parts[group.rank].clone()
        group.broadcast_(sent[:, ::2])
        return own, sent, group.all_gather(parts[group.rank].t(), [6, 6])

    for rank, (own, sent, gathered) in enumerate(in_threads(2, act, kind)):
        expected = parts[rank].clone()
        expected[:, 2:5] = parts[0][:, 2:5] + parts[1][:, 2:5]
        assert same_bits(own, expected)
        assert same_bits(sent[:, ::2], parts[0][:, ::2]) and same_bits(sent[:, 1::2], parts[rank][:, 1::2])
        assert same_bits(gathered, torch.cat([part.t() for part in parts], dim=-1))


def run_mixed_operations(group: Collectives, count: int) -> int:
    """Every rank knows what every other gives in, so each checks every result; returns the number of wrong ones."""
    choose = random.Random(11)
    wrong = 0
    for index in range(count):
        kind = choose.choice(["reduce", "reduce", "gather", "gather at rank 0", "broadcast", "barrier"])
        dtype = choose.choice(DTYPES)
        rows, width = choose.randint(1, 4), choose.choice([1, 8, 100, 576])
        parts = [random_tensor([rows, width + rank], dtype, index + rank) for rank in range(group.world_size)]
        if kind == "reduce":
            same_width = [part[:, :width].contiguous() for part in parts]
            x = same_width[group.rank].clone()
            group.all_reduce_(x)
            wrong += not same_bits(x, rank_order_sum(same_width))
        elif kind == "gather":
            x = group.all_gather(parts[group.rank], [part.shape[-1] for part in parts])
            wrong += not same_bits(x, torch.cat(parts, dim=-1))
        elif kind == "gather at rank 0":
            at_rank_0 = group.gather(parts[group.rank], [part.shape[-1] for part in parts])
            wrong += (at_rank_0 is None) != (group.rank != 0)
            wrong += at_rank_0 is not None and not same_bits(at_rank_0, torch.cat(parts, dim=-1))
        elif kind == "broadcast":
            source = choose.randrange(group.world_size)
            x = parts[source].clone() if group.rank == source else torch.zeros_like(parts[source])
            group.broadcast_(x, source)
            wrong += not same_bits(x, parts[source])
        else:
            group.barrier()
    return wrong


def mix_3000(group: Collectives) -> int:
    return run_mixed_operations(group, 3000)


def mix_60(group: Collectives) -> int:
    return run_mixed_operations(group, 60)


@pytest.mark.parametrize("world_size", [2, thorough(4)])
def test_thousands_of_mixed_operations_between_processes(world_size: int, processes: Any) -> None:
    assert [rank.receive() for rank in processes(world_size, mix_3000)] == [0] * world_size


@pytest.mark.parametrize("world_size", [2, thorough(3)])
def test_gloo_between_processes(world_size: int, processes: Any) -> None:
    assert [rank.receive() for rank in processes(world_size, mix_60, "gloo")] == [0] * world_size


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_two_groups_in_one_process(kind: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(in_threads, 2, lambda group: run_mixed_operations(group, 40), kind) for _ in range(2)]
        assert [future.result(DEADLINE_S) for future in both] == [[0, 0], [0, 0]]


# --- peers that go


def reduce_for_ever(group: Collectives) -> None:
    while True:
        group.all_reduce_(torch.ones(8))


def last_rank_stays_out(group: Collectives) -> None:
    if group.rank == group.world_size - 1:
        threading.Event().wait()
    reduce_for_ever(group)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (reduce_for_ever, "shared_memory"),
        (last_rank_stays_out, "gloo"),
        thorough(reduce_for_ever, "gloo"),
        thorough(last_rank_stays_out, "shared_memory"),
    ],
)
def test_a_killed_peer_is_noticed(kind: str, act: Callable[..., None], processes: Any) -> None:
    ranks = processes(3, act, kind)
    killed = time.monotonic()
    os.kill(ranks[2].process.pid, signal.SIGKILL)
    for rank in ranks[:2]:
        error, blamed, message, at = rank.receive()
        assert (error, blamed) == ("PeerDiedError", 2), message
        assert at - killed < 2


def test_gloo_notices_the_death_of_the_rank_that_holds_the_store(processes: Any) -> None:
    ranks = processes(2, reduce_for_ever, "gloo")
    killed = time.monotonic()
    os.kill(ranks[0].process.pid, signal.SIGKILL)
    error, blamed, _, at = ranks[1].receive()
    assert (error, blamed) == ("PeerDiedError", 0)
    assert at - killed < 2


def wait_for_a_zombie(path: str) -> tuple[int, float]:
    child = os.fork()
    if child == 0:
        connect(Rendezvous("shared_memory", 2, path), 1, 2, DEADLINE_S)
        signal.pause()
    group = connect(Rendezvous("shared_memory", 2, path), 0, 2, DEADLINE_S)
    os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    try:
        group.barrier()
    except PeerDiedError as error:
        return error.rank, time.monotonic() - start
    finally:
        os.waitpid(child, 0)
    return -1, 0.0


def test_a_killed_peer_that_nobody_has_reaped_is_dead() -> None:
    rendezvous = open_rendezvous("shared_memory", 2)
    with FORKED.Pool(1) as pool:
        blamed, waited = pool.apply_async(wait_for_a_zombie, (rendezvous.address,)).get(DEADLINE_S)
    assert blamed == 1
    assert waited < 2


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_abort_reaches_every_waiting_rank(kind: str) -> None:
    def act(group: Collectives) -> float:
        group.barrier()
        if group.rank == 1:
            group.abort("ran out of memory")
            threading.Event().wait(0.01)
        start = time.monotonic()
        with pytest.raises(PeerDiedError, match="rank 1 of this group gave up: ran out of memory"):
            group.barrier()
        return time.monotonic() - start

    assert all(waited < 2 for waited in in_threads(3, act, kind))


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_abort_from_another_thread_ends_this_ranks_own_wait(kind: str) -> None:
    def act(group: Collectives) -> float:
        start = time.monotonic()
        if group.rank == 0:
            timer = threading.Timer(0.2, group.abort, ("told to",))
            timer.start()
            with pytest.raises(PeerDiedError, match="rank 0 of this group gave up: told to"):
                group.barrier()
            timer.join()
            left.set()
        else:
            left.wait(DEADLINE_S)
        return time.monotonic() - start

    left = threading.Event()
    assert all(waited < 2 for waited in in_threads(2, act, kind))


def test_a_peer_that_closes_is_not_waited_for() -> None:
    def act(group: Collectives) -> None:
        group.barrier()
        if group.rank == 0:
            group.close()
        group.barrier()

    mine, theirs = in_threads(2, act)
    assert isinstance(mine, PeerDiedError) and "was closed" in str(mine)
    assert isinstance(theirs, PeerDiedError) and theirs.rank == 0 and "closed its end" in str(theirs)


def test_different_operations_are_refused() -> None:
    def act(group: Collectives) -> None:
        group.all_reduce_(torch.zeros(3 + group.rank))

    errors = in_threads(2, act)
    assert any(isinstance(error, CollectiveMismatchError) for error in errors)
    assert all(isinstance(error, CollectiveMismatchError | PeerDiedError) for error in errors)
    assert any("12 bytes" in str(error) and "16 bytes" in str(error) for error in errors)


def rank_0_is_interrupted(group: Collectives) -> None:
    group.barrier()
    if group.rank == 0:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    last_rank_stays_out(group)


def test_an_interrupt_ends_a_wait_and_the_peers(processes: Any) -> None:
    ranks = processes(3, rank_0_is_interrupted)
    assert ranks[0].receive()[0] == "KeyboardInterrupt"
    error, blamed, message, _ = ranks[1].receive()
    assert (error, blamed) == ("PeerDiedError", 0) and "KeyboardInterrupt" in message
    os.kill(ranks[2].process.pid, signal.SIGKILL)


# --- how a group forms


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_missing_ranks_are_named(kind: str) -> None:
    rendezvous = open_rendezvous(kind, 3)
    with pytest.raises(RendezvousError, match=r"ranks \[1, 2\] of 3 did not"):
        connect(rendezvous, 0, 3, timeout_s=0.2)
    if kind == "shared_memory":
        with pytest.raises(RendezvousError, match="cannot open"):
            connect(rendezvous.publish(), 1, 3, timeout_s=0.2)
    assert not os.path.exists(rendezvous.address)


def test_a_rank_attaches_once() -> None:
    rendezvous = open_rendezvous("shared_memory", 2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(connect, rendezvous, 0, 2, DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        with open(rendezvous.address, "rb") as file:
            while not any(os.pread(file.fileno(), CONTROL_BYTES, 0)):
                assert time.monotonic() < deadline
        with pytest.raises(InvalidValueError, match="rank=0"):
            connect(rendezvous.publish(), 0, 2, 0.2)
        second = connect(rendezvous.publish(), 1, 2, DEADLINE_S)
        first.result(DEADLINE_S).close()
        second.close()
    assert not os.path.exists(rendezvous.address)


def test_the_file_is_private_and_an_unused_one_can_be_removed() -> None:
    rendezvous = open_rendezvous("shared_memory", 2)
    assert os.stat(rendezvous.address).st_mode & 0o777 == 0o600
    rendezvous.close()
    rendezvous.close()
    assert not os.path.exists(rendezvous.address)


@pytest.mark.parametrize(
    ("kind", "world_size", "field"), [("mpi", 2, "kind"), ("solo", 2, "world_size"), ("gloo", 0, "world_size")]
)
def test_bad_rendezvous(kind: str, world_size: int, field: str) -> None:
    with pytest.raises(InvalidValueError, match=field):
        open_rendezvous(kind, world_size)


def test_bad_ranks_and_hosts() -> None:
    rendezvous = open_rendezvous("solo", 1)
    with pytest.raises(InvalidValueError, match="rank=1"):
        connect(rendezvous, 1, 1)
    with pytest.raises(InvalidValueError, match="world_size=2"):
        connect(rendezvous, 0, 2)
    with pytest.raises(InvalidValueError, match="host"):
        open_rendezvous("gloo", 2, host="192.0.2.1")


def test_a_closed_group_gives_back_memory_and_descriptors() -> None:
    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum("headwise-" in line for line in maps)

    for kind in ("shared_memory", "gloo"):
        in_threads(2, lambda group: group.barrier(), kind)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    rounds = 10
    for _ in range(rounds):
        in_threads(2, lambda group: group.barrier())
    gc.collect()
    assert mappings() == 0
    # A group that kept one would add one each round; one alone is another library's, which opens it when it likes.
    assert len(os.listdir("/proc/self/fd")) < before + rounds


class FakeNccl:
    """Stands for torch's NCCL group: says what it is asked for, and does nothing."""

    class Options:
        pass

    def __init__(self, store: Any, rank: int, world_size: int, options: Options) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., FakeNccl]:
        def call(*arguments: Any) -> FakeNccl:
            self.calls.append((name, arguments))
            return self

        return call


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which thread has chosen which GPU."""
    made: list[tuple[str, int]] = []

    def choose(device: torch.device) -> None:
        made.append((threading.current_thread().name, _get_device_index(device)))  # an error without an index

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr(TorchDistributed, "barrier", lambda self: None)
    return made


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_nccl_is_told_which_gpu(chosen: list[tuple[str, int]], device: str, index: int) -> None:
    connect(open_rendezvous("nccl", 1), 0, 1, 10.0, device).close()
    assert chosen == [("MainThread", index), ("headwise-nccl", index)]


def test_a_sum_of_nccl_is_one_call(chosen: list[tuple[str, int]]) -> None:
    group = connect(open_rendezvous("nccl", 1), 0, 1, 10.0, "cuda")
    assert isinstance(group, TorchDistributed)
    nccl = group._group
    x = torch.ones(3, 4)
    group.all_reduce_(x)
    assert [name for name, _ in nccl.calls] == ["allreduce", "wait"] and nccl.calls[0][1][0][0] is x
    nccl.calls.clear()
    group.all_reduce_(x.T)
    assert [name for name, _ in nccl.calls] == ["allreduce", "wait"]
    group.close()


def test_ranks_that_nccl_does_not_connect_are_not_waited_for(
    chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch waits without a limit while NCCL connects."""
    connected = threading.Event()
    monkeypatch.setattr(TorchDistributed, "barrier", lambda self: connected.wait(DEADLINE_S))
    start = time.monotonic()
    with pytest.raises(RendezvousError, match=r"NCCL did not connect rank 0 of 1 with the others within 0\.2 s"):
        connect(open_rendezvous("nccl", 1), 0, 1, 0.2, "cuda")
    assert time.monotonic() - start < 5
    connected.set()
    for thread in threading.enumerate():
        if thread.name == "headwise-nccl":
            thread.join(DEADLINE_S)


def test_why_nccl_did_not_connect_is_told(chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TorchDistributed) -> None:
        raise RuntimeError("unhandled cuda error")

    monkeypatch.setattr(TorchDistributed, "barrier", fail)
    with pytest.raises(RendezvousError, match="rank 0 of 1 found no nccl peers: unhandled cuda error"):
        connect(open_rendezvous("nccl", 1), 0, 1, 10.0, "cuda")


def test_why_a_rank_gave_up_can_be_read_once_its_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a core that writes in another order: what is written before a release is there before it."""
    rendezvous, written = open_rendezvous("shared_memory", 1), []
    peers = connect(rendezvous, 0, 1)
    assert isinstance(peers, SharedMemory)
    write_word = spin.write_word

    def record(address: int, value: int) -> None:
        length = peers._get(0, spin.CAUSE_BYTES)
        written.append((address - peers._address, bytes(peers._controls[0, spin.CAUSE : spin.CAUSE + length])))
        write_word(address, value)

    monkeypatch.setattr(spin, "write_word", record)
    peers.abort("no disk")
    assert written == [(spin.CAUSE_BYTES, b""), (spin.STATUS, b"no disk")]
    peers.close()


def test_a_rank_that_attaches_this_moment_is_watched_under_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous = open_rendezvous("shared_memory", 1)
    peers = connect(rendezvous, 0, 1)
    assert isinstance(peers, SharedMemory)
    looked: list[int] = []

    def attach_meanwhile(rank: int, offset: int) -> int:
        """The other rank attaches after the first look at it."""
        looked.append(offset)
        return {spin.PID: os.getppid(), spin.STATUS: 1}[offset] if len(looked) > 1 else 0

    monkeypatch.setattr(peers, "_get", attach_meanwhile)
    peers._watch_peers()
    assert looked == [spin.STATUS] and peers._watched == {}
    peers._watch_peers()
    assert list(peers._watched) == [0]
    peers.close()


def test_every_rank_blames_the_one_that_died_while_the_group_started() -> None:
    """Rank 2 attaches and dies, rank 0 notices, rank 1 comes after that, and rank 3 is still to come."""
    rendezvous = open_rendezvous("shared_memory", 4)
    gone = subprocess.Popen(["true"])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped: others can see both
    with open(rendezvous.address, "r+b", buffering=0) as file:
        for offset, word in ((spin.PID, gone.pid), (spin.STATUS, 1)):
            os.pwrite(file.fileno(), word.to_bytes(8, "little"), 2 * CONTROL_BYTES + offset)
    again = Rendezvous("shared_memory", 4, f"{rendezvous.address}-again")
    os.link(rendezvous.address, again.address)
    for rank, met in enumerate((rendezvous, again)):
        with pytest.raises(PeerDiedError) as death:
            connect(met, rank, 4, DEADLINE_S)
        assert death.value.rank == 2
    gone.wait(DEADLINE_S)
