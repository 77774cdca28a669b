"""Collectives between CPU ranks on one host, over a file in shared memory."""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwise.workers import failpoints
from headwise.workers.collectives import spin
from headwise.workers.collectives.base import (
    CollectiveMismatchError,
    Collectives,
    RendezvousError,
    sum_in_rank_order,
)
from headwise.workers.errors import InvalidValueError, PeerDiedError
from headwise.workers.failpoints import Point
from headwise.workers.leftovers import SharedMemoryFile, shared_memory_folder
from headwise.workers.machine import usable_cores

SLOT_BYTES = 256 << 10
"""What a rank shows at once; a larger tensor goes in pieces. Two slots of either parity stay in a core's cache."""

_ABSENT, _ATTACHED, _ABORTED, _CLOSED = 0, 1, 2, 3
_NAMES = ("barrier", "all_reduce_", "all_gather", "broadcast_", "gather")
_BARRIER, _ALL_REDUCE, _ALL_GATHER, _BROADCAST, _GATHER = range(5)


def create_file(world_size: int) -> SharedMemoryFile:
    """Make the shared file of a group.

    Raises:
        RendezvousError: the folder does not have the space.
    """
    needed = file_bytes(world_size)
    try:
        return SharedMemoryFile(needed)
    except OSError as error:
        folder = shared_memory_folder()
        raise RendezvousError(f"{folder} has no room for {needed} bytes of {world_size} ranks: {error}") from error


def file_bytes(world_size: int) -> int:
    """Of the shared file of a group."""
    return world_size * (spin.CONTROL_BYTES + 2 * SLOT_BYTES)


class SharedMemory(Collectives):
    """Ranks that are processes, or threads of one, on one host; see spin.py for the protocol.

    A wait looks at the flag for about a microsecond, then yields the core between looks, then naps. Every 50 ms it
    looks whether the ranks it waits for still live: a killed process is noticed also while it is a zombie. Of threads
    of one process only :meth:`abort` tells.

    Args:
        path: of the file from :func:`create_file`. It is removed as soon as every rank is attached.
        timeout_s: how long to wait for the other ranks.

    Raises:
        RendezvousError: not all ranks came in time; names the missing.
        InvalidValueError: the rank is there already.
        PeerDiedError: one that was there died meanwhile.
    """

    def __init__(self, path: str, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        memory = np.frombuffer(_map_file(path, world_size), np.uint8)
        self._address: int = memory.ctypes.data
        self._controls = memory[: world_size * spin.CONTROL_BYTES].reshape(world_size, spin.CONTROL_BYTES)
        slots = torch.from_numpy(memory[world_size * spin.CONTROL_BYTES :]).view(2, world_size, SLOT_BYTES)
        self._slots: list[list[Tensor]] = [list(parity) for parity in slots]
        self._sequence = 0
        self._spins = 2000 if world_size <= usable_cores() else 50
        self._gave_up: str | None = None
        self._closed = False
        self._deaths = select.poll()
        self._watched: dict[int, int] = {}
        if self._get(self.rank, spin.STATUS) != _ABSENT:
            raise InvalidValueError("rank", self.rank, "each rank attaches once, and this one has already")
        try:
            self._attach(time.monotonic() + timeout_s, timeout_s)
        except PeerDiedError as error:
            self._leave_to(error)
            self.close()
            raise
        except BaseException as error:
            self.abort(f"did not start: {str(error) or type(error).__name__}")
            self.close()
            raise
        finally:
            Path(path).unlink(missing_ok=True)

    def all_reduce_(self, x: Tensor) -> None:
        dense = _dense(x)
        num_bytes = dense.nbytes
        signature = _signature(_ALL_REDUCE, num_bytes)
        address = dense.data_ptr()
        if dense.dtype == torch.float32:
            for start in range(0, num_bytes, SLOT_BYTES):
                length = min(num_bytes - start, SLOT_BYTES)
                self._exchange(signature, address + start, length, length // 4)
        else:
            for piece in torch.split(dense.view(-1), SLOT_BYTES // dense.element_size()):
                self._exchange(signature, piece.data_ptr(), piece.nbytes)
                parts = [self._shown(rank, piece.nbytes, x.dtype) for rank in range(self.world_size)]
                sum_in_rank_order(parts, into=piece)
        if dense is not x:
            x.copy_(dense)

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return _side_by_side(self._show_all(x, sizes, _ALL_GATHER, look=True), x, sizes)

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        pieces = self._show_all(x, sizes, _GATHER, look=self.rank == 0)
        return _side_by_side(pieces, x, sizes) if self.rank == 0 else None

    def broadcast_(self, x: Tensor, source: int = 0) -> None:
        if not 0 <= source < self.world_size:
            raise InvalidValueError("source", source, f"a rank in [0, {self.world_size})")
        dense = _dense(x)
        signature = _signature(_BROADCAST, dense.nbytes, source)
        for piece in torch.split(dense.view(-1), SLOT_BYTES // dense.element_size()):
            self._exchange(signature, piece.data_ptr(), piece.nbytes if self.rank == source else 0)
            if self.rank != source:
                piece.copy_(self._shown(source, piece.nbytes, x.dtype))
        if dense is not x and self.rank != source:
            x.copy_(dense)

    def barrier(self) -> None:
        self._exchange(_signature(_BARRIER, 0), 0, 0)

    def abort(self, cause: str) -> None:
        if self._gave_up is None and not self._closed:
            self._gave_up = cause
            text = cause.encode()[: spin.CONTROL_BYTES - spin.CAUSE]
            self._controls[self.rank, spin.CAUSE : spin.CAUSE + len(text)] = np.frombuffer(text, np.uint8)
            self._set(spin.CAUSE_BYTES, len(text))
            self._set(spin.STATUS, _ABORTED)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._gave_up is None:
                self._set(spin.STATUS, _CLOSED)
            for descriptor in self._watched.values():
                self._deaths.unregister(descriptor)
                os.close(descriptor)
            self._watched.clear()
            # The mapping goes with the object, so that a thread still inside an operation finds it in place.

    def _show_all(self, x: Tensor, sizes: Sequence[int], operation: int, look: bool) -> list[list[Tensor]]:
        """Shows ``x`` to every rank; returns what each rank has shown, in pieces, if this one is to ``look``."""
        self._check_gather(x, sizes)
        dense = _dense(x)
        lengths = [prod(x.shape[:-1]) * size * x.element_size() for size in sizes]
        signature = _signature(operation, sum(lengths))
        in_pieces = max(lengths) > SLOT_BYTES
        pieces: list[list[Tensor]] = [[dense.new_empty(0)] for _ in sizes]
        for start in range(0, max(lengths), SLOT_BYTES):
            shown = [max(0, min(length - start, SLOT_BYTES)) for length in lengths]
            self._exchange(signature, dense.data_ptr() + start, shown[self.rank])
            for rank, length in enumerate(shown if look else []):
                piece = self._shown(rank, length, x.dtype)
                pieces[rank].append(piece.clone() if in_pieces else piece)
        return pieces

    def _exchange(self, signature: int, address: int, num_bytes: int, num_sums: int = 0) -> None:
        """Show ``num_bytes`` in this rank's slot and wait until every rank has shown its own."""
        self._check_open()
        try:
            if failpoints.ENABLED:
                failpoints.hit(Point.COLLECTIVE_ENTER, self.rank)
            self._sequence += 1
            operation = (self._sequence, signature, address, num_bytes, num_sums, self._spins)
            outcome = spin.step(self._address, self.rank, self.world_size, SLOT_BYTES, *operation, False)
            while outcome != spin.DONE:
                if outcome & 3 == spin.MISMATCH:
                    self._raise_mismatch(outcome >> 2, signature)
                self._check_open()
                self._check_peers()
                outcome = spin.step(self._address, self.rank, self.world_size, SLOT_BYTES, *operation, True)
            if failpoints.ENABLED:
                failpoints.hit(Point.COLLECTIVE_LEAVE, self.rank)
        except PeerDiedError as error:
            self._leave_to(error)
            raise
        except BaseException as error:
            self.abort(f"left an operation: {str(error) or type(error).__name__}")
            raise

    def _leave_to(self, error: PeerDiedError) -> None:
        """Gives up over a peer. The others are not told: they see for themselves which rank was the first to go."""
        self._gave_up = self._gave_up or f"lost rank {error.rank}"

    def _shown(self, rank: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
        """What a rank shows, as a flat view that is good until the next exchange."""
        shown: Tensor = self._slots[self._sequence & 1][rank][:num_bytes].view(dtype)
        return shown

    def _attach(self, deadline: float, timeout_s: float) -> None:
        self._set(spin.PID, os.getpid())
        self._set(spin.STATUS, _ATTACHED)
        while missing := [r for r in range(self.world_size) if self._get(r, spin.STATUS) == _ABSENT]:
            self._watch_peers()
            self._check_peers()
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"ranks {missing} of {self.world_size} did not attach within {timeout_s:g} s; "
                    "look at their logs, or allow more time"
                )
            time.sleep(0.001)
        self._watch_peers()

    def _watch_peers(self) -> None:
        for peer in range(self.world_size):
            if peer in self._watched or self._get(peer, spin.STATUS) == _ABSENT:
                continue
            pid = self._get(peer, spin.PID)  # after the status, before which it was written
            if pid == os.getpid():
                continue
            try:
                # Unlike kill(pid, 0), it tells a killed process that nobody has reaped yet from a living one.
                self._watched[peer] = os.pidfd_open(pid)
            except ProcessLookupError:
                raise PeerDiedError(peer, f"exited while the group started (pid {pid})") from None
            self._deaths.register(self._watched[peer], select.POLLIN)

    def _check_open(self) -> None:
        if self._closed:
            raise PeerDiedError(self.rank, "has left its group (it was closed)")
        if self._gave_up is not None:
            raise PeerDiedError(self.rank, f"gave up: {self._gave_up}")

    def _check_peers(self) -> None:
        """Raise if the group has lost a rank, also one that had come to this operation; the first cause goes first."""
        dead = {descriptor for descriptor, _ in self._deaths.poll(0)}
        peers = [(peer, self._get(peer, spin.STATUS)) for peer in range(self.world_size) if peer != self.rank]
        for peer, status in peers:
            if status == _ABORTED:
                length = self._get(peer, spin.CAUSE_BYTES)
                text = self._controls[peer, spin.CAUSE : spin.CAUSE + length].tobytes().decode(errors="replace")
                raise PeerDiedError(peer, f"gave up: {text}")
        for peer, status in peers:
            if status == _ATTACHED and self._watched.get(peer) in dead:
                raise PeerDiedError(peer, f"died (pid {self._get(peer, spin.PID)} is gone)")
        for peer, status in peers:
            # Read after the status: a peer that came to this operation before it closed has done its part.
            if status == _CLOSED and self._get(peer, spin.SEQUENCE) < self._sequence:
                raise PeerDiedError(peer, "closed its end")

    def _raise_mismatch(self, peer: int, signature: int) -> None:
        theirs = self._get(peer, spin.SIGNATURES + 8 * (self._sequence & 1))
        raise CollectiveMismatchError(
            f"rank {self.rank} called {_describe(signature)} where rank {peer} called {_describe(theirs)}; every "
            "rank must call the same operations in the same order"
        )

    def _get(self, rank: int, offset: int) -> int:
        return int(spin.read_word(self._address + rank * spin.CONTROL_BYTES + offset))

    def _set(self, offset: int, value: int) -> None:
        spin.write_word(self._address + self.rank * spin.CONTROL_BYTES + offset, value)


def _map_file(path: str, world_size: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise RendezvousError(
            f"cannot open {path} ({error.strerror}): the group has formed without this rank or given up, or the rank "
            "is on another host"
        ) from error
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid() or state.st_size != file_bytes(world_size):
            raise RendezvousError(f"{path} is not the file of a group of {world_size} ranks of this user")
        return mmap.mmap(descriptor, state.st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)


def _side_by_side(pieces: Sequence[Sequence[Tensor]], x: Tensor, sizes: Sequence[int]) -> Tensor:
    parts = [torch.cat(list(part)).view(*x.shape[:-1], size) for part, size in zip(pieces, sizes, strict=True)]
    return torch.cat(parts, dim=-1)


def _dense(x: Tensor) -> Tensor:
    if not x.is_cpu:
        raise InvalidValueError("x.device", str(x.device), "shared-memory collectives take CPU tensors", "use nccl")
    return x.contiguous()


def _signature(operation: int, num_bytes: int, source: int = 0) -> int:
    return (num_bytes << 19) + (source << 3) + operation


def _describe(signature: int) -> str:
    return f"{_NAMES[signature & 7]} of {signature >> 19} bytes"
