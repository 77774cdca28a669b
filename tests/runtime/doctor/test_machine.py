"""Shared memory, limits, cores and the clock: good ones, and broken ones with their fixes."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from headwise.runtime.doctor.finding import Finding, Level
from headwise.runtime.doctor.machine import (
    clock_against_files,
    clock_skew,
    cores,
    cpu_features,
    folder_clock,
    locked_memory,
    open_files,
    shared_memory,
)

MIB = 1 << 20
MORE = 1 << 60
"""Bytes that no machine has."""


def is_fine(found: Finding) -> bool:
    return found.level is Level.PASS and not found.fix


def test_shared_memory_with_room(tmp_path: Path) -> None:
    assert is_fine(shared_memory(tmp_path, 4096, 8192, ""))
    assert not list(tmp_path.iterdir())


def test_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    fails, warns = shared_memory(tmp_path, MORE, MORE, ""), shared_memory(tmp_path, 4096, MORE, "Ray is slow")
    assert fails.level is Level.FAIL and "the ranks need" in fails.said and "--shm-size" in fails.fix
    assert warns.level is Level.WARN and warns.said.endswith("Ray is slow") and warns.fix == fails.fix


def test_shared_memory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = shared_memory(tmp_path / "file", 0, 0, "")
    assert found.level is Level.FAIL and "cannot be written to" in found.said and "mount a tmpfs" in found.fix


@pytest.mark.parametrize(
    ("soft", "hard", "level"),
    [
        (256, 512, Level.FAIL),
        (1023, 65536, Level.FAIL),
        (1024, 65536, Level.WARN),
        (8192, 65536, Level.PASS),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, Level.PASS),
    ],
)
def test_open_files(soft: int, hard: int, level: Level) -> None:
    found = open_files(soft, hard)
    assert found.level is level and bool(found.fix) is (level is not Level.PASS)
    assert level is Level.PASS or found.fix.startswith("ulimit -n 65536")


def test_a_hard_limit_has_to_be_raised_first_and_a_soft_one_is_raised_by_ray() -> None:
    assert "the hard limit of 512" in open_files(256, 512).fix
    assert is_fine(open_files(256, 65536, raised=True))
    assert open_files(256, 512, raised=True).level is Level.FAIL


def test_locked_memory_matters_where_there_is_infiniband() -> None:
    assert is_fine(locked_memory(65536, infiniband=False))
    assert is_fine(locked_memory(resource.RLIM_INFINITY, infiniband=True))
    found = locked_memory(65536, infiniband=True)
    assert found.level is Level.WARN and "64 KiB" in found.said and "ulimit -l unlimited" in found.fix


def test_cpu_features() -> None:
    assert is_fine(cpu_features("x86_64", {"avx2": True, "fma": True}))
    assert is_fine(cpu_features("x86_64", {"avx2": True, "fma": True, "avx512f": True}))
    assert is_fine(cpu_features("aarch64", {}))
    old = cpu_features("x86_64", {"avx2": False, "fma": True})
    assert old.level is Level.WARN and "lacks avx2" in old.said and old.fix
    assert cpu_features("riscv64", {}).level is Level.WARN


def test_more_ranks_than_cores() -> None:
    assert is_fine(cores(2, 2))
    found = cores(4, 2)
    assert found.level is Level.WARN and found.fix.startswith("--tp 2")


@pytest.mark.parametrize(
    ("ahead_s", "sure_to_s", "level"),
    [
        (0.3, 0.01, Level.PASS),
        (-0.3, 0.01, Level.PASS),
        (3.0, 2.5, Level.PASS),
        (3.0, 0.01, Level.WARN),
        (-60.0, 0.01, Level.FAIL),
    ],
)
def test_clock_skew(ahead_s: float, sure_to_s: float, level: Level) -> None:
    found = clock_skew("Ray node 10.0.0.2", ahead_s, sure_to_s)
    assert found.level is level and found.name == "clock of Ray node 10.0.0.2"
    assert level is Level.PASS or ("chrony" in found.fix and ("behind" in found.said) is (ahead_s < 0))


def test_a_folder_of_this_machine_has_its_clock(tmp_path: Path) -> None:
    ahead_s, sure_to_s = folder_clock(tmp_path)
    assert is_fine(clock_skew(str(tmp_path), ahead_s, sure_to_s)) and abs(ahead_s) <= sure_to_s + 0.1


def test_a_file_from_the_future() -> None:
    now = time.time()
    assert is_fine(clock_against_files(now, {"old": now - 1e6, "new": now}))
    found = clock_against_files(now, {"old": now - 1e6, "model.safetensors": now + 3600})
    assert found.level is Level.WARN and "3600 s from now" in found.said and "touch model.safetensors" in found.fix
