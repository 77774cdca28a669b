"""ReplicaHost: an engine that a front elsewhere uses. Tokens come in over a channel, and tokens go out."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from headwise.cluster.channel import ChannelError, Kind, ShardChannel
from headwise.runtime.config import engine_config, handoff_config
from headwise.runtime.deployment.admission import request_of
from headwise.runtime.deployment.memory_share import own_kv_memory
from headwise.runtime.deployment.messages import (
    Abort,
    Add,
    FirstToken,
    FrontMessage,
    KvEvents,
    KvSnapshot,
    Output,
    Pause,
    Peers,
    ReplicaMessage,
    Report,
    RequestDelta,
    ResetPrefixCache,
    SnapshotWanted,
    decode_front,
    encode,
    number_of_add,
)
from headwise.runtime.deployment.prefill_door import handoff_address, on_node, reachable, serve_decode
from headwise.runtime.engine.engine import Engine
from headwise.runtime.engine.loop import EngineLoop, EngineStoppedError
from headwise.runtime.engine.request import Request
from headwise.runtime.engine.text import Delta
from headwise.runtime.handoff.links import NamedPeer
from headwise.runtime.handoff.local import LocalServer
from headwise.runtime.kv.events import Subscription
from headwise.runtime.output import FinishReason
from headwise.runtime.start import Started, handoff_service, run_engine, start_engine
from headwise.workers.errors import HeadwiseError, InvalidValueError
from headwise.workers.model.checkpoint import model_fingerprint

REPORT_S = 0.25
"""How often the front hears how the engine is."""
STATS_S = 1.0
"""How often it gets the engine's counts, too."""
_END_S = 5.0

_logger = logging.getLogger(__name__)


class ReplicaHost:
    """Starts an engine, then serves the front's messages until the front closes the channel.

    Attributes:
        about: what the engine says of itself, see :class:`~headwise.cluster.replica.Replica`; and the model's
            ``fingerprint``, empty where there is no prefix cache.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """
        Args:
            settings: the fields of an EngineConfig, with ``handoff`` as those of a HandoffConfig. Of the host it is on,
                ``rank_memory`` is how many bytes of its memory each rank may count on, where several replicas share it,
                and ``node_address`` its address, where there are others.

        Raises: as :class:`~headwise.runtime.llm.LLM`.
        """
        fields = dict(settings)
        rank_memory, node_address = fields.pop("rank_memory", None), fields.pop("node_address", None)
        if isinstance(handoff := fields.get("handoff"), Mapping):
            handoff = handoff_config(**handoff)
        fields["handoff"] = None if handoff is None else on_node(handoff, node_address)
        config = engine_config(**fields)
        self._config = config = own_kv_memory(config, rank_memory) if rank_memory is not None else config
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._channel: ShardChannel | None = None
        self._received = 0
        self._requests: dict[int, Request] = {}  # by number; on the engine's thread
        self._fresh: set[int] = set()  # those of them that have no token of this attempt
        self._started: Started = start_engine(self._config, quiet=True)
        self._loop: EngineLoop = run_engine(self._started, self._ended)
        self._door: LocalServer | None = None
        try:
            if config.handoff is not None and config.handoff.role == "prefill":
                self._door = serve_decode(handoff_service(self._started, self._loop), config.handoff, node_address)
            self.about = self._about()
        except BaseException:
            self.close()
            raise

    def serve(self, channel: ShardChannel) -> None:
        """Does what the front asks for until it closes the channel.

        Raises:
            HeadwiseError: the engine has ended, or the front does not read.
        """
        self._channel = channel
        if self._failure is not None:
            raise self._failure
        events = self._loop.run(lambda engine: engine.events.subscribe())
        threads = [
            threading.Thread(target=self._report, name="headwise-report", daemon=True),
            threading.Thread(target=self._tell_events, args=(events,), name="headwise-kv-events", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            while (message := channel.receive(None)) is None or message[0] != Kind.CLOSE:
                if message is not None:
                    self._take(*message)
        finally:
            self._closing.set()
            events.close()
            for thread in threads:
                thread.join(_END_S)

    def close(self) -> None:
        """Ends the requests that run, the engine and its shards. Idempotent."""
        self._closing.set()
        with contextlib.ExitStack() as stack:
            stack.callback(self._started.close)
            stack.callback(self._loop.close)
            if self._door is not None:
                stack.callback(self._door.close)

    def hurry(self) -> None:
        """From now on, :meth:`close` waits only a moment for the step in progress."""
        self._loop.hurry()
        self._started.hurry()

    def _about(self) -> dict[str, Any]:
        started, cached = self._started, self._config.enable_prefix_caching
        return {
            "num_blocks": started.engine.generation.fullest.pool.num_blocks,
            "block_size": started.spec.block_size,
            "tensor_parallel_size": started.spec.tensor_parallel_size,
            "dtype": started.spec.dtype,
            "max_model_len": started.inputs.max_model_len,
            "endless": started.inputs.endless,
            "epoch": started.engine.events.epoch,
            "shards": self._shards(),
            "fingerprint": model_fingerprint(started.model_path) if cached else "",
            "handoff_address": handoff_address(self._door) if self._door is not None else None,
        }

    def _shards(self) -> list[dict[str, Any]]:
        places = self._started.engine.generation.group.places
        return [{"rank": rank, "node": node, "pid": pid} for rank, (node, pid) in enumerate(places)]

    def _take(self, kind: Kind, payload: bytes) -> None:
        """Does what a message asks for; one that cannot be understood is passed over, and the engine lives on. A
        request that is in it ends, for the front would wait for it for ever."""
        if kind != Kind.STEP:
            _logger.warning("the front has sent a message of kind %s, which no replica knows; passed over", kind.name)
            return
        try:
            message = decode_front(payload)
        except ValueError as error:
            _logger.warning("the front has sent what is no message (%d bytes); passed over: %s", len(payload), error)
            if (number := number_of_add(payload)) is not None:
                self._refuse(number, "the replica does not understand the request; is Headwise another there?")
            return
        self._do(message)

    def _do(self, message: FrontMessage) -> None:
        match message:
            case Add():
                self._add(message)
            case Abort(number):
                self._loop.post(lambda engine: engine.abort(str(number)))
            case Pause(number, paused):
                self._loop.post(lambda engine: engine.pause(str(number), paused))
            case SnapshotWanted():
                self._loop.post(lambda engine: self._send(KvSnapshot(engine.events.snapshot())))
            case ResetPrefixCache():
                self._loop.post(Engine.reset_prefix_cache)
            case Peers(peers):
                found, missing = reachable(peers)
                if missing:
                    _logger.warning(
                        "no prompts are handed over from %s: their hosts are others, and --handoff-ca, "
                        "--tls-cert and --tls-key are not all given",
                        ", ".join(missing),
                    )
                self._loop.post(lambda engine: self._use_peers(engine, found))

    def _use_peers(self, engine: Engine, peers: list[NamedPeer]) -> None:
        try:
            self._started.generations.use_peers(peers, None if engine.rebuilding else engine.generation)
        except InvalidValueError as error:
            _logger.warning("the front has named prefill engines; passed over: %s", error)

    def _add(self, message: Add) -> None:
        inputs, spec = self._started.inputs, self._started.spec
        try:
            limits = (inputs.model.vocab_size, inputs.max_model_len, spec.block_size, inputs.endless)
            request = request_of(message, *limits)
        except HeadwiseError as error:
            self._refuse(message.number, str(error))
        else:
            self._loop.post(lambda engine: self._queue(engine, message.number, request))

    def _refuse(self, number: int, why: str) -> None:
        self._send(Output([RequestDelta(number, [], finish_reason=FinishReason.ERROR, error=why)]))
        self._loop.post(lambda _: self._receive(number))

    def _receive(self, number: int) -> None:
        """On the engine's thread. A request that was refused has reached the engine, too."""
        self._received = max(self._received, number)

    def _queue(self, engine: Engine, number: int, request: Request) -> None:
        """On the engine's thread."""
        self._receive(number)
        if number in self._requests:
            _logger.warning("the front has sent request %d twice; the second is passed over", number)
            return
        self._requests[number] = request
        self._fresh.add(number)
        engine.add(request, None, self._tell)

    def _tell(self, deltas: list[Delta]) -> None:
        """On the engine's thread, once a step."""
        self._send(Output([self._delta(delta) for delta in deltas]))

    def _delta(self, delta: Delta) -> RequestDelta:
        request = delta.request
        number = int(request.request_id)
        first = None
        if delta.token_ids and number in self._fresh:
            self._fresh.remove(number)
            metrics = request.metrics
            first = FirstToken(
                metrics.num_cached_tokens,
                metrics.num_restored_tokens,
                metrics.num_handoff_tokens,
                metrics.prefilled_by,
                metrics.queued,
            )
        logprobs = [delta.logprobs] if delta.logprobs is not None else None
        if not delta.finished:
            return RequestDelta(number, delta.token_ids, logprobs, first=first)
        self._fresh.discard(number)
        del self._requests[number]
        stop = request.stop_reason if isinstance(request.stop_reason, int) else None
        return RequestDelta(number, delta.token_ids, logprobs, request.finish_reason, stop, request.error, first)

    def _send(self, message: ReplicaMessage) -> None:
        """Tells the front; ends :meth:`serve` if the front does not read, or would lack tokens. For any thread."""
        channel = self._channel
        if channel is None or self._closing.is_set():
            return
        try:
            channel.send(Kind.OUTPUT, encode(message))
        except ChannelError as error:
            channel.fail(error)
        except ValueError as error:
            if isinstance(message, Output):
                channel.fail(ChannelError(f"what requests have got cannot be told to the front: {error}"))
            else:  # a great many blocks; the router does without, or asks for a snapshot
                _logger.warning("the front is not told of %s: %s", type(message).__name__, error)

    def _report(self) -> None:
        """Tells the front every REPORT_S how the engine is, whatever the engine does."""
        stats: Future[dict[str, Any]] | None = None
        asked = -STATS_S
        while not self._closing.wait(REPORT_S):
            if stats is None and time.monotonic() - asked >= STATS_S:
                asked = time.monotonic()
                with contextlib.suppress(HeadwiseError):  # it has ended, which serve() says
                    stats = self._loop.submit(Engine.stats)
            told = None
            if stats is not None and stats.done():
                if stats.exception() is None:
                    told = stats.result() | {"shards": self._shards()}
                stats = None
            self._send(self._how_it_is(told))

    def _how_it_is(self, stats: dict[str, Any] | None) -> Report:
        engine = self._started.engine
        received = self._received  # first: what comes in between is counted twice, rather than not at all
        rebuilding, cache, waiting = engine.rebuilding, engine.generation.fullest, engine.num_waiting
        return Report(
            received,
            engine.num_queued_tokens,
            max(0, len(engine.request_ids) - waiting),
            waiting,
            engine.pace.token_s,
            engine.pace.row_s,
            rebuilding,
            engine.events.epoch,
            0 if rebuilding else cache.pool.num_blocks,
            0 if rebuilding else cache.num_available,
            stats,
        )

    def _tell_events(self, events: Subscription) -> None:
        for data in events:
            self._send(KvEvents(data))

    def _ended(self, error: BaseException) -> None:
        """On the engine's thread: the engine has ended."""
        self._started.engine.events.close()
        if isinstance(error, EngineStoppedError) and error.__cause__ is None:
            return  # by close()
        self._failure = error
        if self._channel is not None:
            self._channel.fail(error)
