"""The command line with no Ray: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from headwise.cluster.group import GroupStartError, ShardGroupDied
from headwise.runtime import LLM, SamplingParams, cli
from headwise.workers.errors import HeadwiseError
from tests.checkpoints import write_checkpoint
from tests.runtime.test_tokenizer import byte_level

DEADLINE_S = 120
LOCAL = ["--executor", "local", "--kv-memory", "8MiB", "--cpus-per-rank", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"), 8, 4, vocab_size=280)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mute"), 8, 4)


class Run:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command in this process."""
        self._monkeypatch.setattr(sys, "argv", ["headwise", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code or 0
        assert isinstance(code, int)
        return code, *self._capfd.readouterr()


@pytest.fixture
def headwise(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


def expected(model: Path, prompt: str, max_tokens: int = 6) -> str:
    with LLM(model, executor="local", kv_memory="8MiB", quiet=True) as llm:
        text = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))[0].outputs[0].text
    assert text is not None
    return text


# generate and chat


def test_generate_streams_the_text_to_stdout(headwise: Run, model: Path) -> None:
    text = expected(model, "hello")
    code, out, err = headwise("generate", "hello", "--model", str(model), "--max-tokens", "6", *LOCAL)
    assert (code, out) == (0, text + "\n") and "KV memory" in err
    code, out, _ = headwise("generate", "-", "-m", str(model), "--max-tokens", "6", *LOCAL, stdin="hello")
    assert (code, out) == (0, text + "\n")


def test_generate_json_is_one_object_and_nothing_else(model: Path) -> None:
    arguments = ["generate", "hello", "--model", str(model), "--max-tokens", "6", "--json", *LOCAL]
    done = subprocess.run(
        [sys.executable, "-m", "headwise.runtime.cli", *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    output = json.loads(done.stdout)
    assert output["prompt"] == "hello" and output["finished"] and output["error"] is None
    [sample] = output["outputs"]
    assert (sample["index"], sample["text"], sample["finish_reason"]) == (0, expected(model, "hello"), "length")
    assert len(sample["token_ids"]) == 6 and all(isinstance(token, int) for token in sample["token_ids"])


def test_generate_with_stop_and_chat(headwise: Run, model: Path) -> None:
    text = expected(model, "user:hello ", 12)
    stop = text[4:6]
    arguments = ["generate", "hello", "--chat", "--model", str(model), "--max-tokens", "12", "--stop", stop, *LOCAL]
    code, out, _ = headwise(*arguments)
    assert (code, out) == (0, text[: text.find(stop)] + "\n")
    code, out, _ = headwise(*arguments, "--json")
    assert code == 0 and json.loads(out)["outputs"][0]["stop_reason"] == stop


def test_generate_in_a_form(headwise: Run, model: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    about = {"properties": {"n": {"enum": [17]}}, "required": ["n"], "additionalProperties": False}
    schema.write_text(json.dumps({"type": "object", **about}))
    arguments = ["generate", "hello", "--model", str(model), "--max-tokens", "256", *LOCAL]
    for flags, forms in [
        (["--choice", "left", "--choice", "right"], ("left\n", "right\n")),
        (["--regex", "a{3}b"], ("aaab\n",)),
    ]:
        code, out, _ = headwise(*arguments, *flags)
        assert code == 0 and out in forms
    code, out, _ = headwise(*arguments, "--json-schema", str(schema), "--json")
    assert code == 0 and json.loads(json.loads(out)["outputs"][0]["text"])["n"] == 17
    for flags, words in [
        (["--regex", "("], "structured_outputs.regex"),
        (["--regex", "a", "--choice", "a"], "structured_outputs"),
        (["--json-schema", str(tmp_path / "nowhere")], "--json-schema"),
    ]:
        code, out, err = headwise(*arguments, *flags)
        assert (code, out) == (2, "") and words in err and "Traceback" not in err


@contextmanager
def ended(server: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        server.terminate()
        assert server.wait(DEADLINE_S) == 0


def test_generate_asks_a_server(headwise: Run, model: Path) -> None:
    arguments = ["serve", "--model", str(model), "--port", "0", "--json", *LOCAL]
    command = [sys.executable, "-m", "headwise.runtime.cli", *arguments]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server,
        ended(server),
    ):
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        question = ["generate", "hello", "--server", address, "--max-tokens", "6"]
        code, out, err = headwise(*question)
        assert (code, out, err) == (0, expected(model, "hello") + "\n", "")
        code, out, _ = headwise(*question, "--chat", "--json")
        answer = json.loads(out)
        assert code == 0 and answer["samples"][0]["text"] == expected(model, "user:hello ")
        code, out, err = headwise(*question, "--choice", "left", "--choice", "right")
        assert code == 0 and out in ("left\n", "right\n")
        code, out, err = headwise(*question, "--temperature", "-1")
        assert (code, out) == (2, "") and "temperature=-1" in err
    code, out, err = headwise(*question)
    assert (code, out) == (1, "") and "Traceback" not in err


def test_chat_keeps_the_conversation(headwise: Run, model: Path) -> None:
    first = expected(model, "system:be good user:hello ")
    second = expected(model, f"system:be good user:hello assistant:{first} user:you ")
    arguments = ["chat", "--model", str(model), "--max-tokens", "6", "--system", "be good", *LOCAL]
    code, out, _ = headwise(*arguments, stdin="hello\nyou\n\nnot read\n")
    assert (code, out) == (0, f"{first}\n{second}\n")
    code, out, _ = headwise(*arguments, "--json", stdin="hello\nyou\n")
    # Not splitlines: a model may well say other line ends.
    answers = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert code == 0 and answers == [{"role": "assistant", "content": text} for text in (first, second)]


# Errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-tokens", "0"], "max_tokens=0"),
        (["--max-tokens", "many"], "--max-tokens"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--top-p", "2"], "top_p=2"),
        (["--tp", "0"], "tensor_parallel_size=0"),
        (["--tp", "2"], "tensor_parallel_size=2"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--kv-memory", "1KiB"], "kv_memory='1KiB'"),
        (["--max-model-len", "100000"], "max_model_len=100000"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_flags_exit_with_2(headwise: Run, model: Path, flags: list[str], words: str) -> None:
    code, out, err = headwise("generate", "hello", "--model", str(model), *LOCAL, *flags)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_models_and_prompts_that_are_wrong_exit_with_2(headwise: Run, model: Path, mute: Path, tmp_path: Path) -> None:
    for name, prompt, words in [
        ("no-such-model", "hello", "headwise: model='no-such-model'"),
        (str(tmp_path), "hello", "config.json"),
        (str(mute), "hello", "no tokenizer"),
        (str(model), "", "at least one token"),
    ]:
        code, out, err = headwise("generate", prompt, "--model", name, *LOCAL)
        assert (code, out) == (2, "") and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ShardGroupDied(1, "here", "killed"), 3),
        (GroupStartError("no room"), 1),
        (HeadwiseError("something"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    headwise: Run, model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LLM, "stream", fail)
    found, _, err = headwise("generate", "hello", "--model", str(model), *LOCAL)
    assert found == code and "Traceback" not in err
    assert f"headwise: {error}" in err or isinstance(error, KeyboardInterrupt)


def test_help_lists_the_commands(headwise: Run) -> None:
    code, out, _ = headwise("--help")
    assert code == 0 and all(name in out for name in ("generate", "chat", "serve", "warmup", "bench"))
    code, out, _ = headwise("bench", "--help")
    benches = ("throughput", "latency", "step", "limits", "kv-cache", "prefix", "serve")
    assert code == 0 and all(name in out for name in benches)
    code, out, _ = headwise("generate", "--help")
    assert code == 0 and "--model" in out
