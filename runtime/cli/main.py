"""The command line: ``headwise generate | chat | serve | plan | doctor | warmup | bench | chaos``.

Exit codes: 0 done; 1 the run failed; 2 bad input, flag or model; 3 a shard died; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from headwise.runtime.cli.bench import bench
from headwise.runtime.cli.chaos import chaos
from headwise.runtime.cli.chat import chat
from headwise.runtime.cli.doctor import doctor
from headwise.runtime.cli.generate import generate
from headwise.runtime.cli.options import FlagError
from headwise.runtime.cli.plan import plan
from headwise.runtime.cli.serve import serve
from headwise.runtime.cli.warmup import warmup
from headwise.workers.errors import CheckpointError, HeadwiseError, InvalidValueError, UnsupportedModelError

app = typer.Typer(
    name="headwise",
    help="Llama inference on tensor-parallel Ray shards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # Rich's tables cut long names; plain help never does
)
for command in (generate, chat, serve, plan, doctor, warmup, chaos):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """The entry point: runs a command and turns its errors into a line on stderr and an exit code."""
    with _exit_codes():
        app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    from headwise.cluster.group import ShardGroupDied

    codes: list[tuple[type[BaseException] | tuple[type[BaseException], ...], int]] = [
        ((FlagError, InvalidValueError, UnsupportedModelError, CheckpointError), 2),
        (ShardGroupDied, 3),
        (HeadwiseError, 1),
    ]
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(next(code for kinds, code in codes if isinstance(error, kinds)))
