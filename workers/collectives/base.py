"""What the ranks of one tensor-parallel group do together, and how they find each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headwise.workers.errors import HeadwiseError, InvalidValueError


class RendezvousError(HeadwiseError, TimeoutError):
    """The ranks of a group did not all find each other in time."""


class CollectiveMismatchError(HeadwiseError):
    """Two ranks called different operations, or the same one on tensors of different sizes."""


class Collectives(ABC):
    """The operations that every rank of a group calls together.

    Contract: every rank calls the same operations in the same order with matching shapes and dtypes, from one thread
    at a time. An operation returns on a rank as soon as that rank has its result; only :meth:`barrier` says that the
    others have come so far. On CPUs sums are taken in rank order, ((x0 + x1) + x2) + ..., so that they have the same
    bits on every rank, in every run and over every transport; on GPUs their bits are those of NCCL's all-reduce. After
    an operation raised, or after :meth:`abort`, the object is only good for :meth:`close`.

    Every operation raises:
        PeerDiedError: a rank died, aborted or closed before it came to this operation.
        CollectiveMismatchError: a rank called something else; where the transport can see it.
    """

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce_(self, x: Tensor) -> None:
        """Replace ``x`` on every rank by the sum over ranks; any shape.

        On CPUs float16 and bfloat16 are summed in float32 and rounded once, every other dtype in its own.
        """

    @abstractmethod
    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every rank's ``x`` side by side: ``[..., sizes[rank]]`` to ``[..., sum(sizes)]``, by rank; any dtype.

        Raises:
            InvalidValueError: ``sizes`` does not have a size a rank, or ``x`` not this rank's.
        """

    @abstractmethod
    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """As :meth:`all_gather` on rank 0; None on the other ranks, which get nothing to hold.

        Raises:
            InvalidValueError: as :meth:`all_gather`.
        """

    @abstractmethod
    def broadcast_(self, x: Tensor, source: int = 0) -> None:
        """Replace ``x`` on every rank by the one of rank ``source``; any shape and dtype."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abstractmethod
    def abort(self, cause: str) -> None:
        """Give up: every other rank raises PeerDiedError(this rank, cause) instead of waiting.

        May be called from any thread, also while another one is inside an operation, which then raises as well.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the group and release what it holds; a second call does nothing."""

    def _check_gather(self, x: Tensor, sizes: Sequence[int]) -> None:
        if len(sizes) != self.world_size:
            raise InvalidValueError("sizes", list(sizes), f"one size for each of {self.world_size} ranks")
        if x.dim() == 0 or x.shape[-1] != sizes[self.rank]:
            raise InvalidValueError(
                "x.shape", list(x.shape), f"the last dimension of rank {self.rank} must be its size"
            )


class Solo(Collectives):
    """A group of one rank: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce_(self, x: Tensor) -> None:
        pass

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        self._check_gather(x, sizes)
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor | None:
        return self.all_gather(x, sizes)

    def broadcast_(self, x: Tensor, source: int = 0) -> None:
        if source != 0:
            raise InvalidValueError("source", source, "a group of one rank has only rank 0")

    def barrier(self) -> None:
        pass

    def abort(self, cause: str) -> None:
        pass

    def close(self) -> None:
        pass


def sum_in_rank_order(parts: Sequence[Tensor], into: Tensor) -> None:
    """``into`` = ((parts[0] + parts[1]) + parts[2]) + ..., in float32 for 16-bit floats, else in their dtype."""
    wide = torch.float32 if into.dtype in (torch.float16, torch.bfloat16) else into.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    into.copy_(total)
