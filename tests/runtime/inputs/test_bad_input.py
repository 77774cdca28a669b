"""Bad input is a typed error that names the field and the limit, and whoever made it can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.config import engine_config
from headwise.workers.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from tests.checkpoints import write_checkpoint
from tests.runtime.inputs.test_tokenizer import byte_level

MAX_LEN = 64
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
GOOD_PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer knows more tokens than the model: ``<think>`` is none of the 256."""
    directory = write_checkpoint(tmp_path_factory.mktemp("spoken"), 8, 4)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mute"), 8, 4)


@pytest.fixture(scope="module")
def served(spoken: Path) -> Iterator[LLM]:
    with start(spoken, max_model_len=MAX_LEN) as llm:
        yield llm


@pytest.fixture
def llm(served: LLM) -> Iterator[LLM]:
    """After the test it must still answer, and have lost no block."""
    yield served
    assert len(served.generate(GOOD_PROMPT, PARAMS)[0].outputs[0].token_ids) == 4
    stats = served.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"] and stats["num_waiting"] == stats["num_running"] == 0


def start(model: Path | str, **settings: Any) -> LLM:
    return LLM(model, **{"executor": "local", "kv_memory": "4MiB", "cpus_per_rank": 1, "quiet": True} | settings)


def refused(field: str, call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        call()
    assert caught.value.field == field, caught.value
    for word in (field, *words):
        assert word in str(caught.value)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([[]], ["at least one token"]),
        ("", ["at least one token"]),
        ([5, 256], ["256", "[0, 256)"]),
        ([5, -1], ["-1", "[0, 256)"]),
        ([5, 2**70], ["[0, 256)"]),
        ([5, True], ["True", "whole token ids"]),
        ([5, 1.0], ["1.0", "whole token ids"]),
        ([1.5, 2.5], ["1.5", "whole token ids"]),
        ([5, None], ["None", "whole token ids"]),
        ([[5], 6], ["6", "text or a list"]),
        ([None], ["None", "whole token ids"]),
        ("a<think>b", ["[0, 256)"]),
        ("half \ud83d", ["surrogate"]),
        ([5] * MAX_LEN, [f"{MAX_LEN} tokens", f"at most {MAX_LEN - 1}", f"max_model_len={MAX_LEN}"]),
        ("x" * 100, ["100 tokens", f"max_model_len={MAX_LEN}"]),
        ("x" * 100_000, ["100000 bytes", f"max_model_len={MAX_LEN}"]),
        (b"hello", ["text or a list"]),
        ([b"hello"], ["text or a list"]),
        ([GOOD_PROMPT, [300]], ["300"]),
    ],
)
def test_prompts(llm: LLM, prompt: Any, words: list[str]) -> None:
    refused("prompt", lambda: llm.generate(prompt, PARAMS), *words)


@pytest.mark.parametrize("prompts", [None, 7, {"prompt": "hello"}, {5, 6}, np.array([5, 6]), iter([5])])
def test_prompts_that_are_no_list(llm: LLM, prompts: Any) -> None:
    refused("prompts", lambda: llm.generate(prompts, PARAMS), "string, a list")


@pytest.mark.parametrize("prompt", [None, 7, [], "", {"prompt": "hello"}, [5, -1], b"hello", ["a", "b"], [[5]]])
def test_prompts_of_a_stream(llm: LLM, prompt: Any) -> None:
    refused("prompt", lambda: llm.stream(prompt, PARAMS))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [[]],
        None,
        7,
        "hello",
        {"role": "user", "content": "x"},
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "x"}, "y"],
        [{"role": "user", "content": "\ud83d"}],
        [{"role": "user", "content": "the model has no chat template"}],
    ],
)
def test_messages(llm: LLM, messages: Any) -> None:
    refused("messages", lambda: llm.chat(messages, PARAMS))


def test_text_where_there_is_no_tokenizer(mute: Path) -> None:
    with start(mute) as llm:
        refused("prompt", lambda: llm.generate("hello", PARAMS), "no tokenizer", "token ids")
        refused("prompt", lambda: llm.stream("hello", PARAMS), "no tokenizer")
        for messages in ([{"role": "user", "content": "x"}], None):
            refused("messages", lambda messages=messages: llm.chat(messages, PARAMS), "no tokenizer")
        assert llm.generate(GOOD_PROMPT, PARAMS)[0].outputs[0].text is None


# Parameters


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"max_tokens": 0}, ["[1, "]),
        ({"max_tokens": -1}, ["[1, "]),
        ({"max_tokens": 10**12}, ["[1, "]),
        ({"max_tokens": 1.5}, ["int"]),
        ({"temperature": -0.1}, ["[0, 100]"]),
        ({"temperature": float("nan")}, ["[0, 100]"]),
        ({"top_p": 0}, ["(0, 1]"]),
        ({"n": 0}, ["[1, 64]"]),
        ({"logprobs": 21}, ["[0, 20]"]),
        ({"stop": ""}, ["1 to 256 characters"]),
        ({"max_token": 5}, ["unknown", "max_tokens"]),
    ],
)
def test_params_are_refused_when_they_are_made(params: dict[str, Any], words: list[str]) -> None:
    refused(next(iter(params)), lambda: SamplingParams(**params), *words)


@pytest.mark.parametrize(
    ("params", "field", "limit"),
    [
        ({"max_tokens": MAX_LEN + 1}, "max_tokens", f"max_model_len={MAX_LEN}"),
        ({"max_tokens": None, "min_tokens": MAX_LEN + 1}, "min_tokens", f"max_model_len={MAX_LEN}"),
        ({"stop_token_ids": [256]}, "stop_token_ids", "[0, 256)"),
        ({"logit_bias": {256: 1.0}}, "logit_bias", "[0, 256)"),
    ],
)
def test_params_past_the_models_limits(llm: LLM, params: dict[str, Any], field: str, limit: str) -> None:
    refused(field, lambda: llm.generate(GOOD_PROMPT, SamplingParams(**params)), limit)
    refused(field, lambda: llm.stream(GOOD_PROMPT, SamplingParams(**params)), limit)


@pytest.mark.parametrize("params", [[], [PARAMS], [PARAMS] * 3])
def test_a_wrong_number_of_params(llm: LLM, params: list[SamplingParams]) -> None:
    refused("sampling_params", lambda: llm.generate([[5], [6]], params), f"{len(params)} of them", "2 prompts")


@pytest.mark.parametrize("params", [{"max_tokens": 4}, 7, "max_tokens=4", [None], [{"max_tokens": 4}]])
def test_params_of_another_type(llm: LLM, params: Any) -> None:
    refused("sampling_params", lambda: llm.generate(["a"], params))


# Settings


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size", ["0", "greater than or equal to 1"]),
        ({"tensor_parallel_size": 9}, "tensor_parallel_size", ["9", "8"]),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size", ["2", "local", "ray"]),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size", ["int"]),
        ({"max_model_len": 1}, "max_model_len", ["greater than or equal to 2"]),
        ({"max_model_len": 513}, "max_model_len", ["513", "512"]),
        ({"dtype": "int8"}, "dtype", ["float32"]),
        ({"device": "tpu"}, "device", ["cpu"]),
        ({"executor": "threads"}, "executor", ["local"]),
        ({"block_size": 0}, "block_size", ["1"]),
        ({"max_num_seqs": 0}, "max_num_seqs", ["1"]),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", ["1"]),
        ({"pipeline_depth": 3}, "pipeline_depth", ["2"]),
        ({"attention": "flash"}, "attention", ["reference"]),
        ({"seed": -1}, "seed", ["0"]),
        ({"cpus_per_rank": 0}, "cpus_per_rank", ["0"]),
        ({"kv_memory": "64KiB"}, "kv_memory", ["max_model_len=512", "65536 bytes", "--kv-memory", "--max-model-len"]),
        ({"kv_memory": "much"}, "kv_memory", ["GiB"]),
        ({"kv_memory": -1}, "kv_memory", ["GiB"]),
        ({"num_blocks": 31}, "num_blocks", ["31", "496 tokens", "max_model_len=512"]),
        ({"num_blocks": 0}, "num_blocks", ["greater than or equal to 1"]),
    ],
)
def test_settings(spoken: Path, settings: dict[str, Any], field: str, words: list[str]) -> None:
    refused(field, lambda: start(spoken, **settings), *words)


def test_an_unknown_setting_is_named(spoken: Path) -> None:
    with pytest.raises(TypeError, match="max_modellen"):
        start(spoken, max_modellen=64)
    with pytest.raises(InvalidValueError, match="max_modellen"):
        engine_config(model="smollm2", max_modellen=64)


def test_the_smallest_memory_that_is_named_is_enough(spoken: Path) -> None:
    needed = 512 * 2 * 2 * 4 * 16 * 4  # 512 tokens of keys and values in 2 layers, 4 heads of 16 float32
    refused("kv_memory", lambda: start(spoken, kv_memory=needed - 1), f"needs {needed} bytes")
    with start(spoken, kv_memory=needed) as llm:
        assert llm.stats()["num_blocks"] == 32
        assert len(llm.generate([5] * 500, PARAMS.clone(max_tokens=None))[0].outputs[0].token_ids) == 12


# Models


@pytest.mark.parametrize("name", ["no-such-model", "meta-llama/Llama-3.2-1B", "/nowhere/at/all"])
def test_unknown_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("model", lambda: start(name), "smollm2", "not downloaded")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start(tmp_path)


@pytest.fixture
def copied(mute: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mute, tmp_path / "model"))


def change_config(directory: Path, remove: str = "", **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    config.pop(remove, None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(copied: Path, keep: int) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        start(copied)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"]
)
def test_a_config_with_a_missing_key(copied: Path, key: str) -> None:
    change_config(copied, remove=key)
    with pytest.raises(CheckpointError, match=key):
        start(copied)


def test_a_config_that_is_not_json(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start(copied)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "mamba"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn"),
    ],
)
def test_models_that_are_not_computed(copied: Path, changes: dict[str, Any], word: str) -> None:
    change_config(copied, **changes)
    (copied / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(UnsupportedModelError, match=f"(?i){word}"):
        start(copied)


def test_a_config_that_promises_other_shapes(copied: Path) -> None:
    change_config(copied, intermediate_size=160)
    with pytest.raises(CheckpointError, match=r"150|160"):
        start(copied)


def test_a_broken_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        start(copied)
