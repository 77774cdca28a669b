"""What a rank does of handoffs: takes KV into its blocks, and sends KV out of them, beside its steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.fences import Fences
from headwise.workers.kv.handoff import HandoffJob, HandoffOp, HandoffSpec, Range
from headwise.workers.kv.pusher import Pusher, connect
from headwise.workers.kv.receiver import Receiver
from headwise.workers.kv.shared_file import host_id
from headwise.workers.kv.transfer import TransferResult

_END_S = 2.0
_logger = logging.getLogger(__name__)


class HandoffRank:
    """Does jobs in their order on a thread of its own; those that take time go on beside it."""

    def __init__(
        self,
        kv_cache: KVCache,
        heads: Sequence[Range],
        rank: int,
        spec: HandoffSpec,
        done: Callable[[TransferResult], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
            heads: the KV heads of each rank of this group.
            rank: this one.
            done: gets the result of each job, on one thread.
            failed: gets the error, of ``done`` too, after which there are no results any more.

        Raises:
            InvalidValueError: the port cannot be opened as ``spec`` says, or a file of TLS cannot be used.
        """
        self._done, self._failed = done, failed
        self._queue: SimpleQueue[HandoffJob | TransferResult | None] = SimpleQueue()
        self._host_id = host_id() if spec.receives and spec.shared_memory else b""
        self._fences = Fences(kv_cache, heads, rank, shared_memory=bool(self._host_id))
        self._receiver: Receiver | None = None
        if spec.receives:
            self._receiver = Receiver(self._fences, spec, kv_cache.range_bytes(1, kv_cache.num_kv_heads, 1))
        self._heads = heads[rank]
        self._pusher = Pusher(kv_cache, heads, rank, connect(spec), self._queue.put)
        self._thread = threading.Thread(target=self._run, name="headwise-kv-handoff", daemon=True)
        self._thread.start()

    def submit(self, job: HandoffJob) -> None:
        """Queue a job; returns at once. After :meth:`close` it is forgotten."""
        self._queue.put(job)

    def endpoint(self) -> tuple[int, int, str, bytes] | None:
        """Where this rank takes KV: the fields of a KvEndpoint, its heads as two; None if it takes none."""
        return (*self._heads, self._receiver.address, self._host_id) if self._receiver is not None else None

    def close(self) -> bool:
        """Ends what runs; nobody hears of it. Idempotent. Returns whether the threads have ended."""
        self._queue.put(None)
        self._thread.join(_END_S)
        self._fences.close_all()
        if self._receiver is not None:
            self._receiver.close()
        return self._pusher.close() and not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                if isinstance(item, TransferResult):
                    self._done(item)
                else:
                    self._begin(item)
        except BaseException as error:
            self._failed(error)

    def _next(self) -> HandoffJob | TransferResult | None:
        while True:
            try:
                return self._queue.get(timeout=self._pusher.expire())
            except Empty:
                continue

    def _begin(self, job: HandoffJob) -> None:
        if job.op == HandoffOp.PUSH:
            self._pusher.push(job)
        elif job.op == HandoffOp.STOP:
            self._pusher.stop(job)
        elif job.op == HandoffOp.FILL:
            self._fences.fill(job.fence, self._fill_result(job.id))
        else:
            self._queue.put(TransferResult(job.id, error=self._open_or_close(job)))

    def _fill_result(self, number: int) -> Callable[[str, int, float], None]:
        def told(error: str, num_bytes: int, seconds: float) -> None:
            self._queue.put(TransferResult(number, seconds=seconds, error=error, num_bytes=num_bytes))

        return told

    def _open_or_close(self, job: HandoffJob) -> str:
        if job.op == HandoffOp.CLOSE:
            self._fences.close(job.fence)
            return ""
        if self._receiver is None:
            return "this rank takes no KV"
        try:
            self._fences.open(job.fence, job.blocks, job.sources)
        except InvalidValueError as error:
            return str(error)
        return ""
