from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferKey(_message.Message):
    __slots__ = ("transfer", "attempt", "decode_epoch", "prefill_epoch")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    transfer: bytes
    attempt: int
    decode_epoch: int
    prefill_epoch: int
    def __init__(self, transfer: _Optional[bytes] = ..., attempt: _Optional[int] = ..., decode_epoch: _Optional[int] = ..., prefill_epoch: _Optional[int] = ...) -> None: ...

class HeadRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("min_version", "max_version", "fingerprint", "dtype", "block_size", "policy", "num_layers", "num_kv_heads", "head_dim")
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    min_version: int
    max_version: int
    fingerprint: str
    dtype: str
    block_size: int
    policy: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    def __init__(self, min_version: _Optional[int] = ..., max_version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., policy: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("heads", "address", "host_id")
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    heads: HeadRange
    address: str
    host_id: bytes
    def __init__(self, heads: _Optional[_Union[HeadRange, _Mapping]] = ..., address: _Optional[str] = ..., host_id: _Optional[bytes] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("identity", "epoch", "endpoints", "tls")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    epoch: int
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    tls: bool
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., epoch: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., tls: _Optional[bool] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("identity", "epoch", "ranks", "version", "max_tokens", "max_transfers", "max_lease_s", "load")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    epoch: int
    ranks: _containers.RepeatedCompositeFieldContainer[HeadRange]
    version: int
    max_tokens: int
    max_transfers: int
    max_lease_s: float
    load: Load
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., epoch: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[HeadRange, _Mapping]]] = ..., version: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_transfers: _Optional[int] = ..., max_lease_s: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queued_tokens", "token_s", "available_blocks")
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    queued_tokens: int
    token_s: float
    available_blocks: int
    def __init__(self, queued_tokens: _Optional[int] = ..., token_s: _Optional[float] = ..., available_blocks: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("key", "fence", "ticket", "token_ids", "first_block", "namespace", "owner", "tenant", "deadline_s", "lease_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    fence: int
    ticket: bytes
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_block: int
    namespace: bytes
    owner: bytes
    tenant: str
    deadline_s: float
    lease_s: float
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., fence: _Optional[int] = ..., ticket: _Optional[bytes] = ..., token_ids: _Optional[_Iterable[int]] = ..., first_block: _Optional[int] = ..., namespace: _Optional[bytes] = ..., owner: _Optional[bytes] = ..., tenant: _Optional[str] = ..., deadline_s: _Optional[float] = ..., lease_s: _Optional[float] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("expected_s", "load")
    EXPECTED_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    expected_s: float
    load: Load
    def __init__(self, expected_s: _Optional[float] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("keys", "lease_s")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[TransferKey]
    lease_s: float
    def __init__(self, keys: _Optional[_Iterable[_Union[TransferKey, _Mapping]]] = ..., lease_s: _Optional[float] = ...) -> None: ...

class TransferStatus(_message.Message):
    __slots__ = ("state", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[TransferStatus.State]
        STATE_UNKNOWN: _ClassVar[TransferStatus.State]
        STATE_COMPUTING: _ClassVar[TransferStatus.State]
        STATE_PUSHED: _ClassVar[TransferStatus.State]
        STATE_COMMITTED: _ClassVar[TransferStatus.State]
        STATE_FAILED: _ClassVar[TransferStatus.State]
    STATE_UNSPECIFIED: TransferStatus.State
    STATE_UNKNOWN: TransferStatus.State
    STATE_COMPUTING: TransferStatus.State
    STATE_PUSHED: TransferStatus.State
    STATE_COMMITTED: TransferStatus.State
    STATE_FAILED: TransferStatus.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: TransferStatus.State
    reason: str
    def __init__(self, state: _Optional[_Union[TransferStatus.State, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("statuses", "load")
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedCompositeFieldContainer[TransferStatus]
    load: Load
    def __init__(self, statuses: _Optional[_Iterable[_Union[TransferStatus, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: TransferStatus
    def __init__(self, status: _Optional[_Union[TransferStatus, _Mapping]] = ...) -> None: ...

class AbortTransferRequest(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: TransferKey
    reason: str
    def __init__(self, key: _Optional[_Union[TransferKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortTransferResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class QueryRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[TransferKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[TransferKey, _Mapping]]] = ...) -> None: ...

class QueryResponse(_message.Message):
    __slots__ = ("epoch", "statuses", "load")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    statuses: _containers.RepeatedCompositeFieldContainer[TransferStatus]
    load: Load
    def __init__(self, epoch: _Optional[int] = ..., statuses: _Optional[_Iterable[_Union[TransferStatus, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    payload: bytes
    def __init__(self, header: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...
