"""What nodes say of themselves: with a Ray that is a stand-in, for the clocks of one machine do not differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayError

from headwise.cluster import ray_nodes
from headwise.cluster.ray_nodes import NodeFacts, visit_nodes


class FakeRay:
    """Of nodes whose clocks go otherwise: how far ahead each is, or what it answers instead."""

    def __init__(self, nodes: list[float | RayError]) -> None:
        self._nodes = {f"{number:056x}": node for number, node in enumerate(nodes, 1)}
        self.joined: list[str | None] = []

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"NodeID": "dead", "Alive": False, "NodeManagerAddress": "10.0.0.9", "Resources": {}}
        has = {"CPU": 4.0, "memory": 1e9}
        return [dead] + [
            {"NodeID": node, "Alive": True, "NodeManagerAddress": f"10.0.0.{int(node, 16)}", "Resources": has}
            for node in self._nodes
        ]

    def remote(self, function: Callable[[], Any]) -> FakeRay:
        self._function = function
        return self

    def options(self, *, num_cpus: int, max_retries: int, scheduling_strategy: Any) -> Any:
        node, function = scheduling_strategy.node_id, self._function
        assert (num_cpus, max_retries, scheduling_strategy.soft) == (0, 0, False)

        class Asked:
            def remote(self) -> tuple[str, Any]:
                return node, function()

        return Asked()

    def get(self, asked: tuple[str, dict[str, Any]], timeout: float) -> dict[str, Any]:
        assert timeout >= 0
        node, said = asked
        answer = self._nodes[node]
        if isinstance(answer, RayError):
            raise answer
        return said | {"now": time.time() + answer}


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[NodeFacts]]:
    def visit(*nodes: float | RayError) -> list[NodeFacts]:
        fake = FakeRay(list(nodes))
        monkeypatch.setattr(ray_nodes, "ray", fake)
        monkeypatch.setattr(ray_nodes.ray_session, "join", fake.joined.append)
        monkeypatch.setattr(ray_nodes.ray_session, "leave", fake.joined.clear)
        found = visit_nodes("10.0.0.0:6379")
        assert not fake.joined
        return found

    return visit


def test_nodes_that_answer(visited: Callable[..., list[NodeFacts]]) -> None:
    first, second = visited(0.0, 60.0)
    assert (first.address, first.cpus, first.gpus, first.problem) == ("10.0.0.1", 4.0, 0.0, "")
    assert first.versions is not None and {"headwise", "torch"} <= first.versions.keys()
    assert first.shared_memory_bytes > 0 and first.open_files != 0
    assert abs(first.clock_ahead_s) <= first.clock_sure_to_s + 0.01
    assert abs(second.clock_ahead_s - 60.0) <= second.clock_sure_to_s + 0.01


def test_nodes_that_do_not(visited: Callable[..., list[NodeFacts]]) -> None:
    lacking, silent, good = visited(
        RayError("No module named 'headwise'\nand much more"), GetTimeoutError("timed out"), 0.0
    )
    assert lacking.problem.startswith("No module named 'headwise'") and lacking.versions is None
    assert "timed out" in silent.problem and not good.problem
