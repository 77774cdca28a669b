"""Fixtures of the runtime floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.runtime.models import resolve


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted once a session, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve("smollm2")
