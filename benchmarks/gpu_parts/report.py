"""What was measured as tables, and against the goals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

GOALS = (
    ("decode of 1 row, of a copy's bandwidth", 0.80),
    ("decode of 64 rows, of a copy's bandwidth", 0.70),
    ("attention alone, 8 rows of 32,768 tokens, of a copy's bandwidth", 0.80),
    ("prefill of 4,096 tokens in a step, of matrix products", 0.60),
    ("the device's share of a decode step", 0.97),
    ("tokens a second over those of transformers, 8 rows", 3.0),
)
"""Each with the least that reaches it; the others are what the least of its cases came to."""


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with the least of its cases, and whether that reaches it; None where none was measured."""
    decodes = [case for case in results["decode"] if "left_out" not in case]
    attentions = [case for case in results["attention"] if "left_out" not in case]
    ratio = results["transformers"].get("ours_over_theirs")
    if not results["measured"]:
        decodes, attentions, ratio = [], [], None  # in the interpreter
    found: tuple[list[float], ...] = (
        [case["of_copy"] for case in decodes if case["rows"] == 1],
        [case["of_copy"] for case in decodes if case["rows"] == 64],
        [case["of_copy"] for case in attentions if (case["rows"], case["context"]) == (8, 32_768)],
        [case["of_matmul"] for case in results["prefill"] if (case["tokens"], case["chunk"]) == (4096, 4096)],
        [1 - case["overhead"] for case in decodes],
        [] if ratio is None else [ratio],
    )
    return [
        {
            "goal": name,
            "least": least,
            "measured": min(values, default=None),
            "reached": min(values) >= least if values else None,
        }
        for (name, least), values in zip(GOALS, found, strict=True)
    ]


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Markdown, a table a part."""
    yield f"## {results['device']}, torch {results['torch']}, triton {results['triton']}"
    yield from _table("ceilings", [results["ceilings"]])
    yield from _table("decode", results["decode"])
    yield from _table("prefill", results["prefill"])
    yield from _table("attention alone", results["attention"])
    yield from _table("transformers", [results["transformers"]])
    yield from _table("KV blocks to and from host memory", [results["copies"]])
    yield from _table("kernels against float64", _worst(results["kernels"]))
    yield from _table("goals", results["goals"])
    yield from _table("seconds", [results["seconds"]])
    if results["warnings"]:
        yield from _table("warnings", [{"warning": warning} for warning in results["warnings"]])
    if results["errors"]:
        yield from _table("errors", [{"part": part, "error": why} for part, why in results["errors"].items()])


def _worst(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel and dtype, the case with the largest error; those that were left out are counted."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in checks:
        groups.setdefault((check["kernels"], check["dtype"]), []).append(check)
    rows = []
    for (kernels, dtype), group in groups.items():
        done = [check for check in group if "error" in check]
        worst = max(done, key=lambda check: math.inf if check["error"] is None else check["error"], default={})
        row = {"kernels": kernels, "dtype": dtype, "checks": len(done), "left out": len(group) - len(done)}
        rows.append(row | {key: worst.get(key) for key in ("case", "error", "limit", "right")})
    return rows


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The columns are the keys of the rows, in the order in which they come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield f"\n### {title}\n"
    if not columns:
        yield "not measured"
        return
    yield f"| {' | '.join(column.replace('_', ' ') for column in columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
