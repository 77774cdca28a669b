"""Headwise's folder for what is made once and kept: converted models, compiled kernels."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.workers.private_files import make_private_folder, make_shared_parent, take_back


def cache_directory() -> Path:
    """``$HEADWISE_CACHE``, else ``headwise`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("HEADWISE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "headwise"


def cache_folder(*names: str) -> Path:
    """A folder in :func:`cache_directory` that only this user may enter, made if it is not there: code is loaded from
    there, and models.

    Raises:
        InvalidValueError: another user could put something there.
        OSError: it cannot be made.
        RuntimeError: there is no home.
    """
    folder = cache_directory()
    for name in names:
        take_back(folder)
        make_shared_parent(folder, "HEADWISE_CACHE")
        folder = folder / name
    # A link of the user's own, such as one to a larger disk, is followed.
    is_own_link = folder.is_symlink() and folder.lstat().st_uid in (0, os.geteuid())
    make_private_folder(folder.resolve() if is_own_link else folder, "HEADWISE_CACHE")
    return folder


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold an exclusive lock on a file; it ends with the process, however that ends.

    Args:
        work: what is done under the lock, for the line on stderr where another process holds it: ``converts x``.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that {work}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
