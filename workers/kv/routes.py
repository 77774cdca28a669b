"""Which rank of one group sends which KV heads to which rank of another. Integers only.

From three ranks to two, and from one that has both heads of a model to four that have one each::

    KV heads      [ 0 ]  [ 1 ]  [ 2 ]              [ 0    1 ]
                    |      |      |                  |    |
    KV heads      [ 0      1 ]  [ 2 ]        [ 0 ]  [ 0 ]  [ 1 ]  [ 1 ]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import Range


@dataclass(frozen=True, slots=True)
class Route:
    """KV heads ``start`` to ``stop`` of the model, which rank ``source`` of one group sends to rank ``destination`` of
    another."""

    source: int
    destination: int
    start: int
    stop: int


def head_routes(source: Sequence[Range], destination: Sequence[Range]) -> list[Route]:
    """How KV goes from the ranks of one group to those of another; the same wherever it is asked for.

    Each KV head that a rank of ``destination`` holds comes from one rank of ``source``. Where several hold it, it is
    the one that has been given the fewest heads so far, and of those the first.

    Args:
        source, destination: the KV heads of each rank, global ranges.

    Returns:
        By destination rank, then by head; adjacent heads from one rank are one route.

    Raises:
        InvalidValueError: a rank of ``destination`` holds a head that none of ``source`` does.
    """
    given = [0] * len(source)
    routes: list[Route] = []
    for to, (start, stop) in enumerate(destination):
        for head in range(start, stop):
            holders = [rank for rank, (first, end) in enumerate(source) if first <= head < end]
            if not holders:
                raise InvalidValueError("source", list(source), f"no rank holds KV head {head}, which rank {to} needs")
            rank = min(holders, key=lambda rank: given[rank])
            given[rank] += 1
            last = routes[-1] if routes else None
            if last is not None and (last.source, last.destination, last.stop) == (rank, to, head):
                routes[-1] = replace(last, stop=head + 1)
            else:
                routes.append(Route(rank, to, head, head + 1))
    return routes
