"""A run of ``headwise chaos``: an undisturbed run first, then requests and faults, then the checker and the books."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.runtime.chaos import books, workload
from headwise.runtime.chaos.checker import Answer, Finding, check
from headwise.runtime.chaos.clients import Clients
from headwise.runtime.chaos.faults import Abilities, injections
from headwise.runtime.chaos.history import Event, History
from headwise.runtime.chaos.injector import Injector, processes
from headwise.runtime.chaos.verdict import Verdict, judge
from headwise.runtime.chaos.workload import Question
from headwise.runtime.config import engine_config
from headwise.runtime.llm import LLM
from headwise.runtime.models import resolve
from headwise.workers import failpoints
from headwise.workers.errors import InvalidValueError
from headwise.workers.model.model_config import load_model_config

DRAIN_S = 120.0
"""For what was asked to be answered once no fault comes any more."""
BOOKS_S = 15.0
"""For blocks, processes and files to be given back."""
IDLE_S = 60.0
"""So long a run may be without any fault, by chance."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is done.

    Attributes:
        seconds: for which faults come.
        streams: clients, each of which asks one thing at a time.
        deadline_s: a request that takes longer hangs, and so does an engine that does not come back in it.
        history: a file for what each client saw, as JSON lines; None: none.
    """

    seed: int
    seconds: float
    streams: int
    deadline_s: float
    history: Path | None = None
    quiet: bool = False


def run(model: str, load: Load, settings: dict[str, Any]) -> Verdict:
    """
    Args:
        settings: of the LLM.

    Raises:
        InvalidValueError: a setting is out of its limits.
        OSError: the history cannot be written.
    """
    engine_config(model=model, **settings)
    before, folder = books.leftovers(), Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        failpoints.use(folder)
        with History(load.history) as history:
            seconds, recoveries, findings = _disturb(model, load, settings, history, folder)
            findings += _books("closed", books.check_closed(folder, before, BOOKS_S))
            return judge(load.seed, seconds, history.events, recoveries, findings)
    finally:
        failpoints.leave()
        shutil.rmtree(folder, ignore_errors=True)


def _disturb(
    model: str, load: Load, settings: dict[str, Any], history: History, folder: Path
) -> tuple[float, int, list[Finding]]:
    """Returns for how many seconds there were faults, the recoveries, and what was found."""
    with LLM(model, **settings, quiet=load.quiet) as llm:
        _check_place(llm, load)
        questions = _questions(llm, model, load.seed)
        _say(load, f"{len(questions)} questions, undisturbed")
        answers = ask_undisturbed(llm, questions)
        findings = _books("undisturbed", books.check_engine(llm, BOOKS_S))
        _say(load, f"faults for {load.seconds:g} s, seed {load.seed}")
        history.begin()
        clients = Clients(llm, questions, history, load.seed, load.streams)
        schedule = injections(load.seed, _abilities(llm))
        injector = Injector(llm, folder, schedule, history, load.deadline_s, lambda event: _say(load, _line(event)))
        try:
            while time.monotonic() - history.began < load.seconds and llm._loop.ended is None and injector.runs:
                time.sleep(0.1)
        finally:
            injector.stop()
        seconds = time.monotonic() - history.began
        _say(load, "no more faults")
        if llm._loop.ended is None and injector.await_progress():
            clients.stop(DRAIN_S)
            findings += _books("drained", books.check_engine(llm, BOOKS_S))
            findings += _books("drained", books.check_processes(llm, injector.processes, _spares(llm), BOOKS_S))
        else:
            findings.append(Finding("ended", f"the engine has ended, or does not come back: {llm._loop.ended}"))
        injector.close()
        findings += injector.findings
        recoveries = _recoveries(llm)
    # A client that still waits hears now that the engine is closed, which is the same to the checker as no end.
    clients.stop(BOOKS_S)
    findings += check(list(history.events), answers, load.deadline_s)
    return seconds, recoveries, findings + _check_faults(history, seconds)


def ask_undisturbed(llm: LLM, questions: Sequence[Question]) -> list[list[Answer]]:
    """What each question's answer has to be, by its number."""
    prompts, params = [list(one.prompt) for one in questions], [one.params for one in questions]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[Answer(one.token_ids, one.text, one.finish_reason) for one in output.outputs] for output in outputs]


def _check_place(llm: LLM, load: Load) -> None:
    """
    Raises:
        InvalidValueError: a rank is where nothing can be done to it.
    """
    if not all(process.is_here() for process in processes(llm, load.deadline_s)):
        limit = "has ranks on other hosts; chaos sends signals to processes of this one"
        raise InvalidValueError("address", llm.config.address, limit, "have room for all ranks on this host")


def _check_faults(history: History, seconds: float) -> list[Finding]:
    """A run in which nothing happened to the engine says nothing about it."""
    if seconds < IDLE_S or any(event["event"] in ("fault", "fired") for event in history.events):
        return []
    return [Finding("faults", f"none has happened in {seconds:.0f} s")]


def _questions(llm: LLM, model: str, seed: int) -> list[Question]:
    vocab_size = load_model_config(resolve(model)).vocab_size
    tokenizer = llm._inputs.tokenizer
    return workload.questions(seed, vocab_size, llm._inputs.max_model_len, tokenizer is not None and _has_grammars())


def _has_grammars() -> bool:
    import importlib.util

    return importlib.util.find_spec("llguidance") is not None


def _abilities(llm: LLM) -> Abilities:
    config = llm.config
    disk = config.disk_kv_path is not None
    tiers = disk or config.host_kv_memory is not None
    processes = config.executor == "ray"
    return Abilities(config.tensor_parallel_size, processes, tiers, disk, config.step_timeout or 8.0)


def _spares(llm: LLM) -> int:
    return llm.config.tensor_parallel_size if llm.config.warm_spare else 0


def _recoveries(llm: LLM) -> int:
    return int(llm._loop.engine.recoveries().get("count", 0))


def _books(when: str, problems: list[str]) -> list[Finding]:
    return [Finding("books", f"{when}: {problem}") for problem in problems]


def _line(event: Event) -> str:
    ranks = event.get("ranks")
    where = f" rank {', '.join(map(str, ranks))}" if ranks else ""
    return f"{event['at']:7.1f} s  {event['fault']}{where}"


def _say(load: Load, line: str) -> None:
    if not load.quiet:
        print(f"chaos: {line}", file=sys.stderr, flush=True)
