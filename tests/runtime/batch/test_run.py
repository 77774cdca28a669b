"""A batch without a model: every line once, whatever comes in between."""

from __future__ import annotations

import errno
import gc
import json
import os
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime import SamplingParams
from headwise.runtime.batch import output as output_module
from headwise.runtime.batch import run as run_module
from headwise.runtime.batch.lines import Line, read_lines
from headwise.runtime.batch.output import Output, OutputBusyError
from headwise.runtime.batch.parse import Parsed
from headwise.runtime.batch.question import Answer, LineError, Question, Sample
from headwise.runtime.batch.render import render
from headwise.runtime.batch.run import check_files
from headwise.workers.errors import HeadwiseError, InvalidValueError
from tests.effort import examples
from tests.runtime.batch.batches import Echo, answers, run, write

CHAT = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}


def prompts(path: Path, count: int) -> Path:
    return write(path, *({"prompt": f"p{number}"} for number in range(1, count + 1)))


def openai(url: str, body: dict[str, Any], name: str = "a") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_each_line_has_its_own_answer(tmp_path: Path) -> None:
    source, target = prompts(tmp_path / "in", 600), tmp_path / "out"
    echo = Echo()
    summary, warnings = run(source, target, echo)
    found = answers(target)
    assert {number: one["outputs"][0]["text"] for number, one in found.items()} == {n: f"p{n}" for n in range(1, 601)}
    assert (summary.lines, summary.done, summary.failed, summary.before) == (600, 600, 0, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (1800, 600) and not warnings
    assert echo.most == run_module.MAX_IN_FLIGHT


def test_lines_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the input, no more of it is in memory than is asked at the same time, and one."""
    monkeypatch.setattr(run_module, "MAX_IN_FLIGHT", 4)
    source, ahead, most = prompts(tmp_path / "in", 50), 0, 0

    def counted(*arguments: Any) -> Any:
        nonlocal ahead, most
        for line in read_lines(*arguments):
            ahead += 1
            most = max(most, ahead)
            yield line

    def end(number: int) -> None:
        nonlocal ahead
        ahead -= 1

    with Output(tmp_path / "out") as output:
        batch = run_module.Batch(source, output, {})
        monkeypatch.setattr(run_module, "read_lines", counted)
        run_module.asyncio.run(batch.run(Echo(end), print))
    assert most <= 4 + 1


def test_long_lines_are_asked_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_BYTES_IN_FLIGHT", 100)
    lines = [{"prompt": "x" * length} for length in (500, *[20] * 20, 500, 500, *[1] * 20)]
    echo = Echo()
    summary, _ = run(write(tmp_path / "in", *lines), tmp_path / "out", echo)
    assert summary.done == len(lines) == 43 and echo.asked == list(range(1, 44))
    assert echo.most == 100 // len('{"prompt": "x"}')


def test_a_line_that_failed_is_not_kept(tmp_path: Path) -> None:
    """Nor is what was made of it, until the garbage is collected, which a few long lines do not bring about."""
    kept: list[weakref.ref[SamplingParams]] = []

    class Failing(Echo):
        async def _answer(self, question: Question, number: int) -> Answer:
            kept.append(weakref.ref(question.params))
            raise LineError("invalid_value", "too long", "prompt")

    gc.disable()
    try:
        run(prompts(tmp_path / "in", 5), tmp_path / "out", Failing())
        assert [one() for one in kept] == 5 * [None]
    finally:
        gc.enable()


def test_a_bad_line_stops_no_other(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"prompt": "a"}, b"nonsense", {"prompt": "b"}, {"prompt": "c", "n": 0})

    def refuse(number: int) -> None:
        if number == 3:
            raise LineError("invalid_value", "prompt='b': too long", "prompt")

    summary, _ = run(source, tmp_path / "out", Echo(refuse))
    found = answers(tmp_path / "out")
    assert (summary.done, summary.failed) == (4, 3)
    assert found[1]["error"] is None and found[1]["line"] == 1
    assert found[2]["error"]["code"] == "invalid_line" and found[2]["response"] is None
    assert found[3]["error"] == {"code": "invalid_value", "field": "prompt", "message": "prompt='b': too long"}
    assert found[4]["error"]["field"] == "n"


def test_openais_form(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        openai("/v1/chat/completions", CHAT | {"model": "echo", "n": 2}, "chat"),
        openai("/v1/completions", {"model": "other", "prompt": "abc", "logprobs": 2}, "completion"),
        openai("/v1/completions", {"prompt": "abc", "n": 0}, "bad"),
        openai("/v1/completions", {"prompt": "abc"}, "chat"),
    )
    _, warnings = run(source, tmp_path / "out", Echo())
    found = answers(tmp_path / "out")
    assert [found[n]["custom_id"] for n in range(1, 5)] == ["chat", "completion", "bad", "chat"]
    assert warnings == ["line 2 asks for the model other; echo answers"]
    chat, completion = (found[n]["response"]["body"] for n in (1, 2))
    assert all(found[n]["error"] is None for n in found)
    assert (chat["object"], completion["object"]) == ("chat.completion", "text_completion")
    assert chat["usage"] == {
        **{"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][0]["message"]["role"] == "assistant" and chat["choices"][0]["finish_reason"] == "stop"
    [entry] = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], len(entry["top_logprobs"])) == ("<7>", -0.5, 1)
    logprobs = completion["choices"][0]["logprobs"]
    assert completion["choices"][0]["text"] == "abc" and logprobs["top_logprobs"] == [{"<7>": -0.5, "<8>": -1.0}]
    for number, param in ((3, "n"), (4, "custom_id")):
        assert found[number]["response"]["status_code"] == 400
        assert found[number]["response"]["body"]["error"]["param"] == param


@pytest.mark.parametrize("count", [0, 1, 3, 60_000])
def test_where_the_tokens_of_a_completion_begin(count: int) -> None:
    """In a time that grows with their number, not with its square."""
    tokens, logprobs = [n % 2 for n in range(count)], [(-0.5, 1, [(0, -0.5)])] * count
    question = Question("a", SamplingParams(logprobs=1), "a", "/v1/completions")
    answer = Answer("m", [Sample(0, "", tokens, list(logprobs), "stop")], 1, 0, {0: "ab", 1: "c"})
    line = Line(1, b"{}", "0" * 16, 2)
    began = time.monotonic()
    value = json.loads(render(line, Parsed("a", True, question), answer, 0))
    assert time.monotonic() - began < 10
    offsets = value["response"]["body"]["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [n // 2 * 3 + n % 2 * 2 for n in range(count)]


def test_openais_own_types_read_the_output(tmp_path: Path) -> None:
    types = pytest.importorskip("openai.types")
    source = write(
        tmp_path / "in",
        openai("/v1/chat/completions", CHAT),
        openai("/v1/completions", {"prompt": "abc", "logprobs": 2}, "b"),
    )
    run(source, tmp_path / "out", Echo())
    found = answers(tmp_path / "out")
    chat = types.chat.ChatCompletion.model_validate(found[1]["response"]["body"], strict=True)
    assert chat.choices[0].logprobs.content[0].bytes == list(b"<7>")
    assert types.Completion.model_validate(found[2]["response"]["body"], strict=True).choices[0].text == "abc"


@given(st.data())
@examples(50)
def test_a_job_that_was_killed_goes_on_from_any_byte(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("cut")
    lines: list[object] = [{"prompt": f"p{n}"} for n in range(5)]
    source = write(folder / "in", *lines, b"nonsense", openai("/v1/chat/completions", CHAT))
    target = folder / "out"
    run(source, target, Echo())
    whole = target.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    target.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    echo = Echo()
    summary, _ = run(source, target, echo)
    assert answers(target).keys() == {1, 2, 3, 4, 5, 6, 7}
    assert target.read_bytes().startswith(whole[: whole[:cut].rfind(b"\n") + 1])
    assert (summary.before, summary.done, summary.failed) == (kept, 7, 1)
    assert len(echo.asked) <= 7 - kept


def test_lines_that_failed_are_not_tried_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"prompt": "a"}, b"nonsense")
    run(source, tmp_path / "out", Echo())
    echo = Echo()
    summary, _ = run(source, tmp_path / "out", echo)
    assert (summary.before, summary.failed, echo.asked) == (2, 1, [])


def test_lines_may_be_added_at_the_end(tmp_path: Path) -> None:
    run(prompts(tmp_path / "in", 3), tmp_path / "out", Echo())
    echo = Echo()
    run(prompts(tmp_path / "in", 5), tmp_path / "out", echo)
    assert echo.asked == [4, 5] and answers(tmp_path / "out").keys() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [lines[1], lines[0], *lines[2:]], "holds the answer to another question for line 1 "),
        (lambda lines: [lines[0], {"prompt": "p2", "n": 1}, *lines[2:]], "another question for line 2 "),
        (lambda lines: lines[:2], "holds an answer to line 3, and the input ends with line 2"),
        (lambda lines: [{"prompt": "new"}, *lines], "another question for line 1 "),
    ],
)
def test_another_input_for_the_same_output_is_noticed(
    tmp_path: Path, change: Callable[[list[object]], list[object]], said: str
) -> None:
    lines: list[object] = [{"prompt": f"p{number}"} for number in (1, 2, 3)]
    run(write(tmp_path / "in", *lines), tmp_path / "out", Echo())
    before, echo = (tmp_path / "out").read_bytes(), Echo()
    with pytest.raises(InvalidValueError, match=said):
        run(write(tmp_path / "in", *change(lines)), tmp_path / "out", echo)
    assert (tmp_path / "out").read_bytes() == before and not echo.asked


@pytest.mark.parametrize("left", [1, 2])
def test_an_input_that_changes_before_it_is_answered_is_noticed(tmp_path: Path, left: int) -> None:
    """A model takes a while to load."""
    source = prompts(tmp_path / "in", 3)
    with Output(tmp_path / "out") as output:
        batch = run_module.Batch(source, output, {})
        prompts(source, left)
        with pytest.raises(InvalidValueError, match=r"--input=.*was changed while it was read"):
            run_module.asyncio.run(batch.run(Echo(), print))


def test_lines_that_are_added_meanwhile_are_left_to_the_next_run(tmp_path: Path) -> None:
    """The last of them may be half written."""
    source = prompts(tmp_path / "in", 3)
    with Output(tmp_path / "out") as output:
        batch = run_module.Batch(source, output, {})
        with source.open("ab") as file:
            file.write(b'{"prompt": "p')
        run_module.asyncio.run(batch.run(Echo(), print))
    assert answers(tmp_path / "out").keys() == {1, 2, 3} and batch.is_done


def test_a_name_of_a_line_that_has_its_answer_is_taken(tmp_path: Path) -> None:
    names = ["a", "\u00e4", "b"]
    lines = [{"prompt": "x", "custom_id": name} for name in names]
    run(write(tmp_path / "in", *lines), tmp_path / "out", Echo())
    summary, _ = run(write(tmp_path / "in", *lines, *lines), tmp_path / "out", Echo())
    assert (summary.before, summary.failed) == (3, 3)


def test_others_have_their_turn_while_answered_lines_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C would wait for the end of a million lines otherwise."""
    monkeypatch.setattr(run_module, "_TURN", 10)
    run(prompts(tmp_path / "in", 200), tmp_path / "out", Echo())
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await run_module.asyncio.sleep(0)

    with Output(tmp_path / "out") as output:
        batch = run_module.Batch(prompts(tmp_path / "in", 201), output, {})
        run_module.asyncio.run(batch.run(Echo(), print, count))
    assert turns > 20


def test_other_flags_or_another_model_are_noticed(tmp_path: Path) -> None:
    source, target = prompts(tmp_path / "in", 2), tmp_path / "out"
    run(source, target, Echo(), context=b"one")
    with pytest.raises(InvalidValueError, match="the input or a flag was changed"):
        run(source, target, Echo(), context=b"other")
    prompts(source, 3)
    other = Echo()
    other.model = "other"
    with pytest.raises(InvalidValueError, match="holds answers of the model echo, not of other"):
        run(source, target, other, context=b"one")


@pytest.mark.parametrize("held", [b"hello", b"hello\n", b'{"id": 5}\n', b'{"id": "batch_req_x"}\n', b"\0\0\0"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, held: bytes) -> None:
    (tmp_path / "out").write_bytes(held)
    with pytest.raises(InvalidValueError, match=r"--output=.*its line 1 is no answer"):
        Output(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == held


def test_a_large_file_of_somebody_else_is_not_read(tmp_path: Path) -> None:
    """Such as a model's weights: they may have no line break for gigabytes."""
    (tmp_path / "out").touch()
    os.truncate(tmp_path / "out", 1 << 26)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidValueError, match=r"--output=.*its line 1 is no answer"):
            Output(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_two_answers_to_one_line_are_noticed(tmp_path: Path) -> None:
    run(prompts(tmp_path / "in", 1), tmp_path / "out", Echo())
    (tmp_path / "out").write_bytes(2 * (tmp_path / "out").read_bytes())
    with pytest.raises(InvalidValueError, match="two answers to line 1 of the input, the second in its line 2"):
        Output(tmp_path / "out")


def test_two_jobs_do_not_write_one_output(tmp_path: Path) -> None:
    with Output(tmp_path / "out"), pytest.raises(OutputBusyError, match=r"--output=.*another job writes this file"):
        Output(tmp_path / "out")
    with Output(tmp_path / "out"):
        pass


def test_what_ends_the_batch_keeps_what_is_done(tmp_path: Path) -> None:
    source, target = prompts(tmp_path / "in", 300), tmp_path / "out"

    def die(number: int) -> None:
        if number == 200:
            raise HeadwiseError("the engine has ended")

    with pytest.raises(HeadwiseError, match="the engine has ended"):
        run(source, target, Echo(die))
    assert 0 < len(answers(target)) < 300 and 200 not in answers(target)
    echo = Echo()
    summary, _ = run(source, target, echo)
    assert len(answers(target)) == 300 and len(echo.asked) + summary.before == 300


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, written = prompts(tmp_path / "in", 9), tmp_path / "out", 0
    write_some = os.write

    def full(file: int, data: bytes) -> int:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(28, "No space left on device")
        return write_some(file, data[:200] if written == 4 else data)

    with monkeypatch.context() as patch:
        patch.setattr(output_module.os, "write", full)
        with pytest.raises(HeadwiseError, match=r"No space left on device; make room, and run the same command"):
            run(source, target, Echo())
    assert len(answers(target)) == 3
    run(source, target, Echo())
    assert len(answers(target)) == 9


@pytest.mark.parametrize("kind", ["null", "fifo"])
def test_an_output_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "null" else tmp_path / "fifo"
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InvalidValueError, match=r"--output=.*must be a file on a disk"):
        Output(path)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_module.fcntl, "flock", lock)
    with pytest.raises(InvalidValueError, match=r"--output=.*cannot be locked: No locks available; give a file on"):
        Output(tmp_path / "out")


def test_what_does_not_reach_the_disk_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may say only then that it is full. What went wrong before is told first."""

    def sync(file: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(output_module.os, "fsync", sync)
    with (
        pytest.raises(HeadwiseError, match="cannot be written: Disk quota exceeded; make room"),
        Output(tmp_path / "o"),
    ):
        pass
    with pytest.raises(ValueError, match="first"), Output(tmp_path / "o"):
        raise ValueError("first")


def test_the_files_of_a_batch_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"--input=.*there is no such file"):
        check_files(tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in", {})
    (tmp_path / "out").symlink_to(tmp_path / "in")
    with pytest.raises(InvalidValueError, match=r"--output=.*is the input"):
        check_files(tmp_path / "in", tmp_path / "out")
    for files, flag in (
        ((Path("x" * 300), tmp_path / "out"), "--input"),
        ((tmp_path / "in", Path("x" * 300)), "--output"),
    ):
        with pytest.raises(InvalidValueError, match=rf"{flag}=.*cannot be used: File name too long"):
            check_files(*files)
    with pytest.raises(InvalidValueError, match=r"--output=.*cannot be written: Is a directory"):
        Output(tmp_path)


def test_an_empty_input_has_an_empty_output(tmp_path: Path) -> None:
    summary, _ = run(write(tmp_path / "in"), tmp_path / "out", Echo())
    assert summary.lines == 0 and (tmp_path / "out").read_bytes() == b""


def test_an_output_line_is_ascii(tmp_path: Path) -> None:
    run(write(tmp_path / "in", {"prompt": "\ud83d"}), tmp_path / "out", Echo())
    assert json.loads((tmp_path / "out").read_text("ascii"))["outputs"][0]["text"] == "\ud83d"
