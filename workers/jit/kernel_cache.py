"""Where compiled CPU kernels are kept: a folder of Headwise's own for each state of their code and each machine.

Numba keeps what it compiled beside the source and compiles anew when the kernel's own file changes, but not when a
kernel it calls, a constant it takes or code that emits LLVM instructions changes in another file. So the folder's name
is a digest of all of these, of the versions and of the CPU: whatever changes, the next process finds an empty folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, overload

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from headwise.workers.disk_cache import cache_directory, cache_folder
from headwise.workers.errors import InvalidValueError

FOLDERS_KEPT = 4
"""How many folders of other versions and machines stay beside the current one."""

_WORKERS = Path(__file__).parent.parent
_MARKER, _IN_USE, _SAVING = "ready", "in-use", "saving.lock"
_njit: Any = numba.njit
_config: Any = numba.config
# Set by NUMBA_* variables; each changes the code that a kernel is compiled to.
_CODE_OPTIONS = ("ENABLE_AVX", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")

_decorating = threading.Lock()
_kernels: list[Any] = []
_held: list[IO[str]] = []
_listeners: list[Callable[[], None]] = []


@overload
def kernel(function: Callable[..., Any], *, signature: Any = None, **options: Any) -> Any: ...


@overload
def kernel(*, signature: Any = None, **options: Any) -> Callable[[Callable[..., Any]], Any]: ...


def kernel(function: Callable[..., Any] | None = None, *, signature: Any = None, **options: Any) -> Any:
    """Decorates a function to compile: ``@kernel``, or with options ``@kernel(parallel=True)``.

    ``numba.njit``, but compiled without Python's lock and kept in Headwise's own folder.

    Args:
        signature: compile for this one at once, at import; None compiles for the arguments of each call.
        options: more of ``numba.njit``'s, such as ``parallel=True`` or ``fastmath``.
    """
    if function is None:
        return partial(kernel, signature=signature, **options)
    options = {"nogil": True, "error_model": "numpy"} | options
    folder = kernel_folder()
    with _decorating:
        before = _config.CACHE_DIR
        # Numba takes kernels that differ in nothing but their options for the same one.
        _config.CACHE_DIR = str(folder / _name_of(options)) if folder is not None else ""
        try:
            made = _njit(cache=folder is not None, **options)(function)
        finally:
            _config.CACHE_DIR = before
    if hasattr(made, "_cache"):  # NUMBA_DISABLE_JIT leaves the function itself
        _kernels.append(made)
        if folder is not None:
            made._cache = _Forgiving(made._cache, folder / _SAVING)
        if signature is not None:
            made.compile(signature)
            made.disable_compile()
    return made


@cache
def kernel_folder() -> Path | None:
    """The folder of this process's kernels, made if it is not there; None, with a line on stderr, if it cannot be."""
    try:
        is_new = not (cache_directory() / "kernels" / current_key()).is_dir()
        folder = cache_folder("kernels", current_key())
        in_use = (folder / _IN_USE).open("a")
        os.utime(in_use.fileno())  # the time of last use, which pruning goes by
    except (InvalidValueError, OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _warn(f"compiled CPU kernels cannot be kept ({error}) and are compiled at every start")
        return None
    _held.append(in_use)  # the lock is this process's until it ends
    _flock(in_use, fcntl.LOCK_SH)
    if is_new:
        _prune(folder)
    return folder


def kernels_ready() -> bool:
    """Whether a warm-up has filled this process's folder."""
    folder = kernel_folder()
    return folder is not None and (folder / _MARKER).is_file()


def mark_ready() -> None:
    """Says that every kernel is in this process's folder."""
    folder = kernel_folder()
    if folder is not None:
        (folder / _MARKER).touch()


def compiled() -> list[str]:
    """The kernels that this process has compiled rather than found on disk."""
    return [made.py_func.__qualname__ for made in _kernels if sum(made.stats.cache_misses.values())]


def count() -> int:
    """How many kernels the modules imported so far have."""
    return len(_kernels)


def watch_compiles(listener: Callable[[], None]) -> None:
    """Have ``listener`` called after each kernel that this process compiles."""
    _listeners.append(listener)


@cache
def current_key() -> str:
    """The key of this process's code and machine."""
    versions = {
        "python": sys.version,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
    }
    features = _config.CPU_FEATURES
    if features is None:
        features = llvmlite.binding.get_host_cpu_features().flatten()
    machine = {"triple": llvmlite.binding.get_process_triple(), "cpu": cpu_name(), "features": features}
    options = {name: str(getattr(_config, name, None)) for name in _CODE_OPTIONS}
    return key_of(kernel_sources(_WORKERS), versions | machine | options | {"folder": str(_WORKERS)})


def cpu_name() -> str:
    """The CPU that kernels are compiled for, as LLVM calls it."""
    return str(_config.CPU_NAME or llvmlite.binding.get_host_cpu_name())


def key_of(sources: Mapping[str, bytes], facts: Mapping[str, str]) -> str:
    """The name of the folder for such sources (by path) and facts about versions and machine: 16 hex digits."""
    digest = hashlib.sha256()
    for part in (sources, facts):
        digest.update(len(part).to_bytes(8, "little"))
        for name in sorted(part):
            value = part[name]
            for data in (name.encode(), value if isinstance(value, bytes) else value.encode()):
                digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


_IMPORT = re.compile(r"^from headwise\.workers(?:\.([\w.]+))? import (?:\(([^)]*)\)|(.*))", re.MULTILINE)


def kernel_sources(workers: Path) -> dict[str, bytes]:
    """What kernels are made from: the modules that use Numba, LLVM or this one; those of cpu/, which make the kernels'
    arguments; and what all these import of ours.

    Imports inside functions are not followed: nothing compiled comes that way.
    """
    everything = {path.relative_to(workers).as_posix(): path.read_bytes() for path in sorted(workers.rglob("*.py"))}
    uses = re.compile(rb"\b(numba|llvmlite|kernel_cache)\b")
    todo = [path for path, source in everything.items() if path.startswith("cpu/") or uses.search(source)]
    found: dict[str, bytes] = {}
    while todo:
        path = todo.pop()
        if path in everything and path not in found:
            found[path] = everything[path]
            for module, names, names_on_line in _IMPORT.findall(everything[path].decode()):
                folder = module.replace(".", "/")
                todo += [f"{folder}.py", f"{folder}/__init__.py"]
                todo += [f"{folder}/{name}.py".lstrip("/") for name in re.findall(r"\w+", names or names_on_line)]
    return found


def _prune(current: Path) -> None:
    """Delete the folders beside the current one but for the FOLDERS_KEPT last used and those in use now."""
    with contextlib.suppress(OSError):  # another process may do so at the same time
        others = [folder for folder in current.parent.iterdir() if (folder / _IN_USE).is_file() and folder != current]
        others.sort(key=lambda folder: (folder / _IN_USE).stat().st_mtime, reverse=True)
        for folder in others[FOLDERS_KEPT:]:
            with (folder / _IN_USE).open("a") as in_use:
                if _flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(folder, ignore_errors=True)


def _name_of(options: Mapping[str, Any]) -> str:
    ordered = {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in options.items()}
    return hashlib.sha256(repr(sorted(ordered.items())).encode()).hexdigest()[:8]


class _Forgiving:
    """Numba's cache of one kernel, but a file that cannot be read or written costs a compile and not the call."""

    def __init__(self, numbas: Any, lock: Path) -> None:
        self._numbas, self._lock = numbas, lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numbas, name)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return self._numbas.load_overload(sig, target_context)
        except Exception as error:  # whatever a torn file makes of unpickling
            _warn(f"a kernel in {self._numbas.cache_path} cannot be read ({error!r}) and is compiled anew")
            with contextlib.suppress(OSError):
                self._numbas.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            # Two processes that add to an index at once would give one file two meanings.
            with self._lock.open("a") as lock:
                _flock(lock, fcntl.LOCK_EX)
                self._numbas.save_overload(sig, data)
        except OSError as error:
            _warn(f"a kernel cannot be kept in {self._numbas.cache_path} ({error}) and will be compiled again")
        for listener in _listeners:
            listener()


def _flock(file: IO[str], operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except OSError:  # held by another, or a file system without locks
        return False
    return True


_warnings: list[str] = []


def _warn(what: str) -> None:
    """One line on stderr a process: what is true of one kernel is true of all."""
    _warnings.append(what)
    if len(_warnings) == 1:
        fix = "free space there, or set HEADWISE_CACHE to a directory that can be written"
        print(f"headwise: {what}; {fix}", file=sys.stderr)
