"""Which Ray this process talks to: one it was told to join, or one it started and will end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
import ray._private.worker as ray_worker
from ray._private.state import actors as actor_table  # there is no public way without a dashboard
from ray.exceptions import RayError
from ray.util import placement_group_table

from headwise.cluster.group import GroupStartError
from headwise.workers import failpoints
from headwise.workers.machine import usable_cores

OBJECT_STORE_BYTES = 100 << 20
"""Of a Ray started here. Headwise puts next to nothing into it: steps have a channel of their own."""

_logger = logging.getLogger(__name__)

_lock = threading.Lock()
_users = 0
_started_here = False
_inherited: dict[str, str] = {}
_ended = threading.Event()  # of the Ray that was started here
_print = ray_worker.print_to_stdstream


def join(address: str | None) -> None:
    """Connects to the Ray at ``address`` or RAY_ADDRESS; with neither, to the one this process already uses; else
    starts one on this machine, without a dashboard. Each join is followed by one :func:`leave`.

    Raises:
        GroupStartError: no Ray answers there.
    """
    global _users, _started_here, _inherited, _ended
    with _lock:
        if not ray.is_initialized():
            target = address or os.environ.get("RAY_ADDRESS")
            if target:
                try:
                    ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR)
                except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # of a token, the last
                    raise GroupStartError(f"no Ray at address={target!r} (--address, RAY_ADDRESS): {error}") from error
            else:
                _ended = threading.Event()
                _on_a_thread_that_stays(_start, _ended)
                _started_here, _inherited = True, failpoints.environment()
            _keep_from_stdout()
        _users += 1


def leave() -> None:
    """The last to leave a Ray that was started here ends it."""
    global _users, _started_here, _inherited
    with _lock:
        _users -= 1
        if _users == 0 and _started_here:
            _started_here, _inherited = False, {}
            try:
                ray.shutdown()
            finally:
                _ended.set()


def _start() -> None:
    ray.init(
        address="local",
        num_cpus=usable_cores(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE_BYTES,
    )


def _on_a_thread_that_stays(function: Callable[[], None], over: threading.Event) -> None:
    """Runs a function that starts processes, on a thread that stays until they are ``over``. Ray has Linux kill its
    processes when the thread that started them ends, so that a program that makes its model on a thread, and uses it
    on another, would lose its Ray."""
    if threading.current_thread() is threading.main_thread():
        function()
        return
    done = Future[None]()

    def run() -> None:
        try:
            function()
        except BaseException as error:
            done.set_exception(error)
            return
        done.set_result(None)
        over.wait()

    threading.Thread(target=run, name="headwise-ray", daemon=True).start()
    done.result()


def _keep_from_stdout() -> None:
    """Ray prints on stdout that a process of its own has died, also with log_to_driver=False; what a program prints
    there is nobody else's. Whoever loses a process says so in the log. A Ray that the program itself starts later
    prints what it likes."""
    connection = _connection()

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        if _connection() != connection:
            _print(data, ignore_prefix)
            return
        for line in data["lines"]:
            _logger.debug("Ray: %s", line)

    ray_worker.print_to_stdstream = log


def _connection() -> bytes | None:
    """Tells one of this process's connections to a Ray from another; None while there is none."""
    return getattr(ray_worker.global_worker, "worker_id", None)


def living() -> list[str]:
    """The actors and placement groups of this program that its Ray has, for people; empty where it has left Ray."""
    if not ray.is_initialized():
        return []
    job = ray.get_runtime_context().get_job_id()
    actors = [one for one in actor_table().values() if one["JobID"] == job and one["State"] != "DEAD"]
    # The id of a placement group ends in that of its program, which is not told otherwise.
    own = [one for one in placement_group_table().values() if one["placement_group_id"].endswith(job)]
    groups = [one for one in own if one["state"] != "REMOVED"]
    return [f"actor {one['ActorClassName']} (pid {one['Pid']}, {one['State']})" for one in actors] + [
        f"placement group {one['placement_group_id']} ({one['state']})" for one in groups
    ]


def rank_environment() -> dict[str, Any] | None:
    """Ray's ``runtime_env`` of a rank: what failpoints need, where the Ray was started before they were on. Processes
    with an environment of their own take longer to start."""
    environment = failpoints.environment()
    return {"env_vars": environment} if environment and environment != _inherited else None
