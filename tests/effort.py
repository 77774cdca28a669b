"""How much ``make test`` tries, and what it leaves to ``make test-all``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

FEW = "few"
"""The Hypothesis profile of ``make test``, for ``--hypothesis-profile``."""


def examples(count: int, **options: Any) -> settings:
    """So many examples of a property, without a deadline for each; a fifth of them in the profile FEW."""
    few = settings.get_current_profile_name() == FEW
    return settings(max_examples=count // 5 if few else count, deadline=None, **options)


def thorough(*values: Any) -> Any:
    """A case of a parametrized test that ``make test`` leaves out."""
    return pytest.param(*values, marks=pytest.mark.thorough)
