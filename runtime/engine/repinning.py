"""What was pinned on shards that have died is computed and pinned again on those that follow."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from headwise.runtime.engine.own_requests import own_name, own_request
from headwise.runtime.engine.text import Delta
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.kv.pins import Pinned
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.engine.engine import Engine

_NAME = "pin "

_logger = logging.getLogger(__name__)


def is_pin(request_id: str) -> bool:
    """Whether a request computes what was pinned."""
    return request_id.startswith(own_name(_NAME))


def repin(engine: Engine, pinned: Pinned, number: int) -> None:
    """Has a prompt computed, behind the requests that wait, and pinned until its time is over.

    Args:
        number: of no other prompt of this engine.
    """
    old, until = pinned.prompt, time.monotonic() + pinned.ttl_s
    blocks = TokenBlocks(old.namespace, old.block_size, old.tokens(pinned.num_blocks), owner=old.owner)

    def pin(deltas: list[Delta]) -> None:
        for delta in deltas:
            left_s = until - time.monotonic()
            if not delta.finished or left_s <= 0:
                continue
            try:
                if delta.request.finish_reason is FinishReason.LENGTH:
                    engine.pin(blocks, blocks.num_tokens, left_s)
                if delta.request.finish_reason is not FinishReason.ERROR:  # or aborted, as by a reset of the cache
                    continue
                reason = delta.request.error
            except InvalidValueError as error:
                reason = str(error)
            _logger.warning("%d tokens that were pinned are not any more: %s", blocks.num_tokens, reason)

    engine.add(own_request(f"{_NAME}{number}", blocks), None, pin)
