"""The checker's memory and its process: what is asked once, and what is left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest.mock import ANY

import pytest

from headwise.runtime.inputs import grammars as module
from headwise.runtime.inputs.grammar_trial import read_frame, write_frame
from headwise.runtime.inputs.grammars import GrammarChecker, GrammarTrialError
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from tests.byte_tokenizer import EOS, VOCAB, write_byte_tokenizer
from tests.runtime.inputs.test_grammar_forms import DEADLINE_S, cannot, pid


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spoken")
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture
def own(model_dir: Path) -> Iterator[GrammarChecker]:
    made = GrammarChecker(model_dir, VOCAB, [EOS])
    yield made
    made.close()


def asked(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that reach the process, from now on."""
    questions: list[str] = []
    ask = checker._ask
    monkeypatch.setattr(checker, "_ask", lambda question: questions.append(question) or ask(question))
    return questions


def test_verdicts_are_remembered(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(own, monkeypatch)
    good, bad = StructuredOutputsParams(regex="a"), {"regex": "("}
    grammar = own.grammar(good)
    reason = cannot(own, **bad)
    assert len(questions) == 2
    for _ in range(3):
        assert own.grammar(StructuredOutputsParams(regex="a")) == grammar
        assert cannot(own, **bad) == reason
    assert len(questions) == 2
    # What is the same text is not the same question.
    assert own.grammar(StructuredOutputsParams(choice=["a"])) != grammar
    assert len(questions) == 3


def test_no_more_than_so_many_are_remembered(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VERDICTS", 3)
    questions = asked(own, monkeypatch)
    for text in "abcd":
        own.grammar(StructuredOutputsParams(regex=text))
        own.grammar(StructuredOutputsParams(regex="a"))  # used, and so not the next to go
    assert len(own._verdicts) == 3 and len(questions) == 4
    own.grammar(StructuredOutputsParams(regex="b"))
    assert len(questions) == 5


def test_a_process_that_is_killed_costs_one_answer_at_most(own: GrammarChecker) -> None:
    for round_ in range(3):
        own.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        dead = pid(own)
        os.kill(dead, signal.SIGKILL)
        failures = 0
        for attempt in range(3):
            try:
                own.grammar(StructuredOutputsParams(regex=f"b{round_}{attempt}"))
            except GrammarTrialError:
                failures += 1
        assert failures <= 1 and pid(own) != dead
        # What failed was not taken for a verdict.
        assert own.grammar(StructuredOutputsParams(regex=f"b{round_}0"))
        assert not is_there(dead)


def test_a_process_that_is_killed_during_a_trial_is_replaced(own: GrammarChecker) -> None:
    own.grammar(StructuredOutputsParams(regex="a"))
    process = pid(own)
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own.grammar, StructuredOutputsParams(regex="b"))
        os.kill(process, signal.SIGKILL)
        with pytest.raises(GrammarTrialError, match="could not be tried"):
            answer.result(timeout=DEADLINE_S)
    assert own.grammar(StructuredOutputsParams(regex="b"))


def test_a_process_that_does_not_answer_is_given_up(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WALL_SECONDS", 0.05)
    own.grammar(StructuredOutputsParams(regex="a"))
    stopped = pid(own)
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(GrammarTrialError, match=r"no answer within 0\.1 s"):
        own.grammar(StructuredOutputsParams(regex="b"))
    assert not is_there(stopped)
    monkeypatch.undo()
    assert own.grammar(StructuredOutputsParams(regex="b"))


def test_closing_leaves_no_process_and_no_descriptor(model_dir: Path) -> None:
    GrammarChecker(model_dir, VOCAB, [EOS]).close()
    made = GrammarChecker(model_dir, VOCAB, [EOS])
    before = descriptors()
    for round_ in range(3):
        made.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        process = pid(made)
        assert descriptors() == before + 2
        for _ in range(2):
            made.close()
        assert not is_there(process) and descriptors() == before
        # A verdict needs no process.
        made.grammar(StructuredOutputsParams(regex=f"a{round_}"))
        assert descriptors() == before


def test_trials_leave_nothing_open_here_or_there(own: GrammarChecker) -> None:
    own.grammar(StructuredOutputsParams(regex="a"))
    here, there = descriptors(), descriptors(pid(own))
    for index in range(30):
        own.grammar(StructuredOutputsParams(regex=f"b{index}"))
        cannot(own, json={"multipleOf": 9000001, "title": str(index)}) if index < 3 else cannot(own, regex=f"({index}")
    assert (descriptors(), descriptors(pid(own))) == (here, there)
    assert Path(f"/proc/{pid(own)}/task/{pid(own)}/children").read_text() == ""


def test_it_can_be_asked_from_many_threads(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = asked(own, monkeypatch)
    together = threading.Barrier(8)

    def ask(index: int) -> str:
        together.wait(DEADLINE_S)
        return own.grammar(StructuredOutputsParams(choice=[f"same {index % 2}"]))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8), timeout=DEADLINE_S))
    assert len(questions) == 2
    assert answers == answers[:2] * 4 and answers[0] != answers[1]


def test_what_is_known_does_not_wait_for_a_trial(own: GrammarChecker) -> None:
    known, unknown = StructuredOutputsParams(regex="a"), StructuredOutputsParams(regex="b")
    bad = {"regex": "("}
    grammar = own.grammar(known)
    cannot(own, **bad)
    process = pid(own)
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(3) as pool:
        try:
            waiting = pool.submit(own.grammar, unknown)
            deadline = time.monotonic() + DEADLINE_S
            while not own._trial.locked():
                assert time.monotonic() < deadline
            assert pool.submit(own.grammar, known).result(timeout=DEADLINE_S) == grammar
            assert pool.submit(own.known, known).result(timeout=DEADLINE_S)
            assert own.known(StructuredOutputsParams(**bad)) and not own.known(unknown)
            assert not waiting.done()
        finally:
            os.kill(process, signal.SIGCONT)
        assert waiting.result(timeout=DEADLINE_S)
    assert own.known(unknown) and not own.known(StructuredOutputsParams(choice=["b"]))


def test_a_host_without_a_core_to_spare_gives_no_verdict(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    params = StructuredOutputsParams(regex="a")
    answers = [json.dumps({"starved": "no core"}).encode()]
    real = module.read_frame
    own.grammar(StructuredOutputsParams(regex="b"))
    monkeypatch.setattr(module, "read_frame", lambda stream: real(stream) and (answers.pop() if answers else "{}"))
    with pytest.raises(GrammarTrialError, match="could not be tried: no core"):
        own.grammar(params)
    monkeypatch.undo()
    assert not own.known(params) and own.grammar(params)


def test_the_clock_on_the_wall_says_nothing_about_a_grammar(own: GrammarChecker) -> None:
    """It ends a trial that waits, but the next one may not have to."""
    source = (
        "import sys; from headwise.runtime.inputs import grammar_trial as trial; "
        "trial.CPU_SECONDS, trial.WALL_SECONDS = 60.0, 0.001; trial.main(*sys.argv[1:])"
    )
    command = [sys.executable, "-P", "-c", source, str(own._model_dir), str(VOCAB), str(EOS)]
    question = json.dumps(StructuredOutputsParams(json={"multipleOf": 9000001}).given)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        write_frame(process.stdin, question)
        process.stdin.close()
        assert [json.loads(read_frame(process.stdout) or "") for _ in range(2)] == [{}, {"starved": ANY}]


def test_timers_work_where_their_signals_are_ignored(own: GrammarChecker) -> None:
    """Processes inherit what their parents ignore and block."""
    kinds = (signal.SIGPROF, signal.SIGALRM)
    handlers = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        own.grammar(StructuredOutputsParams(regex="a"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for kind, handler in zip(kinds, handlers, strict=True):
            signal.signal(kind, handler)
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{pid(own)}/status").read_text().splitlines() if ":\t" in line
    )
    for kind in kinds:
        for name in ("SigBlk", "SigIgn"):
            assert not int(status[name], 16) >> (kind - 1) & 1, f"{name} {kind!r}"


def test_where_grammars_cannot_be_used_the_reason_is_told(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[object] = []
    start = GrammarChecker._start
    monkeypatch.setattr(GrammarChecker, "_start", lambda checker: (starts.append(checker), start(checker)))
    params = StructuredOutputsParams(regex="a")

    def problem(checker: GrammarChecker) -> str:
        with pytest.raises(InvalidValueError) as caught:
            checker.grammar(params)
        assert caught.value.field == "structured_outputs" and checker._process is None
        return caught.value.limit

    before = descriptors()
    assert "no tokenizer.json" in problem(GrammarChecker(tmp_path, VOCAB, [EOS]))
    assert "end of sequence" in problem(GrammarChecker(model_dir, VOCAB, []))
    for content in (b"", b"{", b'{"model": 3}', b"\xff", b"[]"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        made, started = GrammarChecker(tmp_path, VOCAB, [EOS]), len(starts)
        assert not made.known(params)
        for _ in range(3):
            assert "tokenizer.json is of no use" in problem(made)
            assert made.known(params)
        assert len(starts) == started + 1
    assert descriptors() == before


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def descriptors(process: int | None = None) -> int:
    """How many files and pipes are open: sockets and events are others', which may come and go on their threads."""
    gc.collect()
    count = 0
    for link in Path(f"/proc/{process or 'self'}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            count += not os.readlink(link).startswith(("socket:", "anon_inode:"))
    return count
