"""Failpoints: named places where a fault can be made to happen, to see what comes of it.

They are off, and cost a look at a constant, unless the environment variable HEADWISE_FAILPOINTS names a folder when a
process starts (or :func:`use` does). The folder must be this user's own: whoever can write to it can stop the engine.
No request reaches it. A file in it *arms* a point: :func:`arm` writes one, and whichever process on this host comes to
the point first takes it away, so that it fires once in all of them, also in those of a group that is started later.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import itertools
import json
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from headwise.workers.errors import HeadwiseError, InvalidValueError

VARIABLE = "HEADWISE_FAILPOINTS"


class Point(enum.StrEnum):
    """Every place where a fault can be made to happen."""

    ENGINE_SUBMIT = "engine.submit"
    """The engine has planned a step, and not sent it."""
    ENGINE_SUBMITTED = "engine.submitted"
    """The engine has sent a step to every rank."""
    ENGINE_OUTPUT = "engine.output"
    """The engine has a step's output, and has processed nothing of it."""
    RECOVERY_CLOSE = "recovery.close"
    """A group that has died is closed."""
    RECOVERY_START = "recovery.start"
    """The next group is about to be started."""
    RECOVERY_RESUME = "recovery.resume"
    """The next group is ready, and no request has gone on."""
    CHANNEL_PLAN = "channel.plan"
    """A step's plan is about to be sent to a rank, which ``rank`` names. The message may be dropped."""
    RANK_REPLY = "rank.reply"
    """A rank has computed a step. On rank 0 its output, which may be dropped, has not been sent."""
    STEP_TOKEN = "step.token"
    """A rank is about to compute a step with a row that holds a token, with which the point must be armed."""
    STEP_ATTENTION = "step.attention"
    """A rank has computed its part of a layer's attention half; the ranks have not added up."""
    STEP_MLP = "step.mlp"
    """As STEP_ATTENTION, of the layer's MLP half."""
    COLLECTIVE_ENTER = "collective.enter"
    """A rank is about to show the others its part of a sum or another exchange, in shared memory."""
    COLLECTIVE_LEAVE = "collective.leave"
    """A rank has what every rank has shown; others may still be reading."""
    LOAD_LAYER = "load.layer"
    """A rank has loaded a layer's weights."""
    ALLOCATE = "allocate"
    """A rank has its weights, and no KV memory."""
    KV_COPY = "kv.copy"
    """A rank is about to copy a block between its device and a tier, or from tier to tier."""
    KV_WRITE = "kv.write"
    """The disk tier has written the head of a block's file, which has not its name yet, and no keys and values."""
    KV_JOURNAL = "kv.journal"
    """The disk tier has written a block's file, and no record of it."""
    HANDOFF_PUSH = "handoff.push"
    """A rank of a prefill engine is about to read blocks that it sends."""
    HANDOFF_RECEIVE = "handoff.receive"
    """A rank of a decode engine has a message of KV, and has written nothing of it."""
    HANDOFF_COMMIT = "handoff.commit"
    """A prefill engine is about to answer that a transfer is through."""


class Action(enum.StrEnum):
    """What happens at a point."""

    KILL = "kill"
    """SIGKILL to the process."""
    STOP = "stop"
    """SIGSTOP to the process, until somebody sends it SIGCONT."""
    EXIT = "exit"
    """The process exits with 1, without cleaning up."""
    RAISE = "raise"
    """:class:`FailpointError` is raised."""
    NO_SPACE = "no-space"
    """OSError with ENOSPC is raised, as by a full disk."""
    SLEEP = "sleep"
    """The thread sleeps: a slow disk, a message that comes late."""
    DROP = "drop"
    """The message at the point is not sent."""


DROPPABLE = frozenset({Point.CHANNEL_PLAN, Point.RANK_REPLY})
"""Where there is a message to drop."""


class FailpointError(HeadwiseError):
    """A failpoint was armed to raise this."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What an armed point does.

    Attributes:
        skip: how many hits pass before it fires.
        seconds: of SLEEP.
        token: of STEP_TOKEN.
        stays: it fires at every hit, until it is disarmed.
    """

    action: Action
    skip: int = 0
    seconds: float = 0.0
    token: int | None = None
    stays: bool = False


@dataclass(frozen=True, slots=True)
class Fired:
    """A fault that happened: the point, the action, the process, and when, on this host's monotonic clock."""

    point: Point
    action: Action
    pid: int
    at: float


def use(folder: Path) -> None:
    """Turns failpoints on in this process, and in those that it starts from now on, as the environment variable does.

    Raises:
        InvalidValueError: the folder is not there, not this user's own, or others may enter it.
    """
    global ENABLED, _folder
    _folder = _checked(folder)
    ENABLED = True
    os.environ[VARIABLE] = str(folder)


def environment() -> dict[str, str]:
    """What turns failpoints on in a process that is started with it, as they are on here."""
    return {VARIABLE: str(_folder)} if _folder is not None else {}


def leave() -> None:
    """Undoes :func:`use` in this process."""
    global ENABLED, _folder
    ENABLED, _folder = False, None
    os.environ.pop(VARIABLE, None)


def arm(folder: Path, point: Point, fault: Fault, rank: int | None = None) -> None:
    """
    Args:
        folder: what HEADWISE_FAILPOINTS names in the processes that are meant.
        rank: only there; None is whoever comes first.

    Raises:
        InvalidValueError: the action has nothing to do at the point.
        OSError: the folder cannot be written.
    """
    if fault.action is Action.DROP and point not in DROPPABLE:
        raise InvalidValueError("action", fault.action, f"there is no message at {point}")
    if (fault.token is None) == (point is Point.STEP_TOKEN):
        raise InvalidValueError("token", fault.token, f"belongs to {Point.STEP_TOKEN}, and to no other point")
    with _lock(folder):
        _put(folder, _file_name(point, rank), json.dumps(asdict(fault)))


def disarm(folder: Path) -> None:
    """No point is armed any more; what has fired stays known."""
    with _lock(folder):
        for name in armed(folder):
            (folder / name).unlink()


def armed(folder: Path) -> list[str]:
    """The points that have not fired; with ``@rank`` where they are meant for one."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith((_FIRED, _HIDDEN)))


def fired(folder: Path) -> list[Fired]:
    """What has fired, in order. A process that is killed by its fault is in it."""
    found = []
    for path in folder.glob(f"{_FIRED}*"):
        point, action, pid, at = json.loads(path.read_text())
        found.append(Fired(Point(point), Action(action), pid, at))
    return sorted(found, key=lambda one: one.at)


def hit(point: Point, rank: int | None = None, holds: Callable[[int], bool] = lambda token: False) -> bool:
    """A process has come to a point. Call it only where ENABLED is true.

    Args:
        rank: whose thread this is; None where the place does not know.
        holds: whether a row of the step holds a token; of STEP_TOKEN.

    Returns:
        Whether the message at the point is to be dropped.

    Raises:
        FailpointError, OSError: as armed.
    """
    assert _folder is not None, "ENABLED comes first"
    for name in dict.fromkeys((_file_name(point, rank), point.value)):
        fault = _take(_folder, point, name, holds)
        if fault is not None:
            return _act(point, fault)
    return False


_FIRED, _HIDDEN = "fired-", "."
_numbers = itertools.count()


def _file_name(point: Point, rank: int | None) -> str:
    return point.value if rank is None else f"{point.value}@{rank}"


def _take(folder: Path, point: Point, name: str, holds: Callable[[int], bool]) -> Fault | None:
    """The fault, if the point is armed by this name and fires now. That is noted before it happens, for the process may
    not be there afterwards."""
    path = folder / name
    if not path.exists():  # as a rule
        return None
    with _lock(folder):
        try:
            fault = _read(path)
        except FileNotFoundError:  # since it was looked for
            return None
        if fault.token is not None and not holds(fault.token):
            return None
        if fault.skip:
            _put(folder, name, json.dumps(asdict(fault) | {"skip": fault.skip - 1}))
            return None
        pid = os.getpid()
        _put(folder, f"{_FIRED}{pid}-{next(_numbers)}", json.dumps((point, fault.action, pid, time.monotonic())))
        if not fault.stays:
            path.unlink()
        return fault


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps all others, also of other processes, from what is armed. It ends with the process, if that is killed."""
    with open(folder / f"{_HIDDEN}lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Fault:
    fields = json.loads(path.read_text())
    return Fault(**fields | {"action": Action(fields["action"])})


def _act(point: Point, fault: Fault) -> bool:
    pid = os.getpid()
    match fault.action:
        case Action.KILL:
            os.kill(pid, signal.SIGKILL)
        case Action.STOP:
            os.kill(pid, signal.SIGSTOP)
        case Action.EXIT:
            os._exit(1)
        case Action.RAISE:
            raise FailpointError(f"the failpoint {point} was armed to raise this")
        case Action.NO_SPACE:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (the failpoint {point})")
        case Action.SLEEP:
            time.sleep(fault.seconds)
        case Action.DROP:
            return True
    return False


def _put(folder: Path, name: str, text: str) -> None:
    """Under another name first: whoever reads it finds all of it."""
    descriptor, temporary = tempfile.mkstemp(prefix=f"{_HIDDEN}new-", dir=folder)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _checked(folder: Path) -> Path:
    try:
        state = folder.lstat()
    except OSError as error:
        raise InvalidValueError(VARIABLE, str(folder), f"cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or stat.S_IMODE(state.st_mode) & 0o077:
        limit = "must be a folder of this user's that nobody else may enter"
        raise InvalidValueError(VARIABLE, str(folder), limit, f"chmod 700 {folder}")
    return folder


ENABLED = bool(os.environ.get(VARIABLE))
"""Whether any point can fire in this process."""

_folder: Path | None = _checked(Path(os.environ[VARIABLE])) if ENABLED else None
