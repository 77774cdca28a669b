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
    ],
)
def test_what_cannot_be_is_a_line_and_exit_code_2(
    headwise: Run, llama_2_7b: Path, arguments: list[str], said: str
) -> None:
    code, out, err = headwise("plan", str(llama_2_7b), *arguments)
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
