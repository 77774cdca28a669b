from __future__ import annotations

import asyncio
import sys

import pytest

from headwise.runtime.batch import showing
from headwise.runtime.batch.run import Summary


@pytest.mark.parametrize("terminal", [True, False])
def test_how_far_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for name in ("BAR_S", "LINE_S"):
        monkeypatch.setattr(showing, name, 0.01)
    summary = Summary(lines=50, before=2, done=7, failed=1, completion_tokens=90, seconds=2.0)

    async def look() -> None:
        task = asyncio.create_task(showing.show(summary))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(look())
    out, err = capfd.readouterr()
    assert out == ""
    if not terminal:
        line = "headwise: 7 of 50 lines done, 2 of them before; 1 could not be answered; 45 tokens/s"
        assert line in err.splitlines()
