"""What a step's kernels have to know, as one int32 array, so that it goes to the GPU in one copy.

The array begins with a header of eight numbers: how many items of small tiles there are and where they begin, the same
of large tiles, where the block tables begin, how far apart their rows are, and twice nothing. Places are indices into
the array. After the header come the rows, positions and slots of the tokens, the tokens whose logits are wanted, the
block tables, and the items. Each begins at a multiple of 16 bytes. Where the tokens are depends on how many of them and
of the logits there are alone, so that a captured graph finds them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwise.workers.cuda.attention_plan import FIELDS, Items
from headwise.workers.model.attention import AttentionBatch
from headwise.workers.model.model import StepInput

_HEADER = 8
_ALIGNMENT = 4
"""In int32s."""

Ints = NDArray[np.int32]


class TokenPlaces(NamedTuple):
    """Where the tokens of a step are in its array, and where what follows them begins."""

    rows: slice
    positions: slice
    slots: slice
    logit_tokens: slice
    end: int


class StepPack(NamedTuple):
    """Of which parts the array of a step consists.

    Attributes:
        parts: where each begins, and what it is.
        size: of the array.
    """

    parts: list[tuple[int, NDArray[Any]]]
    size: int

    def write(self, into_I: Ints) -> None:
        """Fills an array of ``size``. Between the parts it is left as it is."""
        for start, part in self.parts:
            into_I[start : start + part.size].reshape(part.shape)[...] = part


def token_places(num_tokens: int, num_logits: int) -> TokenPlaces:
    """Where ``num_tokens`` tokens are, of which ``num_logits`` logits are wanted."""
    room = _aligned(num_tokens)
    rows, positions, slots = (slice(at, at + num_tokens) for at in range(_HEADER, _HEADER + 3 * room, room))
    at = _HEADER + 3 * room
    return TokenPlaces(rows, positions, slots, slice(at, at + num_logits), _aligned(at + num_logits))


def pack_attention(batch: AttentionBatch, small: Items, large: Items, start: int = _HEADER) -> StepPack:
    """The header, and from ``start`` on the block tables and items of a step; ``small`` and ``large`` are those of
    :func:`~headwise.workers.cuda.attention_plan.cut_step`."""
    tables_BN = batch.block_tables_BN
    at_small = _aligned(start + tables_BN.size)
    at_large = at_small + small.items_I8.size
    counts = len(small.items_I8), at_small, len(large.items_I8), at_large
    header = np.array([*counts, start, tables_BN.shape[1], 0, 0], np.int32)
    parts = [(0, header), (start, tables_BN), (at_small, small.items_I8), (at_large, large.items_I8)]
    return StepPack(parts, at_large + large.items_I8.size)


def pack_step(step: StepInput, small: Items, large: Items) -> StepPack:
    """All of a step. If it has a bucket, tokens that write nothing make it as large as that, and every token comes
    before the logits that are wanted: those of all tokens are computed then."""
    missing = max(0, step.bucket - len(step.rows_T))
    places = token_places(len(step.rows_T) + missing, step.bucket or len(step.logit_tokens_B))
    attention = pack_attention(step.attention, small, large, places.end)
    padding = np.zeros(missing, np.int32)
    tokens: list[tuple[int, NDArray[Any]]] = [
        (places.rows.start, np.concatenate((step.rows_T, padding))),
        (places.positions.start, np.concatenate((step.positions_T, padding))),
        (places.slots.start, np.concatenate((step.slots_T, padding - 1))),
        (places.logit_tokens.start, step.logit_tokens_B),
    ]
    return StepPack(tokens + attention.parts, attention.size)


def most_items(num_items: int) -> int:
    """How much of an array so many items take."""
    return num_items * len(FIELDS)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
