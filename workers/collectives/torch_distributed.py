"""Collectives over Gloo (CPU ranks on several hosts) or NCCL (CUDA ranks), through torch's process groups."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GatherOptions, PrefixStore, Store, TCPStore

from headwise.workers.collectives.base import Collectives, RendezvousError, sum_in_rank_order
from headwise.workers.errors import InvalidValueError, PeerDiedError

_SLICE = timedelta(milliseconds=100)
_LOOKS_EVERY_S = 0.5
_BLAMES_WITHIN_S = 1.0


def bind_store(world_size: int, host: str) -> TCPStore:
    """Rank 0's key-value store, listening on a free port of ``host`` alone."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    # The store takes the descriptor over; without one it would listen on every interface.
    return TCPStore(host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


class TorchDistributed(Collectives):
    """A process group of its own, apart from torch's default group: several may live in one process.

    On Gloo, sums gather every rank's tensor and add them in rank order: a library's own all-reduce sums in an order
    that depends on the ranks, the size and the network, and this one gives the bits of every other transport between
    CPUs. For two ranks it moves as much as a ring does; for n, (n - 1) / 2 times that. On NCCL a sum is its own
    all-reduce, one call, and has its bits: another size, network or release of NCCL may sum in another order.

    A killed peer closes its connections, which Gloo notices at once; who it was is found out by asking the others, so
    that with more than two ranks one that is busy for over a second may be named in its place. NCCL does not notice:
    there whoever sees the death calls :meth:`abort` on the others.

    Neither transport is authenticated or encrypted: keep it on a network that only the group's hosts share.

    Args:
        backend: "gloo" or "nccl".
        store: that of rank 0, or a connection to it.
        prefix: the group's name in the store.
        device: the rank's own; NCCL wants one CUDA device a rank. ``cuda`` is the first that the process sees.

    Raises:
        RendezvousError: not all ranks came in time, or could not connect in as much time again, or torch is built
            without the backend.
    """

    def __init__(
        self,
        backend: str,
        store: TCPStore,
        prefix: str,
        rank: int,
        world_size: int,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        # With an index, which torch.cuda.set_device asks for: the first GPU that this process sees, if none is given.
        self._device = torch.device("cuda", device.index or 0) if backend == "nccl" else torch.device("cpu")
        self._store: Store = PrefixStore(prefix, store)
        self._gave_up: str | None = None
        self._pending = False
        self._closed = False
        missing = self._await_keys("here", timeout_s)
        if missing:
            raise RendezvousError(
                f"ranks {missing} of {world_size} did not come to {store.host}:{store.port} within {timeout_s:g} s; "
                "look at their logs and at the firewall, or allow more time"
            )
        self._group: Any = None
        try:
            if backend == "nccl":
                torch.cuda.set_device(self._device)  # of this thread
                self._form_in_time(partial(self._form, backend, store.host), timeout_s)
            else:
                self._form(backend, store.host)
        except (AttributeError, RuntimeError, PeerDiedError) as error:
            raise RendezvousError(f"rank {rank} of {world_size} found no {backend} peers: {error}") from error

    def all_reduce_(self, x: Tensor) -> None:
        dense = x.contiguous()
        if self._device.type == "cuda":
            self._run(lambda: self._group.allreduce([dense]))
            if dense is not x:
                x.copy_(dense)
            return
        parts = self._gather_bytes(dense.view(-1).view(torch.uint8))
        sum_in_rank_order([part.view(x.dtype).view(x.shape) for part in parts], into=x)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return _side_by_side(self._gather_bytes(self._padded(x, sizes)), x, sizes)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        own = self._padded(x, sizes)
        parts = [torch.empty_like(own) for _ in sizes] if self.rank == 0 else []
        options = GatherOptions()
        options.rootRank = 0
        self._run(lambda: self._group.gather([parts] if parts else [], [own], options))
        return _side_by_side(parts, x, sizes) if parts else None

    def broadcast_(self, x: Tensor, source: int = 0) -> None:
        if not 0 <= source < self.world_size:
            raise InvalidValueError("source", source, f"a rank in [0, {self.world_size})")
        dense = x.contiguous()
        self._run(lambda: self._group.broadcast(dense.view(-1).view(torch.uint8), source))
        if dense is not x:
            x.copy_(dense)

    def barrier(self) -> None:
        self._gather_bytes(torch.zeros(1, dtype=torch.uint8, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def abort(self, cause: str) -> None:
        if self._gave_up is None and not self._closed:
            self._tell(cause)
            self._group.abort()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._drop_group()

    def _form(self, backend: str, host: str) -> None:
        # NCCL waits in the store for rank 0, and meanwhile a connection is of no use to others.
        own: Any = self._store  # torch's type hints lack clone()
        store = own.clone() if backend == "nccl" else own
        self._group = _make_group(backend, host, store, self.rank, self.world_size, self._device)
        self.barrier()  # NCCL connects in the first operation

    def _form_in_time(self, form: Callable[[], None], timeout_s: float) -> None:
        """Runs ``form`` on a thread that can be left behind: the timeout of torch's NCCL group is one of operations,
        and while NCCL connects, torch waits for it without a limit. (NCCL's way to connect without blocking would have
        one; torch has turned it off since it hung with NCCL 2.26, pytorch#153960.)

        Raises:
            RendezvousError: it takes longer.
            PeerDiedError: another rank has given up meanwhile.
        """
        formed: Future[None] = Future()

        def run() -> None:
            try:
                form()
                formed.set_result(None)
            except BaseException as error:
                formed.set_exception(error)

        threading.Thread(target=run, name="headwise-nccl", daemon=True).start()
        deadline = time.monotonic() + timeout_s
        while not wait([formed], _LOOKS_EVERY_S).done:
            self._check_aborts()
            if time.monotonic() > deadline:
                self._tell(f"NCCL did not connect the ranks within {timeout_s:g} s")
                raise RendezvousError(
                    f"NCCL did not connect rank {self.rank} of {self.world_size} with the others within {timeout_s:g} "
                    "s; NCCL_DEBUG=INFO says what it waits for, NCCL_SOCKET_IFNAME which network it uses; or allow "
                    "more time"
                )
        formed.result()

    def _padded(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The bytes of ``x``, as many as of the rank that has most: both libraries want as many from each."""
        self._check_gather(x, sizes)
        padded = x.new_zeros((prod(x.shape[:-1]) * max(sizes),))
        padded[: x.numel()] = x.reshape(-1)
        return padded.view(torch.uint8)

    def _gather_bytes(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        self._run(lambda: self._group.allgather([parts], [own]))
        return parts

    def _run(self, start: Callable[[], Any]) -> None:
        self._check_open()
        try:
            work = start()
            self._pending = True
            if self._device.type == "cuda":
                work.wait()  # orders the stream after it; the host does not wait
            else:
                self._await_work(work)
            self._pending = False
        except RuntimeError as error:
            self._raise_death(error)

    def _await_work(self, work: Any) -> None:
        """Wait in slices: Gloo's own abort does not wake a waiting thread, here or on a peer."""
        look_at = time.monotonic() + _LOOKS_EVERY_S
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            self._check_open()
            if time.monotonic() > look_at:
                self._check_aborts()
                look_at = time.monotonic() + _LOOKS_EVERY_S

    def _tell(self, cause: str) -> None:
        self._gave_up = cause
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0; the others see that
            self._store.set(f"gave up/{self.rank}", cause)

    def _check_open(self) -> None:
        if self._closed:
            raise PeerDiedError(self.rank, "has left its group (it was closed)")
        if self._gave_up is not None:
            raise PeerDiedError(self.rank, f"gave up: {self._gave_up}")

    def _check_aborts(self) -> None:
        for peer in range(self.world_size):
            if peer != self.rank and self._store.check([f"gave up/{peer}"]):
                cause = self._store.get(f"gave up/{peer}").decode(errors="replace")
                self._gave_up = f"rank {peer} gave up"
                raise PeerDiedError(peer, f"gave up: {cause}")

    def _raise_death(self, error: RuntimeError) -> None:
        """Find out which rank is gone: the one that does not answer, while this one's leaving wakes the others."""
        self._drop_group()
        try:
            self._check_aborts()
            missing = self._await_keys("lost a peer", _BLAMES_WITHIN_S)
        except RuntimeError:
            missing = [0]  # it held the store
        self._gave_up = "lost a peer"
        suspect = missing[0] if missing else (self.rank + 1) % self.world_size
        raise PeerDiedError(suspect, f"died or cannot be reached: {str(error).splitlines()[0]}") from error

    def _await_keys(self, name: str, timeout_s: float) -> list[int]:
        """Say ``name`` for this rank, wait until every rank has; returns those that have not in time."""
        deadline = time.monotonic() + timeout_s
        self._store.set(f"{name}/{self.rank}", "")
        missing = list(range(self.world_size))
        while missing := [peer for peer in missing if not self._store.check([f"{name}/{peer}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return missing

    def _drop_group(self) -> None:
        """Close the connections, which the group's destructor does once what is under way has failed or ended."""
        group, self._group = self._group, None
        if self._pending and group is not None:
            doomed = [group]
            del group
            threading.Thread(target=doomed.clear, daemon=True).start()


def _side_by_side(parts: Sequence[Tensor], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """What ranks with tensors like ``x`` have padded, along the last dimension."""
    lead, pairs = x.shape[:-1], zip(parts, sizes, strict=True)
    return torch.cat([part.view(x.dtype)[: prod(lead) * size].view(*lead, size) for part, size in pairs], dim=-1)


def _make_group(backend: str, host: str, store: Store, rank: int, world_size: int, device: torch.device) -> Any:
    # Not in every build of torch, nor in its type hints.
    c10d: Any = torch.distributed
    if backend == "nccl":
        torch.cuda.set_device(device)  # of this thread; operations may be those of another
        return c10d.ProcessGroupNCCL(store, rank, world_size, c10d.ProcessGroupNCCL.Options())
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=_own_address(host))]
    options._threads = 1
    return c10d.ProcessGroupGloo(store, rank, world_size, options)


def _own_address(host: str) -> str:
    """The address of the interface by which this machine reaches ``host``; sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
