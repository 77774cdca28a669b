"""How every benchmark says what it found: a table or JSON lines, with the machine and the versions it holds for."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from headwise.workers.machine import usable_cores

PACKAGES = ("torch", "numba", "ray", "headwise")


def machine() -> dict[str, Any]:
    """The CPU's name, the cores this process may use, and the memory in GiB."""
    return {
        "cpu": _cpu_name(Path("/proc/cpuinfo")),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide how fast a step is; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # Ray may be missing: executor="local" works without
            continue
    return found


def emit(
    benchmark: str,
    model: str,
    settings: dict[str, Any],
    results: Sequence[dict[str, Any]],
    tables: Sequence[Table],
    *,
    as_json: bool,
    fraction_of_bound: dict[str, float] | None = None,
    **summary: Any,
) -> None:
    """Prints the results on stdout.

    Args:
        fraction_of_bound: by case, what was reached of the machine's own limit; None where there is no bound.
        summary: what else the closing JSON object says.

    With ``as_json``, a line a result and a closing line with the benchmark, the model, its settings, the machine, the
    versions and, where there is a bound, ``fraction_of_bound``; else the tables and a line about the machine.
    """
    about = machine()
    if not as_json:
        console = Console()
        for table in tables:
            console.print(table)
        console.print(f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB", style="dim")
        return
    closing = {"benchmark": benchmark, "model": model, "settings": settings, **summary}
    closing |= {"machine": about, "versions": versions()}
    if fraction_of_bound is not None:
        closing["fraction_of_bound"] = fraction_of_bound
    for line in (*results, closing):
        print(json.dumps(line), flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """Cells aligned to the right, but for the first column."""
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    return made


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"


def _cpu_name(cpuinfo: Path) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
