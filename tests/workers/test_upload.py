"""Arrays to a device and back: each with its shape and dtype, and all in one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwise.workers.download import Download
from headwise.workers.upload import upload, upload_together
from tests.workers.cuda.fake_gpu import FakeGpu

ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.array([True, False, True]),
    np.empty(0, np.int64),
    np.linspace(0, 1, 5, dtype=np.float32)[:, None],
    np.array([7], np.int32),
    np.array([0.1, 0.2]),
]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_arrays_arrive_as_they_are(device: str) -> None:
    for sent, array in zip(upload_together(ARRAYS, torch.device(device)), ARRAYS, strict=True):
        assert sent.device.type == device
        np.testing.assert_array_equal(sent.cpu().numpy(), array, strict=True)


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.zeros(3)
    upload(array, torch.device("cpu"))[1] = 5
    assert array.tolist() == [0, 5, 0]
    x = torch.zeros(3)
    [read] = Download([x], None).arrays()
    x[2] = 1
    assert read.tolist() == [0, 0, 1]


def test_tensors_come_back_in_one_copy() -> None:
    """As they were when the copy was queued."""
    fake, tensors = FakeGpu(), [torch.from_numpy(array.copy()) for array in ARRAYS if array.size]
    tensors.append(torch.arange(12).view(3, 4).T[1:3])
    download = Download(tensors, fake)
    expected = [x.clone() for x in tensors]
    for x in tensors:
        x.zero_()
    assert [entry[0] for entry in fake.log] == ["pinned"]
    for read, x in zip(download.arrays(), expected, strict=True):
        np.testing.assert_array_equal(read, x.numpy(), strict=True)
