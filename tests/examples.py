"""How many examples a property is tried on: all that a test asks for, or few of them, as ``make test`` does."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

FEW = "few"
"""The profile's name, for ``--hypothesis-profile``."""


def examples(count: int, **options: Any) -> settings:
    """So many examples, without a deadline for each; a fifth of them in the profile FEW."""
    few = settings.get_current_profile_name() == FEW
    return settings(max_examples=count // 5 if few else count, deadline=None, **options)
