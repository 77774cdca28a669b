"""This machine: shared memory, limits of a process, cores and what they can do, the clock."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from headwise.runtime.doctor.finding import Finding, failed, passed, warned
from headwise.runtime.sizes import size_text

LEAST_OPEN_FILES, GOOD_OPEN_FILES = 1024, 8192
"""Ray, the ranks' sockets and a server's connections all take some; the second is what Ray asks for."""
RAYS_OPEN_FILES = 65536
"""To which Ray raises the limit of its driver, as far as the hard limit lets it."""

BAD_SKEW_S, SKEW_S = 5.0, 1.0
"""An engine that is started again on another host has to have a later epoch, and that takes it some seconds."""

_MORE_SHARED_MEMORY = (
    "make it larger: mount -o remount,size=2G /dev/shm; docker run --shm-size=2g; in Kubernetes an emptyDir with "
    "medium: Memory there"
)
_SET_CLOCKS = "have chrony or systemd-timesyncd set the clocks of both: timedatectl set-ntp true"


def shared_memory(folder: Path, needed: int, wanted: int, without: str) -> Finding:
    """
    Args:
        folder: where it is; a file is made there, and removed.
        needed: bytes without which ranks cannot meet.
        wanted: bytes that there should be.
        without: what happens with less than that.
    """
    name = f"shared memory {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            state = os.statvfs(folder)
    except OSError as error:
        return failed(
            name, f"cannot be written to: {error.strerror}", "mount a tmpfs there that this user may write to"
        )
    free = state.f_bavail * state.f_frsize
    if free < needed:
        return failed(name, f"{size_text(free)} are free, and the ranks need {size_text(needed)}", _MORE_SHARED_MEMORY)
    if free < wanted:
        said = f"{size_text(free)} are free; with less than {size_text(wanted)} {without}"
        return warned(name, said, _MORE_SHARED_MEMORY)
    return passed(name, f"{size_text(free)} are free")


def open_files(soft: int, hard: int, raised: bool = False) -> Finding:
    """
    Args:
        soft, hard: limits of a process (``RLIMIT_NOFILE``); RLIM_INFINITY is none.
        raised: whether Ray will raise the soft one.
    """
    soft, hard = (RAYS_OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    limit = max(soft, min(hard, RAYS_OPEN_FILES)) if raised else soft
    fix = f"ulimit -n {RAYS_OPEN_FILES}, or LimitNOFILE={RAYS_OPEN_FILES} in the systemd unit"
    if hard < RAYS_OPEN_FILES:
        fix += f"; the hard limit of {hard} has to be raised first, by root"
    if limit < LEAST_OPEN_FILES:
        return failed("open files", f"a process may have {limit}, and needs {LEAST_OPEN_FILES}", fix)
    if limit < GOOD_OPEN_FILES:
        said = f"a process may have {limit}: a server takes {limit // 2} connections, and Ray asks for"
        return warned("open files", f"{said} {GOOD_OPEN_FILES}", fix)
    return passed("open files", f"a process may have {limit}")


def locked_memory(limit: int, infiniband: bool) -> Finding:
    """Matters to GPUs of several machines alone: NCCL registers its buffers with InfiniBand's adapters, which locks
    them. CUDA's own page-locked memory does not count.

    Args:
        limit: of bytes (``RLIMIT_MEMLOCK``); RLIM_INFINITY is none.
        infiniband: whether this machine has such an adapter.
    """
    if not infiniband:
        return passed("locked memory", "no InfiniBand adapter, so NCCL locks none")
    if limit == resource.RLIM_INFINITY:
        return passed("locked memory", "unlimited")
    said = f"a process may lock {size_text(limit)}, and NCCL cannot use InfiniBand where that is not enough"
    fix = "ulimit -l unlimited, LimitMEMLOCK=infinity in the systemd unit, or docker run --ulimit memlock=-1"
    return warned("locked memory", said, fix)


def cpu_features(machine: str, features: Mapping[str, bool]) -> Finding:
    """Whether the CPU has what the compiled kernels are quick with.

    Args:
        machine: as ``platform.machine()``.
        features: of the CPU, by LLVM's names.
    """
    if machine == "x86_64":
        if missing := [name for name in ("avx2", "fma") if not features.get(name)]:
            said = f"this CPU lacks {' and '.join(missing)}: kernels work, and are slower"
            return warned("CPU", said, "use a CPU of 2013 or later, or have the virtual machine pass its CPU through")
        return passed("CPU", "AVX-512" if features.get("avx512f") else "AVX2; kernels are faster still with AVX-512")
    if machine == "aarch64":
        return passed("CPU", "NEON")
    said = f"kernels have never been measured on {machine}"
    return warned("CPU", said, "use x86_64 with AVX2 or AVX-512, or aarch64")


def cores(ranks: int, usable: int) -> Finding:
    """
    Args:
        ranks: on this machine's CPU.
        usable: the cores that this process may keep busy.
    """
    if ranks > usable:
        said = f"{ranks} ranks share {usable}, and each waits for the others in every layer"
        return warned("cores", said, f"--tp {usable} or less, or give the container more CPUs")
    return passed("cores", f"{usable} for {ranks} rank{'s' * (ranks > 1)}")


def clock_skew(name: str, ahead_s: float, sure_to_s: float) -> Finding:
    """Certificates, logs and the epochs of engines go by the clock.

    Args:
        name: whose clock was compared with this machine's.
        ahead_s: how far it is ahead of this machine's; negative if behind.
        sure_to_s: by how much that may be wrong.
    """
    skew = max(0.0, abs(ahead_s) - sure_to_s)
    if skew <= SKEW_S:
        return passed(f"clock of {name}", "agrees with this machine's")
    said = f"is {skew:.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's, or more"
    make = failed if skew > BAD_SKEW_S else warned
    return make(f"clock of {name}", said, _SET_CLOCKS)


def folder_clock(folder: Path) -> tuple[float, float]:
    """How far the clock of a folder's file system is ahead, which may be another machine's, and how sure that is; in
    seconds. Makes a file there, and removes it.

    Raises:
        OSError: none can be made.
    """
    before = time.time()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"1")
        file.flush()
        written = os.fstat(file.fileno()).st_mtime
    after = time.time()
    # A file's time is that of the last tick of the kernel's clock.
    return written - (before + after) / 2, (after - before) / 2 + 0.02


def clock_against_files(now: float, modified: Mapping[str, float]) -> Finding:
    """
    Args:
        now: this machine's clock.
        modified: when files were last modified, by name.
    """
    name, latest = max(modified.items(), key=lambda item: item[1])
    if latest - now > SKEW_S:
        said = f"{name} was modified {latest - now:.0f} s from now, so this machine's clock is behind"
        fix = f"set the clock (timedatectl set-ntp true); if it is right, the file's time is wrong: touch {name}"
        return warned("clock against files", said, fix)
    return passed("clock against files", "no file is from the future")
