"""Prefilling: prompts that are computed for another engine, as requests of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise.runtime.engine.own_requests import own_name, own_request
from headwise.runtime.engine.text import Delta
from headwise.runtime.handoff.messages import Ask, Load, TransferKey
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError

if TYPE_CHECKING:
    from headwise.runtime.engine.engine import Engine


class Prefilling:
    """What :class:`~headwise.runtime.handoff.outbound.Outbound` needs of an engine.

    A prompt comes cut to full blocks, and one token is sampled after it. Nobody wants that token: the engine that goes
    on samples its own. But its logits have read every key and value of the prompt, and if they are finite, those are.
    """

    def __init__(self, engine: Engine, max_model_len: int, vocab_size: int) -> None:
        self._engine, self._max_model_len, self._vocab_size = engine, max_model_len, vocab_size

    def check(self, ask: Ask) -> None:
        """
        Raises:
            InvalidValueError: the prompt is not of full blocks, too long, or not of this model's vocabulary.
        """
        size, count = self._engine.generation.cache.block_size, len(ask.token_ids)
        if count % size or not 0 <= ask.first_block < count // size:
            limit = f"must be full blocks of {size} tokens, and more than first_block={ask.first_block} of them"
            raise InvalidValueError("token_ids", f"{count} tokens", limit)
        if count >= self._max_model_len:
            raise InvalidValueError("token_ids", f"{count} tokens", f"at most {self._max_model_len - 1}")
        if not 0 <= min(ask.token_ids) <= max(ask.token_ids) < self._vocab_size:
            raise InvalidValueError("token_ids", max(ask.token_ids), f"token ids are in [0, {self._vocab_size})")

    def start(self, ask: Ask) -> None:
        size = self._engine.generation.cache.block_size
        blocks = TokenBlocks(ask.namespace, size, ask.token_ids, owner=ask.owner)
        self._engine.add(own_request(_name(ask.key), blocks, ask.tenant, ask.key), None, self._take)

    def end(self, key: TransferKey) -> None:
        self._engine.abort(own_name(_name(key)))

    def moved(self) -> None:
        self._engine.give_up_seats()

    def load(self) -> Load:
        """Of the engine, without what the pushes of its ranks still have to do."""
        queued, token_s = self._engine.num_queued_tokens, self._engine.pace.token_s
        return Load(queued, token_s or 0.0, self._engine.generation.cache.num_available)

    def _take(self, deltas: list[Delta]) -> None:
        outbound = self._engine.generation.outbound
        assert outbound is not None
        for delta in deltas:
            if delta.finished and (key := delta.request.transfer) is not None:
                reason = delta.request.finish_reason
                error = None if reason is FinishReason.LENGTH else delta.request.error or f"the request ended: {reason}"
                outbound.ended(key, error)


def _name(key: TransferKey) -> str:
    return f"{key.transfer.hex()}\x1f{key.attempt}\x1f{key.decode_epoch}"
