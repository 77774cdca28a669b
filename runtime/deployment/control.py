"""What whoever runs a deployment sees of it, and may have done to it."""

from __future__ import annotations

from typing import Literal, Protocol, TypedDict

Role = Literal["both", "prefill", "decode"]
State = Literal["starting", "serving", "rebuilding", "draining", "ended"]
"""Of a replica. ``rebuilding``: its shards are dead, and others are started."""


class ShardPlace(TypedDict):
    """Where one rank runs."""

    rank: int
    node: str
    pid: int


class ReplicaStatus(TypedDict):
    """One replica. What is not known of it, as while it starts, is 0 or empty.

    Keys:
        name: unique in the life of the deployment, so that a replica that takes another's place has a new one.
        node, pid: of its engine's process.
        since_s: seconds that it has been in its state.
        epoch: of its shards; see docs/architecture.md.
        running, waiting: requests.
        queued_tokens: prompt tokens that were routed to it and are not computed yet.
        kv_blocks, kv_free_blocks: of each rank; free are also those kept only for what they hold.
        queried_tokens, hit_tokens: prompt tokens that were looked for in the prefix cache on the device, and found.
        recoveries: how often other shards took the place of dead ones.
        problem: why it does not serve, in words; empty if it does.
    """

    name: str
    role: Role
    state: State
    node: str
    pid: int
    since_s: float
    tensor_parallel_size: int
    epoch: int
    running: int
    waiting: int
    queued_tokens: int
    kv_blocks: int
    kv_free_blocks: int
    queried_tokens: int
    hit_tokens: int
    generated_tokens: int
    recoveries: int
    problem: str
    shards: list[ShardPlace]


class Status(TypedDict):
    """A deployment.

    Keys:
        wanted: replicas that there are to be.
        min_replicas, max_replicas: between which an autoscaler chooses ``wanted``; None without one.
        waiting: requests that no replica has taken yet.
        restarting: whether a rolling restart is under way.
        routing: what the router counts, by name; empty without one.
        replicas: in the order in which they were started.
    """

    wanted: int
    min_replicas: int | None
    max_replicas: int | None
    waiting: int
    restarting: bool
    routing: dict[str, int]
    replicas: list[ReplicaStatus]


class Control(Protocol):
    """A deployment, for whoever runs it. Every method may be called on any thread but the event loop's."""

    def status(self) -> Status:
        """How it is now."""

    def scale(self, replicas: int) -> None:
        """From now on there are to be so many replicas. Returns at once; :meth:`status` tells how it goes.

        Raises:
            InvalidValueError: there may not be so many, or so few.
        """

    def restart(self) -> str:
        """Begins to replace every replica, one after another, so that requests go on. Returns at once;
        :meth:`status` tells how it goes.

        Returns:
            What is being done, in words.

        Raises:
            InvalidValueError: a rolling restart is under way, or none can be made.
        """
