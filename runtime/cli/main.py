"""The command line: ``headwise generate | chat | serve | submit | status | scale | restart | drain | plan | doctor |
calibrate | convert | warmup | bench | chaos``.

Exit codes: 0 done; 1 the run failed; 2 bad input, flag or model; 3 a shard died; 4 a Ray cluster does not run a job;
130 interrupted. ``submit`` has those of the command that it runs, and 143 if somebody else stopped it.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated

import typer

from headwise.runtime.cli.bench import bench
from headwise.runtime.cli.calibrate import calibrate
from headwise.runtime.cli.chaos import chaos
from headwise.runtime.cli.chat import chat
from headwise.runtime.cli.convert import convert
from headwise.runtime.cli.deployment import drain, restart, scale
from headwise.runtime.cli.doctor import doctor
from headwise.runtime.cli.generate import generate
from headwise.runtime.cli.options import AsJson, FlagError
from headwise.runtime.cli.plan import plan
from headwise.runtime.cli.printing import print_json
from headwise.runtime.cli.serve import serve
from headwise.runtime.cli.status import status
from headwise.runtime.cli.submit import NOT_RUN, submit
from headwise.runtime.cli.warmup import warmup
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError, UnsupportedModelError

app = typer.Typer(
    name="headwise",
    help="""Llama inference on tensor-parallel Ray shards.

    Exit codes: 0 done; 1 it failed; 2 bad input, flag or model; 3 a shard, or a server's engine, died; 130 interrupted.
    """,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # Rich's tables cut long names; plain help never does
)
for command in (
    *(generate, chat, serve, submit, status, scale, restart, drain, plan, doctor),
    *(calibrate, convert, warmup, chaos),
):
    app.command()(command)
app.add_typer(bench, name="bench")

_VERSIONS = ("headwise", "ray", "torch", "grpcio")


@app.callback(invoke_without_command=True)
def about(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    if version:
        versions = {package: metadata.version(package) for package in _VERSIONS}
        if as_json:
            print_json(versions | {"python": platform.python_version()})
        else:
            print(f"headwise {versions['headwise']}")
        raise typer.Exit
    if as_json:
        raise FlagError("--json", "is for a command, or for --version", "write it after the command's name")
    if ctx.invoked_subcommand is None:
        raise FlagError("a command", "is missing", "headwise --help lists them")


def main() -> None:
    """The entry point: runs a command and turns its errors into a line on stderr and an exit code."""
    with _exit_codes():
        app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    from headwise.cluster.group import ShardGroupDied
    from headwise.cluster.jobs import JobServerError

    codes: list[tuple[type[BaseException] | tuple[type[BaseException], ...], int]] = [
        ((FlagError, InvalidValueError, UnsupportedModelError, CheckpointError), 2),
        (ShardGroupDied, 3),
        (JobServerError, NOT_RUN),
        (HeadwiseError, 1),
    ]
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(next(code for kinds, code in codes if isinstance(error, kinds)))
