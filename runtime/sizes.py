"""Bytes as people write them. Imports no torch."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """For people: ``12.55 GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):,.4g} {unit}"
    return f"{num_bytes} B"
