"""Digests are the same in every process and on every machine, for ever, and differ wherever blocks do."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv import identity
from headwise.runtime.kv.identity import ROOT, KvIdentity, TokenBlocks, namespace_digest, sha256

NAMESPACE = "a9b4d401d2cf8b9aaad3b76516fd6e50c477b12d9b8d692f2d0c08602d7808ab"
TENANT_NAMESPACE = "71fafa4cf487f55f98fecf7c3e4339e38488653fd8368bb2c2765c84d6c77109"
TOKENS = [1, 2, 3, 4, 5, 0, 2**32 - 1, 65536, 128000, 7, 7, 7]
DIGESTS = [
    "3343e4687ce5b305c164220e7c177c901c671571c023e5c4a48f20e61e07c612",
    "03f41ccc02ebaf1b7d88f022b9442b9716848c1a50963f7ba29c71482be3003c",
    "35893a1e92ef9f7c6e2fd247ab6de8244fe7c0dd08568f70a65f055e86af52ac",
]
SCRIPT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("identity", sys.argv[1])
identity = sys.modules["identity"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(identity)
kv = identity.KvIdentity("llama-1b", "bfloat16", 4)
print(kv.namespace().hex(), kv.namespace("tenant-\\u00e9").hex())
print(*(digest.hex() for digest in kv.token_blocks({TOKENS}).digests))
print(hash("tenant"))
"""
"""The file alone: what it gives does not depend on the rest of the package."""

token_ids = st.integers(0, 2**32 - 1)
fields = st.tuples(st.text(max_size=6), st.text(max_size=6), st.text(max_size=6), st.text(max_size=6))


def test_the_namespace_vectors() -> None:
    assert namespace_digest("llama-1b", "bfloat16", 4).hex() == NAMESPACE
    assert namespace_digest("llama-1b", "bfloat16", 4, "dense", "tenant-é").hex() == TENANT_NAMESPACE
    assert KvIdentity("llama-1b", "bfloat16", 4).namespace("tenant-é").hex() == TENANT_NAMESPACE


def test_the_chain_vectors() -> None:
    blocks = KvIdentity("llama-1b", "bfloat16", 4).token_blocks([*TOKENS, 9])
    assert [digest.hex() for digest in blocks.digests] == DIGESTS
    assert [blocks.parent(index).hex() for index in range(3)] == [ROOT.hex(), *DIGESTS[:2]]
    assert bytes(32) == ROOT
    assert blocks.num_tokens == 13
    assert blocks.block(1) == struct.pack("<4I", *TOKENS[4:8])


def test_the_same_digests_in_every_process_whatever_its_hash_seed() -> None:
    outputs = []
    for seed in ("0", "1", "2", "12345", "4294967295"):
        command = [sys.executable, "-c", SCRIPT, identity.__file__]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
        outputs.append(ran.stdout.splitlines())
    for namespaces, digests, _ in outputs:
        assert namespaces.split() == [NAMESPACE, TENANT_NAMESPACE]
        assert digests.split() == DIGESTS
    assert len({seeded for _, _, seeded in outputs}) == 5, "the seeds made no difference to anything"


def test_it_imports_nothing_heavy() -> None:
    source = Path(identity.__file__).read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "hashlib", "struct", "collections.abc", "dataclasses"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c", 16, "dense", ""), ("a", "bc", 16, "dense", "")),
        (("m", "float32", 16, "dense", "x"), ("m", "float32", 16, "densex", "")),
        (("m", "float321", 6, "dense", ""), ("m", "float32", 16, "dense", "")),
        (("m", "float32", 16, "dense", ""), ("m", "float32", 16, "dense", "\0")),
        (("m\x03\0\0\0", "f", 1, "d", ""), ("m", "\x03\0\0\0f", 1, "d", "")),
    ],
)
def test_fields_cannot_be_shifted_into_each_other(
    one: tuple[str, str, int, str, str], other: tuple[str, str, int, str, str]
) -> None:
    assert namespace_digest(*one) != namespace_digest(*other)


@given(one=fields, other=fields, sizes=st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_different_fields_give_different_preimages(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str], sizes: tuple[int, int]
) -> None:
    def preimage(data: bytes) -> bytes:
        return data

    first = namespace_digest(one[0], one[1], sizes[0], one[2], one[3], preimage)
    second = namespace_digest(other[0], other[1], sizes[1], other[2], other[3], preimage)
    assert (first == second) == ((one, sizes[0]) == (other, sizes[1]))


@given(pieces=st.lists(st.lists(token_ids, max_size=9), max_size=6), block_size=st.integers(1, 5))
def test_extending_in_pieces_is_extending_at_once(pieces: list[list[int]], block_size: int) -> None:
    namespace = sha256(b"namespace")
    grown = TokenBlocks(namespace, block_size)
    for piece in pieces:
        before = grown.copy()
        digests = list(before.digests)
        grown.extend(piece)
        assert before.digests == digests, "the copy grew along"
    tokens = [token for piece in pieces for token in piece]
    whole = TokenBlocks(namespace, block_size, tokens)
    assert grown.digests == whole.digests and grown.num_tokens == whole.num_tokens == len(tokens)
    assert len(whole.digests) == len(tokens) // block_size
    parent = ROOT
    for index, digest in enumerate(whole.digests):
        block = b"".join(token.to_bytes(4, "little") for token in tokens[index * block_size : (index + 1) * block_size])
        assert grown.block(index) == block and whole.parent(index) == parent
        parent = sha256(parent + namespace + block)
        assert digest == parent


@given(tokens=st.lists(token_ids, min_size=4, max_size=12), at=st.integers(0, 11), token=token_ids)
def test_a_digest_is_of_all_tokens_up_to_the_blocks_end(tokens: list[int], at: int, token: int) -> None:
    at %= len(tokens)
    changed = [*tokens[:at], token, *tokens[at + 1 :]]
    one, other = (KvIdentity("model", "float32", 2).token_blocks(each).digests for each in (tokens, changed))
    same = at // 2 if token != tokens[at] else len(one)
    assert [a == b for a, b in zip(one, other, strict=True)] == [index < same for index in range(len(one))]


def test_every_field_and_the_salt_make_other_digests() -> None:
    identities = [
        KvIdentity("model", "float32", 2),
        KvIdentity("models", "float32", 2),
        KvIdentity("model", "bfloat16", 2),
    ]
    digests = {kv.token_blocks([1, 2], salt).digests[0] for kv in identities for salt in ("", "a", "b")}
    assert len(digests) == 9
    assert namespace_digest("m", "f", 16, "dense") != namespace_digest("m", "f", 16, "window")
    assert namespace_digest("m", "f", 16) != namespace_digest("m", "f", 32)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_beyond_32_bits_is_refused_and_changes_nothing(token: int) -> None:
    blocks = KvIdentity("model", "float32", 2).token_blocks([1, 2, 3])
    before = list(blocks.digests)
    with pytest.raises(struct.error):
        blocks.extend([token])
    assert blocks.num_tokens == 3 and blocks.digests == before
    blocks.extend([2**32 - 1])
    assert blocks.block(1) == b"\x03\0\0\0\xff\xff\xff\xff"


def test_another_hash_makes_all_digests() -> None:
    kv = KvIdentity("model", "float32", 1, hash=lambda data: sha256(data)[:1])
    assert len(kv.namespace()) == 1
    assert all(len(digest) == 1 for digest in kv.token_blocks([1, 2, 3]).digests)


def test_digests_of_a_chain_differ_even_where_its_blocks_do_not() -> None:
    digests = KvIdentity("model", "float32", 2).token_blocks([7] * 20).digests
    assert len(set(digests)) == 10 and all(a != b for a, b in pairwise(digests))
