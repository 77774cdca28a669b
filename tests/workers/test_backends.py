"""Which backend computes a model, by what its KV policy and its keys and values ask for."""

from __future__ import annotations

import pytest
import torch

from headwise.workers.backends import BACKENDS, find_backend
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KvFormat
from headwise.workers.kv.policy import resolve_policy

CUDA = (torch.device("cuda"), torch.bfloat16, 16, 64)
SINKS, PLAIN = resolve_policy("sinks:4,60", 2, 2), resolve_policy("dense", 2, 2)
INT8, OWN = KvFormat("int8", "int8"), KvFormat("bfloat16", "bfloat16")


@pytest.mark.parametrize("name", ["cuda", "flashinfer"])
def test_gpu_kernels_say_what_they_are_not_for(name: str) -> None:
    with pytest.raises(InvalidValueError, match="kv_policy=sinks:4,60 is not dense and kv_dtype=int8 is not the dtype"):
        find_backend(name, *CUDA, INT8, SINKS)
    obstacles = BACKENDS[name].attention.obstacles
    assert obstacles(*CUDA, OWN, PLAIN) == obstacles(*CUDA)


@pytest.mark.parametrize(("format", "policy"), [(INT8, PLAIN), (OWN, SINKS), (KvFormat("float16", "float16"), None)])
def test_the_reference_serves_on_a_gpu_what_its_kernels_do_not(format: KvFormat, policy: object) -> None:
    assert find_backend(None, *CUDA, format, policy) is BACKENDS["reference"]  # type: ignore[arg-type]


def test_a_cpu_serves_bfloat16_models_of_any_policy_by_the_reference() -> None:
    cpu = (torch.device("cpu"), torch.bfloat16, 16, 64)
    assert find_backend(None, *cpu, INT8, SINKS) is BACKENDS["reference"]
