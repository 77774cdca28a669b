"""Shard groups whose ranks are threads of the test's process: every rank count without Ray's start-up."""

from __future__ import annotations

from collections.abc import Callable

from headwise.cluster.local_group import LocalGroupFactory, LocalShardGroup
from headwise.runtime.config import EngineConfig
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec


class ThreadShardGroup(LocalShardGroup):
    def __init__(self, spec: ShardSpec) -> None:
        super().__init__(spec, num_threads=1)

    @property
    def shards(self) -> list[Shard]:
        return [thread.rank.shard for thread in self._ranks if thread.rank.shard is not None]


def thread_groups(
    kind: Callable[[ShardSpec], ThreadShardGroup] = ThreadShardGroup,
) -> Callable[[EngineConfig, ShardSpec], LocalGroupFactory]:
    """What to put in the place of ``start.make_factory``, so that engines run on groups of this kind."""

    class Factory(LocalGroupFactory):
        def __init__(self, config: EngineConfig, spec: ShardSpec) -> None:
            self._spec = spec

        def make(self) -> ThreadShardGroup:
            return kind(self._spec)

    return Factory
