"""Which faults there are, drawn from a seed: the same one has the same, in the same order, with the same waits."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass

from headwise.workers.failpoints import Action, Fault, Point


class Kind(enum.StrEnum):
    """Where a fault comes from."""

    KILL = "kill"
    """SIGKILL to the processes of some ranks."""
    STOP = "stop"
    """SIGSTOP to a rank's process, and SIGCONT after a while."""
    POINT = "failpoint"


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault, and when.

    Attributes:
        wait_s: since the fault before if it is hasty; else since every request went on after that.
        hasty: whether requests have gone on or not.
        ranks: whose processes; of POINT, where it is armed: one, or none for whoever comes first.
        stopped_s: of STOP.
        point, fault: of POINT.
        kills: of POINT: rank 0 is killed once it is armed, for it is in the way of the next group.
    """

    kind: Kind
    wait_s: float
    hasty: bool
    ranks: tuple[int, ...]
    stopped_s: float = 0.0
    point: Point | None = None
    fault: Fault | None = None
    kills: bool = False

    @property
    def name(self) -> str:
        """For people, such as ``kill``, ``stop``, ``step.mlp exit``."""
        if self.point is not None and self.fault is not None:
            return f"{self.point} {self.fault.action}"
        return self.kind.value if len(self.ranks) == 1 else f"{self.kind} all"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What can be done to an engine.

    Attributes:
        ranks: how many.
        processes: whether each is one, which can be killed; with executor="local" none is.
        tiers, disk: whether it has any, and one on disk.
        hangs_s: after so long without progress a rank is taken for hung.
    """

    ranks: int
    processes: bool
    tiers: bool
    disk: bool
    hangs_s: float


_IN_STEPS = (
    Point.RANK_REPLY,
    Point.STEP_ATTENTION,
    Point.STEP_MLP,
    Point.COLLECTIVE_ENTER,
    Point.COLLECTIVE_LEAVE,
)
_IN_STARTS = (Point.LOAD_LAYER, Point.ALLOCATE)
_IN_TIERS = (Point.KV_COPY,)
_ON_DISK = (Point.KV_WRITE, Point.KV_JOURNAL)
_IN_ENGINE = (Point.ENGINE_SUBMIT, Point.ENGINE_SUBMITTED, Point.ENGINE_OUTPUT)
_IN_RECOVERY = (Point.RECOVERY_CLOSE, Point.RECOVERY_START, Point.RECOVERY_RESUME)
_COLLECTIVE = (Point.COLLECTIVE_ENTER, Point.COLLECTIVE_LEAVE)


def injections(seed: int, able: Abilities) -> Iterator[Injection]:
    """Faults without end."""
    chance = random.Random(f"{seed}-faults")
    hasty = False
    while True:
        hasty = not hasty and chance.random() < 0.15  # never two in a row: ten deaths without a step are the end
        wait_s = round(chance.uniform(0.05, 1.5) if hasty else chance.uniform(0.5, 6.0), 3)
        yield _draw(chance, able, wait_s, hasty)


def _draw(chance: random.Random, able: Abilities, wait_s: float, hasty: bool) -> Injection:
    rank = (chance.randrange(able.ranks),)
    kinds = ["kill", "kill all", "stop", "hang", "point"] if able.processes else ["point"]
    [kind] = chance.choices(kinds, (8, 2, 3, 1, 10) if able.processes else (1,))
    match kind:
        case "kill":
            return Injection(Kind.KILL, wait_s, hasty, rank)
        case "kill all":
            return Injection(Kind.KILL, wait_s, hasty, tuple(range(able.ranks)))
        case "stop":
            return Injection(Kind.STOP, wait_s, hasty, rank, round(chance.uniform(0.1, able.hangs_s / 3), 3))
        case "hang":
            return Injection(Kind.STOP, wait_s, hasty, rank, round(able.hangs_s + chance.uniform(2, 4), 3))
    point, action, skips = _draw_point(chance, able)
    fault = Fault(action, chance.randint(0, skips), round(chance.uniform(0.05, 1.0), 3))
    anyone = point in (*_IN_ENGINE, *_IN_RECOVERY, *_IN_TIERS)
    if action is Action.DROP and point is Point.RANK_REPLY:
        rank = (0,)  # the one that sends outputs
    kills = point in (*_IN_STARTS, *_IN_RECOVERY) and able.processes
    return Injection(Kind.POINT, wait_s, hasty, () if anyone else rank, point=point, fault=fault, kills=kills)


def _draw_point(chance: random.Random, able: Abilities) -> tuple[Point, Action, int]:
    """A point, an action that makes sense there, and how many hits may pass before."""
    ends = [Action.KILL, Action.EXIT, Action.STOP] if able.processes else []
    in_steps = [point for point in _IN_STEPS if able.ranks > 1 or point not in _COLLECTIVE]
    groups: list[tuple[int, list[Point], list[Action], int]] = [
        (6, in_steps, [*ends[:2] * 2, *ends[2:], Action.RAISE, Action.NO_SPACE, Action.SLEEP], 60),
        (1, [Point.RANK_REPLY], [Action.DROP], 6),
        (2, [Point.CHANNEL_PLAN], [Action.DROP, Action.SLEEP], 6),
        (1, [*_IN_ENGINE], [Action.SLEEP], 6),
    ]
    if able.processes:
        groups.append((2, [*_IN_STARTS], [Action.KILL, Action.EXIT, Action.RAISE, Action.NO_SPACE, Action.SLEEP], 1))
        groups.append((1, [*_IN_RECOVERY], [Action.SLEEP], 0))
    if able.tiers:
        groups.append((3, [*_IN_TIERS], [*ends[:2], Action.RAISE, Action.NO_SPACE, Action.SLEEP], 4))
    if able.disk:
        groups.append((3, [*_ON_DISK], [*ends[:2], Action.RAISE, Action.NO_SPACE, Action.SLEEP], 4))
    [(_, points, actions, skips)] = chance.choices(groups, [weight for weight, *_ in groups])
    return chance.choice(points), chance.choice(actions), skips
