"""Fixtures of handoffs."""

from __future__ import annotations

import pytest

from tests.workers.kv.handoff_wire import Wire


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)
