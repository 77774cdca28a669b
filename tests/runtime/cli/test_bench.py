"""The benchmarks' commands from end to end: JSON, tables, pictures and bad flags."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.bench import bounds, kv_cache, limits
from headwise.runtime.bench.workload import prompts
from headwise.workers.model.model_config import ModelConfig
from tests.runtime.conftest import LOCAL, Run

ENGINE = [*LOCAL, "--max-model-len", "256"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("gqa"))


@pytest.fixture(autouse=True)
def bounds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the bounds in this process, which need not import torch for it."""

    def measure(config: ModelConfig, cases: Sequence[bounds.Case]) -> dict[bounds.Case, bounds.StepBound]:
        return bounds.step_bounds(config, cases, threads=1, repeats=1)

    monkeypatch.setattr(bounds, "measure_bounds", measure)


def parsed(out: str, benchmark: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The results and the closing object, which every benchmark prints alike."""
    *results, closing = [json.loads(line) for line in out.splitlines()]
    assert closing["benchmark"] == benchmark
    assert closing["machine"].keys() == {"cpu", "cores", "memory_gib"}
    assert closing["versions"].keys() >= {"python", "torch", "numba", "headwise"}
    return results, closing


def test_throughput(headwise: Run, model: str, tmp_path: Path) -> None:
    flags = ["--batches", "1,3", "--tokens", "9", "--prompt-tokens", "5", "--repeats", "2", *ENGINE]
    picture = tmp_path / "out.png"
    code, out, _ = headwise("bench", "throughput", "--model", model, *flags, "--json", "--plot", str(picture))
    assert code == 0
    lines, closing = parsed(out, "throughput")
    assert [line["batch"] for line in lines] == [1, 3] and closing["fraction_of_bound"].keys() == {"1", "3"}
    assert all(fraction > 0 for fraction in closing["fraction_of_bound"].values())
    assert picture.read_bytes().startswith(PNG)
    with LLM(model, executor="local", kv_memory="8MiB", quiet=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        firsts = [llm.generate(prompts(b, 5, 256), params)[0].outputs[0].token_ids[:8] for b in (1, 3)]
    for line, first in zip(lines, firsts, strict=True):
        assert line.keys() == {"engine", "batch", "tok_s", "median_tok_s", "first_ids", "startup_s"}
        assert line["engine"] == "headwise" and line["first_ids"] == first
        assert line["tok_s"] >= line["median_tok_s"] > 0 and line["startup_s"] >= 0
    code, out, _ = headwise("bench", "throughput", "--model", model, *flags, "--no-bound")
    assert code == 0 and "batch" in out and "best" in out and "median" in out


def test_limits(headwise: Run, model: str, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    flags = ["--model", model, "--batches", "1,4", "--chunk", "32", "--repeats", "2", "--threads", "1"]
    code, out, _ = headwise("bench", "limits", *flags, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "limits")
    assert [result["case"] for result in results] == ["decode 1", "decode 4", "prefill 32"]
    for result in results:
        assert result["step_ms"] <= result["median_step_ms"]
        assert result["step_ms"] == min(result["step_ms_by_product"].values())
        assert result["tok_s"] == pytest.approx(result["rows"] / result["step_ms"] * 1e3, rel=0.05)
    assert closing["settings"] == {"threads": 1} and closing["read_gb_per_s"] > 0 and closing["gflop_per_s"] > 0
    assert picture.read_bytes().startswith(PNG)


def test_limits_table(headwise: Run, model: str) -> None:
    code, out, _ = headwise("bench", "limits", "--model", model, "--batches", "2", "--chunk", "8", "--repeats", "1")
    assert code == 0 and all(word in out for word in ("decode 2", "prefill 8", "GB/s", "GFLOP/s", "tokens/s"))


def test_step(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    # Rows decode while nobody looks, and a model this small would soon be at the end of a short length.
    model = str(checkpoint("gqa", max_position_embeddings=16384))
    flags = ["--model", model, "--batches", "1,4", "--steps", "6", "--repeats", "1", "--prompt-tokens", "100", *LOCAL]
    flags += ["--max-model-len", "16384", "--kv-memory", "128MiB"]
    flags += ["--max-num-batched-tokens", "64", "--pipeline-depth", "2"]
    code, out, _ = headwise("bench", "step", *flags, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "step")
    cases = ["decode 1", "decode 4", "prefill 100"]
    assert [result["case"] for result in results] == cases and [*closing["fraction_of_bound"]] == cases
    assert [result["tokens"] for result in results] == [1, 4, 100] and results[-1]["steps"] == 2
    for result in results:
        assert result["engine_ms"].keys() == {"schedule", "submit", "collect", "emit"}
        assert 0 < sum(result["shard_ms"].values()) <= result["ms"]
        fraction = closing["fraction_of_bound"][result["case"]]
        assert fraction == pytest.approx(result["bound_ms"] / result["ms"], rel=0.05) and fraction > 0
    assert closing["settings"]["pipeline_depth"] == 2
    assert picture.read_bytes().startswith(PNG)
    code, out, _ = headwise("bench", "step", *flags, "--no-bound")
    assert code == 0 and all(word in out for word in (*cases, "engine: schedule", "engine: collect", "engine CPU ms"))


def test_latency(headwise: Run, model: str, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    flags = ["--model", model, "--rate", "50", "--requests", "5", "--prompt-tokens", "20", "--tokens", "4", *ENGINE]
    code, out, _ = headwise("bench", "latency", *flags, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "latency")
    assert [result["metric"] for result in results] == ["time to first token", "inter-token", "end to end"]
    assert [result["count"] for result in results] == [5, 15, 5]
    for result in results:
        assert 0 <= result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert "fraction_of_bound" not in closing and closing["completed_per_s"] > 0
    assert picture.read_bytes().startswith(PNG)
    code, out, _ = headwise("bench", "latency", *flags)
    assert code == 0 and all(word in out for word in ("time to first token", "p50", "p90", "p99"))


@pytest.mark.usefixtures("at_once")
def test_latency_of_steady_rows(headwise: Run, checkpoint: Callable[..., Path]) -> None:
    model = str(checkpoint("gqa", max_position_embeddings=4096))
    flags = ["--rate", "50", "--requests", "3", "--prompt-tokens", "20", "--tokens", "2", "--steady", "2", *LOCAL]
    flags += ["--max-model-len", "4096"]
    code, out, _ = headwise("bench", "latency", "--model", model, *flags, "--json")
    assert code == 0
    results, closing = parsed(out, "latency")
    assert results[-1]["metric"] == "steady inter-token" and results[-1]["p99_over_p50"] >= 1
    assert closing["fraction_of_bound"].keys() == {"decode 2"}


def test_kv_cache(headwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    picture = tmp_path / "out.png"
    flags = ["--tokens", "20", *LOCAL]
    code, out, _ = headwise("bench", "kv-cache", *flags, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "kv-cache")
    assert [result["n"] for result in results] == [1, 2, 4, 8, 16, 20]
    assert closing["identical_outputs"] is True and closing["model"] == "tiny"
    assert picture.read_bytes().startswith(PNG)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # the tiny model is gone


def test_kv_cache_table_of_a_model(headwise: Run, model: str) -> None:
    code, out, _ = headwise("bench", "kv-cache", "--model", model, "--tokens", "8", *LOCAL)
    assert code == 0 and "Without a KV cache" in out and "times" in out


def test_kv_cache_with_other_outputs_exits_with_1(headwise: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kv_cache.with_cache

    def wrong(*arguments: Any) -> tuple[list[int], list[float]]:
        tokens, seconds = right(*arguments)
        return [*tokens[:-1], (tokens[-1] + 1) % 256], seconds

    monkeypatch.setattr(kv_cache, "with_cache", wrong)
    code, out, err = headwise("bench", "kv-cache", "--model", model, "--tokens", "4", *LOCAL)
    assert (code, out) == (1, "") and "token 3 is" in err and "Traceback" not in err


HANDOFF = ["--prompt-tokens", "40", "--pairs", "1", "--streams", "2", "--window", "0.05", *LOCAL]
HANDOFF += ["--max-model-len", "4096"]


def test_handoff(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    picture, model = tmp_path / "out.png", str(checkpoint("gqa", max_position_embeddings=4096))
    code, out, _ = headwise("bench", "handoff", "--model", model, *HANDOFF, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "handoff")
    ways, paces = ["grpc", "shared memory"], ["paced", "back to back"]
    assert [(one["part"], one["way"]) for one in results[:5]] == [
        *(("bytes", way) for way in ("bare", *ways)),
        *(("first token", way) for way in ways),
    ]
    assert [(one["way"], one["pace"]) for one in results[5:]] == [(way, pace) for way in ways for pace in paces]
    assert results[0]["of_bare"] == 1 and all(one["gb_per_s"] > 0 for one in results[:3])
    assert all(one["ratio"] > 0 and one["handoff_s"] >= one["push_s"] > 0 for one in results[3:5])
    assert all(one["ratio"] > 0 and one["transfers_per_s"] > 0 for one in results[5:])
    assert closing["settings"]["prompt_tokens"] == 40 and picture.read_bytes().startswith(PNG)


@pytest.mark.thorough
def test_handoff_table(headwise: Run, checkpoint: Callable[..., Path]) -> None:
    model = str(checkpoint("gqa", max_position_embeddings=4096))
    code, out, err = headwise("bench", "handoff", "--model", model, *HANDOFF)
    assert code == 0 and "measuring" in err
    assert all(word in out for word in ("bare", "grpc", "shared memory", "first token", "paced", "back to back"))


def test_interference(headwise: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    model = str(checkpoint("gqa", max_position_embeddings=4096))
    flags = ["--streams", "2", "--rate", "50", "--requests", "3", "--prompt-tokens", "64", "--tokens", "2", *LOCAL]
    code, out, _ = headwise("bench", "interference", "--model", model, *flags, "--json", "--plot", str(picture))
    assert code == 0
    results, closing = parsed(out, "interference")
    assert [one["case"] for one in results] == ["prefill and decode", "one engine", "one engine, no limit"]
    assert [one["handed_over"] for one in results] == [3, 0, 0]
    for one in results:
        assert 0 <= one["gaps"]["p50_ms"] <= one["gaps"]["p99_ms"] and one["first_token"]["count"] == 3
        assert one["stream_tok_s"] > 0 and one["prompt_tok_s"] > 0 and not one["pinned"]
    assert closing["settings"]["requests"] == 3 and picture.read_bytes().startswith(PNG)
    code, out, _ = headwise("bench", "interference", "--model", model, *flags)
    assert code == 0 and all(word in out for word in ("p50", "p99", "TTFT", "limit"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["handoff", "--pairs", "0"], "--pairs"),
        (["handoff", "--streams", "0"], "--streams"),
        (["interference", "--rate", "0"], "--rate"),
        (["throughput", "--batches", "1,none"], "--batches='none'"),
        (["throughput", "--batches", "0"], "--batches='0'"),
        (["throughput", "--batches", ""], "--batches=''"),
        (["throughput", "--tokens", "0"], "--tokens"),
        (["throughput", "--repeats", "0"], "--repeats"),
        (["throughput", "--prompt-tokens", "0"], "--prompt-tokens"),
        (["throughput", "--pipeline-depth", "3"], "pipeline_depth=3"),
        (["step", "--batches", "1,,2"], "--batches=''"),
        (["step", "--steps", "0"], "--steps"),
        (["step", "--max-num-batched-tokens", "0"], "max_num_batched_tokens=0"),
        (["latency", "--rate", "0"], "--rate"),
        (["latency", "--requests", "0"], "--requests"),
        (["limits", "--chunk", "x"], "--chunk='x'"),
        (["limits", "--threads", "0"], "--threads"),
        (["kv-cache", "--tokens", "0"], "--tokens"),
    ],
)
def test_bad_flags_exit_with_2(headwise: Run, model: str, flags: list[str], words: str) -> None:
    code, out, err = headwise("bench", *flags, "--model", model)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["throughput", "step", "latency", "limits", "kv-cache", "handoff", "interference"])
def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(
    headwise: Run, model: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("an engine was started"))
    for module in (bounds, limits):
        monkeypatch.setattr(module, "measure_bounds", lambda *_: pytest.fail("bounds were measured"))
    code, out, err = headwise("bench", command, "--model", model, "--plot", "out.png")
    assert (code, out) == (2, "") and "pip install 'headwise[plot]'" in err


def test_steps_that_do_not_fit_exit_with_1(headwise: Run, model: str) -> None:
    flags = ["--batches", "2", "--steps", "300", "--prompt-tokens", "10", "--no-bound", *ENGINE]
    code, out, err = headwise("bench", "step", "--model", model, *flags)
    assert (code, out) == (1, "") and "--max-model-len" in err and "Traceback" not in err


def test_help_lists_the_benchmarks(headwise: Run) -> None:
    code, out, _ = headwise("bench", "--help")
    assert code == 0 and all(name in out for name in ("latency", "kv-cache", "handoff", "interference"))
