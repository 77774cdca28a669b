"""``Engine.stats`` of several engines as if they were one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_LISTED = 32
"""Entries of a list that are kept, such as the last deaths of shards."""

_LATEST = ("epoch", "last_seconds", "oldest_s")
"""The largest counts."""
_PRESENT = {
    *("num_running", "num_waiting", "num_blocks", "num_free_blocks", "blocks", "cached_blocks", "pinned_blocks"),
    *("max_blocks", "in_flight", "reserved_blocks", "oldest_s", "peers", "rebuilding", "spare", "spare_bytes"),
    *("shards", "cost_s", "epoch", "role"),
}
"""What says how an engine is, and nothing of what it has done."""

NONE: dict[str, Any] = {
    "epoch": 0,
    "num_running": 0,
    "num_waiting": 0,
    "num_blocks": 0,
    "num_free_blocks": 0,
    "num_steps": 0,
    "num_generated_tokens": 0,
    "num_preemptions": 0,
    "engine_seconds": {},
    "engine_cpu_seconds": 0.0,
    "prefix_cache": {
        **dict.fromkeys(("queried_tokens", "hit_tokens", "inserted_tokens", "duplicate_blocks"), 0),
        "integrity_checks": 0,
        "evictions": {},
        "blocks": {},
        "tiers": {},
    },
    "handoff": {},
    "recoveries": {"rebuilding": False, "count": 0, "num_deaths": 0, "deaths_by_rank": {}, "deaths": []},
}
"""Of no engine."""


def merged(stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts are summed; of ``epoch`` and other times the latest holds; of measured means the largest."""
    total = NONE
    for one in stats:
        total = _merge("", total, one)
    return total


def done(stats: dict[str, Any]) -> dict[str, Any]:
    """What an engine that is gone has done: its counts, without how it was."""
    return {
        key: done(value) if isinstance(value, dict) else value
        for key, value in stats.items()
        if key not in _PRESENT and not (key == "seconds" and isinstance(value, dict))
    }


def _merge(key: str, one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        inside = "last_seconds" if key in ("seconds", "cost_s") else ""  # means
        return {
            name: _merge(inside or name, one[name], other[name]) if name in one and name in other
            else one.get(name, other.get(name))
            for name in one.keys() | other.keys()
        }  # fmt: skip
    if one is None or other is None or isinstance(one, str):
        return other if one is None else one
    if isinstance(one, bool):
        return one or other
    if isinstance(one, list):
        return [*one, *other][-MAX_LISTED:]
    return max(one, other) if key in _LATEST else one + other
