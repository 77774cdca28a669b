"""``headwise plan``: its table, its JSON and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.conftest import Run

SHAPES = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}


@pytest.fixture
def llama_2_7b(tmp_path: Path) -> Path:
    """Its config.json, and no weights."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES))
    return tmp_path


def planned(headwise: Run, *arguments: str | Path) -> dict[str, Any]:
    code, out, err = headwise("plan", *map(str, arguments), "--json")
    assert code == 0, err
    return dict(json.loads(out))


def test_json(headwise: Run, llama_2_7b: Path) -> None:
    said = planned(headwise, llama_2_7b, "--max-model-len", "1024", "--tp", "3")
    assert said["kv_bytes_per_token"] == 512 << 10 and said["kv_bytes_per_request"] == 512 << 20
    assert said["dtype"] == "float16" and said["attention"] == "MHA" and said["fits"] == {}
    assert [rank["kv_bytes_per_token"] for rank in said["ranks"]] == [176 << 10, 176 << 10, 160 << 10]
    assert sum(rank["weight_bytes"] for rank in said["ranks"]) == said["weight_bytes"]


def test_a_file_a_short_dtype_and_what_fits(headwise: Run, llama_2_7b: Path) -> None:
    said = planned(headwise, llama_2_7b / "config.json", "--dtype", "bf16", "--gpu-memory", "80GiB", "--tp", "4")
    assert said["dtype"] == "bfloat16" and said["request_tokens"] == 4096
    [rank] = {rank["weight_bytes"] for rank in said["ranks"][1:]}
    blocks = int(0.9 * ((80 << 30) - said["ranks"][0]["weight_bytes"])) // (16 * 128 << 10)
    assert said["fits"]["gpu_memory"]["blocks"] == blocks
    assert said["fits"]["gpu_memory"]["requests"] == blocks // 256 and rank < 80 << 30


def test_policies_and_forms(headwise: Run, llama_2_7b: Path) -> None:
    arguments = (llama_2_7b, "--kv-policy", "dense@0-7;sinks:4,1020", "--kv-dtype", "int8", "--gpu-memory", "80GiB")
    said = planned(headwise, *arguments)
    token = 32 * 2 * (128 + 4)  # of a layer
    assert (said["kv_policy"], said["kv_dtype"]) == ("dense@0-7;sinks:4,1020@8-31", "int8")
    assert said["kv_bytes_per_token"] == 32 * token and said["kv_constant_after_tokens"] is None
    dense, sinks = said["groups"]
    assert dense == {
        "reach": "dense",
        "heads": 256,
        "kv_bytes_per_token": 8 * token,
        "request_blocks": 256,
        "kv_bytes_per_request": 4096 * 8 * token,
    }
    assert sinks["request_blocks"] == 67 and sinks["kv_bytes_per_request"] == 67 * 16 * 24 * token
    both = dense["kv_bytes_per_request"] + sinks["kv_bytes_per_request"]
    assert said["kv_bytes_per_request"] == said["ranks"][0]["kv_bytes_per_request"] == both
    assert said["fits"]["gpu_memory"]["requests"] > 0
    said = planned(headwise, llama_2_7b, "--kv-policy", "window:100", "--kv-dtype", "bf16", "--max-model-len", "64")
    assert said["kv_dtype"] == "bfloat16" and said["kv_constant_after_tokens"] == 9 * 16


def test_streaming_heads(headwise: Run, llama_2_7b: Path) -> None:
    file = llama_2_7b / "heads.json"
    file.write_text(json.dumps({"kv_policy": "sinks:4,60", "heads": [[0, 0], [31, 31]]}))
    said = planned(headwise, llama_2_7b, "--streaming-heads", file)
    assert [(group["reach"], group["heads"]) for group in said["groups"]] == [("sinks:4,60", 2), ("dense", 1022)]


def test_a_table_of_groups_and_a_picture(headwise: Run, llama_2_7b: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = llama_2_7b / "plan.svg"
    arguments = ("--kv-policy", "sinks:4,1020", "--kv-dtype", "int8/int4", "--plot", str(picture))
    code, out, err = headwise("plan", str(llama_2_7b), *arguments)
    assert code == 0, err
    said = " ".join(out.split())
    assert "float16, KV int8/int4" in said and "sinks:4,1020: 1,024 KV heads of all layers" in said
    assert "67 blocks" in said and "no more from 1,072 tokens on" in said
    assert picture.read_text().startswith("<?xml")


def test_a_table_and_a_picture(headwise: Run, llama_2_7b: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = llama_2_7b / "plan.svg"
    code, out, err = headwise("plan", str(llama_2_7b), "--gpu-memory", "24GiB", "--plot", str(picture))
    assert code == 0, err
    assert "512 KiB" in out and "12.55 GiB" in out and "requests of 4,096" in " ".join(out.split())
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tp", "33"], "tensor_parallel_size=33"),
        (["--dtype", "int3"], "dtype='int3'"),
        (["--gpu-memory", "12GiB"], "raise --tp"),
        (["--host-kv-memory", "much"], "host_kv_memory='much'"),
        (["--plot", "x.gif"], "--plot"),
        (["--kv-policy", "sinks"], "kv_policy='sinks'"),
        (["--kv-policy", "window:8@40;dense"], "names layers 40 to 40"),
        (["--kv-dtype", "int3"], "kv_dtype='int3'"),
        (["--kv-policy", "window:8@1;dense", "--host-kv-memory", "1GiB"], "host_kv_memory="),
    ],
)
def test_what_cannot_be_is_a_line_and_exit_code_2(
    headwise: Run, llama_2_7b: Path, arguments: list[str], said: str
) -> None:
    code, out, err = headwise("plan", str(llama_2_7b), *arguments)
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
