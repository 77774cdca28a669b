"""A deployment on a real Ray of two nodes, submitted from outside: clients get answers, ranks are spread over nodes,
and a node that is lost takes no stream with it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from openai import OpenAI

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.client import Client, Completion, Increment
from tests.runtime.jobs.conftest import DEADLINE_S, Head, Node, free_ports, processes_of, wait_until

STREAMS, TOKENS = 8, 160
PROMPTS = [[number + 3] * 5 for number in range(STREAMS)]
# Half of them are greedy.
PARAMS = [
    SamplingParams(temperature=0.8 * (number % 2), seed=7, max_tokens=TOKENS, ignore_eos=True)
    for number in range(STREAMS)
]


@contextmanager
def served(head: Head, model: Path, *flags: str) -> Iterator[str]:
    """The address of a server that ``headwise submit`` runs as a job."""
    [port] = free_ports(1)
    words = ["headwise", "submit", "--address", head.address, "--", "serve", "--model", str(model)]
    words += ["--port", str(port), "--max-model-len", "512", "--kv-memory", "128MiB", *flags]
    with head.start(*words) as job:
        # Or the job would wait for somebody to read what it says.
        assert job.stderr is not None
        threading.Thread(target=job.stderr.read, daemon=True).start()
        try:
            assert job.stdout is not None and any(line.startswith("ready ") for line in job.stdout)
            yield f"127.0.0.1:{port}"
        finally:
            job.send_signal(signal.SIGINT)
            job.wait(DEADLINE_S)
    assert not processes_of(str(port))


def streams_across(address: str, happens: Callable[[], None]) -> list[list[int]]:
    """The tokens of streams, while something happens once all have begun."""
    begun, over = threading.Barrier(STREAMS + 1), threading.Event()
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    results: list[Completion] = []

    def stream(client: Client, number: int) -> None:
        for item in client.stream(PROMPTS[number], PARAMS[number]):
            if isinstance(item, Increment):
                tokens[number] += item.token_ids
                if len(tokens[number]) == len(item.token_ids):
                    begun.wait(DEADLINE_S)
                    over.wait(DEADLINE_S)
            else:
                results.append(item)

    with Client(address) as client:
        threads = [threading.Thread(target=stream, args=(client, number), daemon=True) for number in range(STREAMS)]
        for thread in threads:
            thread.start()
        begun.wait(DEADLINE_S)
        happens()
        over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
    assert [one.samples[0].finish_reason for one in results] == STREAMS * ["length"]
    return tokens


def status(head: Head, address: str) -> dict[str, object]:
    done = head.run("headwise", "status", "--server", address, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def right(smollm2: Path) -> list[list[int]]:
    """What one rank in a process computes."""
    with LLM(str(smollm2), executor="local", max_model_len=512, kv_memory="128MiB", quiet=True) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_on_two_nodes_and_a_node_that_is_lost(head: Head, smollm2: Path, right: list[list[int]]) -> None:
    [openai] = free_ports(1)
    flags = ("--replicas", "2", "--cpus-per-rank", "2", "--openai-port", str(openai), "--name", "demo")
    with Node(head) as node, served(head, smollm2, *flags) as address:
        replicas = status(head, address)["replicas"]
        assert isinstance(replicas, list) and [one["state"] for one in replicas] == 2 * ["serving"]
        asked = head.run("headwise", "generate", "--server", address, "--chat", "What is the capital of France?")
        assert asked.returncode == 0 and "Paris" in asked.stdout
        with OpenAI(base_url=f"http://127.0.0.1:{openai}/v1", api_key="none") as client:
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            answer = client.chat.completions.create(model="demo", messages=messages, temperature=0)  # type: ignore[call-overload]
            assert "Paris" in answer.choices[0].message.content
        assert streams_across(address, lambda: None) == right
        assert streams_across(address, node.kill) == right
        wait_until(lambda: [one["state"] for one in status(head, address)["replicas"]].count("serving") == 1)  # type: ignore[attr-defined]
        with Node(head):  # which has room for the one that is missing
            wait_until(lambda: [one["state"] for one in status(head, address)["replicas"]].count("serving") == 2)  # type: ignore[attr-defined]
            assert streams_across(address, lambda: None) == right


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_over_both_nodes_and_a_node_that_is_lost(head: Head, smollm2: Path, right: list[list[int]]) -> None:
    """No node has room for both ranks. When a node is lost, they wait for another."""
    with Node(head) as node, Node(head), served(head, smollm2, "--tp", "2", "--cpus-per-rank", "1.5") as address:
        [engine] = status(head, address)["replicas"]  # type: ignore[misc]
        assert len(engine["shards"]) == 2
        undisturbed = streams_across(address, lambda: None)
        assert undisturbed[::2] == right[::2]  # a sampled token may fall between those of two ranks and of one
        assert streams_across(address, node.kill) == undisturbed
