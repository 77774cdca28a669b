"""The injector and the books: no other process is harmed, and no run is without a finding because nothing happened."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwise.runtime import LLM, SamplingParams
from headwise.runtime.chaos import books, run
from headwise.runtime.chaos.clients import Clients
from headwise.runtime.chaos.faults import Injection, Kind
from headwise.runtime.chaos.history import History
from headwise.runtime.chaos.injector import Injector
from headwise.runtime.chaos.run import Load
from headwise.runtime.chaos.workload import Ask, Question, Way
from headwise.workers import failpoints
from headwise.workers.errors import InvalidValueError
from headwise.workers.processes import ProcessId
from tests.chaos.bench import DEADLINE_S, speaking_model, wait_until

SETTINGS: dict[str, Any] = {"executor": "local", "kv_memory": "8MiB", "max_model_len": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def engine_with(*ranks: ProcessId) -> Any:
    """As much of an LLM as the injector sees, with ranks in these processes."""
    engine = SimpleNamespace(rebuilding=False, num_suspects=0, generation=SimpleNamespace(epoch=1))
    engine.query_shards = lambda method: [{"process": asdict(rank)} for rank in ranks]

    def submit(function: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(engine))
        return future

    loop = SimpleNamespace(engine=engine, ended=None, submit=submit)
    return SimpleNamespace(_loop=loop, config=SimpleNamespace(address=None))


def inject(tmp_path: Path, llm: Any, schedule: Iterator[Injection], faults: int) -> Injector:
    told: list[Any] = []
    with History() as history:
        injector = Injector(llm, tmp_path, schedule, history, DEADLINE_S, told.append)
        wait_until(lambda: len(told) >= faults and not injector.runs)
        injector.stop()
        injector.close()
    return injector


def test_a_rank_on_this_host_is_killed_and_nobody_who_has_its_id_elsewhere(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    here = ProcessId.of(bystander.pid)
    for other in (dataclasses.replace(here, place="another host"), dataclasses.replace(here, born=here.born + 1)):
        for kind in (Kind.KILL, Kind.STOP):
            inject(tmp_path, engine_with(other), iter([Injection(kind, 0.0, True, (0,))]), 1)
            assert bystander.poll() is None
    inject(tmp_path, engine_with(here), iter([Injection(Kind.KILL, 0.0, True, (0,))]), 1)
    assert bystander.wait(DEADLINE_S) == -9


def test_ranks_on_other_hosts_are_refused(bystander: subprocess.Popen[bytes]) -> None:
    here, load = ProcessId.of(bystander.pid), Load(1, 1.0, 1, DEADLINE_S)
    run._check_place(engine_with(here), load)
    with pytest.raises(InvalidValueError, match="other hosts"):
        run._check_place(engine_with(here, dataclasses.replace(here, place="another host")), load)


def test_an_injector_that_fails_is_a_finding(tmp_path: Path) -> None:
    def schedule() -> Iterator[Injection]:
        raise OSError(28, "no space")
        yield

    injector = inject(tmp_path, engine_with(), schedule(), 0)
    assert [(one.rule, "no space" in one.detail) for one in injector.findings] == [("faults", True)]


def test_an_injector_that_waits_for_requests_can_be_stopped(tmp_path: Path) -> None:
    llm = engine_with()
    llm._loop.engine.rebuilding = True
    with History() as history:
        schedule = iter([Injection(Kind.KILL, 0.0, False, (0,))])
        injector = Injector(llm, tmp_path, schedule, history, 600.0, lambda event: None)
        stopping = threading.Thread(target=injector.stop, daemon=True)
        stopping.start()
        stopping.join(DEADLINE_S)
        assert not stopping.is_alive() and injector.findings == []
        wait_until(lambda: [event["event"] for event in history.events] == ["down"])
        llm._loop.engine.rebuilding = False
        wait_until(lambda: [event["event"] for event in history.events] == ["down", "up"])  # or the pause was lost
        injector.close()


def test_a_pin_that_there_is_no_room_for_is_no_finding() -> None:
    """Nor would an undisturbed engine have any."""

    def refuse(*args: object, **options: object) -> None:
        raise InvalidValueError("prompt", "7 blocks", "52 blocks would be pinned, at most 47 may be")

    delta = SimpleNamespace(index=0, token_ids=[5], text=None, finish_reason="length", error=None)
    llm: Any = SimpleNamespace(pin_prefix=refuse, stream=lambda *args, **options: iter([delta]))
    with History() as history:
        clients = Clients(llm, [Question((1,), SamplingParams())], history, seed=1, count=0)
        assert not clients._ask("0-0", Ask((0,), Way.PIN, ""))
        assert [event["tokens"] for event in history.events] == [[5]]


def test_a_run_without_faults_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "IDLE_S", 0.5)
    monkeypatch.setattr(run, "injections", lambda seed, able: iter([Injection(Kind.KILL, 600.0, False, (0,))]))
    verdict = run.run(str(model), Load(1, 1.0, 2, DEADLINE_S, quiet=True), SETTINGS)
    assert "faults" in [finding.rule for finding in verdict.findings]


def test_an_engine_without_shards_has_no_books(model: Path) -> None:
    with LLM(model, **SETTINGS, quiet=True) as llm:
        assert books.check_engine(llm, DEADLINE_S) == []
        llm._loop.run(lambda engine: setattr(engine, "rebuilding", True))
        try:
            assert books.check_engine(llm, 0.1) == ["the shards are dead, and others are started"]
        finally:
            llm._loop.run(lambda engine: setattr(engine, "rebuilding", False))


def test_a_process_that_was_started_with_the_failpoints_and_goes_on_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    failpoints.use(tmp_path)
    try:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    finally:
        failpoints.leave()
    before = books.leftovers()
    with process:
        [found] = books.check_closed(tmp_path, before, 0.1)
        assert f"process {process.pid} " in found
        process.kill()
        process.wait(DEADLINE_S)
        assert books.check_closed(tmp_path, before, DEADLINE_S) == []
