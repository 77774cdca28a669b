"""What makes two KV blocks the same: digests over all the tokens up to a block's end, and over what computed them.

    digest    = SHA-256(parent digest ‖ namespace digest ‖ the block's tokens as u32 little-endian)
    namespace = SHA-256(for each of its fields: length as u32 little-endian ‖ the field in UTF-8)

The first block's parent is ROOT. Nothing here is random or depends on the process: digests are compared between
engines, and found again by the next one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Hash = Callable[[bytes], bytes]

ROOT = bytes(32)
"""The parent digest of a sequence's first block."""

TOKEN_BYTES = 4


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def namespace_digest(
    fingerprint: str, dtype: str, block_size: int, policy: str = "dense", cache_salt: str = "", hash: Hash = sha256
) -> bytes:
    """Of everything but the tokens that decides what a block holds, and of who may see it.

    Args:
        fingerprint: of the model's weights and configuration, see ``model_fingerprint``.
        dtype: of the KV, such as ``float32``, and what it was computed in if that is another: ``int8 of float32``.
        policy: which tokens a token attends to, see :mod:`headwise.workers.kv.policy`; ``dense`` is all before it.
        cache_salt: requests share blocks only with those that have the same.
    """
    fields = [field.encode() for field in (fingerprint, dtype, str(block_size), policy, cache_salt)]
    return hash(b"".join(len(field).to_bytes(4, "little") + field for field in fields))


class TokenBlocks:
    """A sequence's tokens, cut into full blocks, and the blocks' digests. Grows; the rest that fills no block waits.

    Attributes:
        digests: of the full blocks, in order.
        owner: whose quota the blocks count for.
    """

    __slots__ = ("_hash", "_tokens", "block_size", "digests", "namespace", "owner")

    def __init__(
        self,
        namespace: bytes,
        block_size: int,
        tokens: Sequence[int] = (),
        hash: Hash = sha256,
        owner: bytes | None = None,
    ) -> None:
        """Args: ``owner``: all blocks of a namespace have the same; None is the namespace itself."""
        self.namespace, self.block_size, self._hash = namespace, block_size, hash
        self.owner = namespace if owner is None else owner
        self.digests: list[bytes] = []
        self._tokens = bytearray()
        self.extend(tokens)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens) // TOKEN_BYTES

    def extend(self, tokens: Sequence[int]) -> None:
        self._tokens += struct.pack(f"<{len(tokens)}I", *tokens)
        parent = self.digests[-1] if self.digests else ROOT
        for index in range(len(self.digests), self.num_tokens // self.block_size):
            parent = self._hash(parent + self.namespace + self.block(index))
            self.digests.append(parent)

    def block(self, index: int) -> bytes:
        """The tokens of a block, as they go into its digest."""
        size = self.block_size * TOKEN_BYTES
        return bytes(self._tokens[index * size : (index + 1) * size])

    def tokens(self, num_blocks: int) -> list[int]:
        """The tokens of the first so many blocks."""
        count = num_blocks * self.block_size
        return list(struct.unpack_from(f"<{count}I", self._tokens))

    def parent(self, index: int) -> bytes:
        """The digest of the block before."""
        return self.digests[index - 1] if index else ROOT

    def copy(self) -> TokenBlocks:
        other = TokenBlocks(self.namespace, self.block_size, (), self._hash, self.owner)
        other.digests, other._tokens = list(self.digests), bytearray(self._tokens)
        return other


@dataclass(frozen=True, slots=True)
class KvIdentity:
    """What an engine's blocks are made by; with a cache salt it gives a namespace."""

    fingerprint: str
    dtype: str
    block_size: int
    policy: str = "dense"
    hash: Hash = sha256

    def namespace(self, cache_salt: str = "") -> bytes:
        return namespace_digest(self.fingerprint, self.dtype, self.block_size, self.policy, cache_salt, self.hash)

    def token_blocks(self, tokens: Sequence[int], cache_salt: str = "", tenant: str = "") -> TokenBlocks:
        """Args: ``tenant``: its quota is the one that all its blocks count for; empty: each salt has a quota."""
        owner = tenant.encode() if tenant else None
        return TokenBlocks(self.namespace(cache_salt), self.block_size, tokens, self.hash, owner)
