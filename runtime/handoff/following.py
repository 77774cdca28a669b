"""Following: which blocks another engine holds, as its KV events tell (runtime/kv/events.py)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from headwise.runtime.kv.events import TIERS, KvEvent, Removed, Stored, decode_events, decode_snapshot
from headwise.v1 import inference_pb2 as pb
from headwise.v1.inference_pb2_grpc import InferenceServiceStub

MAX_SNAPSHOT_BYTES = 256 << 20
"""Of some four million blocks."""
MAX_BLOCKS = 4 << 20
"""A peer that tells of more is followed no further: what it tells would fill the memory here."""
_FOLLOW_S = 3600.0
"""After which a new call takes the place of the last."""
_REFUSALS = (
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
"""What does not pass while the peer is the same."""

_logger = logging.getLogger(__name__)


class Following:
    """One thread, while there is something to follow. Where the peer tells nothing, nothing is known of it.

    Attributes:
        digests: of the blocks that the peer holds in any tier. May be asked on any thread whether a digest is in it.
    """

    def __init__(
        self, channel: grpc.Channel, metadata: list[tuple[str, str]], name: str, lost: Callable[[], None]
    ) -> None:
        """
        Args:
            name: of the peer, for the log.
            lost: called when a peer that has told something is gone.
        """
        self._lost = lost
        self._stub, self._metadata, self._name = InferenceServiceStub(channel), metadata, name
        self.digests: set[bytes] = set()
        self._call: Any = None
        self._thread: threading.Thread | None = None
        self._refused = self._heard = False

    def begin(self) -> None:
        """Follows a peer that was just met."""
        self._refused = self._heard = False
        self.go_on()

    def go_on(self) -> None:
        """Begins anew if the peer has ended what it told, unless it tells this engine nothing."""
        if self._refused or (self._thread is not None and self._thread.is_alive()):
            return
        request = pb.SubscribeKvEventsRequest()
        try:
            self._call = self._stub.SubscribeKvEvents(request, timeout=_FOLLOW_S, metadata=self._metadata)
        except ValueError:  # the channel is closed
            return
        name = f"headwise-follow-{self._name}"
        self._thread = threading.Thread(target=self._run, args=(self._call,), name=name, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Follows no more: nothing is known of the peer."""
        if self._call is not None:
            self._call.cancel()

    def close(self, timeout_s: float) -> None:
        """Ends the thread. Idempotent."""
        self.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self, call: Any) -> None:
        try:
            self._follow(call)
            _logger.info("prefill at %s: its KV events skip a number, or have ended", self._name)
        except grpc.RpcError as error:
            self._refused = error.code() in _REFUSALS
            level = logging.DEBUG if error.code() is grpc.StatusCode.UNIMPLEMENTED else logging.INFO
            _logger.log(level, "prefill at %s tells no KV events: %s", self._name, error.code().name)
            if error.code() is grpc.StatusCode.UNAVAILABLE and self._heard:
                self._lost()
        except ValueError as error:
            _logger.warning("prefill at %s: malformed KV events: %s", self._name, error)
        finally:
            call.cancel()
            self.digests = set()

    def _follow(self, call: Iterator[pb.SubscribeKvEventsResponse]) -> None:
        """Follows until a number is missing.

        Raises:
            grpc.RpcError: the call failed.
            ValueError: a message is malformed.
        """
        tiers: dict[str, set[bytes]] = {tier: set() for tier in TIERS}
        at: tuple[int, int] | None = None
        for response in call:
            self._heard = True
            if response.WhichOneof("message") == "snapshot":
                snapshot = decode_snapshot(response.snapshot)
                tiers = {tier: set(blocks) for tier, blocks in snapshot.blocks.items()}
                at = snapshot.epoch, snapshot.sequence
                self.digests = set().union(*tiers.values())
                continue
            message = decode_events(response.events)
            now = message.epoch, message.sequence
            if at is not None and now <= at:
                continue  # the snapshot has it
            if at is None or message.resnapshot or now not in ((at[0], at[1] + 1), (message.epoch, 0)):
                return
            at = now
            for event in message.events:
                self._apply(event, tiers)
            if len(self.digests) > MAX_BLOCKS:
                self._refused = True
                raise ValueError(f"more than {MAX_BLOCKS} blocks")

    def _apply(self, event: KvEvent, tiers: dict[str, set[bytes]]) -> None:
        if isinstance(event, Stored):
            tiers[event.tier].update(event.digests)
            self.digests.update(event.digests)
        elif isinstance(event, Removed):
            tiers[event.tier].difference_update(event.digests)
            gone = [one for one in event.digests if not any(one in blocks for blocks in tiers.values())]
            self.digests.difference_update(gone)
        else:
            for tier in TIERS if event.tier is None else (event.tier,):
                tiers[tier].clear()
            self.digests = set().union(*tiers.values())
