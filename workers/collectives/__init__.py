"""Collectives between the ranks of a tensor-parallel group: alone, over shared memory, over Gloo or NCCL."""

from headwise.workers.collectives.base import CollectiveMismatchError, Collectives, RendezvousError, Solo
from headwise.workers.collectives.rendezvous import Rendezvous, connect, open_rendezvous

__all__ = [
    "CollectiveMismatchError",
    "Collectives",
    "Rendezvous",
    "RendezvousError",
    "Solo",
    "connect",
    "open_rendezvous",
]
