"""A model's files, heads and memory: good ones, and broken ones with their fixes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from headwise.runtime.capacity import capacity
from headwise.runtime.doctor.finding import Finding, Level
from headwise.runtime.doctor.model import gpu_build, gpus, heads, kernels, kv_memory, tokenizer, weights
from headwise.workers.kv.format import kv_format
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.model.model_config import ModelConfig, load_model_config

GIB = 1 << 30
LLAMA_2_7B = ModelConfig(4096, 32, 32, 32, 128, 11008, 32_000, 4096, 1e-5)


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(checkpoint("gqa"), tmp_path / "model")


def looked_at(directory: Path) -> Finding:
    return weights(directory, load_model_config(directory))


def test_good_weights(copy: Path) -> None:
    found = looked_at(copy)
    assert found.level is Level.PASS and "(F32) in 1 safetensors" in found.said


def test_pickles(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    found = looked_at(copy)
    assert found.level is Level.FAIL and "pytorch_model.bin, a pickle" in found.said
    assert found.fix.startswith("convert it to safetensors")


def test_missing_shards(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00003.safetensors")
    files = {name: f"model-0000{number}-of-00003.safetensors" for number, name in enumerate("abc", 1)}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = looked_at(copy)
    assert found.level is Level.FAIL and "hf download" in found.fix
    assert found.said.startswith("model-00002-of-00003.safetensors, model-00003-of-00003.safetensors of ")


def test_a_file_that_was_cut_off(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])
    found = looked_at(copy)
    assert found.level is Level.FAIL and "truncated" in found.said and found.fix == "copy the file again"


def test_weights_of_another_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    found = looked_at(copy)
    assert found.level is Level.FAIL and "lacks the tensor" in found.said and "fetch the model's files" in found.fix


def test_a_tokenizer_that_is_missing_or_damaged(copy: Path) -> None:
    assert tokenizer(copy).level is Level.WARN
    (copy / "tokenizer.json").write_text("{")
    found = tokenizer(copy)
    assert found.level is Level.FAIL and "fetch" in found.fix


def test_heads_that_go_into_the_ranks() -> None:
    found = heads(9, 3, 2)
    assert found.level is Level.PASS and "6+3" in found.said and "2+1" in found.said


def test_heads_that_do_not_go_into_the_ranks() -> None:
    found = heads(9, 3, 12)
    assert found.level is Level.FAIL and "--tp 12" in found.said and found.fix.startswith("--tp 9 at most")


def test_more_ranks_than_kv_heads() -> None:
    found = heads(9, 3, 6)
    assert found.level is Level.WARN and "KV takes 2.3 times" in found.said and found.fix.startswith("--tp 3 or less")


def test_kernels_for_a_cpu() -> None:
    found = kernels(None, "cpu", "float32", 16, 64)
    assert found.level is Level.PASS and "attention=cpu" in found.said
    assert kernels("reference", "cpu", "bfloat16", 16, 64).level is Level.PASS  # as it was asked for
    half, narrow = kernels(None, "cpu", "bfloat16", 16, 64), kernels(None, "cpu", "float32", 16, 12)
    assert half.level is Level.WARN and "dtype=bfloat16" in half.said and half.fix == "--dtype float32"
    assert narrow.level is Level.WARN and "head_dim=12" in narrow.said and narrow.fix


def test_kernels_that_are_asked_for_and_not_there() -> None:
    found = kernels("flashinfer", "cpu", "float32", 16, 64)
    assert found.level is Level.FAIL and "device=cpu is not cuda" in found.said and "leave attention out" in found.fix


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.workers.cuda.attention.TRITON", False)
    found = kernels(None, "cuda", "bfloat16", 16, 128)
    assert found.level is Level.WARN and found.fix == "pip install 'headwise[cuda]'"


def test_kv_that_a_gpus_kernels_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.workers.cuda.attention.TRITON", True)
    kept, policy = kv_format("int8", 128), resolve_policy("window:64", 2, 2)
    for changes in ((kept, None), (None, policy), (kept, policy)):
        found = kernels(None, "cuda", "bfloat16", 16, 128, *changes)
        assert found.level is Level.WARN and "kv_" in found.said and found.fix.startswith("leave out --kv-policy")


def test_gpus_for_the_ranks() -> None:
    assert gpus("cpu", 4, 0, "this machine").level is Level.PASS
    assert gpus("cuda", 4, 4, "the Ray cluster").level is Level.PASS
    few, none = gpus("cuda", 4, 2, "the Ray cluster"), gpus("cuda", 4, 0, "this machine")
    assert few.level is Level.FAIL and "the Ray cluster has 2" in few.said and few.fix.startswith("--tp 2")
    assert none.level is Level.FAIL and none.fix.startswith("--device cpu")


def test_a_torch_that_cannot_use_the_gpus() -> None:
    assert gpu_build(None, driver=False, visible=0).level is Level.PASS
    assert gpu_build("12.8", driver=True, visible=1).level is Level.PASS
    for_cpus, hidden = gpu_build(None, driver=True, visible=0), gpu_build("12.8", driver=True, visible=0)
    assert for_cpus.level is Level.WARN and "built for CUDA" in for_cpus.fix
    assert hidden.level is Level.WARN and "CUDA_VISIBLE_DEVICES" in hidden.fix


def test_kv_memory_for_some_requests() -> None:
    """2 GiB a GPU are left of 24 GiB by hand: 512 KiB a token, 12.55 GiB of weights."""
    taken = capacity(LLAMA_2_7B, 1, "float16", 1024)
    found = kv_memory(taken, [24 * GIB], "2GiB", "cuda")
    assert found.level is Level.PASS and "4,096 tokens" in found.said and "4 request(s) of 1,024" in found.said


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kv_memory_for_less_than_a_request(device: str) -> None:
    taken = capacity(LLAMA_2_7B, 1, "float16", 4096)
    found = kv_memory(taken, [24 * GIB], "1GiB", device)
    assert found.level is Level.FAIL and "2,048 tokens, and one request may have 4,096" in found.said
    assert found.fix == "--kv-memory 2048MiB, or --max-model-len 2048"
    assert kv_memory(taken, [24 * GIB], "2048MiB", device).level is Level.PASS


def test_kv_memory_that_is_not_there() -> None:
    taken = capacity(LLAMA_2_7B, 2, "float16", 1024)
    found = kv_memory(taken, [16 * GIB], "4GiB", "cpu")
    assert found.level is Level.FAIL and "--kv-memory 4GiB is more than" in found.said
    size = found.fix.split()[1]
    assert kv_memory(taken, [16 * GIB], size, "cpu").level is Level.PASS


def test_kv_memory_that_is_no_size() -> None:
    found = kv_memory(capacity(LLAMA_2_7B, 1, "float16", 1024), [24 * GIB], "much", "cuda")
    assert found.level is Level.FAIL and "kv_memory='much'" in found.said and found.fix == "--kv-memory 2GiB, or 0.9"


def test_weights_that_do_not_fit() -> None:
    found = kv_memory(capacity(LLAMA_2_7B, 1, "float16", 1024), [8 * GIB], 0.9, "cuda")
    assert found.level is Level.FAIL and "12.55 GiB" in found.said and "raise --tp" in found.fix


def test_ranks_of_a_host_share_its_memory_and_those_on_gpus_do_not() -> None:
    taken = capacity(LLAMA_2_7B, 2, "float16", 1024)
    assert kv_memory(taken, [14 * GIB], 0.9, "cpu").level is Level.PASS
    assert kv_memory(taken, [10 * GIB] * 2, 0.9, "cuda").level is Level.PASS
    assert kv_memory(taken, [10 * GIB], 0.9, "cpu").level is Level.FAIL
