"""``headwise generate --input --output``, with tiny models: by an engine here, and by a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headwise.runtime import LLM, SamplingParams, aio
from headwise.runtime.batch.output import Output
from headwise.runtime.batch.run import Batch
from tests.checkpoints import write_checkpoint
from tests.runtime.batch.batches import answers, write
from tests.runtime.cli.test_cli import speaking
from tests.runtime.conftest import LOCAL, Run
from tests.runtime.server.conftest import Running, serve  # noqa: F401 - a fixture

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(write_checkpoint(tmp_path_factory.mktemp("model"), 8, 4, vocab_size=280))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0, "logprobs": True}
    return write(
        tmp_path / "prompts.jsonl",
        {"prompt": "hello"},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
        {"prompt": [5, 6, 7], "temperature": 1, "n": 2, "logprobs": 1},
        {"prompt": [5, 999]},
        b"{",
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"prompt": "hello", "structured_outputs": {"choice": ["left", "right"]}},
    )


def check(found: dict[int, dict[str, object]], model: Path) -> None:
    with LLM(model, executor="local", kv_memory="8MiB", quiet=True) as llm:
        [first] = llm.generate("hello", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        [second] = llm.chat(
            [{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False
        )
    one, two, three, four, five, six, seven = (json.loads(json.dumps(found[n])) for n in range(1, 8))
    assert one["outputs"][0]["text"] == first.outputs[0].text and one["prompt_tokens"] == len(first.prompt_token_ids)
    assert one["outputs"][0]["token_ids"] == first.outputs[0].token_ids and len(first.outputs[0].token_ids) == 4
    assert two["outputs"][0]["text"] == second.outputs[0].text
    assert [sample["index"] for sample in three["outputs"]] == [0, 1] and len(three["outputs"][0]["logprobs"]) == 4
    assert four["error"]["code"] == "invalid_value" and "280" in four["error"]["message"]
    assert five["error"]["code"] == "invalid_line"
    choice = six["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == second.outputs[0].text and len(choice["logprobs"]["content"]) == 3
    assert seven["outputs"][0]["text"] in ("left", "right") or seven["outputs"][0]["finish_reason"] == "length"


def test_a_batch_by_an_engine_here(headwise: Run, model: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    files = ["--input", str(source), "--output", str(target), "--max-tokens", "4"]
    code, out, err = headwise("generate", *files, "-m", str(model), "--json", *LOCAL)
    assert code == 1 and "7 of 7 lines done; 2 could not be answered" in err and str(target) in err
    summary = json.loads(out)
    assert (summary["lines"], summary["done"], summary["failed"], summary["before"]) == (7, 7, 2, 0)
    check(answers(target), model)
    before = target.read_bytes()
    code, out, err = headwise("generate", *files, "-m", "a model that is not loaded", *LOCAL)
    assert (code, out) == (1, "") and "7 of them before" in err and target.read_bytes() == before


def test_a_batch_by_a_server(headwise: Run, serve: object, model: Path, source: Path, tmp_path: Path) -> None:  # noqa: F811
    running: Running = serve(model)  # type: ignore[operator]
    target = tmp_path / "answers.jsonl"
    files = ["--input", str(source), "--output", str(target), "--max-tokens", "4"]
    code, out, err = headwise("generate", *files, "--server", running.address)
    assert (code, out) == (1, "") and "7 of 7 lines done; 2 could not be answered" in err
    check(answers(target), model)


def test_a_server_that_is_busy_is_asked_again(headwise: Run, serve: object, model: Path, tmp_path: Path) -> None:  # noqa: F811
    running: Running = serve(model, max_queued_requests=4, max_num_seqs=2)  # type: ignore[operator]
    source = write(tmp_path / "in", *({"prompt": f"{n}", "max_tokens": 2} for n in range(40)))
    code, _, err = headwise(
        *("generate", "--input", str(source), "--output", str(tmp_path / "out"), "--server", running.address)
    )
    assert code == 0, err
    assert len(answers(tmp_path / "out")) == 40


def test_a_server_that_is_not_there_ends_the_batch(headwise: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"prompt": "a"})
    code, _, err = headwise(
        *("generate", "--input", str(source), "--output", str(tmp_path / "out"), "--server", "127.0.0.1:1")
    )
    assert code == 1 and "UNAVAILABLE" in err and "the same command goes on from there" in err
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "a"], "--input: goes with --output; give both"),
        (["--output", "a"], "--output: goes with --input; give both"),
        ([], "PROMPT: is missing; give one, or --input and --output"),
        (["hi", "--input", "a", "--output", "b"], "--input: does not go with a prompt"),
        (["--chat", "--input", "a", "--output", "b"], "--chat: is for one prompt"),
        (["--input", "nothing", "--output", "b"], "there is no such file"),
    ],
)
def test_flags_of_a_batch(headwise: Run, arguments: list[str], said: str) -> None:
    code, out, err = headwise("generate", *arguments, "-m", "x")
    assert (code, out) == (2, "") and said in err


def test_a_second_job_on_the_same_output_is_refused(headwise: Run, model: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.jsonl"
    with Output(target):
        code, _, err = headwise("generate", "--input", str(source), "--output", str(target), "-m", str(model), *LOCAL)
    assert code == 1 and "another job writes this file now" in err


def test_sigterm_ends_a_batch_as_ctrl_c_does_though_ray_was_joined(
    headwise: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ray.init`` sets this handler."""
    closed = []

    class Joined:
        def __init__(self, config: object, max_queued_requests: int) -> None:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

        def shutdown(self) -> None:
            closed.append(True)

    async def run(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(DEADLINE_S)

    monkeypatch.setattr(aio, "AsyncLLM", Joined)
    monkeypatch.setattr(Batch, "run", run)
    files = ["--input", str(source), "--output", str(tmp_path / "out")]
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = headwise("generate", *files, "-m", "m", *LOCAL)
    assert code == 130 and "the same command goes on from there" in err and closed
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_ended_half_way_goes_on(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Every line has one answer in the end, the one that it has undisturbed; sampled ones too."""
    count = 600
    lines = [{"prompt": f"{n}", "temperature": 1, "max_tokens": 40, "ignore_eos": True} for n in range(count)]
    source, whole, cut = write(tmp_path / "in", *lines), tmp_path / "whole", tmp_path / "cut"

    def command(target: Path) -> list[str]:
        files = ["--input", str(source), "--output", str(target), "--max-model-len", "128"]
        return [sys.executable, "-m", "headwise.runtime.cli", "generate", *files, "-m", str(model), *LOCAL]

    with subprocess.Popen(command(cut), stderr=subprocess.PIPE, text=True) as job:
        deadline = time.monotonic() + DEADLINE_S
        while not cut.exists() or cut.read_bytes().count(b"\n") < 50:
            assert time.monotonic() < deadline and job.poll() is None
            threading.Event().wait(0.01)
        job.send_signal(number)
        _, err = job.communicate(timeout=DEADLINE_S)
    kept = cut.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    number_kept = kept.count(b"\n")
    assert 50 <= number_kept < count
    if number is not signal.SIGKILL:
        assert job.returncode == 130 and f"{number_kept} of {count} lines done" in err
    for target in (cut, whole):
        subprocess.run(command(target), check=True, timeout=DEADLINE_S, env=os.environ, capture_output=True)
    assert cut.read_bytes().startswith(kept)
    done = answers(cut)
    assert {n: one["outputs"] for n, one in done.items()} == {n: one["outputs"] for n, one in answers(whole).items()}


def test_lines_with_many_samples_wait_for_room_in_the_queue(headwise: Run, model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n}", "max_tokens": 1, "n": 64, "temperature": 1} for n in range(40)]
    files = ["--input", str(write(tmp_path / "in", *lines)), "--output", str(tmp_path / "out")]
    code, _, err = headwise("generate", *files, "-m", str(model), *LOCAL)
    assert code == 0, err
    assert {len(one["outputs"]) for one in answers(tmp_path / "out").values()} == {64}
