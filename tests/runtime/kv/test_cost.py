"""Restoring is chosen where it was faster lately."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv.cost import RestoreCost
from headwise.workers.kv.transfer import Tier

times = st.floats(1e-7, 10.0)


def measured(token_s: float, block_s: float, latency_s: float = 0.0) -> RestoreCost:
    cost = RestoreCost()
    cost.saw_prefill(10, 10 * token_s)
    cost.saw_restore(Tier.HOST, 4, 4 * block_s, latency_s)
    return cost


def test_what_was_never_measured_is_tried() -> None:
    cost = RestoreCost()
    assert cost.worth({Tier.DISK: 1000}, 1)
    cost.saw_prefill(1, 1e-9)
    assert cost.worth({Tier.DISK: 1000}, 1)
    assert cost.stats() == {"computed_token": 1e-9}


def test_the_faster_is_chosen_and_a_tie_is_computed() -> None:
    cost = measured(token_s=1.0, block_s=4.0)
    assert cost.worth({Tier.HOST: 1}, 5)
    assert not cost.worth({Tier.HOST: 1}, 4)
    assert not measured(token_s=1.0, block_s=4.0).worth({Tier.HOST: 1}, 3)


def test_latency_is_paid_once_and_not_for_each_block() -> None:
    cost = measured(token_s=1.0, block_s=1.0, latency_s=6.0)
    for _ in range(50):
        cost.saw_restore(Tier.HOST, 4, 4.0, 6.0)
    assert cost.worth({Tier.HOST: 4}, 16)
    assert not cost.worth({Tier.HOST: 1}, 4)


def test_the_first_latency_counts_in_full() -> None:
    assert measured(token_s=1.0, block_s=1.0, latency_s=6.0).stats()["restore_latency"] == 6.0


def test_each_tier_has_costs_of_its_own() -> None:
    cost = measured(token_s=1.0, block_s=1.0)
    cost.saw_restore(Tier.DISK, 1, 20.0, 0.0)
    assert cost.worth({Tier.HOST: 4}, 16)
    assert not cost.worth({Tier.DISK: 4}, 16)
    assert cost.worth({Tier.HOST: 3, Tier.DISK: 1}, 24)
    cost.declined([Tier.DISK, Tier.DISK])
    stats = cost.stats()
    assert stats["host_block"] == 1.0 and stats["disk_block"] == pytest.approx(20.0 * 0.98)


def test_to_ask_changes_nothing() -> None:
    cost = measured(token_s=1.0, block_s=40.0, latency_s=40.0)
    before = cost.stats()
    assert not cost.worth({Tier.HOST: 1}, 4) and cost.stats() == before


def test_what_was_declined_is_tried_again_in_the_end() -> None:
    cost = measured(token_s=1.0, block_s=40.0, latency_s=40.0)
    declined = 0
    while not cost.worth({Tier.HOST: 1}, 4):
        cost.declined([Tier.HOST])
        declined += 1
    assert 100 < declined < 200  # 0.98 ** 148 is 1/20


@given(old=times, new=times, count=st.integers(1, 50))
def test_the_mean_goes_to_what_is_seen_and_stays_between(old: float, new: float, count: int) -> None:
    cost = RestoreCost()
    cost.saw_prefill(1, old)
    for _ in range(count):
        cost.saw_prefill(1, new)
    mean = cost.stats()["computed_token"]
    assert min(old, new) * (1 - 1e-9) <= mean <= max(old, new) * (1 + 1e-9)
    assert abs(mean - new) <= abs(old - new) * 0.7**count * (1 + 1e-6) + 1e-9


@given(token_s=times, block_s=times, blocks=st.integers(1, 100), size=st.integers(1, 64))
def test_more_of_the_same_changes_no_verdict_where_there_is_no_latency(
    token_s: float, block_s: float, blocks: int, size: int
) -> None:
    if abs(block_s - size * token_s) < 1e-6 * block_s:
        return
    verdict = measured(token_s, block_s).worth({Tier.HOST: blocks}, blocks * size)
    assert verdict == (block_s < size * token_s)
    assert measured(token_s, block_s).worth({Tier.HOST: 1}, size) == verdict
