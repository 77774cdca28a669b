"""Folders and files that are this user's alone: what the disk tier holds tells prompts, and what is kept on disk is
computed with, compiled kernels too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from headwise.workers.errors import InvalidValueError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_shared_parent(path: Path, field: str) -> None:
    """Makes a folder for private ones, mode 0700, if it is not there; a link to a folder will do.

    Args:
        field: the setting that names it, for errors.

    Raises:
        InvalidValueError: another user could put something else in the place of what is in it.
        OSError: there is no such folder and none can be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    state = path.stat()
    if state.st_uid not in (0, os.geteuid()):
        raise _refusal(field, path, _owner(path, state), "give a folder of your own")
    # In one with the sticky bit, such as /tmp, only the owner of a file renames or deletes it.
    if state.st_mode & _OTHERS_WRITE and not state.st_mode & stat.S_ISVTX:
        raise _refusal(field, path, _writable(path, state), f"chmod go-w {path}, or give a folder in it")


def make_private_folder(path: Path, field: str) -> None:
    """Makes a folder that only this user may enter, or makes the one that is there so.

    Args:
        field: the setting that it lies under, for errors.

    Raises:
        InvalidValueError: the folder is another user's, others could have put files there, or it is no folder.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    state, fix = path.lstat(), "delete it, or give another folder"
    if not stat.S_ISDIR(state.st_mode):
        raise _refusal(field, path, f"{path} is a link", fix)
    if state.st_uid != os.geteuid():
        raise _refusal(field, path, _owner(path, state), fix)
    if state.st_mode & _OTHERS_WRITE:
        raise _refusal(field, path, _writable(path, state), fix)
    path.chmod(0o700)


def take_back(path: Path) -> None:
    """Lets nobody else write to a folder of this user's, if it is there, as one made under a lax umask is.

    Whatever others put there is theirs, and refused where it is used.
    """
    try:
        state = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and state.st_mode & _OTHERS_WRITE:
        path.chmod(stat.S_IMODE(state.st_mode) & ~_OTHERS_WRITE)


def private(path: str, flags: int) -> int:
    """As the ``opener`` of :func:`open`: makes files with mode 0600, and follows no link.

    Raises:
        OSError: the file cannot be opened, or is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def own_size(path: Path) -> int | None:
    """The bytes of a file of this user's; None if there is none, or if it is a link or another user's."""
    try:
        state = path.lstat()
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() else None


def _owner(path: Path, state: os.stat_result) -> str:
    return f"{path} belongs to another user (uid {state.st_uid}), who could read and replace what is kept there"


def _writable(path: Path, state: os.stat_result) -> str:
    mode = stat.S_IMODE(state.st_mode)
    return f"others can write to {path} (mode {mode:04o}), and could read and replace what is kept there"


def _refusal(field: str, path: Path, limit: str, fix: str) -> InvalidValueError:
    return InvalidValueError(field, str(path), limit, fix)
