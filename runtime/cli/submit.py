"""``headwise submit``: another command of ours, as a job on a Ray cluster."""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.runtime.cli.options import AsJson, FlagError, option
from headwise.runtime.cli.printing import print_json, write

if TYPE_CHECKING:
    from headwise.cluster.jobs import JobServer, JobState

INTERRUPTED, STOPPED, NOT_RUN, NOT_FOUND = 130, 143, 4, 127
"""Exit codes: Ctrl-C, here; stopped by somebody else; the job server is out of reach, or did not run the command; and
the shell's, for a command that is not there."""
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def submit(
    command: Annotated[
        list[str],
        typer.Argument(hidden=True),
    ],
    address: Annotated[
        str | None,
        option(
            "url",
            "The head's dashboard; default: http://127.0.0.1:8265.",
            envvar="RAY_API_SERVER_ADDRESS",
        ),
    ] = None,
    checkout: Annotated[
        Path | None,
        option(
            "folder",
            "Build a wheel of this checkout, and run that; nodes need what it depends on. Default: what nodes have.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        option(
            "folder",
            "Copy this folder there, and run the command in the copy. Default: where Ray was started.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        option("name=value", "A variable of the job, which Ray keeps in clear text; may be given several times."),
    ] = None,
    job_id: Annotated[
        str | None, option("name", "The job's name, which none there ever had; default: a new one.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show its output until it ends.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a command on a Ray cluster, as a job.

    After -- comes the command, as it would after headwise: -- serve --model smollm2. Files that it names are those of
    the cluster's head.

    What the job writes is shown on stdout; with --json one object is on stdout in the end, and the rest on stderr.
    Ctrl-C stops the job, which drains as by SIGTERM; the second one leaves at once. A Ray that asks for a token gets
    that of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token.

    The exit code is the command's own; 130 after Ctrl-C; 143 if somebody else stopped the job; 4 if the cluster cannot
    be reached, or could not run the command.
    """
    from headwise.cluster.jobs import Job, JobServerError
    from headwise.cluster.ray_jobs import RayJobServer, without_password
    from headwise.runtime.jobs.checkout import packages_of
    from headwise.runtime.jobs.command import (
        job_environment,
        relative_output,
        secret_flags,
        secret_names,
        shell_command,
    )

    words = command[1:] if command[0] == "headwise" else command
    if not words or words[0] == "submit":
        raise FlagError("COMMAND", "must be another command of headwise", "such as: -- serve --model …")
    if job_id is not None and not _ID.fullmatch(job_id):
        limit = "has 1 to 128 letters, digits, dots, dashes and underscores, and begins with none of . and -"
        raise FlagError("--job-id", limit, "give another")
    if working_dir is not None and (lost := relative_output(words)):
        fix = "give a path from / on, of a disk that stays"
        raise FlagError("--output", f"{lost} would be in the copy of --working-dir, which goes when the job ends", fix)
    environment = job_environment(env or (), words)
    if names := [*secret_names(environment), *secret_flags(words)]:
        _say(f"{', '.join(names)}: Ray keeps this in clear text, for all who may ask it about jobs; use a file instead")
    address = address or "http://127.0.0.1:8265"
    server = RayJobServer(address)
    if job_id is not None and server.has(job_id):  # before Ctrl-C could stop that one
        raise JobServerError(f"--job-id={job_id}: there is a job of this name, or was; give another name")
    name = job_id or f"headwise-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="headwise-submit-") as folder:
        packages = packages_of(checkout, Path(folder)) if checkout is not None else ()
        job = Job(name, shell_command(words, bool(packages)), environment, packages, working_dir)
        with _stopped_by_ctrl_c(server, name):
            server.submit(job)
    with _stopped_by_ctrl_c(server, name):
        if not wait:
            print_json({"job_id": name, "address": without_password(address)}) if as_json else print(name)
            return
        _say(f"job {name} is submitted; Ctrl-C stops it")
        state, stopped = asyncio.run(_follow(server, name, as_json))
    if state is None:
        raise KeyboardInterrupt
    code = exit_code(state, stopped)
    _say(ending(name, state, stopped))
    if as_json:
        about = {"job_id": name, "status": state.status, "exit_code": state.exit_code, "stopped_here": stopped}
        print_json(about)
    sys.exit(code)


def exit_code(state: JobState, stopped_here: bool) -> int:
    """Of a job that has ended. A command that a signal ended has 128 more than the signal's number."""
    if state.status == "STOPPED":
        return INTERRUPTED if stopped_here else STOPPED
    if state.status == "SUCCEEDED":
        return 0
    if not state.exit_code:
        return NOT_RUN
    return state.exit_code if state.exit_code > 0 else 128 - state.exit_code


def ending(name: str, state: JobState, stopped_here: bool) -> str:
    """A sentence about it."""
    if state.status == "STOPPED":
        return f"job {name} was stopped{'' if stopped_here else ' by somebody else'}"
    if state.status == "SUCCEEDED":
        return f"job {name} is done"
    if not state.exit_code:
        return f"job {name} did not run: {state.message.strip()[-1000:]}"
    hint = ""
    if state.exit_code == NOT_FOUND:
        hint = ": no headwise on the PATH that Ray was started with; start Ray from its environment, or give --checkout"
    return f"job {name} failed with exit code {exit_code(state, False)}{hint}"


@contextmanager
def _stopped_by_ctrl_c(server: JobServer, name: str) -> Iterator[None]:
    """Ctrl-C stops the job while nothing else listens for it."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"stopping job {name}")
        with suppress(Exception):  # it may have begun, or not
            server.stop(name)
        raise


async def _follow(server: JobServer, name: str, as_json: bool) -> tuple[JobState | None, bool]:
    """How the job ended, None if the user did not wait for that; and whether it was stopped from here.

    Raises:
        KeyboardInterrupt: Ctrl-C came before this listened for it.
    """
    from headwise.cluster.jobs import JobServerError, follow

    loop, presses = asyncio.get_running_loop(), 0
    stopping: set[asyncio.Task[None]] = set()
    following = asyncio.ensure_future(follow(server, name, _to_stderr if as_json else write))

    async def stop() -> None:
        try:
            await asyncio.to_thread(server.stop, name)
        except JobServerError as error:
            _say(f"{error}; the job goes on: ray job stop {name}")

    def interrupt() -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            _say(f"stopping job {name}; Ctrl-C again leaves at once")
            stopping.add(loop.create_task(stop()))
        else:
            following.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await following, presses > 0
    except asyncio.CancelledError:
        if not presses:
            raise KeyboardInterrupt from None
        _say(f"job {name} may go on for a while: ray job status {name}")
        return None, True
    except JobServerError as error:
        raise JobServerError(f"{error}; the job may go on: ray job status {name}") from error
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _say(text: str) -> None:
    print(f"headwise: {text}", file=sys.stderr, flush=True)
