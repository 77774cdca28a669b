"""What the README promises, on the demo model and real Ray actors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.client import Client, Completion
from headwise.runtime.inputs.tokenizer import load_tokenizer
from tests.byte_tokenizer import VOCAB, write_byte_tokenizer
from tests.checkpoints import assert_greedy, reference_model, write_checkpoint

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "How many legs does a spider have?",
    "Explain photosynthesis in one sentence.",
    "Name three primary colours.",
    "What is 12 times 12?",
    "Translate 'good morning' to Spanish.",
    "Tell me a fact about the ocean.",
)
TOKENS = 64


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_demo_model_says_what_transformers_computes(smollm2: Path, tp: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(smollm2, tensor_parallel_size=tp, max_model_len=512, kv_memory="256MiB", quiet=True) as llm:
        outputs = llm.chat(conversations, params)
        [alone] = llm.chat(conversations[0], params)
    tokenizer, reference = load_tokenizer(smollm2), reference_model(smollm2)
    assert tokenizer is not None
    for conversation, output in zip(conversations, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == TOKENS
        assert_greedy(reference, tokenizer.apply_chat_template(conversation), output.outputs[0].token_ids)
    assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids


def headwise(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headwise.runtime.cli", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ray_processes(folder: Path) -> list[psutil.Process]:
    """Of a Ray that was started in this folder; others may run on this machine."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.name().startswith(("raylet", "gcs_server", "ray::")) and process.cwd() == str(folder):
                found.append(process)
    return found


@pytest.mark.parametrize("as_json", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generate_answers_on_two_actors(smollm2: Path, tmp_path: Path, as_json: bool) -> None:
    arguments = ["--model", str(smollm2), "--tp", "2", "--chat", "--max-model-len", "512", "--max-tokens", "16"]
    run = headwise("generate", *arguments, *(["--json"] if as_json else []), QUESTIONS[0], cwd=tmp_path)
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    if as_json:
        assert json.loads(stdout)["outputs"][0]["text"] == "The capital of France is Paris."
    else:
        assert stdout == "The capital of France is Paris.\n"
    assert "KV memory: " in stderr
    assert not ray_processes(tmp_path)


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    endless = {"max_position_embeddings": 1 << 20, "eos_token_id": None}  # or it would be over in half a second
    model = write_checkpoint(tmp_path / "model", 8, 4, vocab_size=VOCAB, **endless)
    write_byte_tokenizer(model)
    run = headwise(
        *("generate", "--model", str(model), "--tp", "2", "--max-tokens", "1000000", "--kv-memory", "1GiB"),
        *("--stop", "no such text", "Once upon a time"),
        cwd=tmp_path,
    )
    assert run.stdout is not None
    assert run.stdout.read(20)  # it is generating
    assert ray_processes(tmp_path)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, (len(stdout), stderr)
    wait_for_the_end_of_ray(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_finishes_what_runs_on_a_signal(smollm2: Path, tmp_path: Path, number: int) -> None:
    run = headwise(
        *("serve", "--model", str(smollm2), "--tp", "2", "--max-model-len", "512", "--port", "0", "--json"),
        cwd=tmp_path,
    )
    assert run.stdout is not None
    ready = run.stdout.readline()
    assert ready, run.communicate(timeout=60)
    address = json.loads(ready)["address"]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with Client(address, timeout=60) as client:
        stream = client.stream([{"role": "user", "content": QUESTIONS[0]}], params)
        text = next(stream).text
        assert ray_processes(tmp_path)
        if number == signal.SIGTERM:  # as an init system does, and as a terminal does
            run.send_signal(number)
        else:
            os.killpg(run.pid, number)
        *increments, last = stream
    assert isinstance(last, Completion) and last.completion_tokens == 100
    assert (text + "".join(increment.text for increment in increments)).startswith("The capital of France is Paris.")
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    wait_for_the_end_of_ray(tmp_path)


@pytest.mark.slow
def test_serve_ends_when_a_shard_dies_while_nothing_runs(smollm2: Path, tmp_path: Path) -> None:
    run = headwise(
        *("serve", "--model", str(smollm2), "--tp", "2", "--max-model-len", "512", "--port", "0", "--json"),
        *("--on-shard-death", "fail"),
        cwd=tmp_path,
    )
    assert run.stdout is not None and run.stdout.readline()
    shards = [process for process in ray_processes(tmp_path) if "ShardActor" in process.name()]
    assert len(shards) == 2
    shards[1].kill()
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 3, stderr
    wait_for_the_end_of_ray(tmp_path)


def wait_for_the_end_of_ray(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while (left := ray_processes(folder)) and time.monotonic() < deadline:
        psutil.wait_procs(left, 1)
    assert not ray_processes(folder)
