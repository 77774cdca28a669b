"""Replicas under KV policies: each computes what one engine does, and outputs go on past the model's length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.runtime import start
from headwise.runtime.aio import AsyncLLM
from headwise.runtime.config import EngineConfig, engine_config
from headwise.runtime.sampling_params import SamplingParams
from headwise.workers.errors import InvalidValueError
from tests.runtime.deployment.deployed import Deployed, ask_all, prompts, settled, wait_until
from tests.thread_group import thread_groups

MAX_LEN, COUNT = 64, 150
KEPT: dict[str, dict[str, Any]] = {
    "sinks": {"kv_policy": "sinks:4,28"},
    "int8": {"kv_policy": "window:32", "kv_dtype": "int8"},
    "groups": {"kv_policy": "sinks:4,28@0;window:48"},
}


def kept_by(checkpoint: Callable[..., Path], **settings: Any) -> EngineConfig:
    limits = {"max_model_len": MAX_LEN, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return engine_config(model=str(checkpoint("gqa")), kv_memory="4MiB", **limits, **settings)


@pytest.mark.parametrize("name", KEPT)
def test_endless_outputs_survive_the_death_of_a_replica(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    config = kept_by(checkpoint, **KEPT[name])
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    asked: Any = [(f"request-{index}", prompt, params) for index, prompt in enumerate(prompts(4))]
    one = AsyncLLM(config, quiet=True)
    try:
        expected = ask_all(one, asked)
    finally:
        one.shutdown()
    deployed = Deployed(config)
    try:
        llm = deployed(2)
        assert llm.inputs.max_model_len == MAX_LEN and llm.inputs.endless
        killed: list[str] = []

        def kill(count: int) -> None:
            """Once a request is past the model's length."""
            if count > MAX_LEN and not killed:
                killed.extend([r["name"] for r in llm.status()["replicas"] if r["running"]][:1])
                for name in killed:
                    deployed.kill(name)

        got = ask_all(llm, asked, on_tokens=kill)
        assert killed and got == expected
        assert all(len(sample.tokens) == COUNT for [sample] in got)
        wait_until(lambda: [*deployed.states().values()] == ["serving"] * 2)
        settled(llm)
    finally:
        deployed.close()


def test_replicas_need_no_file_of_streaming_heads(
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(start, "make_factory", thread_groups())
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"kv_policy": "window:16", "heads": [[1, 2]], "model": "another"}))
    deployed = Deployed(kept_by(checkpoint, streaming_heads=str(file)))
    try:
        llm = deployed(1)
        assert "was written for a model with other weights" in caplog.text
        [replica] = deployed.factory.started
        config = replica.host._config
        assert (config.kv_policy, config.streaming_heads) == ("window:16@1.2;dense", None)
        assert llm.inputs.identity is not None and llm.inputs.identity.policy == "dense@0,1.0,1.1,1.3;window:16@1.2"
        assert not llm.inputs.endless
        with pytest.raises(InvalidValueError, match=r"^max_tokens=65: must be at most max_model_len=64"):
            ask_all(llm, [("a", [5] * 4, SamplingParams(max_tokens=65))])
    finally:
        deployed.close()


def test_replicas_take_what_the_heads_that_keep_everything_have_room_for(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heads of the first group have fewer blocks, for they make no use of more."""
    monkeypatch.setattr(start, "make_factory", thread_groups())
    limits = {"max_model_len": 2048, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    policy, model = "sinks:4,28@0;dense@*", checkpoint("gqa", max_position_embeddings=2048)
    config = engine_config(model=str(model), kv_memory="4MiB", kv_policy=policy, **limits)
    deployed = Deployed(config)
    try:
        llm = deployed(1)
        [replica] = deployed.factory.started
        pools = [cache.pool.num_blocks for cache in replica.host._started.engine.generation.tables.caches]
        assert pools[0] * 16 < 2048 <= pools[1] * 16
        assert llm.num_blocks == pools[1] and llm.inputs.max_model_len == 2048
        [[sample]] = ask_all(llm, [("a", [5] * 2000, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))])
        assert len(sample.tokens) == 3
        settled(llm)
    finally:
        deployed.close()


def test_a_file_of_streaming_heads_of_other_shapes_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"kv_policy": "window:16", "heads": [[9, 2]]}))
    deployed = Deployed(kept_by(checkpoint, streaming_heads=str(file)))
    try:
        with pytest.raises(InvalidValueError, match=r"^streaming_heads=.*heads\[0\]=\[9, 2\] in it: the model has"):
            deployed(1)
    finally:
        deployed.close()
