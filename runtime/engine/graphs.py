"""Graphs: which decode graphs the shards of a generation have, and when they make the next.

On a GPU a step that only decodes is replayed from a graph, which was made for a number of rows: a *bucket*. A step of
fewer rows is padded to it. To *capture* a graph takes a shard up to seconds, so that a generation starts without any.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from headwise.workers.cuda.buckets import bucket_of, buckets_of
from headwise.workers.plan import StepPlan

_logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""From so many shard groups on that died while they captured a graph, none is captured any more."""

STEPS_PER_CAPTURE = 16
"""Under load, one of so many steps captures a graph: whoever reads a stream waits that long again now and then."""


class Graphs:
    """Fills in :attr:`StepPlan.bucket` and :attr:`StepPlan.capture`. For one generation, and for one thread.

    Nothing is captured before the first request is served. Then all graphs are, the largest first, for it takes the
    memory that the smaller ones share: one in each step that computes nothing, and one in some of the steps that do.

    Attributes:
        num_deaths: of shard groups that captured a graph then, this generation's and earlier ones'.
    """

    def __init__(self, max_rows: int) -> None:
        """Args: ``max_rows``: of a step; 0 is a device without graphs."""
        self._missing = list(buckets_of(max_rows))  # ascending
        self._captured: set[int] = set()
        self._begun = False
        self.num_deaths = 0
        self._num_steps = 0  # since the last capture

    @property
    def due(self) -> bool:
        """Whether there is a graph to capture now."""
        return self._begun and bool(self._missing)

    def lose_group(self, in_flight: Iterable[StepPlan]) -> None:
        """The shards have died with these plans in flight."""
        self.num_deaths += any(plan.capture for plan in in_flight)

    def count_on(self, before: Graphs) -> None:
        """Those of the shards before have died so often; from MAX_DEATHS on there are no graphs any more."""
        self.num_deaths = before.num_deaths
        if self.num_deaths >= MAX_DEATHS:
            _logger.warning("shards died %d times while they captured graphs: there are none now", self.num_deaths)
            self._missing = []

    def begin(self) -> None:
        """A request has been served. Idempotent."""
        self._begun = True

    def fill(self, plan: StepPlan, may_capture: bool = True) -> None:
        """Says in the next plan which graph its step uses, and which one is captured before it, if one may be."""
        if not self._missing and not self._captured:
            return
        num_rows = len(plan.computes)
        if num_rows and (bucket := bucket_of(num_rows)) in self._captured:
            plan.bucket = bucket if all(count == 1 for _, count in plan.computes) else 0
        self._num_steps += 1
        if may_capture and self.due and (not num_rows or self._num_steps >= STEPS_PER_CAPTURE):
            plan.capture = self._missing.pop()
            self._captured.add(plan.capture)
            self._num_steps = 0
