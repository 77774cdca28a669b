"""Whatever replicas do and whenever they do it: each request ends once, and each of its tokens comes once, in order."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headwise.runtime.deployment.messages import Output
from tests.effort import examples
from tests.runtime.deployment.script import Script

NAMES = st.integers(0, 3)


class DeploymentMachine(RuleBasedStateMachine):
    """``Script`` checks the tokens: each comes once, in order, and nothing after the end."""

    @initialize(replicas=st.integers(1, 3))
    def begin(self, replicas: int) -> None:
        self.script = Script(replicas, most=4)
        self.asked: dict[str, int] = {}
        self.late: list[tuple[str, Output]] = []
        self.numbers = itertools.count()

    def pick(self, at: int) -> str | None:
        return [*self.script.replicas][at % len(self.script.replicas)] if self.script.replicas else None

    @rule(tokens=st.integers(1, 12), tenant=st.sampled_from(["", "a"]))
    def ask(self, tokens: int, tenant: str) -> None:
        name = f"r{next(self.numbers)}"
        self.asked[self.script.add(name, tokens, tenant=tenant).key] = tokens

    @rule(at=NAMES)
    def abort(self, at: int) -> None:
        running = [key for key in self.asked if key not in self.script.ended]
        if running:
            self.script.deployment.abort(running[at % len(running)].removesuffix("#0"))
            self.script.follow()

    @rule(at=NAMES, paused=st.booleans())
    def pause(self, at: int, paused: bool) -> None:
        running = [key for key in self.asked if key not in self.script.ended]
        if running:
            self.script.deployment.pause(running[at % len(running)].removesuffix("#0"), paused)
            self.script.follow()

    @rule(at=NAMES, part=st.sets(st.integers(1, 40)))
    def compute(self, at: int, part: set[int]) -> None:
        if (name := self.pick(at)) is not None:
            self.deliver(name)
            self.script.say(name, self.script.replicas[name].step([*part] or None))

    @rule(at=NAMES)
    def compute_what_comes_late(self, at: int) -> None:
        """What is on its way when something else happens; it comes in order, or never, as its replica is dead."""
        if (name := self.pick(at)) is not None and not any(one == name for one, _ in self.late):
            self.late.append((name, self.script.replicas[name].step()))

    @rule()
    def what_was_late_comes(self) -> None:
        self.deliver(*{name for name, _ in self.late})

    def deliver(self, *names: str) -> None:
        """What these replicas have computed, and is on its way, comes."""
        for name, output in [one for one in self.late if one[0] in names]:
            self.late.remove((name, output))
            self.script.say(name, output)

    @precondition(lambda self: self.script.names)
    @rule(at=NAMES)
    def start(self, at: int) -> None:
        self.script.start(self.script.names[at % len(self.script.names)])

    @precondition(lambda self: self.script.names)
    @rule(at=NAMES, no_room=st.booleans())
    def fail_to_start(self, at: int, no_room: bool) -> None:
        self.script.fail_start(self.script.names[at % len(self.script.names)], no_room=no_room)

    @rule(at=NAMES)
    def die(self, at: int) -> None:
        if (name := self.pick(at)) is not None:
            self.script.die(name)

    @rule()
    def close(self) -> None:
        self.script.close_all()

    @rule(at=NAMES, rebuilding=st.booleans())
    def report(self, at: int, rebuilding: bool) -> None:
        if (name := self.pick(at)) is not None:
            self.script.report(name, rebuilding=rebuilding)

    @rule(replicas=st.integers(1, 4))
    def scale(self, replicas: int) -> None:
        self.script.deployment.scale(replicas)
        self.script.follow()

    @rule()
    def restart(self) -> None:
        if not self.script.deployment.status()["restarting"]:
            self.script.deployment.restart()
            self.script.follow()

    @rule(seconds=st.sampled_from([0.25, 1.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.script.wait(seconds)

    @invariant()
    def nothing_is_lost(self) -> None:
        dispatcher = self.script.deployment._dispatcher
        assert dispatcher._live.keys() == self.asked.keys() - self.script.ended.keys()

    def teardown(self) -> None:
        """Let alone, with replicas that serve, it ends every request."""
        if not hasattr(self, "script"):
            return
        script = self.script
        self.what_was_late_comes()
        script.deployment.scale(2)
        for key in self.asked:
            script.deployment.pause(key.removesuffix("#0"), False)
        script.follow()
        for _ in range(1000):
            if len(script.ended) == len(self.asked):
                break
            script.start_all()
            script.wait(0.25)
            script.step()
            script.close_all()
        assert script.ended.keys() == self.asked.keys()
        for key, request in script.ended.items():
            if request.finish_reason == "length":
                assert script.got[key] == [*range(self.asked[key])]
        assert script.deployment.status()["routing"]["requests"] == 0
        assert script.deployment._dispatcher.num_blamed == 0


def machine_settings() -> Any:
    return settings(examples(100), stateful_step_count=50)


DeploymentMachine.TestCase.settings = machine_settings()
TestDeployment = DeploymentMachine.TestCase
