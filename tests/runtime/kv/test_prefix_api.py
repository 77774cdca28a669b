"""The prefix cache as a user meets it: pins, resets, salts, quotas, events, metrics, and what is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from headwise.runtime import LLM, start
from headwise.runtime.kv.events import Cleared, KvMessage, Removed, Stored, Subscription, decode_events, decode_snapshot
from headwise.workers.errors import InvalidValueError
from tests.conftest import MakeLLM
from tests.runtime.kv.test_prefix_parity import (
    GREEDY,
    SHAPE,
    always_restore,
    block_bytes,
    cached,
    prefix_stats,
    settle,
    some_tokens,
    tokens,
    without_cache,
)
from tests.runtime.test_llm import PacedGroup
from tests.runtime.test_llm import spoken as spoken
from tests.thread_group import thread_groups

__all__ = ["always_restore", "spoken"]  # fixtures

MAX_LEN = 128


@pytest.fixture
def small(checkpoint: Callable[..., Path], thread_llm: MakeLLM) -> Callable[..., LLM]:
    """Makes LLMs whose cache holds 16 blocks, twice what one request may need."""

    def make(**settings: Any) -> LLM:
        return thread_llm(checkpoint(SHAPE), **{"num_blocks": 16, "max_model_len": MAX_LEN} | settings)

    return make


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Each fills 6 blocks with its answer, 5 of them alone."""
    chance = random.Random(6)
    return [some_tokens(chance, 90) for _ in range(8)]


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[..., Path], prompts: list[list[int]]) -> list[list[list[int]]]:
    return without_cache(checkpoint(SHAPE), prompts)


def refused(field: str, call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        call()
    assert caught.value.field == field, caught.value
    for word in (field, *words):
        assert word in str(caught.value)


# Pins


class Clock:
    """In place of the pins' own."""

    def __init__(self, llm: LLM) -> None:
        self.now = 0.0
        llm._loop.engine.generation.pins._clock = lambda: self.now


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("eviction", ["lru", "cost_aware"])
def test_a_pinned_prefix_stays_until_its_time_is_over(
    small: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], depth: int, eviction: str
) -> None:
    llm = small(pipeline_depth=depth, prefix_eviction=eviction)
    clock = Clock(llm)
    assert llm.pin_prefix(prompts[0], 100.0) == 80
    assert llm.pin_prefix(prompts[0], 20.0) == 80  # no more blocks, and the longer time holds
    stats = prefix_stats(llm)
    assert stats["pinned_blocks"] == 5 and stats["blocks"]["active"] == 5
    for now in (0.0, 30.0, 99.0):
        clock.now = now
        assert tokens(llm.generate(prompts[1:], GREEDY)) == expected[1:]
        outputs = llm.generate(prompts[0], GREEDY)
        assert (tokens(outputs), cached(outputs)) == (expected[:1], [80])
    clock.now = 100.0
    llm.generate(prompts[1:], GREEDY)
    stats = prefix_stats(llm)
    assert stats["pinned_blocks"] == stats["blocks"]["active"] == 0
    assert cached(llm.generate(prompts[0], GREEDY)) == [0]


def test_a_pin_is_of_its_salt_alone(small: Callable[..., LLM], prompts: list[list[int]]) -> None:
    llm = small()
    assert llm.pin_prefix(prompts[0], 100, cache_salt="a") == 80
    assert cached(llm.generate(prompts[0], GREEDY)) == [0]
    assert cached(llm.generate(prompts[0], GREEDY, cache_salt="a")) == [80]


def test_a_prompt_that_fills_no_block_pins_nothing(small: Callable[..., LLM]) -> None:
    llm = small()
    assert llm.pin_prefix([5] * 15, 100) == 0
    assert llm.pin_prefix([5] * 16, 100) == 16
    assert prefix_stats(llm)["pinned_blocks"] == 1


def test_pins_leave_room_for_a_request_of_the_full_length(small: Callable[..., LLM], prompts: list[list[int]]) -> None:
    llm = small()
    assert llm.pin_prefix(prompts[0], 100) == 80
    # 16 blocks less 8 of a full request and 1 to spare: 7 may be pinned, 5 are.
    refused("prompt", lambda: llm.pin_prefix(prompts[1], 100), "10 blocks", "at most 7", "max_model_len", "--kv-memory")
    assert llm.pin_prefix(prompts[1][:47], 100) == 32
    [output] = llm.generate([9] * 10, GREEDY.clone(max_tokens=None))
    assert len(output.outputs[0].token_ids) == MAX_LEN - 10
    assert prefix_stats(llm)["pinned_blocks"] == 7


@pytest.mark.parametrize(
    "ttl", [0, -1, 0.0, float("nan"), float("inf"), pytest.param(10**400, id="huge"), None, "10", True, [5]]
)
def test_times_of_a_pin_that_are_refused(small: Callable[..., LLM], ttl: Any) -> None:
    llm = small()
    refused("ttl", lambda: llm.pin_prefix([5] * 20, ttl), "above 0")
    assert prefix_stats(llm)["queried_tokens"] == 0


@pytest.mark.parametrize("prompt", [None, 7, [], "", {"prompt": "hello"}, [5, -1], [5, 256], b"hello", [[5]], [5.0]])
def test_prompts_of_a_pin_that_are_refused(small: Callable[..., LLM], prompt: Any) -> None:
    refused("prompt", lambda: small().pin_prefix(prompt, 10))


def test_a_conversation_can_be_pinned(spoken: Path, thread_llm: MakeLLM) -> None:
    llm = thread_llm(spoken)
    start = {"role": "system", "content": "be brief, and never say anything that is not so"}
    kept = llm.pin_prefix([start], 100)
    assert kept == len(llm._inputs.chat_token_ids([start])) // 16 * 16 > 0
    [output] = llm.chat([start, {"role": "user", "content": "hi"}], GREEDY)
    assert output.num_cached_tokens == kept


# Reset, and no cache at all


@pytest.mark.parametrize("depth", [1, 2])
def test_a_reset_forgets_everything_and_disturbs_nobody(
    checkpoint: Callable[..., Path],
    thread_llm: MakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    depth: int,
) -> None:
    monkeypatch.setattr(start, "make_factory", thread_groups(PacedGroup))
    llm = thread_llm(checkpoint(SHAPE), pipeline_depth=depth)
    long = GREEDY.clone(max_tokens=60)
    [[whole]] = tokens(llm.generate(prompts[0], long))
    llm.pin_prefix(prompts[1], 100)
    streamed: list[int] = []
    for number, delta in enumerate(llm.stream(prompts[0], long)):
        streamed += delta.token_ids
        if number in (0, 17, 40):
            llm.reset_prefix_cache()
            stats = prefix_stats(llm)
            assert stats["cached_blocks"] == stats["pinned_blocks"] == 0
    assert streamed == whole
    for prompt in prompts[:2]:
        assert cached(llm.generate(prompt, GREEDY)) == [0]
    llm.reset_prefix_cache()
    stats = llm.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"] == stats["prefix_cache"]["blocks"]["free"]
    assert tokens(llm.generate(prompts[0], long)) == [[whole]]


@pytest.mark.usefixtures("always_restore")
def test_a_reset_reaches_the_tiers(
    small: Callable[..., LLM], tmp_path: Path, prompts: list[list[int]], expected: list[list[list[int]]]
) -> None:
    llm = small(host_kv_memory=20 * block_bytes(1), disk_kv_path=tmp_path)
    for _ in range(3):
        for prompt, answer in zip(prompts, expected, strict=True):  # blocks are on their way when the reset comes
            assert tokens(llm.generate(prompt, GREEDY)) == [answer]
        found = prefix_stats(llm)["tiers"]
        assert found["host"]["blocks"] and found["disk"]["blocks"]
        llm.reset_prefix_cache()
        found = prefix_stats(llm)["tiers"]
        assert found["host"]["blocks"] == found["disk"]["blocks"] == 0
        for prompt, answer in zip(prompts[:2], expected, strict=False):
            outputs = llm.generate(prompt, GREEDY)
            assert (tokens(outputs), cached(outputs)) == ([answer], [0])


def test_without_prefix_caching(
    small: Callable[..., LLM], tmp_path: Path, prompts: list[list[int]], expected: list[list[list[int]]]
) -> None:
    llm = small(enable_prefix_caching=False)
    for _ in range(2):
        outputs = llm.generate(prompts[:2], GREEDY)
        assert (tokens(outputs), cached(outputs)) == (expected[:2], [0, 0])
    stats = prefix_stats(llm)
    assert stats["hit_tokens"] == stats["cached_blocks"] == stats["inserted_tokens"] == 0
    refused("enable_prefix_caching", lambda: llm.pin_prefix(prompts[0], 10))
    llm.reset_prefix_cache()
    assert not any(decode_snapshot(llm.kv_snapshot()).blocks.values())
    for tier in ({"host_kv_memory": "1MiB"}, {"disk_kv_path": tmp_path / "kv"}):
        refused(next(iter(tier)), lambda tier=tier: small(enable_prefix_caching=False, **tier), "enable_prefix_caching")
    assert not (tmp_path / "kv").exists()


# Salts and quotas


def test_salts_share_nothing(
    small: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]]
) -> None:
    llm = small(num_blocks=64)
    for salt in ("", "a", "b", "ab", "é", "x" * 256):
        for found in (0, 80):
            outputs = llm.generate(prompts[0], GREEDY, cache_salt=salt)
            assert (tokens(outputs), cached(outputs)) == (expected[:1], [found]), salt
    assert [t for delta in llm.stream(prompts[0], GREEDY, cache_salt="c") for t in delta.token_ids] == expected[0][0]
    assert cached(llm.generate(prompts[0], GREEDY, cache_salt="c")) == [80]


@pytest.mark.parametrize(
    ("salt", "words"),
    [
        (None, ["string", "NoneType"]),
        (5, ["string", "int"]),
        (b"a", ["string", "bytes"]),
        (["a"], ["string", "list"]),
        ("x" * 257, ["257 characters", "at most 256"]),
        ("\ud83d", ["surrogate"]),
    ],
)
def test_salts_that_are_refused(spoken: Path, thread_llm: MakeLLM, salt: Any, words: list[str]) -> None:
    llm = thread_llm(spoken)
    message = [{"role": "user", "content": "hi"}]
    for call in (
        lambda: llm.generate([[5], [6]], GREEDY, cache_salt=salt),
        lambda: llm.chat(message, GREEDY, cache_salt=salt),
        lambda: next(llm.stream([5], GREEDY, cache_salt=salt)),
        lambda: llm.pin_prefix([5] * 20, 10, cache_salt=salt),
    ):
        refused("cache_salt", call, *words)
    assert llm.stats()["num_steps"] == 0


@pytest.mark.parametrize("eviction", ["lru", "cost_aware"])
def test_a_quota_keeps_one_tenant_from_flushing_the_others(
    small: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], eviction: str
) -> None:
    quiet, loud = prompts[0], prompts[1:]
    for quota in (None, 0.5):
        # 6 blocks of the quiet one, 16 of the loud one and 7 for its next request fit; all 48 do not.
        llm = small(cache_quota=quota, prefix_eviction=eviction, num_blocks=32)
        llm.generate(quiet, GREEDY, cache_salt="quiet")
        for prompt, answer in zip(loud, expected[1:], strict=True):
            assert tokens(llm.generate(prompt, GREEDY, cache_salt="loud")) == [answer]
        outputs = llm.generate(quiet, GREEDY, cache_salt="quiet")
        assert tokens(outputs) == expected[:1]
        assert (cached(outputs) == [80]) == (quota is not None)
    assert prefix_stats(llm)["evictions"]["quota"] > 0


# Events


class Mirror:
    """What a router knows: a snapshot and the messages after it."""

    def __init__(self, llm: LLM, capacity: int = 1024) -> None:
        self._llm = llm
        self.raw: list[bytes] = []
        self.num_snapshots = 0
        self.subscription: Subscription = llm.subscribe_kv_events(capacity)
        self._take_snapshot()

    def read(self) -> None:
        while (data := self.subscription.get(0)) is not None:
            self.raw.append(data)
            self._apply(decode_events(data))

    def _take_snapshot(self) -> None:
        data = self._llm.kv_snapshot()
        self.raw.append(data)
        snapshot = decode_snapshot(data)
        self.num_snapshots += 1
        self.epoch, self.sequence, self.blocks = snapshot.epoch, snapshot.sequence, snapshot.blocks

    def _apply(self, message: KvMessage) -> None:
        assert message.epoch == self.epoch
        if message.sequence <= self.sequence:
            return
        if message.resnapshot:
            self._take_snapshot()
            return
        assert message.sequence == self.sequence + 1
        self.sequence = message.sequence
        for event in message.events:
            if isinstance(event, Stored):
                parent = event.parent
                for digest in event.digests:
                    assert digest not in self.blocks[event.tier]
                    self.blocks[event.tier][digest], parent = parent, digest
            elif isinstance(event, Removed):
                for digest in event.digests:
                    del self.blocks[event.tier][digest]
            elif isinstance(event, Cleared):
                for tier in self.blocks if event.tier is None else (event.tier,):
                    self.blocks[tier].clear()


@pytest.mark.parametrize("capacity", [10_000, 2])
@pytest.mark.usefixtures("always_restore")
def test_a_mirror_of_the_events_is_the_cache(
    small: Callable[..., LLM], tmp_path: Path, prompts: list[list[int]], capacity: int
) -> None:
    llm = small(host_kv_memory=8 * block_bytes(1), disk_kv_path=tmp_path)
    llm.generate(prompts[0], GREEDY)
    chance = random.Random(1)
    mirror = Mirror(llm, capacity)
    assert mirror.blocks["device"]
    for number in range(30):
        listed = [prompt[: chance.randint(20, 90)] for prompt in chance.sample(prompts, chance.randint(1, 3))]
        llm.generate(listed, GREEDY)
        if number == 15:
            llm.reset_prefix_cache()
        if number % 5 == 0:
            mirror.read()
    settle(llm)
    later = decode_snapshot(llm.kv_snapshot())
    mirror.read()
    assert (later.epoch, later.sequence) == (mirror.epoch, mirror.sequence)
    assert mirror.blocks == later.blocks
    assert all(later.blocks[tier] for tier in ("device", "host", "disk"))
    assert (mirror.num_snapshots > 1) == (capacity == 2)
    stats = prefix_stats(llm)
    assert len(later.blocks["device"]) == stats["cached_blocks"]
    assert {tier: len(later.blocks[tier]) for tier in ("host", "disk")} == {
        tier: stats["tiers"][tier]["blocks"] for tier in ("host", "disk")
    }
    told = b"".join(mirror.raw)
    for prompt in prompts:
        assert struct.pack("<4I", *prompt[:4]) not in told and msgpack.packb(prompt[:4])[1:] not in told


def test_a_subscription_ends_with_its_engine(small: Callable[..., LLM], prompts: list[list[int]]) -> None:
    llm = small()
    with llm.subscribe_kv_events() as first:
        llm.generate(prompts[0], GREEDY)
        assert first.get(10) is not None
    assert first.get(0) is None
    second = llm.subscribe_kv_events()
    llm.close()
    assert list(second) == [], "nobody waits for an engine that is gone"


@pytest.mark.parametrize("capacity", [0, -1, pytest.param(-(10**5000), id="huge"), None, "10", 1.5, True, [5]])
def test_capacities_that_are_refused(small: Callable[..., LLM], capacity: Any) -> None:
    llm = small()
    refused("capacity", lambda: llm.subscribe_kv_events(capacity), "at least 1")
    llm.subscribe_kv_events().close()  # the engine is there


# Metrics


@pytest.mark.usefixtures("always_restore")
def test_an_output_tells_where_its_tokens_came_from(small: Callable[..., LLM], prompts: list[list[int]]) -> None:
    llm = small(host_kv_memory=64 * block_bytes(1))
    for prompt in prompts[:4]:
        [output] = llm.generate(prompt, GREEDY)
        metrics = output.metrics
        assert output.num_cached_tokens == metrics.num_cached_tokens == metrics.num_restored_tokens == 0
        assert 0 < metrics.arrival <= metrics.first_scheduled <= metrics.first_token <= metrics.finished
        assert metrics.time_to_first_token > 0 and metrics.num_preemptions == 0
    [near], [far] = llm.generate(prompts[3], GREEDY), llm.generate(prompts[0], GREEDY)
    assert (near.num_cached_tokens, near.metrics.num_restored_tokens) == (80, 0)
    assert (far.num_cached_tokens, far.metrics.num_restored_tokens) == (80, 80)
    assert 0 < far.metrics.arrival <= far.metrics.first_scheduled <= far.metrics.first_token
    stats = prefix_stats(llm)
    assert stats["queried_tokens"] == 6 * 90
    assert stats["hit_tokens"] == 80 and stats["tiers"]["host"]["hit_tokens"] == 80
    assert stats["tiers"]["host"]["queried_tokens"] == 6 * 90 - 80
    assert stats["evictions"]["room"] > 0 and stats["integrity_checks"] > 0
    assert sum(stats["blocks"].values()) == 16


# Settings


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"enable_prefix_caching": 1}, "enable_prefix_caching", ["bool"]),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching", ["bool"]),
        ({"prefix_eviction": "fifo"}, "prefix_eviction", ["fifo", "lru", "cost_aware"]),
        ({"prefix_eviction": None}, "prefix_eviction", ["lru"]),
        ({"cache_quota": 0}, "cache_quota", ["greater than 0"]),
        ({"cache_quota": 1.5}, "cache_quota", ["1.5", "less than or equal to 1"]),
        ({"cache_quota": float("nan")}, "cache_quota", ["nan"]),
        ({"cache_quota": "half"}, "cache_quota", ["half"]),
        ({"host_kv_memory": "much"}, "host_kv_memory", ["much", "2GiB"]),
        ({"host_kv_memory": 0}, "host_kv_memory", ["0"]),
        ({"host_kv_memory": -1}, "host_kv_memory", ["-1"]),
        ({"host_kv_memory": "0.5"}, "host_kv_memory", ["0.5", "bytes"]),
        ({"host_kv_memory": 0.5}, "host_kv_memory", ["0.5"]),
        ({"host_kv_memory": True}, "host_kv_memory", ["True"]),
        ({"host_kv_memory": "1KiB"}, "host_kv_memory", ["1KiB", f"{block_bytes(1)} bytes"]),
        ({"disk_kv_path": "kv", "disk_kv_limit": "1KiB"}, "disk_kv_limit", ["1KiB", "block"]),
        ({"disk_kv_path": "kv", "disk_kv_limit": "much"}, "disk_kv_limit", ["much", "2GiB"]),
        ({"disk_kv_path": "kv", "disk_kv_limit": 0}, "disk_kv_limit", ["0"]),
        ({"disk_kv_path": "kv", "disk_kv_limit": None}, "disk_kv_limit", ["None"]),
        ({"disk_kv_path": "file"}, "disk_kv_path", ["file", "cannot be used"]),
        ({"disk_kv_path": "file/below"}, "disk_kv_path", ["below", "cannot be used"]),
        ({"disk_kv_path": "/proc/nowhere"}, "disk_kv_path", ["/proc/nowhere", "cannot be used"]),
        ({"disk_kv_path": "x" * 300}, "disk_kv_path", ["cannot be used"]),
        ({"disk_kv_path": "a\0b"}, "disk_kv_path", []),
        ({"disk_kv_path": "~nobody-has-this-name/kv"}, "disk_kv_path", []),
        ({"disk_kv_path": ""}, "disk_kv_path", []),
    ],
)
def test_settings_that_are_refused(
    small: Callable[..., LLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    field: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    refused(field, lambda: small(**settings), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
