"""What the engines of a handoff tell each other (proto/headwise/v1/kv_transfer.proto), as values that are checked.

``of`` reads a message of the other engine, and raises InvalidValueError with the name of the field that is outside its
limit. No error holds tokens or a ticket. ``message`` is the inverse; it checks nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

from headwise.v1 import kv_transfer_pb2 as pb
from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.handoff import TICKET_BYTES, TRANSFER_BYTES, KvEndpoint, Range

VERSION = 1
"""Of the protocol; the only one so far."""
LEASE_S = 30.0
"""How long a transfer lives after its last renewal, unless prefill allows less."""

MAX_TOKENS = 1 << 20
MAX_KEYS = 1024
"""Transfers of one message, and the most that an engine may run."""
MAX_RANKS = 1024
MAX_DEADLINE_S = 86_400.0
MAX_TENANT = 256
"""Characters of a tenant's name, and bytes of an owner."""
MAX_REASON = 256
"""Characters; what is longer is cut."""
MAX_NAME = 256
MAX_ADDRESS = 256
NAMESPACE_BYTES = 32
MAX_HOST_ID_BYTES = 64
_MAX_SIZE = 1 << 20
"""Of a number of layers, heads or tokens of a block."""


class Mismatch(NamedTuple):
    """The first field in which two engines do not fit together, and its values."""

    field: str
    ours: object
    theirs: object

    def __str__(self) -> str:
        return f"{self.field}: {self.ours!r} here, {self.theirs!r} there"


@dataclass(frozen=True, slots=True)
class Identity:
    """What two engines must have in common, and the versions of the protocol that one of them speaks.

    Attributes:
        fingerprint: of the model's configuration and weights.
        dtype: of the KV, such as ``float32``.
        policy: which tokens a token attends to; ``dense`` is all before it.
    """

    min_version: int
    max_version: int
    fingerprint: str
    dtype: str
    block_size: int
    policy: str
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def agree(self, other: Identity) -> int | Mismatch:
        """The highest version that both speak; or the first field in which they do not fit together."""
        version = min(self.max_version, other.max_version)
        if version < max(self.min_version, other.min_version):
            ours, theirs = (f"{one.min_version}-{one.max_version}" for one in (self, other))
            return Mismatch("version", ours, theirs)
        for name in ("fingerprint", "dtype", "block_size", "policy", "num_layers", "num_kv_heads", "head_dim"):
            if (ours := getattr(self, name)) != (theirs := getattr(other, name)):
                return Mismatch(name, ours, theirs)
        return version

    @classmethod
    def of(cls, message: pb.Identity) -> Self:
        def size(name: str) -> int:
            return _number(f"identity.{name}", getattr(message, name), 1, _MAX_SIZE)

        def text(name: str) -> str:
            return _text(f"identity.{name}", getattr(message, name), MAX_NAME)

        lowest = _number("identity.min_version", message.min_version, 1)
        return cls(
            lowest,
            _number("identity.max_version", message.max_version, lowest),
            text("fingerprint"),
            text("dtype"),
            size("block_size"),
            text("policy"),
            size("num_layers"),
            size("num_kv_heads"),
            size("head_dim"),
        )

    def message(self) -> pb.Identity:
        return pb.Identity(**{name: getattr(self, name) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class TransferKey:
    """An attempt of a transfer, as both engines know it.

    Attributes:
        transfer: 16 bytes, made at random by decode.
        attempt: counts up from 1.
        decode_epoch: of the engine that asks.
        prefill_epoch: as prefill's Hello told it.
    """

    transfer: bytes
    attempt: int
    decode_epoch: int
    prefill_epoch: int

    @classmethod
    def of(cls, message: pb.TransferKey) -> Self:
        transfer = _bytes("key.transfer", message.transfer, TRANSFER_BYTES)
        attempt = _number("key.attempt", message.attempt, 1)
        return cls(transfer, attempt, message.decode_epoch, message.prefill_epoch)

    def message(self) -> pb.TransferKey:
        return pb.TransferKey(
            transfer=self.transfer,
            attempt=self.attempt,
            decode_epoch=self.decode_epoch,
            prefill_epoch=self.prefill_epoch,
        )


def keys_of(messages: Sequence[pb.TransferKey]) -> list[TransferKey]:
    """
    Raises:
        InvalidValueError: one is malformed, or they are too many.
    """
    _number("keys", len(messages), 0, MAX_KEYS)
    return [TransferKey.of(message) for message in messages]


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt that prefill is to compute.

    Attributes:
        key: which attempt this is.
        fence, ticket: the number of decode's fence, and the 32 bytes that open it.
        token_ids: the prompt, cut to full blocks.
        first_block: how many of its blocks decode has already; fewer than it has.
        namespace: the digest of what made the blocks, 32 bytes.
        owner: who the blocks count for where there is a quota.
        tenant: requests of several take turns; empty where they are not told apart.
        deadline_s: seconds from now after which nobody wants the blocks.
        lease_s: seconds.
    """

    key: TransferKey
    fence: int
    ticket: bytes = field(repr=False)
    token_ids: list[int] = field(repr=False)
    first_block: int
    namespace: bytes
    owner: bytes
    tenant: str
    deadline_s: float
    lease_s: float

    @classmethod
    def of(
        cls, message: pb.PrefillRequest, block_size: int, max_tokens: int = MAX_TOKENS, max_lease_s: float = LEASE_S
    ) -> Self:
        """Args: ``block_size``, ``max_tokens``, ``max_lease_s``: of this engine."""
        key = TransferKey.of(message.key)
        if len(message.ticket) != TICKET_BYTES:  # whose bytes no error shows
            raise InvalidValueError("ticket", f"{len(message.ticket)} bytes", f"must have {TICKET_BYTES} bytes")
        num_tokens = len(message.token_ids)
        _number("token_ids", num_tokens, block_size, min(max_tokens, MAX_TOKENS), "number of tokens ")
        if num_tokens % block_size:
            raise InvalidValueError("token_ids", num_tokens, f"must fill blocks of {block_size} tokens")
        return cls(
            key,
            message.fence,
            message.ticket,
            list(message.token_ids),
            _number("first_block", message.first_block, 0, num_tokens // block_size - 1),
            _bytes("namespace", message.namespace, NAMESPACE_BYTES),
            _bytes("owner", message.owner, 0, MAX_TENANT),
            _text("tenant", message.tenant, MAX_TENANT, 0),
            _seconds("deadline_s", message.deadline_s, MAX_DEADLINE_S),
            _seconds("lease_s", message.lease_s, max_lease_s),
        )

    def message(self) -> pb.PrefillRequest:
        return pb.PrefillRequest(
            key=self.key.message(),
            fence=self.fence,
            ticket=self.ticket,
            token_ids=self.token_ids,
            first_block=self.first_block,
            namespace=self.namespace,
            owner=self.owner,
            tenant=self.tenant,
            deadline_s=self.deadline_s,
            lease_s=self.lease_s,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is.

    Attributes:
        queued_tokens: of prompts that wait to be computed.
        token_s: seconds to compute a token, of those computed lately; 0 if none was.
        available_blocks: that it could take now.
    """

    queued_tokens: int = 0
    token_s: float = 0.0
    available_blocks: int = 0

    @classmethod
    def of(cls, message: pb.Load) -> Self:
        token_s = _seconds("load.token_s", message.token_s, 3600.0, zero=True)
        return cls(message.queued_tokens, token_s, message.available_blocks)

    def message(self) -> pb.Load:
        return pb.Load(queued_tokens=self.queued_tokens, token_s=self.token_s, available_blocks=self.available_blocks)


class State(enum.IntEnum):
    """How a transfer stands at prefill.

    UNKNOWN: it never came, its lease ran out, or it is over. PUSHED: it is computed and pushed, and waits for Commit.
    """

    UNKNOWN = pb.TransferStatus.STATE_UNKNOWN
    COMPUTING = pb.TransferStatus.STATE_COMPUTING
    PUSHED = pb.TransferStatus.STATE_PUSHED
    COMMITTED = pb.TransferStatus.STATE_COMMITTED
    FAILED = pb.TransferStatus.STATE_FAILED


@dataclass(frozen=True, slots=True)
class Status:
    """How a transfer stands at prefill, and why it failed."""

    state: State
    reason: str = ""

    @classmethod
    def of(cls, message: pb.TransferStatus) -> Self:
        if message.state not in {*State}:
            raise InvalidValueError("status.state", message.state, f"must be one of {', '.join(State.__members__)}")
        return cls(State(message.state), printable(message.reason))

    def message(self) -> pb.TransferStatus:
        return pb.TransferStatus(state=self.state.value, reason=printable(self.reason))


@dataclass(frozen=True, slots=True)
class Hello:
    """What decode tells of itself.

    Attributes:
        endpoints: by rank; together they take every KV head.
        tls: whether the data ports are encrypted.
    """

    identity: Identity
    epoch: int
    endpoints: list[KvEndpoint]
    tls: bool = False

    @classmethod
    def of(cls, message: pb.HelloRequest) -> Self:
        identity = Identity.of(message.identity)
        heads = _ranges("endpoints", [end.heads for end in message.endpoints], identity.num_kv_heads)
        endpoints = [
            KvEndpoint(
                head_range,
                _text("endpoints.address", end.address, MAX_ADDRESS),
                _bytes("endpoints.host_id", end.host_id, 0, MAX_HOST_ID_BYTES),
            )
            for head_range, end in zip(heads, message.endpoints, strict=True)
        ]
        return cls(identity, message.epoch, endpoints, message.tls)

    def message(self) -> pb.HelloRequest:
        ends = [
            pb.Endpoint(heads=_heads(end.heads), address=end.address, host_id=end.host_id) for end in self.endpoints
        ]
        return pb.HelloRequest(identity=self.identity.message(), epoch=self.epoch, endpoints=ends, tls=self.tls)


@dataclass(frozen=True, slots=True)
class HelloAnswer:
    """What prefill tells of itself.

    Attributes:
        ranks: the KV heads of each rank.
        max_tokens: most tokens of a prompt.
        max_transfers: most that may run or wait.
        max_lease_s: the longest lease that may be asked for.
        version: of the protocol, that both speak.
    """

    identity: Identity
    epoch: int
    ranks: list[Range]
    max_tokens: int
    max_transfers: int
    max_lease_s: float = LEASE_S
    version: int = VERSION
    load: Load = Load()

    @classmethod
    def of(cls, message: pb.HelloResponse) -> Self:
        identity = Identity.of(message.identity)
        return cls(
            identity,
            message.epoch,
            _ranges("ranks", message.ranks, identity.num_kv_heads),
            _number("max_tokens", message.max_tokens, 1),
            _number("max_transfers", message.max_transfers, 1),
            _seconds("max_lease_s", message.max_lease_s, MAX_DEADLINE_S),
            _number("version", message.version, identity.min_version, identity.max_version),
            Load.of(message.load),
        )

    def message(self) -> pb.HelloResponse:
        return pb.HelloResponse(
            identity=self.identity.message(),
            epoch=self.epoch,
            ranks=map(_heads, self.ranks),
            max_tokens=self.max_tokens,
            max_transfers=self.max_transfers,
            max_lease_s=self.max_lease_s,
            version=self.version,
            load=self.load.message(),
        )


def printable(text: str) -> str:
    """A text of the other engine as it may go to a log: one line, and not long."""
    return "".join(one if one.isprintable() else "?" for one in text[:MAX_REASON])


class _HeadRange(Protocol):
    start: int
    stop: int


def _heads(heads: Range) -> pb.HeadRange:
    return pb.HeadRange(start=heads[0], stop=heads[1])


def _ranges(name: str, ranges: Iterable[_HeadRange], num_kv_heads: int) -> list[Range]:
    """The KV heads of each rank; together all of them."""
    ranges = list(ranges)
    _number(name, len(ranges), 1, MAX_RANKS)
    for one in ranges:
        if not 0 <= one.start < one.stop <= num_kv_heads:
            raise InvalidValueError(f"{name}.heads", (one.start, one.stop), f"must be a range of {num_kv_heads} heads")
    reached = 0
    for start, stop in sorted((one.start, one.stop) for one in ranges):
        if start > reached:
            break
        reached = max(reached, stop)
    if reached < num_kv_heads:
        raise InvalidValueError(f"{name}.heads", reached, f"every one of {num_kv_heads} heads must be a rank's")
    return [(one.start, one.stop) for one in ranges]


def _number(name: str, value: int, lowest: int, highest: int = 1 << 32, what: str = "") -> int:
    if not lowest <= value <= highest:
        raise InvalidValueError(name, value, f"{what}must be {lowest} to {highest}")
    return value


def _seconds(name: str, value: float, most: float, zero: bool = False) -> float:
    if not math.isfinite(value) or value < 0 or value > most or (value == 0 and not zero):
        raise InvalidValueError(
            name, value, f"must be a number of seconds, {'at least' if zero else 'over'} 0, at most {most:g}"
        )
    return value


def _bytes(name: str, value: bytes, least: int, most: int | None = None) -> bytes:
    most = least if most is None else most
    if not least <= len(value) <= most:
        raise InvalidValueError(name, f"{len(value)} bytes", f"must have {least} to {most} bytes")
    return value


def _text(name: str, value: str, most: int, least: int = 1) -> str:
    if not least <= len(value) <= most or not value.isprintable():
        raise InvalidValueError(name, value, f"must have {least} to {most} printable characters")
    return value
