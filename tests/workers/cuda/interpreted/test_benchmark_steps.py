"""The steps of benchmarks/gpu.py on a GPU that is none: what it calls a decode step is one launch of a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.cuda.fake_gpu import FakeGpu

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"


def test_decode_steps_are_graphs_of_their_bucket(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_parts.device import Device
    from gpu_parts.served import DEPTH, Served
    from gpu_parts.sizes import TINY

    monkeypatch.setattr(Device, "is_gpu", False)  # what is torch's own is not there
    served = Served(Device(torch.device("cpu")), TINY)
    for _ in range(2):
        served.decode(3, 20)
    served.decode(1, 20)
    launches = [what for what, _ in fake_gpu.log if what in ("capture", "replay")]
    timed = 1 + TINY.steps  # one comes before
    assert launches == ["capture"] + ["replay"] * 2 * timed + ["capture"] + ["replay"] * timed
    waited = served.waits_of_a_decode(1, 20)
    assert waited == (None, None) and len(launches) + DEPTH + 1 == sum(
        what in ("capture", "replay") for what, _ in fake_gpu.log
    )
    served.prefill(24, 16)
    assert len(served.logprobs(served.tokens(12)).top) == 20
