"""What whoever runs a server sees of it and has done to it, through the service and the command line."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from headwise.runtime import SamplingParams
from headwise.runtime.cli import deployment as commands
from headwise.runtime.cli import status
from headwise.runtime.client import ServerError
from headwise.runtime.deployment.control import ReplicaStatus, Role, State, Status
from headwise.runtime.server import single
from headwise.v1 import deployment_pb2 as pb
from headwise.workers.errors import InvalidValueError
from tests.runtime.conftest import Run
from tests.runtime.server.conftest import DEADLINE_S, Running, steps_held
from tests.runtime.server.test_service import wait_until

Serve = Callable[..., Running]
PROMPT = list(range(3, 40))
MAX = 4


def replica(number: int, state: State = "serving", role: Role = "both") -> ReplicaStatus:
    return ReplicaStatus(
        name=f"replica-{number}",
        role=role,
        state=state,
        node=f"10.0.0.{number}",
        pid=100 + number,
        since_s=90.0,
        tensor_parallel_size=2,
        epoch=number,
        running=3,
        waiting=0,
        queued_tokens=512,
        kv_blocks=100,
        kv_free_blocks=75,
        queried_tokens=1 << 40,
        hit_tokens=1 << 39,
        generated_tokens=12,
        recoveries=1,
        problem="the shards are dead" if state == "rebuilding" else "",
        shards=[{"rank": 0, "node": "10.0.0.8", "pid": 7}, {"rank": 1, "node": "10.0.0.9", "pid": 8}],
    )


class FakeDeployment:
    """Replicas that change a step with each look, as a script says.

    Attributes:
        after_scale, after_restart: the replicas of the looks that follow; the last stay.
    """

    def __init__(self, num_replicas: int = 2) -> None:
        self.wanted, self.restarting = num_replicas, False
        self.replicas = [replica(number) for number in range(1, num_replicas + 1)]
        self.after_scale: list[list[ReplicaStatus]] = []
        self.after_restart: list[list[ReplicaStatus]] = []
        self._script: Iterator[list[ReplicaStatus]] = iter(())

    def status(self) -> Status:
        if (replicas := next(self._script, None)) is not None:
            self.replicas = replicas
        else:
            self.restarting = False
        return Status(
            wanted=self.wanted,
            min_replicas=1,
            max_replicas=MAX,
            waiting=5,
            restarting=self.restarting,
            routing={"blocks": 9},
            replicas=self.replicas,
        )

    def scale(self, replicas: int) -> None:
        if not 1 <= replicas <= MAX:
            raise InvalidValueError("replicas", replicas, f"must be from 1 to {MAX}")
        self.wanted, self._script = replicas, iter(self.after_scale)

    def restart(self) -> str:
        if self.restarting:
            raise InvalidValueError("restart", "rolling", "one is under way")
        self.restarting, self._script = True, iter(self.after_restart)
        return "2 replicas are replaced"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time between two looks."""
    monkeypatch.setattr(commands, "LOOK_S", 0.0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("alice the-token-of-alice\nops the-token-of-ops-- admin\ndecode the-token-of-decode peer\n")
    return path


# One engine


def test_a_server_with_one_engine(serve: Serve) -> None:
    running = serve(tensor_parallel_size=2)
    with running.client() as client:
        for _ in range(2):
            client.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
        found = client.status()
        for refused in (lambda: client.scale(2), client.restart):
            with pytest.raises(ServerError, match="--replicas") as error:
                refused()
            assert error.value.code is grpc.StatusCode.INVALID_ARGUMENT
    [engine] = found.replicas
    assert (found.wanted, found.restarting, found.draining, found.HasField("max_replicas")) == (1, False, False, False)
    assert (engine.name, engine.role, engine.state) == ("engine", pb.REPLICA_ROLE_BOTH, pb.REPLICA_STATE_SERVING)
    assert (engine.node, engine.pid, engine.problem) == (os.uname().nodename, os.getpid(), "")
    assert (engine.generated_tokens, engine.queried_tokens, engine.hit_tokens) == (10, 2 * len(PROMPT), 32)
    assert engine.running == engine.waiting == engine.queued_tokens == engine.recoveries == 0
    assert engine.kv_blocks == engine.kv_free_blocks == running.stats()["num_blocks"]
    assert engine.epoch == running.stats()["epoch"] and engine.since > 0
    assert [(shard.rank, shard.pid) for shard in engine.shards] == [(0, os.getpid()), (1, os.getpid())]


def test_an_engine_that_does_not_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "STATS_TIMEOUT_S", 0.1)
    running = serve()
    with running.client() as client:
        client.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
        assert client.status().replicas[0].generated_tokens == 5
        with steps_held(monkeypatch) as go_on:
            stream = client.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
            with read_meanwhile(stream):
                wait_until(lambda: "has not answered" in client.status().replicas[0].problem)
                [engine] = client.status().replicas
                assert (engine.state, engine.generated_tokens) == (pb.REPLICA_STATE_SERVING, 5), "as it told before"
                go_on.set()
        wait_until(lambda: not client.status().replicas[0].problem)


@contextmanager
def read_meanwhile(stream: Iterable[object]) -> Iterator[None]:
    thread = threading.Thread(target=lambda: list(stream), daemon=True)
    thread.start()
    yield
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_who_is_no_admin_sees_nothing(serve: Serve, tokens: Path) -> None:
    running = serve(options={"token_file": tokens}, control=FakeDeployment())
    for token in ("the-token-of-alice", "the-token-of-decode"):
        with running.client(token=token) as client:
            for refused in (client.status, lambda: client.scale(1), client.restart):
                with pytest.raises(ServerError, match="admin") as error:
                    refused()
                assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
    with running.client(token="the-token-of-ops--") as client:
        assert client.status().wanted == 2
        client.scale(3)
        assert client.status().wanted == 3


# Several


def test_a_deployment_crosses_the_wire(serve: Serve) -> None:
    running = serve(control=FakeDeployment())
    with running.client() as client:
        found = client.status()
        with pytest.raises(ServerError, match="from 1 to 4"):
            client.scale(9)
        for wrong in (-1, 1 << 40):
            with pytest.raises(InvalidValueError, match="replicas"):
                client.scale(wrong)
        assert client.restart() == "2 replicas are replaced"
    assert (found.wanted, found.min_replicas, found.max_replicas, found.waiting) == (2, 1, 4, 5)
    first = found.replicas[0]
    assert (first.name, first.node, first.since, first.queried_tokens) == ("replica-1", "10.0.0.1", 90.0, 1 << 40)
    assert [(shard.rank, shard.node) for shard in first.shards] == [(0, "10.0.0.8"), (1, "10.0.0.9")]
    assert dict(found.routing) == {"blocks": 9}


def test_status_on_a_pipe(serve: Serve, headwise: Run) -> None:
    control = FakeDeployment()
    control.replicas[1] = replica(2, "rebuilding")
    running = serve(control=control)
    code, out, err = headwise("status", "--server", running.address)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "1 of 2 (1 to 4) replicas serve, 5 requests wait for one"
    assert lines[1].startswith("replica-1: state=serving for=90s node=10.0.0.1 shards=1x10.0.0.8,1x10.0.0.9 epoch=1 ")
    assert "queued=512 kv=25% hits=50% generated=12" in lines[1]
    assert lines[3] == "replica-2: problem: the shards are dead"
    code, out, _ = headwise("status", "--server", running.address, "--json")
    found = json.loads(out)
    assert (found["wanted"], found["replicas"][1]["state"], found["replicas"][1]["role"]) == (2, "rebuilding", "both")
    assert found["replicas"][0]["queried_tokens"] == 1 << 40
    assert found["replicas"][0]["shards"][1] == {"rank": 1, "node": "10.0.0.9", "pid": 8}


def test_status_on_a_terminal(serve: Serve, headwise: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    control = FakeDeployment()
    control.replicas[1] = replica(2, "rebuilding")
    running = serve(control=control)
    monkeypatch.setattr(status, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = headwise("status", "--server", running.address)
    assert code == 0 and "replica-1" in out and "rebuilding" in out and "25%" in out
    assert "the shards are dead" in out and "1 of 2 (1 to 4) replicas serve" in out
    control.replicas[1]["problem"] = "no such file: [/models/a], [bold]"
    code, out, _ = headwise("status", "--server", running.address)
    assert code == 0 and "no such file: [/models/a], [bold]" in out
    code, _, err = headwise("status", "--watch", "--json", "--server", running.address)
    assert code == 2 and "--json" in err


@pytest.mark.parametrize("terminal", [False, True])
def test_status_again_and_again(serve: Serve, headwise: Run, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    running, looks = serve(control=FakeDeployment()), iter(range(2))

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        if next(looks, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(status, "is_terminal", lambda: terminal)
    monkeypatch.setattr(status, "sleep", sleep)
    code, out, _ = headwise("status", "--watch", "--interval", "0.5", "--server", running.address)
    assert code == 130 and out.count("2 of 2 (1 to 4) replicas serve") == (1 if terminal else 3)


def test_scale_and_wait(serve: Serve, headwise: Run, quick: None) -> None:
    control = FakeDeployment()
    control.after_scale = [
        [replica(1), replica(2), replica(3, "starting")],
        [replica(1), replica(2), replica(3)],
    ]
    running = serve(control=control)
    code, out, err = headwise("scale", "replicas=3", "--wait", "--json", "--server", running.address)
    assert code == 0 and len(json.loads(out)["replicas"]) == 3
    assert err.splitlines()[-1] == "replica-1 serving, replica-2 serving, replica-3 serving"
    control.after_scale = [[replica(1), replica(2, "draining"), replica(3, "ended")], [replica(1)]]
    code, out, err = headwise("scale", "replicas=1", "--wait", "--server", running.address)
    assert (code, out) == (0, "") and "replica-2 draining" in err
    code, _, err = headwise("scale", "replicas=2", "--wait", "--timeout", "0", "--server", running.address)
    assert code == 1 and "not done after 0 s" in err
    assert headwise("scale", "replicas=2", "--server", running.address) == (0, "", "")


def test_replicas_that_only_compute_prompts_are_not_those_that_are_wanted(
    serve: Serve, headwise: Run, quick: None
) -> None:
    control = FakeDeployment(1)
    prefill = [replica(2, role="prefill"), replica(3, role="prefill")]
    control.replicas = [replica(1, role="decode"), *prefill]
    control.after_scale = [[replica(1, role="decode"), replica(4, role="decode"), *prefill]]
    running = serve(control=control)
    code, out, _ = headwise("status", "--server", running.address)
    assert code == 0 and out.startswith("1 of 1 (1 to 4) replicas serve")
    code, _, err = headwise("scale", "replicas=2", "--wait", "--timeout", "5", "--server", running.address)
    assert (code, err.count("replica-4 serving")) == (0, 1)
    control.after_restart = [[replica(5, role="decode"), replica(6, role="prefill"), replica(7, role="prefill")]]
    code, _, err = headwise("restart", "--rolling", "--server", running.address)
    assert code == 1 and "1 of 2 replicas serve" in err


@pytest.mark.parametrize("number", ["3", "replicas=", "replicas=-1", "replicas=0", "replicas=many", "engines=3"])
def test_a_number_of_replicas_that_is_none(headwise: Run, number: str) -> None:
    code, _, err = headwise("scale", "--", number)
    assert code == 2 and "replicas=N" in err


def test_what_the_server_refuses_exits_with_2(serve: Serve, headwise: Run) -> None:
    running = serve()
    for command in (["scale", "replicas=2"], ["restart", "--rolling"]):
        code, out, err = headwise(*command, "--server", running.address)
        assert (code, out) == (2, "") and "--replicas" in err
    code, _, err = headwise("restart", "--server", running.address)
    assert code == 2 and "--rolling" in err


def test_a_rolling_restart(serve: Serve, headwise: Run, quick: None) -> None:
    control = FakeDeployment()
    control.after_restart = [
        [replica(1, "draining"), replica(2), replica(3)],
        [replica(2, "draining"), replica(3), replica(4)],
        [replica(2, "ended"), replica(3), replica(4)],
    ]
    running = serve(control=control)
    code, out, err = headwise("restart", "--rolling", "--server", running.address)
    assert (code, out) == (0, "")
    assert err.splitlines()[0] == "2 replicas are replaced" and "replica-1 draining" in err
    assert err.splitlines()[-1] == "replica-2 ended, replica-3 serving, replica-4 serving"


def test_a_rolling_restart_that_does_not_get_on(serve: Serve, headwise: Run, quick: None) -> None:
    control = FakeDeployment()
    control.after_restart = [[replica(1), replica(2), replica(3, "starting")], [replica(1), replica(2)]]
    running = serve(control=control)
    code, _, err = headwise("restart", "--rolling", "--server", running.address)
    assert code == 1 and "replica-1, replica-2 was not replaced" in err
    control.replicas = [replica(1), replica(2)]
    control.after_restart = [[replica(3)]]
    code, _, err = headwise("restart", "--rolling", "--server", running.address)
    assert code == 1 and "1 of 2 replicas serve" in err
    control.after_restart = list(itertools.repeat([replica(1)], 100))
    code, _, err = headwise("restart", "--rolling", "--timeout", "0", "--server", running.address)
    assert code == 1 and "not done after 0 s" in err
    code, _, err = headwise("restart", "--rolling", "--no-wait", "--server", running.address)
    assert code == 2 and "one is under way" in err


def test_drain(serve: Serve, headwise: Run) -> None:
    running = serve()
    assert headwise("drain", "--server", running.address, "--json") == (0, '{"drained": true}\n', "")
    assert running.exit_code.result(DEADLINE_S) == 0
    code, _, err = headwise("status", "--server", running.address)
    assert code == 1 and "UNAVAILABLE" in err
