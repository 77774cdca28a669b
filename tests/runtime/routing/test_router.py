"""The router's rules, one by one; test_router_machine.py has them all at once."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from headwise.runtime.kv.events import TIERS, KvMessage, KvSnapshot, Stored
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.routing.load import LoadReport
from headwise.runtime.routing.router import RouteAgain, Router, SnapshotWanted
from headwise.workers.errors import InvalidValueError

SIZE = 16
IDENTITY = KvIdentity("model", "float32", SIZE)


def digests(first: int, tokens: int, salt: str = "") -> list[bytes]:
    return IDENTITY.token_blocks([first, *range(1, tokens)], salt).digests


class World:
    """Replicas a, b, … that hold nothing, and take a millisecond for a token and for a request that runs."""

    def __init__(self, replicas: int = 2, token_s: float | None = 0.001, row_s: float = 0.001) -> None:
        self.router = Router(SIZE)
        self.names = [chr(ord("a") + index) for index in range(replicas)]
        for name in self.names:
            assert self.router.joined(name) == [SnapshotWanted(name)]
            self.hold(name)
            if token_s is not None:
                self.router.load(name, LoadReport(0, 0, 0, token_s, row_s))
        self.count = 0

    def hold(self, name: str, *chains: list[bytes]) -> None:
        """The replica holds these blocks and no others."""
        held = dict.fromkeys((digest for chain in chains for digest in chain), bytes(32))
        blocks = {tier: held if tier == "device" else {} for tier in TIERS}
        assert self.router.kv_snapshot(name, KvSnapshot(1, self.router._number + 1, blocks)) == []

    def route(self, first: int, tokens: int = 64, salt: str = "", tail: int = 0) -> str | None:
        """A prompt's replica. ``first`` makes it another prompt, ``tail`` another of the same beginning."""
        self.count += 1
        choice = self.router.route(str(self.count), digests(first, tokens, salt), tokens + tail)
        return choice and choice.replica

    def end(self, *requests: int) -> None:
        for request in requests:
            self.router.first_token(str(request))
            self.router.finished(str(request))


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("holder", ["a", "b"])
def test_a_prompt_goes_to_the_longest_prefix(world: World, holder: str) -> None:
    other = "b" if holder == "a" else "a"
    world.hold(holder, digests(1, 640))
    world.hold(other, digests(1, 320))
    choice = world.router.route("x", digests(1, 640), 650)
    assert choice is not None and (choice.replica, choice.cached_tokens) == (holder, 640)
    assert choice.wait_s == pytest.approx(0.01)


def test_one_token_at_least_is_computed(world: World) -> None:
    world.hold("a", digests(1, 64))
    choice = world.router.route("x", digests(1, 64), 64)
    assert choice is not None and choice.cached_tokens == 63 and world.router.stats()["queued_tokens"] == 1


def test_a_tenants_blocks_are_nothing_to_another(world: World) -> None:
    """The blocks' digests have the salt in them: with another one the same tokens are other blocks."""
    world.hold("a", digests(1, 640, salt="one"))
    found = {}
    for salt in ("two", "", "one"):
        choice = world.router.route(f"of {salt}", digests(1, 640, salt), 650)
        assert choice is not None
        found[salt] = choice.cached_tokens
        world.router.finished(f"of {salt}")
    assert found == {"two": 0, "": 0, "one": 640}


def test_nothing_known_goes_to_the_least_loaded() -> None:
    world = World(3, token_s=None)
    chosen = [world.route(first) for first in range(3)]
    assert set(chosen) == {"a", "b", "c"}
    world.end(2)
    assert world.route(9) == chosen[1]


def test_equals_are_told_apart_by_a_hash_that_depends_on_the_prompt_and_not_on_the_order() -> None:
    counts: Counter[str | None] = Counter()
    for first in range(100):
        forward, backward = World(2), Router(SIZE)
        for name in ("b", "a"):
            backward.joined(name)
        mine = forward.route(first)
        theirs = backward.route("1", digests(first, 64), 64)
        assert theirs is not None and mine == theirs.replica
        counts[mine] += 1
    assert min(counts["a"], counts["b"]) > 25


def test_equal_costs_go_to_the_least_loaded() -> None:
    world = World(2, row_s=0.0)  # what runs costs nothing, and yet is a load
    world.router.load("a", LoadReport(0, 0, running=3))
    for first in range(20):
        assert world.route(first) == "b"
        world.end(world.count)


def test_equal_prompts_that_come_at_once_meet() -> None:
    world = World(8)
    assert len({world.route(1, 640, tail=16 * index) for index in range(8)}) == 1
    assert world.router.stats()["queued_tokens"] < 640 + 8 * 9 * 16


def test_a_hot_prefix_spreads_when_waiting_costs_more_than_computing_it_elsewhere() -> None:
    world = World(2)
    chosen = [world.route(1, 640, tail=64) for _ in range(40)]
    assert len(set(chosen[:10])) == 1
    first_elsewhere = next(index for index, name in enumerate(chosen) if name != chosen[0])
    # 704 + n * 65 tokens wait there; here they would wait for 704 and cost 640 more of computing.
    assert 64 * first_elsewhere >= 640 and first_elsewhere < 25
    counts = Counter(chosen)
    assert min(counts.values()) >= 10
    assert sum(len(replica.blocks._coming) > 0 for replica in world.router._replicas.values()) == 2


@pytest.mark.parametrize("order", ["one after another", "in turns", "at random"])
def test_eight_beginnings_of_eight_requests_find_what_one_replica_would_and_share_two(order: str) -> None:
    """At least 0.9 of the tokens that a single replica would find, and loads within 25%."""
    world = World(2)
    beginnings = [first for _ in range(8) for first in range(8)]
    if order == "one after another":
        beginnings.sort()
    elif order == "at random":
        random.Random(0).shuffle(beginnings)
    found, requests, computed = 0, Counter[str](), Counter[str]()
    for number, first in enumerate(beginnings):
        choice = world.router.route(f"{number}", digests(first, 512), 544)
        assert choice is not None
        found += choice.cached_tokens
        requests[choice.replica] += 1
        computed[choice.replica] += 544 - choice.cached_tokens
    assert found >= 0.9 * 8 * 7 * 512
    for counts in (requests, computed):
        assert max(counts.values()) <= 1.25 * counts.total() / 2


def test_a_slow_replica_gets_less() -> None:
    world = World(2)
    for _ in range(50):
        world.router.load("a", LoadReport(0, 0, 0, 0.004))
    counts = Counter(world.route(first) for first in range(50))
    assert 1 <= counts["a"] <= 12


def test_what_runs_costs_what_the_replica_told() -> None:
    world = World(2)
    world.router.load("a", LoadReport(0, 0, running=30))
    assert [world.route(1, 16), world.route(2, 16), world.route(3, 16)] == ["b", "b", "a"]  # 30 ms against 0, 16, 32


def test_routed_requests_count_at_once_and_their_blocks_are_coming(world: World) -> None:
    name = world.route(1, 640)
    assert world.router.stats() == {
        "replicas": 2, "draining": 0, "stale": 0, "blocks": 40, "held": 0, "requests": 1, "queued_tokens": 640,
        "running": 0,
    }  # fmt: skip
    assert world.route(1, 640) == name
    world.router.first_token("1")
    world.router.first_token("1")
    stats = world.router.stats()
    assert (stats["queued_tokens"], stats["running"], stats["blocks"]) == (1, 1, 40)
    world.router.failed("1")
    world.end(2)
    stats = world.router.stats()
    assert (stats["queued_tokens"], stats["running"], stats["blocks"], stats["requests"]) == (0, 0, 0, 0)


def test_a_report_replaces_what_is_known_of_requests_that_have_arrived() -> None:
    world = World(1)
    for first in range(3):
        world.route(first, 100)
    world.router.load("a", LoadReport(received=2, queued_tokens=50, running=0))
    assert world.router.stats()["queued_tokens"] == 50 + 100
    assert [entry.tokens for entry in world.router._requests.values()] == [0, 50, 100]
    world.router.first_token("1")
    world.router.first_token("2")
    assert world.router.stats()["queued_tokens"] == 100


def test_what_others_sent_counts_until_the_next_report() -> None:
    world = World(1)
    world.route(1, 100)
    world.router.load("a", LoadReport(received=1, queued_tokens=700, running=4))
    stats = world.router.stats()
    assert (stats["queued_tokens"], stats["running"]) == (700, 4)
    world.end(1)
    world.router.load("a", LoadReport(received=1, queued_tokens=0, running=0))
    stats = world.router.stats()
    assert (stats["queued_tokens"], stats["running"]) == (0, 0)


def test_a_draining_replica_gets_nothing_new_and_keeps_what_it_has(world: World) -> None:
    world.hold("a", digests(1, 640))
    assert world.route(1, 640) == "a"
    world.router.draining("a")
    world.router.draining("a")
    assert {world.route(1, 640) for _ in range(20)} == {"b"}
    assert world.router.stats()["draining"] == 1
    world.end(1)
    assert world.router.left("a") == []


def test_with_no_replica_nothing_is_chosen_and_nothing_is_counted(world: World) -> None:
    world.router.left("a")
    world.router.draining("b")
    assert world.route(1) is None
    assert world.router.stats()["requests"] == 0 == world.router._number


def test_a_replica_that_leaves_gives_its_requests_back_and_its_blocks_are_gone(world: World) -> None:
    world.hold("a", digests(1, 640))
    assert [world.route(1, 640), world.route(1, 640)] == ["a", "a"]
    world.router.first_token("1")
    assert world.router.left("a") == [RouteAgain("1"), RouteAgain("2")]
    assert world.router.stats()["blocks"] == 0 == world.router.stats()["requests"]
    choice = world.router.route("1", digests(1, 640), 650)
    assert choice is not None and choice.replica == "b"


def test_a_replica_that_comes_again_is_another(world: World) -> None:
    world.hold("a", digests(1, 640))
    world.router.load("a", LoadReport(0, 900, 4))
    world.router.left("a")
    with pytest.raises(InvalidValueError, match=r"replica='b': .*; say left\(\) first"):
        world.router.joined("b")
    assert world.router.joined("a") == [SnapshotWanted("a")]
    stats = world.router.stats()
    assert (stats["blocks"], stats["queued_tokens"], stats["running"], stats["stale"]) == (0, 0, 0, 1)
    assert {world.route(first) for first in range(2)} == {"a", "b"}


def test_what_is_said_of_those_that_are_gone_is_passed_over(world: World) -> None:
    world.route(1)
    world.router.left("a")
    world.router.left("b")
    world.end(1)
    world.router.failed("1")
    world.router.load("a", LoadReport(0, 5, 5))
    assert world.router.kv_message("a", KvMessage(1, 9)) == world.router.left("a") == []
    assert world.router.kv_snapshot("a", KvSnapshot(1, 9, {})) == []
    world.router.draining("a")
    assert set(world.router.stats().values()) == {0}


def test_a_gap_wants_a_snapshot(world: World) -> None:
    message = KvMessage(1, 7, (Stored("device", tuple(digests(1, 64)), bytes(32)),))
    assert world.router.kv_message("a", message) == [SnapshotWanted("a")]
    assert world.router.stats()["stale"] == 1
    assert world.router.kv_snapshot("a", KvSnapshot(1, 0, {})) == [SnapshotWanted("a")]
    assert world.router.kv_snapshot("a", KvSnapshot(1, 6, {})) == []
    assert world.router.stats()["held"] == 4


def test_a_replica_that_fails_at_once_is_not_sent_everything() -> None:
    world = World(2)
    for first in range(100):
        if world.route(first) == "a":
            world.router.failed(str(world.count))
        else:
            world.end(world.count)
    assert world.router._loads.wait_s(0, 0) == 1.0  # it failed once
    for _ in range(20):
        world.router.load("a", LoadReport(0, 0, 0))
    assert {world.route(first) for first in range(200, 202)} == {"a", "b"}


def test_an_id_or_a_number_that_cannot_be_is_refused(world: World) -> None:
    world.route(1)
    with pytest.raises(InvalidValueError, match="request='1': must be an id that no request under way has"):
        world.router.route("1", [], 1)
    with pytest.raises(InvalidValueError, match="num_tokens=63: must be at least 1, and at least 4 blocks of 16"):
        world.router.route("2", digests(1, 64), 63)
    with pytest.raises(InvalidValueError, match="num_tokens=0"):
        world.router.route("2", [], 0)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["received", "queued_tokens", "running", "token_s", "row_s"])
def test_a_report_that_cannot_be_is_refused(name: str, value: float) -> None:
    report = {"received": 0, "queued_tokens": 0, "running": 0} | {name: value}
    with pytest.raises(InvalidValueError, match=f"{name}={value}: must be a finite number of at least 0"):
        LoadReport(**report)  # type: ignore[arg-type]


def test_prompts_of_less_than_a_block_are_routed() -> None:
    world = World(4)
    assert {world.route(first, 5) for first in range(4)} == set("abcd")


def test_more_replicas_than_a_bitmap_of_one_word() -> None:
    router = Router(SIZE)
    for index in range(200):
        router.joined(f"r{index}")
        router.kv_snapshot(f"r{index}", KvSnapshot(1, 0, {"device": dict.fromkeys(digests(1, 64), bytes(32))}))
    seen = set()
    for request in range(200):
        choice = router.route(str(request), digests(1, 64), 128)
        assert choice is not None and choice.cached_tokens == 64
        seen.add(choice.replica)
    assert len(seen) == 200
