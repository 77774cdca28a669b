"""How CPUs are shared out among the replicas of a cluster."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.cluster.cpu_shares import share_cpus
from headwise.cluster.group import GroupStartError


@pytest.mark.parametrize(
    ("nodes", "ranks", "cpus"),
    [
        ([8], [1], 8),
        ([8], [2], 4),
        ([2], [1, 1, 1], 0.6666),
        ([8, 8], [2, 2], 4),
        ([8, 8], [2, 2, 2], 2),
        ([8, 4], [2, 2, 2], 2),
        ([8, 4], [1, 1, 1], 4),
        ([4, 4], [4], 1),  # on one of them
        ([2], [1, 1, 2], 0.5),
        ([0, 6], [3], 2),
    ],
)
def test_each_rank_gets_the_most_with_which_all_fit(nodes: list[float], ranks: list[int], cpus: float) -> None:
    assert share_cpus(nodes, ranks) == cpus


@pytest.mark.parametrize("nodes", [[], [0.0], [0.00005]])
def test_where_there_are_none_it_says_so_with_numbers(nodes: list[float]) -> None:
    with pytest.raises(GroupStartError, match=rf"2 replicas of 1\+1 ranks do not fit on {len(nodes)} nodes"):
        share_cpus(nodes, [1, 1])


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 8), st.integers(1, 12))
def test_equal_replicas_fit_and_would_not_with_more(nodes: list[int], tp: int, replicas: int) -> None:
    cpus = share_cpus(nodes, [tp] * replicas)

    def fitting(cpus: float) -> int:
        return sum(math.floor(round(node * 10_000) / round(cpus * 10_000)) // tp for node in nodes)

    assert fitting(cpus) >= replicas
    assert fitting(cpus + 0.0002) < replicas


@given(st.lists(st.integers(1, 64), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_no_node_gives_more_than_it_has(nodes: list[int], ranks: list[int]) -> None:
    assert 0 < share_cpus(nodes, ranks) * sum(ranks) <= sum(nodes)
