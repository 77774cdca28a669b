"""What the README promises, on the demo model and real Ray actors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.client import Client, Completion
from headwise.runtime.inputs.tokenizer import load_tokenizer
from tests.checkpoints import reference_model, reference_tokens

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


@pytest.fixture(scope="module")
def expected(smollm2: Path) -> list[list[int]]:
    """transformers' greedy tokens after each question."""
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer is not None
    torch.set_num_threads(os.cpu_count() or 1)
    model = reference_model(smollm2)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [reference_tokens(model, tokenizer.apply_chat_template(c), TOKENS) for c in conversations]


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_demo_model_says_what_transformers_computes(smollm2: Path, expected: list[list[int]], tp: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with LLM(smollm2, tensor_parallel_size=tp, max_model_len=512, kv_memory="256MiB", quiet=True) as llm:
        outputs = llm.chat(conversations, params)
        alone = llm.chat(conversations[0], params)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert alone[0].outputs[0].token_ids == expected[0]


def headwise(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headwise.runtime.cli", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ray_processes() -> set[int]:
    """Of every Ray on this machine."""
    found = set()
    for process in psutil.process_iter(["pid", "name"]):
        if process.info["name"] in ("raylet", "gcs_server") or (process.info["name"] or "").startswith("ray::"):
            found.add(process.info["pid"])
    return found


def test_generate_answers_on_two_actors(smollm2: Path, tmp_path: Path) -> None:
    before = ray_processes()
    arguments = ["--model", str(smollm2), "--tp", "2", "--chat", "--max-model-len", "512", "--max-tokens", "16"]
    run = headwise("generate", *arguments, QUESTIONS[0], cwd=tmp_path)
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    assert stdout == "The capital of France is Paris.\n"
    assert "KV memory: " in stderr
    run = headwise("generate", *arguments, "--json", QUESTIONS[0], cwd=tmp_path)
    stdout, stderr = run.communicate(timeout=120)
    assert json.loads(stdout)["outputs"][0]["text"] == "The capital of France is Paris."
    assert ray_processes() <= before


def test_ctrl_c_leaves_nothing_behind(smollm2: Path, tmp_path: Path) -> None:
    before = ray_processes()
    run = headwise(
        *("generate", "--model", str(smollm2), "--tp", "2", "--max-model-len", "4096", "--max-tokens", "4000"),
        *("--stop", "no such text", "Once upon a time"),
        cwd=tmp_path,
    )
    assert run.stdout is not None
    assert run.stdout.read(20)  # it is generating
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    run.communicate(timeout=60)
    assert run.returncode == 130
    wait_for_the_end_of_ray(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_finishes_what_runs_on_a_signal(smollm2: Path, tmp_path: Path, number: int) -> None:
    before = ray_processes()
    run = headwise(
        *("serve", "--model", str(smollm2), "--tp", "2", "--max-model-len", "512", "--port", "0", "--json"),
        cwd=tmp_path,
    )
    assert run.stdout is not None
    address = json.loads(run.stdout.readline())["address"]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with Client(address, timeout=60) as client:
        stream = client.stream([{"role": "user", "content": QUESTIONS[0]}], params)
        text = next(stream).text
        if number == signal.SIGTERM:  # as an init system does, and as a terminal does
            run.send_signal(number)
        else:
            os.killpg(run.pid, number)
        *increments, last = stream
    assert isinstance(last, Completion) and last.completion_tokens == 100
    assert (text + "".join(increment.text for increment in increments)).startswith("The capital of France is Paris.")
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    wait_for_the_end_of_ray(before)


@pytest.mark.slow
def test_serve_ends_when_a_shard_dies_while_nothing_runs(smollm2: Path, tmp_path: Path) -> None:
    before = ray_processes()
    run = headwise(
        *("serve", "--model", str(smollm2), "--tp", "2", "--max-model-len", "512", "--port", "0", "--json"),
        cwd=tmp_path,
    )
    assert run.stdout is not None and run.stdout.readline()
    shards = [p for pid in ray_processes() - before if "ShardActor" in (p := psutil.Process(pid)).name()]
    assert len(shards) == 2
    shards[1].kill()
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 3, stderr
    wait_for_the_end_of_ray(before)


def wait_for_the_end_of_ray(before: set[int]) -> None:
    deadline = time.monotonic() + 20
    while ray_processes() - before and time.monotonic() < deadline:
        psutil.wait_procs([psutil.Process(pid) for pid in ray_processes() - before if psutil.pid_exists(pid)], 1)
    assert ray_processes() <= before
