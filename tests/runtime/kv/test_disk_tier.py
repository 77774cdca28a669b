"""The disk tier from one engine to the next: found again, and whatever happens to its files, no answer is wrong."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import LLM
from headwise.runtime.engine.engine import Engine
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv import journal
from headwise.workers.kv import store as kv_store
from tests.conftest import MakeLLM
from tests.effort import thorough
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
from tests.runtime.test_llm import wait_until

__all__ = ["always_restore"]  # a fixture

pytestmark = pytest.mark.usefixtures("always_restore")

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Each has 5 blocks of its own before its last token."""
    chance = random.Random(12)
    return [some_tokens(chance, 90) for _ in range(6)]


@pytest.fixture
def engine(checkpoint: Callable[..., Path], thread_llm: MakeLLM, tmp_path: Path) -> Callable[..., LLM]:
    """Makes LLMs with the same folder and too little memory for two requests."""

    def make(tp: int = 1, **settings: Any) -> LLM:
        defaults = {"num_blocks": 12, "max_model_len": 128, "disk_kv_path": tmp_path / "kv"}
        return thread_llm(checkpoint(SHAPE), tensor_parallel_size=tp, **defaults | settings)

    return make


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[..., Path], prompts: list[list[int]]) -> list[list[list[int]]]:
    return without_cache(checkpoint(SHAPE), prompts)


def fill(llm: LLM, prompts: list[list[int]], expected: list[list[list[int]]]) -> None:
    """Leaves all of the prompts' blocks on the disk, however slowly they are saved."""
    for prompt, answer in zip(prompts, expected, strict=True):
        assert tokens(llm.generate(prompt, GREEDY)) == [answer]
        settle(llm)  # the next one takes memory for its answer whether or not what is there is saved
    llm.close()


def check(llm: LLM, prompts: list[list[int]], expected: list[list[list[int]]]) -> tuple[dict[str, Any], list[int]]:
    """Every request gets its tokens, three times; the disk's stats, and what each request found at first."""
    found: list[int] = []
    for _ in range(3):
        for prompt, answer in zip(prompts, expected, strict=True):
            outputs = llm.generate(prompt, GREEDY)
            assert tokens(outputs) == [answer]
            assert outputs[0].outputs[0].finish_reason == "length"
            found += cached(outputs)
    wait_until(lambda: not llm._loop.run(lambda engine: engine.has_work))
    llm._loop.run(Engine.check_integrity)
    disk: dict[str, Any] = prefix_stats(llm)["tiers"]["disk"]
    return disk, found[: len(prompts)]


def block_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*/??/*.kv"))


def all_but_the_first(folder: Path, prompts: list[list[int]]) -> list[Path]:
    """The files of all blocks but the first prompt's first: damaging some of them, whichever, leaves one to find."""
    tokens = b"".join(token.to_bytes(4, "little") for token in prompts[0][:16])
    return [path for path in block_files(folder) if tokens not in path.read_bytes()]


# A restart


@pytest.mark.parametrize(("tp", "host"), [thorough(1, False), (1, True), (2, False), thorough(2, True)])
def test_the_next_engine_finds_it(
    engine: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    tp: int,
    host: bool,
) -> None:
    settings = {"host_kv_memory": 8 * block_bytes(tp)} if host else {}
    fill(engine(tp, **settings), prompts, expected)
    llm = engine(tp, **settings)
    stored = prefix_stats(llm)["tiers"]["disk"]["blocks"]
    assert stored == len(block_files(tmp_path / "kv")) / tp
    hits = 0
    for prompt, answer in zip(prompts, expected, strict=True):
        [output] = llm.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == answer[0]
        assert output.num_cached_tokens == output.metrics.num_restored_tokens
        hits += output.num_cached_tokens
    # What a host still has for itself alone when its engine ends is lost with it.
    assert hits == 6 * 80 if not host else hits >= 2 * 80
    assert prefix_stats(llm)["tiers"]["disk"]["hit_tokens"] == hits
    assert prefix_stats(llm)["tiers"]["disk"]["damaged"] == 0


def test_the_limit_is_kept_from_one_engine_to_the_next(
    engine: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], tmp_path: Path
) -> None:
    fill(engine(), prompts, expected)
    before = len(block_files(tmp_path / "kv"))
    limit = 7 * kv_store.disk_block_bytes(block_bytes(1), 16)
    llm = engine(disk_kv_limit=limit)
    disk, _ = check(llm, prompts, expected)
    assert disk["max_blocks"] == 7 >= disk["blocks"] > 0 and before > 30
    llm.close()
    assert len(block_files(tmp_path / "kv")) <= 7
    assert sum(path.stat().st_size for path in (tmp_path / "kv").rglob("*") if path.is_file()) <= limit


@pytest.mark.parametrize("tiers", ["host", "disk", "both"])
def test_a_request_that_wants_more_blocks_than_the_tiers_hold(
    engine: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], tiers: str
) -> None:
    settings: dict[str, Any] = {} if tiers == "disk" else {"host_kv_memory": 3 * block_bytes(1)}
    path = {} if tiers != "host" else {"disk_kv_path": None}
    llm = engine(disk_kv_limit=3 * kv_store.disk_block_bytes(block_bytes(1), 16), **settings, **path)
    # Should they wait for ever, this ends them.
    ids = [f"request-{number}" for number in range(2 * len(prompts))]
    timer = threading.Timer(2.0, lambda: [llm.abort(name) for name in ids])
    timer.start()
    outputs = llm.generate(prompts * 2, GREEDY)
    timer.cancel()
    assert tokens(outputs) == expected * 2


def test_what_is_on_the_device_is_not_saved_over_and_over(engine: Callable[..., LLM], prompts: list[list[int]]) -> None:
    llm = engine(num_blocks=64, disk_kv_limit=7 * kv_store.disk_block_bytes(block_bytes(1), 16))
    llm.generate(prompts, GREEDY)
    llm.generate([3] * 5, GREEDY)
    before = prefix_stats(llm)["tiers"]["disk"]["inserted_tokens"]
    for _ in range(5):
        llm.generate([3] * 5, GREEDY)
    assert prefix_stats(llm)["tiers"]["disk"]["inserted_tokens"] - before <= 36 * 16  # each block on the device once


# What can happen to the folder in between


def truncate(files: list[Path]) -> None:
    for path in files[::3]:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)


def flip(files: list[Path]) -> None:
    """One bit, in the header, the payload or the checksum."""
    for number, path in enumerate(files[::3]):
        data = bytearray(path.read_bytes())
        data[(10, len(data) // 2, len(data) - 5)[number % 3]] ^= 1
        path.write_bytes(data)


def swap(files: list[Path]) -> None:
    for one, other in zip(files[::3], files[1::3], strict=False):
        held = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(held)


def empty(files: list[Path]) -> None:
    for path in files[::3]:
        path.write_bytes(b"")


def remove(files: list[Path]) -> None:
    for path in files[::3]:
        path.unlink()


def lengthen(files: list[Path]) -> None:
    for path in files[::3]:
        path.write_bytes(path.read_bytes() + b"more")


def make_folders(files: list[Path]) -> None:
    for path in files[::3]:
        path.unlink()
        path.mkdir()


BEFORE_START = (truncate, empty, remove, lengthen, make_folders)  # are noticed when the folder is read


@pytest.mark.parametrize("harm", [truncate, flip, swap, empty, remove, lengthen, make_folders])
@pytest.mark.parametrize("tp", [1, thorough(2)])
def test_files_that_were_damaged_between_two_engines(
    engine: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    tp: int,
    harm: Callable[[list[Path]], None],
) -> None:
    fill(engine(tp), prompts, expected)
    whole = len(block_files(tmp_path / "kv"))
    harm(all_but_the_first(tmp_path / "kv", prompts))
    llm = engine(tp)
    blocks = prefix_stats(llm)["tiers"]["disk"]["blocks"]
    assert (blocks < whole / tp) == (harm in BEFORE_START)
    disk, found = check(llm, prompts, expected)
    assert 0 < sum(found) < 6 * 80, "some blocks were lost, and others not"
    assert (disk["damaged"] > 0) == (harm not in BEFORE_START)


@pytest.mark.parametrize("harm", [truncate, flip, swap, empty, remove])
@pytest.mark.parametrize("tp", [1, thorough(2)])
def test_files_that_are_damaged_under_an_engine(
    engine: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    tp: int,
    harm: Callable[[list[Path]], None],
) -> None:
    fill(engine(tp), prompts, expected)
    llm = engine(tp)
    harm(all_but_the_first(tmp_path / "kv", prompts))
    disk, found = check(llm, prompts, expected)
    assert 0 < sum(found) < 6 * 80 and disk["damaged"] > 0
    assert disk["evictions"]["damage"] == disk["damaged"]


@pytest.mark.parametrize("harm", ["deleted", "garbage", "empty", "half", "flipped", "folder"])
def test_a_journal_that_was_damaged(
    engine: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], tmp_path: Path, harm: str
) -> None:
    fill(engine(), prompts, expected)
    path = tmp_path / "kv" / "rank-0-of-1" / "journal"
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "deleted":
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        harmed = {"garbage": random.Random(1).randbytes(5000), "empty": b"", "half": data[: len(data) // 2]}
        path.write_bytes(harmed.get(harm, bytes(flipped)))
    llm = engine()
    stored = prefix_stats(llm)["tiers"]["disk"]["blocks"]
    assert stored > 0 if harm in ("half", "flipped") else stored == 0
    assert stored == len(block_files(tmp_path / "kv")), "what the journal does not know is deleted"
    disk, _ = check(llm, prompts, expected)
    # Where there can be no journal nothing is kept, and nothing else is wrong.
    assert disk["damaged"] == 0 and (disk["hit_tokens"] > 0) == (harm != "folder") == (disk["refused"] == 0)


def test_one_rank_of_two_lost_its_files(
    engine: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], tmp_path: Path
) -> None:
    fill(engine(2), prompts, expected)
    for path in (tmp_path / "kv" / "rank-1-of-2").glob("??/*.kv"):
        path.unlink()
    llm = engine(2)
    assert prefix_stats(llm)["tiers"]["disk"]["blocks"] == 0
    disk, found = check(llm, prompts, expected)
    assert sum(found) == 0 and disk["damaged"] == 0
    llm.close()
    names = [{path.name for path in (tmp_path / "kv").glob(f"rank-{rank}-of-2/??/*")} for rank in range(2)]
    assert names[0] == names[1], "what the other rank cannot use is deleted"


# Whose files they are


@pytest.mark.parametrize("other", ["model", "ranks", "block size"])
def test_files_of_another_engine_are_not_served(
    checkpoint: Callable[..., Path],
    engine: Callable[..., LLM],
    thread_llm: MakeLLM,
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    other: str,
) -> None:
    """Of a model with the same shapes and other weights, of two ranks, or of blocks twice as long."""
    if other == "model":
        foreign = checkpoint(SHAPE, tie_word_embeddings=True)
        llm = thread_llm(foreign, num_blocks=12, max_model_len=128, disk_kv_path=tmp_path / "kv")
        for prompt in prompts:
            llm.generate(prompt, GREEDY)
        settle(llm)
        llm.close()
    else:
        fill(engine(2) if other == "ranks" else engine(block_size=32, num_blocks=6), prompts, expected)
    files = len(block_files(tmp_path / "kv"))
    assert files > 10
    llm = engine()
    assert prefix_stats(llm)["tiers"]["disk"]["blocks"] == 0
    kept = files if other == "ranks" else 0  # another number of ranks has folders of its own
    assert len(block_files(tmp_path / "kv")) == kept
    disk, found = check(llm, prompts, expected)
    assert sum(found) == disk["damaged"] == 0 and disk["hit_tokens"] > 0


def test_files_put_in_place_of_another_models(
    checkpoint: Callable[..., Path],
    engine: Callable[..., LLM],
    thread_llm: MakeLLM,
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
) -> None:
    """The names and the journal are right, what is in the files is not."""
    fill(engine(), prompts, expected)
    foreign = checkpoint(SHAPE, tie_word_embeddings=True)
    llm = thread_llm(foreign, num_blocks=12, max_model_len=128, disk_kv_path=tmp_path / "foreign")
    for prompt in prompts:
        llm.generate(prompt, GREEDY)
    settle(llm)
    llm.close()
    foreign_files = block_files(tmp_path / "foreign")
    for path, source in zip(block_files(tmp_path / "kv")[::2], foreign_files, strict=False):
        path.write_bytes(source.read_bytes())
    disk, found = check(engine(), prompts, expected)
    assert disk["damaged"] > 0 and sum(found) < 6 * 80


def test_two_engines_on_one_folder(
    engine: Callable[..., LLM], prompts: list[list[int]], expected: list[list[list[int]]], tmp_path: Path
) -> None:
    first = engine()
    with pytest.raises(InvalidValueError) as caught:
        engine()
    assert caught.value.field == "disk_kv_path"
    assert str(tmp_path / "kv") in str(caught.value) and "another engine" in str(caught.value)
    check(first, prompts, expected)
    first.close()
    assert cached(engine().generate(prompts[0], GREEDY)) == [80]


# A disk that is full, an engine that is killed


@pytest.mark.parametrize(("tp", "host"), [(1, False), thorough(1, True), thorough(2, False), (2, True)])
def test_a_full_disk(
    engine: Callable[..., LLM],
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    tp: int,
    host: bool,
) -> None:
    llm = engine(tp, **({"host_kv_memory": 8 * block_bytes(tp)} if host else {}))
    room = [200_000 // tp]
    write_all = journal.write_all

    def write(file: Any, data: bytes | memoryview) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(kv_store, "write_all", write)
    monkeypatch.setattr(journal, "write_all", write)
    disk, _ = check(llm, prompts, expected)
    assert disk["refused"] > 0 and disk["damaged"] == 0
    room[0] = 1 << 40
    refused = disk["refused"]
    disk, _ = check(llm, prompts, expected)
    assert disk["refused"] == refused and disk["hit_tokens"] > 0
    llm.close()
    disk, found = check(engine(tp), prompts, expected)
    assert disk["damaged"] == 0 and sum(found) > 0
    assert not list((tmp_path / "kv").rglob("*.tmp"))


VICTIM = """
import random, sys
from headwise.runtime import LLM, SamplingParams
llm = LLM(sys.argv[1], executor="local", cpus_per_rank=1, kv_memory="4MiB", num_blocks=12, max_model_len=128,
          disk_kv_path=sys.argv[2], quiet=True)
chance = random.Random(12)
prompts = [[chance.randrange(3, 256) for _ in range(90)] for _ in range(6)]
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
while True:
    for prompt in prompts:
        llm.generate(prompt, params)
    llm.generate([[chance.randrange(3, 256) for _ in range(90)] for _ in range(4)], params)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("wanted", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_an_engine_that_is_killed_while_it_writes(
    checkpoint: Callable[..., Path],
    engine: Callable[..., LLM],
    prompts: list[list[int]],
    expected: list[list[list[int]]],
    tmp_path: Path,
    wanted: int,
) -> None:
    folder = tmp_path / "kv"
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(checkpoint(SHAPE)), str(folder)])
    try:
        wait_until(lambda: len(block_files(folder)) >= wanted or victim.poll() is not None)
        assert victim.poll() is None
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait(DEADLINE_S)
    llm = engine()
    stored = prefix_stats(llm)["tiers"]["disk"]["blocks"]
    assert stored == len(block_files(folder)) >= (wanted > 1)
    disk, found = check(llm, prompts, expected)
    assert disk["damaged"] == 0 and (sum(found) > 0 or wanted == 1)
    assert not list(folder.rglob("*.tmp"))
