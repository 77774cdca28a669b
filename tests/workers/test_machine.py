"""What of the machine may be used, under every form of cgroup limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headwise.workers import machine
from headwise.workers.machine import free_host_memory, usable_cores

GIB = 1 << 30
UNLIMITED = "9223372036854771712"


class FakeMachine:
    """A /proc, and the folders of cgroups that it tells of."""

    def __init__(self, folder: Path, available: int = 64 * GIB) -> None:
        self._folder = folder
        (folder / "self").mkdir()
        (folder / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
        (folder / "self/mountinfo").write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n")
        (folder / "self/cgroup").write_text("")

    def mount(self, version: str, controllers: str, root: str, own: str) -> None:
        place = self._folder / controllers
        options = f"rw,{controllers}" if version == "cgroup" else "rw,nsdelegate"
        with (self._folder / "self/mountinfo").open("a") as mounts, (self._folder / "self/cgroup").open("a") as cgroups:
            mounts.write(f"31 23 0:28 {root} {place} rw,relatime shared:9 - {version} cgroup {options}\n")
            cgroups.write(f"4:{controllers}:{own}\n" if version == "cgroup" else f"0::{own}\n")
        place.mkdir()

    def write(self, controllers: str, cgroup: str, **files: str) -> None:
        folder = self._folder / controllers / cgroup
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return FakeMachine(tmp_path)


def test_a_machine_without_cgroups_is_all_there_is(fake: FakeMachine) -> None:
    assert (free_host_memory(), usable_cores()) == (64 * GIB, 64)


@pytest.mark.parametrize("limited", ["", "slice", "slice/pod", "slice/pod/container"])
def test_the_lowest_limit_of_nested_cgroups_counts(fake: FakeMachine, limited: str) -> None:
    fake.mount("cgroup2", "unified", "/", "/slice/pod/container")
    for cgroup in ("slice", "slice/pod", "slice/pod/container"):
        fake.write("unified", cgroup, memory__max="max", memory__current="12345", cpu__max="max 100000")
    fake.write("unified", limited, memory__max=str(8 * GIB), memory__current=str(3 * GIB), cpu__max="150000 100000")
    assert (free_host_memory(), usable_cores()) == (5 * GIB, 2)


@pytest.mark.parametrize("limited", ["", "docker", "docker/1f"])
def test_the_limits_of_version_1_count(fake: FakeMachine, limited: str) -> None:
    fake.mount("cgroup", "cpu,cpuacct", "/", "/docker/1f")
    fake.mount("cgroup", "memory", "/", "/docker/1f")
    fake.mount("cgroup2", "unified", "/", "/")
    for cgroup in ("", "docker", "docker/1f"):
        fake.write("memory", cgroup, memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes="12345")
        fake.write("cpu,cpuacct", cgroup, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    fake.write("memory", limited, memory__limit_in_bytes=str(8 * GIB), memory__usage_in_bytes=str(3 * GIB))
    fake.write("cpu,cpuacct", limited, cpu__cfs_quota_us="200000", cpu__cfs_period_us="50000")
    assert (free_host_memory(), usable_cores()) == (5 * GIB, 4)


@pytest.mark.parametrize("own", ["/docker/1f", "/", "/../../other"])
def test_a_cgroup_that_is_mounted_as_the_root_counts(fake: FakeMachine, own: str) -> None:
    fake.mount("cgroup2", "unified", "/docker/1f" if own == "/docker/1f" else "/", own)
    fake.write("unified", "", memory__max=str(GIB), memory__current="0", cpu__max="10000 100000")
    assert (free_host_memory(), usable_cores()) == (GIB, 1)


def test_cached_files_count_as_free(fake: FakeMachine) -> None:
    fake.mount("cgroup2", "unified", "/", "/")
    stat = f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}"
    fake.write("unified", "", memory__max=str(8 * GIB), memory__current=str(7 * GIB), memory__stat=stat)
    assert free_host_memory() == 4 * GIB


def test_a_cgroup_over_its_limit_has_nothing_free(fake: FakeMachine) -> None:
    fake.mount("cgroup2", "unified", "/", "/")
    fake.write("unified", "", memory__max=str(GIB), memory__current=str(2 * GIB))
    assert free_host_memory() == 0


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("max", 64), ("", 64), ("max 100000", 64), ("250000", 3), ("200000 0", 2), ("0 100000", 64)]
)
def test_files_of_another_form_are_no_error(fake: FakeMachine, cpu_max: str, cores: int) -> None:
    """As an emulated cgroup file system may have."""
    fake.mount("cgroup2", "unified", "/", "/")
    fake.write("unified", "", memory__max=str(GIB), memory__current="", memory__stat="a\nb 1 2", cpu__max=cpu_max)
    assert usable_cores() == cores and free_host_memory() == 64 * GIB
    fake.write("unified", "", memory__current="0")
    assert free_host_memory() == GIB


def test_this_machine() -> None:
    assert 0 < free_host_memory() < 1 << 46
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
