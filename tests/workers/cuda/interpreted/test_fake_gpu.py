"""The fake GPU sees what makes the host wait."""

from __future__ import annotations

import pytest
import torch

from headwise.workers.download import Download
from tests.workers.cuda.fake_gpu import WAITS, FakeGpu, waits_are_errors


@pytest.mark.parametrize("method", WAITS)
def test_reading_a_tensor_waits(method: str) -> None:
    x = torch.ones(1)
    with waits_are_errors(FakeGpu()), pytest.raises(RuntimeError, match=f"the host would wait.*{method}"):
        getattr(x, method)()


@pytest.mark.parametrize("to_host", [True, False])
def test_a_blocking_copy_waits_and_another_does_not(to_host: bool) -> None:
    fake = FakeGpu()
    host, device = fake.pinned(8), torch.ones(8, dtype=torch.uint8)
    target, source = (host, device) if to_host else (device, host)
    with waits_are_errors(fake):
        target.copy_(source, non_blocking=True)
        with pytest.raises(RuntimeError, match="the host would wait for a copy"):
            target.copy_(source)


def test_a_download_does_not_wait() -> None:
    fake = FakeGpu()
    with waits_are_errors(fake):
        download = Download([torch.arange(3), torch.ones(2)], fake)
    assert [array.tolist() for array in download.arrays()] == [[0, 1, 2], [1.0, 1.0]]
