"""Compiling the CPU kernels ahead, with what a user sees of it; workers/warmup.py does the work."""

from __future__ import annotations

import sys

import numba
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headwise.workers.jit.kernel_cache import cpu_name, kernel_folder, kernels_ready
from headwise.workers.warmup import WarmUpError, ensure_warm

_ABOUT_S = 25


def compile_kernels(quiet: bool = False) -> bool:
    """Compiles what this machine's kernel folder lacks; returns whether there was anything to do.

    Args:
        quiet: nothing on stderr.

    Raises:
        WarmUpError: nothing was kept; kernels are then compiled when they are first called.
    """
    if quiet or kernel_folder() is None or kernels_ready():
        return ensure_warm(quiet=quiet)
    machine = f"{cpu_name()} (Numba {numba.__version__})"
    print(f"headwise: compiling CPU kernels for {machine}, once; about {_ABOUT_S} s", file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return ensure_warm(lambda done, total: bar.update(task, completed=done, total=total))


def prepare_kernels(quiet: bool) -> None:
    """As :func:`compile_kernels`, before shards start: without a folder for them, they compile for themselves."""
    if kernel_folder() is None:
        return
    try:
        compile_kernels(quiet)
    except WarmUpError as error:
        if not quiet:
            print(f"headwise: {error}; they are compiled when first called", file=sys.stderr)
