"""A job server without a cluster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

from headwise.cluster.jobs import Job, JobServer, JobServerError, JobState


class FakeJobServer(JobServer):
    """A job writes ``text`` and ends with ``end``; with an end of None, it runs until it is stopped.

    Attributes:
        jobs: that were submitted.
        stopped: is set by the first stop.
        breaks: after how many pieces of text each connection to the logs breaks; each is used once.
        lost: whether nothing answers.
        silent: how many connections to the logs bring nothing and never end.
    """

    def __init__(self, text: tuple[str, ...] = (), end: JobState | None = None, breaks: tuple[int, ...] = ()) -> None:
        self.text, self.end, self.breaks = text, end, list(breaks)
        self.jobs: list[Job] = []
        self.stopped, self.lost, self.silent = threading.Event(), False, 0
        self.on_logs: Callable[[], None] = lambda: None

    def submit(self, job: Job) -> None:
        if any(job.id == other.id for other in self.jobs):
            raise JobServerError("does not take the job: it is there already")
        self.jobs.append(job)

    def has(self, job_id: str) -> bool:
        return any(job_id == job.id for job in self.jobs)

    def state(self, job_id: str) -> JobState:
        if self.lost:
            raise JobServerError("does not answer")
        if self.breaks:
            return JobState("RUNNING")
        return self.end or (JobState("STOPPED") if self.stopped.is_set() else JobState("RUNNING"))

    def stop(self, job_id: str) -> None:
        self.stopped.set()

    async def logs(self, job_id: str) -> AsyncIterator[str]:
        self.on_logs()
        if self.lost:
            raise JobServerError("does not answer")
        if self.silent:
            self.silent -= 1
            await asyncio.Event().wait()
        end = self.breaks.pop(0) if self.breaks else None
        for text in self.text[:end]:
            yield text
        if end is not None:
            raise JobServerError("the connection broke")
        while self.end is None and not self.stopped.is_set():
            await asyncio.sleep(0.01)
