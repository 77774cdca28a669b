"""How the ranks of a group find each other: rank 0 opens a rendezvous, publishes it, and every rank connects."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import torch

from headwise.workers.collectives.base import Collectives, RendezvousError, Solo
from headwise.workers.errors import InvalidValueError

KINDS = ("solo", "shared_memory", "gloo", "nccl")


@dataclass(slots=True)
class Rendezvous:
    """Where the ranks of one group meet.

    Attributes:
        kind: one of KINDS.
        address: a path (shared_memory), or host:port (gloo, nccl).
        token: the group's name there, random.
        bound: what keeps the address open, in the process that opened it only.
    """

    kind: str
    world_size: int
    address: str = ""
    token: str = ""
    bound: Any = field(default=None, repr=False, compare=False)

    def publish(self) -> dict[str, str | int]:
        """What the other ranks need, of plain strings and integers."""
        return {"kind": self.kind, "world_size": self.world_size, "address": self.address, "token": self.token}

    def close(self) -> None:
        """Give the address up, where the group did not form; a formed group is not touched."""
        self.bound = None
        if self.kind == "shared_memory":
            with suppress(FileNotFoundError):
                os.unlink(self.address)


def open_rendezvous(kind: str, world_size: int, host: str = "127.0.0.1") -> Rendezvous:
    """Bind the rendezvous of a new group; called on rank 0, which passes the object itself to :func:`connect`.

    Args:
        kind: "solo" (one rank), "shared_memory" (CPU ranks of one host), "gloo" (CPU ranks), "nccl" (CUDA ranks).
        host: the address of this machine that the others reach; gloo and nccl bind a free port of it.

    Raises:
        InvalidValueError: an unknown kind, or a world size that it does not take.
        RendezvousError: shared memory has no room.
    """
    if kind not in KINDS:
        raise InvalidValueError("kind", kind, f"one of {', '.join(KINDS)}")
    if world_size < 1 or (kind == "solo" and world_size != 1):
        raise InvalidValueError("world_size", world_size, "1 for solo, 1 or more for the other kinds")
    if kind == "solo":
        return Rendezvous(kind, 1)
    if kind == "shared_memory":
        from headwise.workers.collectives.shared_memory import create_file

        file = create_file(world_size)
        return Rendezvous(kind, world_size, file.path, bound=file)
    from headwise.workers.collectives.torch_distributed import bind_store

    try:
        store = bind_store(world_size, host)
    except OSError as error:
        raise InvalidValueError("host", host, f"an address of this machine ({error})") from error
    return Rendezvous(kind, world_size, f"{host}:{store.port}", token_hex(8), store)


def connect(
    rendezvous: Rendezvous | dict[str, Any],
    rank: int,
    world_size: int,
    timeout_s: float = 60.0,
    device: torch.device | str = "cpu",
) -> Collectives:
    """Join the group; every rank calls it, and it returns once all of them are there.

    Args:
        rendezvous: the object on rank 0, what it published on the others.
        device: the rank's own; used by nccl.

    Raises:
        RendezvousError: the ranks did not all come within ``timeout_s``; names the missing.
        InvalidValueError: the rank or world size is not of this rendezvous.
        PeerDiedError: a rank died meanwhile.
    """
    at = rendezvous if isinstance(rendezvous, Rendezvous) else Rendezvous(**rendezvous)
    if world_size != at.world_size:
        raise InvalidValueError("world_size", world_size, f"the rendezvous is for {at.world_size} ranks")
    if not 0 <= rank < world_size:
        raise InvalidValueError("rank", rank, f"0 to {world_size - 1}")
    if at.kind == "solo":
        return Solo()
    # Only who uses a transport pays for its import.
    if at.kind == "shared_memory":
        from headwise.workers.collectives.shared_memory import SharedMemory

        return SharedMemory(at.address, rank, world_size, timeout_s)
    from headwise.workers.collectives.torch_distributed import TorchDistributed, connect_store

    host, _, port = at.address.rpartition(":")
    try:
        store = at.bound or connect_store(host, int(port), timeout_s)
    except RuntimeError as error:
        raise RendezvousError(f"rank {rank} cannot reach rank 0 at {at.address}: {error}") from error
    return TorchDistributed(at.kind, store, at.token, rank, world_size, timeout_s, torch.device(device))
