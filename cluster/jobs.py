"""Jobs: commands that a Ray cluster runs on one of its nodes. What there is to ask of it, and how a job is followed."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from headwise.workers.errors import HeadwiseError

LOST_S = 60.0
"""How long a job server may be out of reach before whoever follows a job gives up."""
_BETWEEN_TRIES_S = 1.0
_SILENCE_S = 10.0
"""How long a connection to a job's logs may bring nothing before the server is asked how the job is."""


class JobServerError(HeadwiseError):
    """The job server cannot be reached, or refuses what it is asked."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run.

    Attributes:
        id: no other job of the cluster ever had it.
        command: for a shell on the cluster's head.
        environment: variables of the command, and of all that Ray starts for it. Ray keeps them in clear text.
        packages: folders whose parents Python looks for modules in; they are copied to every node.
        working_dir: a folder that is copied to every node, and where the command runs; None: where Ray was started.
    """

    id: str
    command: str
    environment: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[Path, ...] = ()
    working_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job is.

    Attributes:
        status: Ray's word: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: of the command; None where Ray does not tell: while it runs, if it was stopped, or never started.
        message: what Ray says about it.
    """

    status: str
    exit_code: int | None = None
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer(ABC):
    """The part of a Ray cluster that takes jobs. Every method raises JobServerError."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Starts a job; copies what it needs first."""

    @abstractmethod
    def has(self, job_id: str) -> bool:
        """Whether there is a job of that name, or was one."""

    @abstractmethod
    def state(self, job_id: str) -> JobState: ...

    @abstractmethod
    def stop(self, job_id: str) -> None:
        """Has a job end; returns at once. Ray sends SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""

    @abstractmethod
    def logs(self, job_id: str) -> AsyncIterator[str]:
        """What the command writes on stdout and stderr, from the beginning; ends with the job."""


async def follow(server: JobServer, job_id: str, write: Callable[[str], None]) -> JobState:
    """Hands out what a job writes, each piece once, until the job has ended; returns how it ended.

    Args:
        write: gets each piece of text.

    Raises:
        JobServerError: the server was out of reach for LOST_S. The job may go on.
    """
    written, answered = 0, time.monotonic()
    while True:
        try:
            read = 0
            async with aclosing(_pieces(server, job_id)) as pieces:
                async for text in pieces:
                    answered = time.monotonic()
                    read += len(text)
                    if read > written:  # after a new connection, the logs come from the beginning
                        write(text[written - read :])
                        written = read
            state = await asyncio.to_thread(server.state, job_id)
            if state.ended:
                return state
            answered = time.monotonic()
        except JobServerError:
            if time.monotonic() - answered > LOST_S:
                raise
        await asyncio.sleep(_BETWEEN_TRIES_S)


async def _pieces(server: JobServer, job_id: str) -> AsyncGenerator[str]:
    """What a connection to the job's logs brings; empty text where the job was seen to go on without writing.

    A machine that is gone, or a router that forgot a connection, says nothing of it: where nothing comes for a while,
    the server is asked how the job is.

    Raises:
        JobServerError: the connection broke, or brings nothing though the job has ended; another one may.
    """
    logs = server.logs(job_id)
    ended = False
    while True:
        piece = asyncio.ensure_future(anext(logs, None))
        try:
            while not (await asyncio.wait({piece}, timeout=_SILENCE_S))[0]:
                if ended:
                    raise JobServerError(f"the logs of job {job_id} do not end with it")
                ended = (await asyncio.to_thread(server.state, job_id)).ended
                yield ""
        finally:
            if not piece.done():
                piece.cancel()
                await asyncio.wait({piece})
        if (text := piece.result()) is None:
            return
        yield text
