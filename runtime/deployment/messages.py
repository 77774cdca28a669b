"""What the front of a deployment and its replicas tell each other, and the msgpack codec.

A request is told to a replica as its tokens so far and how the next ones are sampled. So a request that goes on
elsewhere after a replica's death is the same message as a new one, with more generated tokens.

A message is an array: its number in ``_MESSAGES``, then its fields in order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

from headwise.runtime.output import FinishReason
from headwise.workers.plan import RowSampling, TokenLogprobs, foreign_is_value_error, pack, unpack


@dataclass(frozen=True, slots=True)
class Add:
    """Compute a request.

    Attributes:
        number: its name at the replica: the router's number of the choice, so that each attempt has its own.
        generated: the tokens that it has already.
        max_tokens: the most it may generate, those it has included.
        min_tokens: until so many tokens are generated, those it has included, no stop token ends it.
        stop_token_ids: those of the request itself, which become its stop_reason; ``sampling`` also has the model's.
        namespace, owner: of its blocks in the prefix cache; None: it takes no part in it.
        tenant: who asks; empty where tenants are not told apart.
        streamed: someone waits for each token, not just for the last.
    """

    number: int
    prompt_token_ids: list[int]
    generated: list[int]
    sampling: RowSampling
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    namespace: bytes | None = None
    owner: bytes | None = None
    tenant: str = ""
    streamed: bool = True


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request, if it still runs."""

    number: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Compute nothing for a request until told so with False."""

    number: int
    paused: bool


@dataclass(frozen=True, slots=True)
class SnapshotWanted:
    """Say which blocks are there."""


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget every cached block."""


@dataclass(frozen=True, slots=True)
class Peers:
    """These prefill engines compute prompts for you from now on, and no others.

    Attributes:
        peers: the name of each, and its ``about["handoff_address"]``.
    """

    peers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What is known of a request with the first token of this attempt.

    Attributes:
        num_cached_tokens, num_restored_tokens, num_handoff_tokens, prefilled_by: as
            :class:`~headwise.runtime.output.RequestMetrics`.
        queued_s: seconds that it waited at the replica.
    """

    num_cached_tokens: int = 0
    num_restored_tokens: int = 0
    num_handoff_tokens: int = 0
    prefilled_by: str | None = None
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What is new of a request.

    Attributes:
        number: of its :class:`Add`.
        logprobs: one for each token; None where they were not asked for.
        finish_reason: None while it runs; else this is the last delta.
        stop_reason: the stop token that ended it.
        error: why, where the finish_reason is ``error``.
    """

    number: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    first: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a step has brought, of all requests."""

    deltas: list[RequestDelta]


@dataclass(frozen=True, slots=True)
class Report:
    """How a replica is. It comes whatever the engine does, so that without one for long the replica counts as dead.

    Attributes:
        received: the largest number of a request that has reached the engine; 0 if none has.
        queued_tokens: tokens of prompts that are not computed yet.
        running, waiting: requests.
        token_s, row_s: as :class:`~headwise.runtime.routing.load.LoadReport`.
        rebuilding: its shards are dead, and others are being started.
        epoch: of its generation of shards.
        num_blocks, num_free_blocks: of KV; a block that is only kept for its content counts as free.
        stats: as ``Engine.stats``, in one report of several.
    """

    received: int
    queued_tokens: int
    running: int
    waiting: int
    token_s: float | None
    row_s: float | None
    rebuilding: bool
    epoch: int
    num_blocks: int
    num_free_blocks: int
    stats: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class KvEvents:
    """A message of the replica's KV events, as :func:`headwise.runtime.kv.events.decode_events` reads it."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """The answer to :class:`SnapshotWanted`, as :func:`headwise.runtime.kv.events.decode_snapshot` reads it."""

    data: bytes = field(repr=False)


FrontMessage = Add | Abort | Pause | SnapshotWanted | ResetPrefixCache | Peers
"""From the front to a replica."""

ReplicaMessage = Output | Report | KvEvents | KvSnapshot
"""From a replica to the front."""


def encode(message: FrontMessage | ReplicaMessage) -> bytes:
    """
    Raises:
        ValueError: it is larger than :data:`~headwise.workers.plan.MAX_MESSAGE_BYTES`.
    """
    number = _NUMBERS[type(message)]
    match message:
        case Add():
            fields = [getattr(message, name) for name in Add.__slots__]
            fields[_SAMPLING] = astuple(message.sampling)
        case Output():
            fields = [[_plain(delta) for delta in message.deltas]]
        case Report():
            fields = [getattr(message, name) for name in Report.__slots__]
            fields[-1] = None if message.stats is None else json.dumps(message.stats)
        case _:
            fields = [getattr(message, name) for name in message.__slots__]
    return pack((number, *fields))


def decode_front(data: bytes) -> FrontMessage:
    """A message from the front.

    Raises:
        ValueError: it is none, or larger than :data:`~headwise.workers.plan.MAX_MESSAGE_BYTES`.
    """
    message: FrontMessage = _decode(data, (Add, Abort, Pause, SnapshotWanted, ResetPrefixCache, Peers))
    return message


def number_of_add(data: bytes) -> int | None:
    """The number of a request in an :class:`Add` that :func:`decode_front` refuses; None if it is none, or has no
    number."""
    try:
        with foreign_is_value_error():
            kind, number, *_ = unpack(data)
            return _count(number) if kind == _NUMBERS[Add] else None
    except ValueError:
        return None


def decode_replica(data: bytes) -> ReplicaMessage:
    """A message from a replica; raises as :func:`decode_front`."""
    message: ReplicaMessage = _decode(data, (Output, Report, KvEvents, KvSnapshot))
    return message


Check = Callable[[Any], Any]


def _decode(data: bytes, kinds: tuple[type, ...]) -> Any:
    with foreign_is_value_error():
        number, *fields = unpack(data)
        kind, checks = _MESSAGES[_count(number)]
        if kind not in kinds:
            raise ValueError(f"{kind.__name__} is no message for this side")
        return kind(*_checked(fields, checks))


def _checked(fields: Any, checks: tuple[Check, ...]) -> list[Any]:
    return [check(value) for check, value in zip(checks, _list(fields), strict=True)]


def _plain(delta: RequestDelta) -> tuple[Any, ...]:
    logprobs = None if delta.logprobs is None else [astuple(one) for one in delta.logprobs]
    first = None if delta.first is None else astuple(delta.first)
    return delta.number, delta.token_ids, logprobs, delta.finish_reason, delta.stop_reason, delta.error, first


def _of(kind: type, name: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"expected {name}, not {repr(value)[:80]}")
        return value

    return check


_list, _text, _bytes, _flag = _of(list, "an array"), _of(str, "text"), _of(bytes, "bytes"), _of(bool, "true or false")


def _maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number of at least 0, not {repr(value)[:80]}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"expected a whole number, not {repr(value)[:80]}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError(f"expected a number, not {repr(value)[:80]}")
    return float(value)


def _seconds(value: Any) -> float:
    if not 0 <= (seconds := _number(value)) < math.inf:
        raise ValueError(f"expected seconds, not {value!r}")
    return seconds


def _counts(value: Any) -> list[int]:
    for one in _list(value):
        if type(one) is not int or one < 0:
            raise ValueError(f"expected whole numbers of at least 0, not {repr(one)[:80]}")
    return list(value)


def _count_tuple(value: Any) -> tuple[int, ...]:
    return tuple(_counts(value))


def _some_tokens(value: Any) -> list[int]:
    if not _counts(value):
        raise ValueError("a prompt has at least one token")
    return list(value)


def _peers(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(name), _text(address)) for name, address in _list(value))


def _stats(value: Any) -> dict[str, Any]:
    stats: dict[str, Any] = _of(dict, "an object")(json.loads(_text(value)))
    return stats


def _sampling(value: Any) -> RowSampling:
    return RowSampling(*_checked(value, _SAMPLING_CHECKS))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    return tuple((_count(token), _number(bias)) for token, bias in _list(value))


def _logprobs(value: Any) -> list[TokenLogprobs]:
    checks = (_number, _count, _count_tuple, lambda top: tuple(map(_number, _list(top))))
    return [TokenLogprobs(*_checked(one, checks)) for one in _list(value)]


def _first(value: Any) -> FirstToken:
    return FirstToken(*_checked(value, (_count, _count, _count, _maybe(_text), _seconds)))


def _delta(value: Any) -> RequestDelta:
    delta = RequestDelta(*_checked(value, _DELTA_CHECKS))
    if delta.logprobs is not None and len(delta.logprobs) != len(delta.token_ids):
        raise ValueError(f"{len(delta.token_ids)} tokens have {len(delta.logprobs)} logprobs")
    return delta


_SAMPLING_CHECKS: tuple[Check, ...] = (
    _number,
    _count,
    *[_number] * 5,
    _biases,
    _whole,
    _count,
    _count_tuple,
    _count,
    _text,
)
_DELTA_CHECKS: tuple[Check, ...] = (
    _count,
    _counts,
    _maybe(_logprobs),
    _maybe(FinishReason),
    _maybe(_count),
    _maybe(_text),
    _maybe(_first),
)
_ADD_CHECKS: tuple[Check, ...] = (
    _count,
    _some_tokens,
    _counts,
    _sampling,
    _count,
    _count,
    _count_tuple,
    _maybe(_bytes),
    _maybe(_bytes),
    _text,
    _flag,
)
_REPORT_CHECKS: tuple[Check, ...] = (
    *[_count] * 4,
    _maybe(_seconds),
    _maybe(_seconds),
    _flag,
    *[_count] * 3,
    _maybe(_stats),
)
_SAMPLING = Add.__slots__.index("sampling")

_MESSAGES: dict[int, tuple[type, tuple[Check, ...]]] = {
    1: (Add, _ADD_CHECKS),
    2: (Abort, (_count,)),
    3: (Pause, (_count, _flag)),
    4: (SnapshotWanted, ()),
    5: (ResetPrefixCache, ()),
    6: (Peers, (_peers,)),
    16: (Output, (lambda deltas: list(map(_delta, _list(deltas))),)),
    17: (Report, _REPORT_CHECKS),
    18: (KvEvents, (_bytes,)),
    19: (KvSnapshot, (_bytes,)),
}
_NUMBERS = {kind: number for number, (kind, _) in _MESSAGES.items()}
