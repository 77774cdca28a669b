"""How far a batch is, on stderr: a bar where that is a terminal, else a line now and then."""

from __future__ import annotations

import asyncio
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from headwise.runtime.batch.run import Summary

BAR_S, LINE_S = 0.25, 10.0
"""Between two looks."""


async def show(summary: Summary) -> None:
    """Shows it until it is cancelled."""
    if not sys.stderr.isatty():
        while True:
            await asyncio.sleep(LINE_S)
            print(f"headwise: {summary.text()}", file=sys.stderr, flush=True)
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("lines  {task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=summary.lines)
        while True:
            rate = summary.completion_tokens / summary.seconds if summary.seconds else 0.0
            failed = f"{summary.failed} failed  " if summary.failed else ""
            bar.update(task, completed=summary.done, description=f"{failed}{rate:.0f} tokens/s")
            await asyncio.sleep(BAR_S)
