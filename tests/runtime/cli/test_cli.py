"""The command line with no Ray: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from headwise.cluster.group import GroupStartError, ShardGroupDied
from headwise.runtime import LLM, SamplingParams
from headwise.runtime.cli import main as cli
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.structured_outputs import MAX_GRAMMAR_BYTES
from headwise.workers.errors import HeadwiseError
from tests.checkpoints import write_checkpoint
from tests.runtime.conftest import LOCAL, Run
from tests.runtime.inputs.test_tokenizer import TOKENIZERS, byte_level
from tests.runtime.server.conftest import Running, serve  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(write_checkpoint(tmp_path_factory.mktemp("model"), 8, 4, vocab_size=280))


def speaking(directory: Path) -> Path:
    """With a byte-level tokenizer."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that fails after an exclamation mark."""
    directory = write_checkpoint(tmp_path_factory.mktemp("failing"), 8, 4, vocab_size=280, tie_word_embeddings=False)
    weights = load_file(directory / "model.safetensors")
    [mark] = TOKENIZERS["byte_level"].encode("!")
    weights["model.embed_tokens.weight"][mark] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return speaking(directory)


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mute"), 8, 4)


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


def test_generate_json_is_one_object_and_nothing_else(headwise: Run, model: Path) -> None:
    code, out, _ = headwise("generate", "hello", "--model", str(model), "--max-tokens", "6", "--json", *LOCAL)
    assert code == 0 and out.count("\n") == 1
    output = json.loads(out)
    assert output["prompt"] == "hello" and output["finished"] and output["error"] is None
    [sample] = output["outputs"]
    assert (sample["index"], sample["text"], sample["finish_reason"]) == (0, expected(model, "hello"), "length")
    assert len(sample["token_ids"]) == 6 and all(isinstance(token, int) for token in sample["token_ids"])


def test_generate_json_tells_how_long_it_took(headwise: Run, model: Path) -> None:
    started = time.monotonic()
    code, out, _ = headwise("generate", "hello", "--model", str(model), "--max-tokens", "6", "--json", *LOCAL)
    metrics = json.loads(out)["metrics"]
    assert code == 0 and metrics.keys() == {
        *("queued_s", "time_to_first_token_s", "total_s"),
        *("num_preemptions", "num_cached_tokens", "num_restored_tokens"),
    }
    times = [metrics[name] for name in ("queued_s", "time_to_first_token_s", "total_s")]
    assert 0 < times[0] < times[1] < times[2] < time.monotonic() - started


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
    schema.write_text('{"type": "string", "minLength": 3, "maxLength": 3}', encoding="utf-8-sig")
    code, out, _ = headwise(*arguments, "--json-schema", str(schema))
    assert code == 0 and len(json.loads(out)) == 3


def test_a_form_that_only_the_model_can_refuse_is_told_in_flags(
    headwise: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text('{"type": "nothing"}')
    arguments = ["generate", "hello", "--model", str(model), *LOCAL]
    code, out, err = headwise(*arguments, "--regex", "(")
    assert (code, out) == (2, "") and "headwise: --regex='(': cannot be used: " in err
    code, out, err = headwise(*arguments, "--json", "--json-schema", "schema.json")
    assert (code, out) == (2, "") and "headwise: --json-schema='schema.json': cannot be used: " in err
    assert "structured_outputs" not in err
    monkeypatch.setattr(GrammarChecker, "problem", "knows no grammars")
    code, out, err = headwise(*arguments, "--choice", "left", "--choice", "right")
    assert (code, out) == (2, "") and err.endswith("headwise: --choice=['left', 'right']: knows no grammars\n")


def test_generate_asks_a_server(headwise: Run, model: Path, serve: Callable[..., Running]) -> None:  # noqa: F811
    server = serve(model)
    question = ["generate", "hello", "--server", server.address, "--max-tokens", "6"]
    code, out, err = headwise(*question)
    assert (code, out, err) == (0, expected(model, "hello") + "\n", "")
    code, out, _ = headwise(*question, "--chat", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["samples"][0]["text"] == expected(model, "user:hello ")
    code, out, err = headwise(*question, "--choice", "left", "--choice", "right")
    assert code == 0 and out in ("left\n", "right\n")
    code, out, err = headwise(*question, "--temperature", "-1")
    assert (code, out) == (2, "") and "temperature=-1" in err
    assert server.end() == 0
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


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(LLM, "__init__", load)


@pytest.mark.usefixtures("no_model")
def test_a_form_that_is_wrong_is_refused_before_the_model_loads(
    headwise: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"type": "object",}')
    Path("empty.json").write_text("")
    Path("list.json").write_text("[]")
    Path("latin.json").write_bytes(b'{"const": "\xe9"}')
    Path("long.json").write_text(json.dumps({"const": "é" * MAX_GRAMMAR_BYTES}, ensure_ascii=False))
    position = "line 1 column 19 (char 18)"
    for flags, words in [
        (["--json-schema", "bad.json"], ["--json-schema='bad.json': must be a JSON schema: ", position]),
        (["--json-schema", "empty.json"], ["--json-schema='empty.json': must not be empty"]),
        (["--json-schema", "list.json"], ["--json-schema='list.json': must be a JSON schema that is an object"]),
        (["--json-schema", "latin.json"], ["--json-schema='latin.json': cannot be read: 'utf-8' codec"]),
        (["--json-schema", "long.json"], ["--json-schema='long.json': has ", f"more than {MAX_GRAMMAR_BYTES}"]),
        (["--json-schema", "nowhere"], ["--json-schema='nowhere': cannot be read: "]),
        (["--json-schema", "."], ["--json-schema='.': cannot be read: "]),
        (["--regex", ""], ["--regex='': must not be empty"]),
        (["--choice", "left", "--choice", ""], ["--choice='': must not be empty"]),
        (
            ["--regex", "a", "--choice", "b"],
            ["--regex and --choice: do not go together; give one of --json-schema, --regex, --choice"],
        ),
        (["--json-schema", "nowhere", "--regex", "a"], ["--json-schema and --regex: do not go together"]),
    ]:
        code, out, err = headwise("generate", "hello", "--model", "smollm2", *LOCAL, *flags)
        assert (code, out) == (2, "") and all(word in err for word in words), err
        assert err.startswith("headwise: --") and err.count("\n") == 1 and "structured_outputs" not in err


@pytest.mark.usefixtures("no_model")
def test_generate_needs_a_model_or_a_server(headwise: Run) -> None:
    wanted = "headwise: --model: is missing; give a model, or --server\n"
    assert headwise("generate", "hi") == (2, "", wanted)
    assert headwise("generate", "-", "--chat", "--json") == (2, "", wanted)


@pytest.mark.parametrize("as_json", [False, True])
def test_generate_fails_where_its_request_failed(headwise: Run, failing: Path, as_json: bool) -> None:
    arguments = ["generate", "hello", "--chat", "--model", str(failing), *LOCAL, *(["--json"] if as_json else [])]
    code, out, err = headwise(*arguments, "--regex", "ab!c")
    assert code == 1 and err.endswith("\nheadwise: the model's logits are not finite\n")
    if as_json:
        output = json.loads(out)
        assert output["error"] == "the model's logits are not finite"
        assert (output["outputs"][0]["text"], output["outputs"][0]["finish_reason"]) == ("ab!", "error")
    else:
        assert out == "ab!\n"
    code, _, err = headwise(*arguments, "--regex", "abc")
    assert code == 0 and "not finite" not in err


def test_chat_ends_where_an_answer_failed(headwise: Run, failing: Path) -> None:
    system = ["--system", "!"]
    arguments = ["chat", "--model", str(failing), "--max-tokens", "6", *LOCAL]
    code, out, err = headwise(*arguments, *system, stdin="hello\nyou\n")
    assert (code, out) == (1, "\n") and err.endswith("\nheadwise: the model's logits are not finite\n")
    code, out, err = headwise(*arguments, *system, "--json", stdin="hello\nyou\n")
    assert code == 1 and err.endswith("\nheadwise: the model's logits are not finite\n")
    assert json.loads(out) == {"role": "assistant", "content": ""}


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
    names = ("generate", "chat", "serve", "status", "scale", "restart", "drain", "plan", "doctor", "convert", "warmup")
    assert code == 0 and all(f"\n  {name} " in out for name in (*names, "calibrate", "bench"))
    code, out, _ = headwise("bench", "--help")
    benches = ("throughput", "latency", "step", "limits", "kv-cache", "prefix", "serve")
    assert code == 0 and all(name in out for name in benches)
    code, out, _ = headwise("generate", "--help")
    assert code == 0 and "--model" in out


def commands(command: Any, *path: str) -> list[Any]:
    """A command and those below it, each with what is typed for it."""
    below = getattr(command, "commands", {}).items()
    return [
        pytest.param(path, command, id=" ".join(path) or "headwise"),
        *itertools.chain.from_iterable(commands(sub, *path, name) for name, sub in below),
    ]


@pytest.mark.parametrize(("path", "command"), commands(typer.main.get_command(cli.app)))
def test_help_at_80_columns_cuts_nothing(
    headwise: Run, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...], command: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = headwise(*path, "--help")
    usage, _, rest = out.partition("\n")
    assert code == 0 and usage.startswith("Usage: ") and "…" not in out and "..." not in rest
    assert max(map(len, out.splitlines())) <= 80
    together = "".join(out.split())  # as no line break can be in the way
    for name, sub in getattr(command, "commands", {}).items():
        assert f"\n  {name} " in out and sub.get_short_help_str(200) in out
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert re.search(rf"(^|[ ,]){name}([ ,]|$)", out, re.MULTILINE), name
        if parameter.metavar:
            assert f"{max(parameter.opts, key=len)} {parameter.metavar}" in out
        assert "".join((parameter.help or "").split()) in together
        if parameter.param_type_name == "option" and not isinstance(parameter.default, bool | None):
            assert "".join(f"[default: {parameter.default}".split()) in together


def test_version(headwise: Run) -> None:
    version = metadata.version("headwise")
    assert headwise("--version") == (0, f"headwise {version}\n", "")
    code, out, _ = headwise("--version", "--json")
    found = json.loads(out)
    assert code == 0 and found["headwise"] == version and {"python", "ray", "torch"} <= found.keys()
    code, _, err = headwise("--json")
    assert code == 2 and "--version" in err
