"""How many CPUs each rank gets where several engines share a cluster, and nobody has said how many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headwise.cluster.group import GroupStartError

_UNIT = 10_000
"""Ray counts CPUs in ten-thousandths: three thirds of a CPU, rounded up, would not fit in it."""


def share_cpus(nodes: Sequence[float], ranks: Sequence[int]) -> float:
    """The most CPUs that each rank can have so that all engines fit, each on one node, if the largest comes first and
    each goes where the most is left. (Where engines differ, other ways of placing them may now and then do better.)

    Args:
        nodes: the CPUs of each node.
        ranks: of each engine, how many it has.

    Raises:
        GroupStartError: they do not fit, however few each rank gets.
    """
    total = sum(ranks)
    # Where a rank gets a little more than one of these, some node has room for one rank less.
    candidates = {math.floor(cpus / count * _UNIT) / _UNIT for cpus in nodes for count in range(1, total + 1)}
    for cpus in sorted(candidates, reverse=True):
        if cpus > 0 and _fit(nodes, ranks, cpus):
            return cpus
    raise GroupStartError(
        f"{len(ranks)} replicas of {'+'.join(str(count) for count in ranks)} ranks do not fit on {len(nodes)} nodes of "
        f"{', '.join(f'{cpus:g}' for cpus in nodes) or 'no'} CPUs; start fewer (--replicas), or add nodes"
    )


def _fit(nodes: Sequence[float], ranks: Sequence[int], cpus: float) -> bool:
    """Whether all engines find a node. The largest is placed first, each where the most is left."""
    left = [math.floor(round(node * _UNIT) / round(cpus * _UNIT)) for node in nodes]
    for count in sorted(ranks, reverse=True):
        place = max(range(len(left)), key=left.__getitem__, default=None)
        if place is None or left[place] < count:
            return False
        left[place] -= count
    return True
