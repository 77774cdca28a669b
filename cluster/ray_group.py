"""A group of shards in Ray actors, one a rank."""

from __future__ import annotations

from ray.util.placement_group import PlacementGroup

from headwise.cluster.channel_group import ChannelGroup
from headwise.cluster.group import Progress
from headwise.cluster.mailbox import CLOSED, Mailbox
from headwise.cluster.process_watch import ProcessWatch
from headwise.cluster.ray_ranks import RayRanks
from headwise.cluster.ray_watcher import RunWatcher
from headwise.workers.spec import ShardSpec


class RayShardGroup(ChannelGroup):
    """RayRanks builds and ends the actors, the mailbox talks to them, RunWatcher and ProcessWatch notice their
    deaths."""

    def __init__(self, spec: ShardSpec, placement: PlacementGroup, start_timeout_s: float) -> None:
        """
        Args:
            placement: has a bundle for each rank; it stays when the group closes.
            start_timeout_s: seconds until every rank must have met the others.
        """
        super().__init__(spec)
        self._ranks = RayRanks(spec, placement, start_timeout_s)
        self._watchers: list[RunWatcher | ProcessWatch] = []

    def load(self, progress: Progress | None = None) -> None:
        channel = self._ranks.create()
        self._mailbox = Mailbox(channel, self._ranks.nodes)
        self._ranks.load(progress)
        report = self._mailbox.declare_dead
        self._watchers = [RunWatcher(self._ranks.run(), report), ProcessWatch(self._ranks.processes, report)]

    @property
    def places(self) -> list[tuple[str, int]]:
        return self._ranks.places

    def give_up(self, cause: str) -> None:
        if self._mailbox is not None:
            stopped = self._ranks.stopped()
            self._mailbox.declare_dead(stopped, f"{cause}; its process is stopped" if stopped is not None else cause)

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.stop()  # before the ranks end, or it would report their end as a death
        alive = self.death is None
        if self._mailbox is not None:
            self._mailbox.declare_dead(
                None, CLOSED
            )  # first, so that an engine that waits for a step leaves the channel
        try:
            self._ranks.end(ask=alive)
        finally:
            for watcher in self._watchers:
                watcher.join()  # before anybody leaves the Ray that a watcher's thread waits on
