"""What this process may use of its machine: cores and memory, within the limits of its cgroups.

A container's limits are those of its cgroup, and each of the cgroups above has limits of its own, such as a pod's or a
systemd slice's. The lowest counts. Imports no torch: thread pools are sized before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_PERIOD_US = 100_000
"""Of a CPU quota that names no period."""

_MEMORY_FILES = {
    "cgroup2": ("memory.max", "memory.current", ""),
    "cgroup": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""By version of cgroups: the limit, the use, and how entries of memory.stat that include the cgroups below begin."""


def usable_cores() -> int:
    """The cores that this process may keep busy: its affinity, and no more than its CPU quota pays for, rounded up.

    More threads than that would wait for each other while the kernel lets none of them run.
    """
    cores = len(os.sched_getaffinity(0))
    for version, folder in _cgroups("cpu"):
        names = ["cpu.max"] if version == "cgroup2" else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        quota, period, *_ = [*" ".join(_read(folder / name) or "" for name in names).split(), "", ""]
        if _number(quota) > 0:  # no quota is "max", or -1
            cores = min(cores, -(-_number(quota) // (_number(period) or _PERIOD_US)))
    return max(1, cores)


def free_host_memory() -> int:
    """Bytes that can still be allocated in host memory by all programs of this container together.

    What files are cached in counts as free, as it does in MemAvailable: the kernel takes it back before anything else.
    """
    fields = dict(line.split(":") for line in (_PROC / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for version, folder in _cgroups("memory"):
        limit_file, used_file, prefix = _MEMORY_FILES[version]
        limit, used = _read(folder / limit_file), _read(folder / used_file)
        if limit and limit.isdigit() and used:
            counts = dict(
                line.split(" ", 1) for line in (_read(folder / "memory.stat") or "").splitlines() if " " in line
            )
            cached = sum(_number(counts.get(f"{prefix}{name}", "")) for name in ("active_file", "inactive_file"))
            free = min(free, max(0, _number(limit) - _number(used) + cached))
    return free


def _cgroups(controller: str) -> Iterator[tuple[str, Path]]:
    """The folders of this process's cgroup and of those above it, as far as they can be seen, each with its version."""
    for version, root, mount in _mounts(controller):
        folder = mount
        yield version, folder
        own = _own_cgroup(version, controller)
        # A container may see its own cgroup mounted as the root; with ".." in it, it lies outside what is mounted.
        for part in Path(own).relative_to(root).parts if Path(own).is_relative_to(root) else ():
            folder = folder / part
            if part == ".." or not folder.is_dir():
                break
            yield version, folder


def _mounts(controller: str) -> Iterator[tuple[str, str, Path]]:
    """Version, root within the hierarchy, and place of each mount that may limit a controller."""
    for line in (_read(_PROC / "self/mountinfo") or "").splitlines():
        place, _, kind = line.partition(" - ")
        version, _, options = kind.split(" ", 2)
        if version == "cgroup2" or (version == "cgroup" and controller in options.split(" ")[-1].split(",")):
            _, _, _, root, mount, *_ = place.split(" ")
            yield version, root, Path(mount)


def _own_cgroup(version: str, controller: str) -> str:
    """The path of this process's cgroup in a hierarchy."""
    for line in (_read(_PROC / "self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if (version == "cgroup2" and number == "0") or (version == "cgroup" and controller in controllers.split(",")):
            return path
    return "/"


def _number(text: str) -> int:
    """0 where the kernel says something else than a number."""
    return int(text) if text.isdigit() else 0


def _read(path: Path) -> str | None:
    """A file's text; None where there is none, or none for this user."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
