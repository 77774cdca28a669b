"""Ray's job server, over HTTP: no Ray runs in the process that asks it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobSubmissionClient

from headwise.cluster.jobs import Job, JobServer, JobServerError, JobState
from headwise.workers.errors import InvalidValueError

TIMEOUT_S = 30.0
"""For the job server to take a connection, and for each of its answers."""
_FAILURES = (OSError, RuntimeError, ValueError, RayError, requests.exceptions.RequestException, aiohttp.ClientError)
_NO_TOKEN = "asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
_OTHER_TOKEN = "asks for a token, and does not know that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): (.+)$", re.MULTILINE)
_USER = re.compile(r"://[^/\s]*@")
_CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")


class RayJobServer(JobServer):
    """The job server at an address. Ray's own token goes along where RAY_AUTH_MODE=token."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: ``http://host:port`` or ``https://…`` of the dashboard on the cluster's head.

        Raises:
            InvalidValueError: the address is of another form.
            JobServerError: no job server answers there, or it does not let this user in.
        """
        if not address.startswith(("http://", "https://")):
            limit = "must be that of the head's dashboard, as a URL"
            raise InvalidValueError("--address", without_password(address), limit, "such as http://head:8265")
        self._address = address
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._failures("does not answer"), _no_other_address():
            self._client = _Client(address)

    def submit(self, job: Job) -> None:
        environment: dict[str, Any] = {"env_vars": dict(job.environment)}
        if job.packages:
            environment["py_modules"] = [str(path) for path in job.packages]
        if job.working_dir is not None:
            environment["working_dir"] = str(job.working_dir)
        with self._failures("does not take the job"):
            try:
                self._client.submit_job(entrypoint=job.command, submission_id=job.id, runtime_env=environment)
            except (requests.exceptions.Timeout, requests.exceptions.ConnectionError) as error:
                raise RuntimeError(f"{error}; the job may have begun: ray job status {job.id}") from error

    def has(self, job_id: str) -> bool:
        with self._failures("does not say whether there is a job of that name"):
            return self._client.has_job(job_id)

    def state(self, job_id: str) -> JobState:
        with self._failures("does not say how the job is"):
            details = self._client.get_job_info(job_id)
        return JobState(str(details.status.value), details.driver_exit_code, details.message or "")

    def stop(self, job_id: str) -> None:
        with self._failures("does not stop the job"):
            self._client.stop_job(job_id)

    async def logs(self, job_id: str) -> AsyncIterator[str]:
        with self._failures("does not give the job's logs"):
            async for text in self._client.tail_job_logs(job_id):
                yield text

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            said = _OTHER_TOKEN if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else _NO_TOKEN
            raise JobServerError(f"--address={without_password(self._address)}: {said}") from error
        except _FAILURES as error:
            # Of a traceback that the server sends, the line that says what was wrong.
            cause = (_CAUSE.findall(str(error)) or [str(error)])[-1]
            raise JobServerError(without_password(f"--address={self._address}: {what}: {cause}")) from error


def without_password(text: str) -> str:
    """A text with the user and password of each URL in it left out."""
    return _USER.sub("://...@", text)


class _Client(JobSubmissionClient):
    """Ray's own waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S} | options)

    def has_job(self, job_id: str) -> bool:
        response = self._do_request("GET", f"/api/jobs/{job_id}")
        if response.status_code not in (200, 404):
            self._raise_error(response)
        return bool(response.status_code == 200)


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray takes the address of these variables before the one that it is given."""
    held = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in held.items() if value is not None})
