"""In which dtype a model is computed, and what its user is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.precision import precision_notes, resolve_dtype
from headwise.workers.cuda import attention
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.checkpoint import verify_checkpoint
from headwise.workers.model.model_config import load_model_config
from tests.checkpoints import small_spec, write_checkpoint
from tests.conftest import MakeLLM

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 20]


@pytest.fixture(scope="module")
def half(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a small checkpoint that is stored in a 16-bit dtype."""

    def make(dtype: str) -> Path:
        directory = tmp_path_factory.mktemp(dtype)
        model = LlamaForCausalLM.from_pretrained(checkpoint("gqa"), dtype=getattr(torch, dtype))
        model.save_pretrained(directory)
        return directory

    return make


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_auto_computes_a_checkpoint_of_16_bits_in_float32_on_a_cpu(
    half: Callable[[str], Path],
    dtype: str,
    thread_llm: MakeLLM,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    stored = half(dtype)
    auto = thread_llm(stored, device="cpu", quiet=False, disk_kv_path=str(tmp_path))
    said = capfd.readouterr().err
    weight_bytes = auto.stats()["shards"][0]["weight_bytes"]
    assert f"headwise: dtype=auto computes this {dtype} checkpoint in float32, which is exact" in said
    assert f"weights take {weight_bytes / 2**30:.2f} GiB" in said and "slow" not in said
    found = tokens(auto)
    auto.close()
    explicit = thread_llm(stored, device="cpu", dtype="float32", quiet=False, disk_kv_path=str(tmp_path))
    assert "dtype" not in capfd.readouterr().err
    assert tokens(explicit) == found
    # K and V of 16 tokens in 2 layers of 4 heads, 16 floats wide.
    assert explicit.stats()["kv_bytes_per_rank"] == [2 * 16 * 2 * 4 * 16 * 4 * explicit.stats()["num_blocks"]]
    # KV of float32 is one thing, whichever setting asked for it: either engine finds what the other kept on disk.
    assert auto._inputs.identity == explicit._inputs.identity
    assert explicit._inputs.identity is not None and explicit._inputs.identity.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({}, {"dtype": "bfloat16"}, "slow: dtype=bfloat16 is not float32, so the reference backend computes the model"),
        ({}, {"dtype": "float16"}, "slow: dtype=float16 is not float32,"),
        ({}, {"block_size": 8}, "slow: block_size=8 is not a multiple of 16,"),
        ({"head_dim": 12}, {}, "slow: head_dim=12 is not a multiple of 8,"),
        ({"head_dim": 12}, {"dtype": "float16"}, "dtype=float16 is not float32 and head_dim=12 is not a multiple of 8"),
        ({}, {}, ""),
        ({}, {"attention": "reference"}, ""),
    ],
)
def test_what_falls_back_to_the_reference_says_so(
    tmp_path: Path,
    thread_llm: MakeLLM,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    settings: dict[str, Any],
    said: str,
) -> None:
    model = write_checkpoint(tmp_path, **changes)
    thread_llm(model, device="cpu", quiet=False, **settings).close()
    err = capfd.readouterr().err
    assert (said in err) if said else ("slow" not in err)
    thread_llm(model, device="cpu", quiet=True, **settings).close()
    assert "slow" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kept", "dtype", "said"),
    [
        ("int8", "float32", "kv_dtype=int8 keeps keys and values of a token in 320 B, which take 1 KiB as float32; "),
        ("int8/int4", "float32", "in 256 B, which take 1 KiB as float32; they are rounded"),
        ("bfloat16", "float32", "in 512 B, which take 1 KiB as float32; they are rounded"),
        ("float16", "bfloat16", "in 512 B, which take 512 B as bfloat16; they are rounded"),
        ("float32", "bfloat16", "in 1 KiB, which take 512 B as bfloat16"),
        ("float32", "float32", ""),
    ],
)
def test_what_a_kv_dtype_costs_is_said(checkpoint: Callable[..., Path], kept: str, dtype: str, said: str) -> None:
    directory = checkpoint("gqa")
    config = load_model_config(directory)
    spec = small_spec(directory, dtype=dtype, kv_dtype=kept)
    notes = precision_notes(dtype, spec, config, verify_checkpoint(directory, config))
    [*about] = [note for note in notes if note.startswith("kv_dtype=")]
    assert len(about) == bool(said) and all(said in note for note in about)
    assert all(("rounded" in note) is (kept != "float32") for note in about)


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [({"dtype": "bfloat16"}, "dtype=bfloat16 is not float32"), ({"block_size": 8}, "block_size=8 is not a multiple")],
)
def test_an_attention_that_cannot_serve_the_model_is_refused(
    checkpoint: Callable[..., Path], thread_llm: MakeLLM, settings: dict[str, Any], obstacle: str
) -> None:
    with pytest.raises(InvalidValueError, match=rf"^attention='cpu': {obstacle}.*leave attention out"):
        thread_llm(checkpoint("gqa"), device="cpu", attention="cpu", **settings)


def test_auto_is_the_checkpoints_dtype_on_a_gpu() -> None:
    assert resolve_dtype("auto", "cuda", "bfloat16") == "bfloat16"
    assert resolve_dtype("auto", "cpu", "bfloat16") == resolve_dtype("float32", "cuda", "bfloat16") == "float32"
    assert resolve_dtype("float16", "cpu", "float32") == "float16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused_by_name(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidValueError, match=r"^device='cuda': torch finds no GPU here; device=cpu \(--device\)"):
        LLM(checkpoint("gqa"), executor="local", device="cuda", quiet=True)


@pytest.mark.parametrize("triton", [True, False])
def test_a_gpu_without_triton_is_said_to_be_slow(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, triton: bool
) -> None:
    monkeypatch.setattr(attention, "TRITON", triton)
    directory = checkpoint("gqa")
    spec = small_spec(directory, device="cuda", dtype="bfloat16")
    index = verify_checkpoint(directory, load_model_config(directory))
    said = list(precision_notes("auto", spec, load_model_config(directory), index))
    assert [note.partition(":")[0] for note in said] == ([] if triton else ["slow"])
    assert triton or "triton is not installed (pip install 'headwise[cuda]')" in said[0]
