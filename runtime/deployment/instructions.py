"""What a deployment wants done: by its front, which does it and tells of the outcome."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.runtime.deployment.control import Role
from headwise.runtime.deployment.messages import FrontMessage


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start an engine.

    Attributes:
        name: no replica had it before.
        place: number of the place that it takes, of those of its role.
        extra: whether it is one more than are wanted, so that it is only started where there is room for it now.
    """

    name: str
    place: int
    extra: bool = False
    role: Role = "both"


@dataclass(frozen=True, slots=True)
class CancelStart:
    """A replica that is being started is not wanted any more. Whether it has started is to be told all the same."""

    name: str


@dataclass(frozen=True, slots=True)
class EndReplica:
    """End a replica's process, and say when it is gone.

    Attributes:
        ask: whether it can end by itself; else it is dead, or hangs.
    """

    name: str
    ask: bool


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a replica something."""

    replica: str
    message: FrontMessage


@dataclass(frozen=True, slots=True)
class AskForNodes:
    """Have the cluster provide room for so many replicas."""

    replicas: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No replica is left, and none can be started any more."""

    reason: str


Instruction = StartReplica | CancelStart | EndReplica | Send | AskForNodes | GiveUp
