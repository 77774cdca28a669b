"""A shard group whose ranks are threads of the test's process: every rank count without Ray's start-up."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headwise.cluster.group import Progress, ShardGroup, ShardGroupDied, TransferResults
from headwise.workers import collectives
from headwise.workers.kv.transfer import (
    TransferJob,
    TransferResult,
    decode_job,
    decode_result,
    encode_job,
    encode_result,
)
from headwise.workers.plan import StepOutput, StepPlan, decode_output, decode_plan, encode_output, encode_plan
from headwise.workers.shard import Shard
from headwise.workers.spec import ShardSpec

DEADLINE_S = 120.0


class ThreadShardGroup(ShardGroup):
    """Plans and outputs go through the wire codec, as they do between processes."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec, self._tp = spec, spec.tensor_parallel_size
        self.shards: list[Shard] = []
        self._plans: list[queue.SimpleQueue[bytes | None]] = [queue.SimpleQueue() for _ in range(self._tp)]
        self._outputs: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._copied: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._results = TransferResults(self._tp)

    def start(self, progress: Progress | None = None, num_blocks: int | None = None) -> int:
        kind = "solo" if self._tp == 1 else "shared_memory"
        rendezvous = collectives.open_rendezvous(kind, self._tp, "127.0.0.1")

        def build(rank: int) -> Shard:
            peers = collectives.connect(rendezvous, rank, self._tp, DEADLINE_S, "cpu")
            shard = Shard(self._spec, peers, 1, lambda result: self._copied.put(encode_result(result)))
            shard.load()
            return shard

        with ThreadPoolExecutor(self._tp) as pool:
            self.shards = list(pool.map(build, range(self._tp)))
        affordable = min(shard.affordable_blocks() for shard in self.shards)
        blocks = min(affordable, num_blocks or affordable)
        for shard in self.shards:
            shard.allocate(blocks)
        self._threads = [threading.Thread(target=self._run, args=(rank,), daemon=True) for rank in range(self._tp)]
        for thread in self._threads:
            thread.start()
        return blocks

    def submit(self, plan: StepPlan) -> None:
        for plans in self._plans:
            plans.put(encode_plan(plan))

    def collect(self) -> StepOutput:
        output = self._outputs.get(timeout=DEADLINE_S)
        if isinstance(output, BaseException):
            raise ShardGroupDied(0, "thread", repr(output)) from output
        return decode_output(output)

    def query(self, method: str) -> list[Any]:
        return [getattr(shard, method)() for shard in self.shards]

    def transfer(self, job: TransferJob) -> None:
        for shard in self.shards:
            shard.transfer(decode_job(encode_job(job)))

    def transferred(self, timeout_s: float) -> TransferResult | None:
        while (result := self._results.take()) is None:
            try:
                self._results.add(
                    decode_result(self._copied.get(timeout=timeout_s) if timeout_s else self._copied.get_nowait())
                )
            except queue.Empty:
                return None
        return result

    def close(self) -> None:
        for plans in self._plans:
            plans.put(None)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for shard in self.shards:
            shard.close()
        self.shards, self._threads = [], []

    def _run(self, rank: int) -> None:
        while (data := self._plans[rank].get()) is not None:
            try:
                output = self.shards[rank].step(decode_plan(data))
                if rank == 0:
                    self._outputs.put(encode_output(output))
            except BaseException as error:
                self.shards[rank].abort(repr(error))
                self._outputs.put(error)
                return
