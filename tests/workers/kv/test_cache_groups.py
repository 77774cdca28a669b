"""The paged KV memory of policies with several groups, and of other forms than the model's floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.format import KV_DTYPES, KvFormat, kv_format
from headwise.workers.kv.policy import resolve_policy
from headwise.workers.kv.quantise import dequantise, quantise
from headwise.workers.kv.sizes import block_bytes
from tests.effort import examples

FORMATS = st.sampled_from([kv_format(name, 32) for name in KV_DTYPES])


def small_cache(format: KvFormat, transposed_keys: bool = False, num_kv_heads: int = 3, policy: str = "") -> KVCache:
    of = resolve_policy(policy, 2, num_kv_heads) if policy else None
    sizes = (2, 5, num_kv_heads, 4, 32)
    return KVCache(*sizes, torch.float32, transposed_keys=transposed_keys, format=format, policy=of)


def kept(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What a cache gives back of numbers."""
    return dequantise(quantise(x, kind)) if kind.startswith("int") else x.to(getattr(torch, kind))


def content(cache: KVCache) -> torch.Tensor:
    blocks = torch.empty(cache.num_blocks, *cache.block_shape, dtype=cache.dtype)
    cache.read_blocks(range(cache.num_blocks), blocks)
    return blocks


@examples(60)
@given(format=FORMATS, transposed_keys=st.booleans(), slots=st.permutations(range(20)), count=st.integers(1, 20))
def test_a_token_is_read_as_its_form_keeps_it(
    format: KvFormat, transposed_keys: bool, slots: list[int], count: int
) -> None:
    cache = small_cache(format, transposed_keys)
    kv_T2KD, slots_T = torch.randn(count, 2, 3, 32), torch.tensor(slots[:count])
    cache.write(1, kv_T2KD[:, 0], kv_T2KD[:, 1], slots_T)
    for part, (x_KCD, kind) in enumerate(zip(cache.gather(1, torch.arange(5), 20), format, strict=True)):
        assert torch.equal(x_KCD[:, slots_T].transpose(0, 1), kept(kv_T2KD[:, part], kind))
        x_KCD[:, slots_T] = 0
        assert not x_KCD.any()
    assert not any(x.any() for x in cache.gather(0, torch.arange(5), 20))


@examples(60)
@given(format=FORMATS, layouts=st.tuples(st.booleans(), st.booleans()), data=st.data())
def test_a_range_of_heads_moves_alone_whatever_its_form(
    format: KvFormat, layouts: tuple[bool, bool], data: st.DataObject
) -> None:
    """From a rank's cache of KV heads 0 to 3 to that of another, which has heads -1 to 3."""
    source, target = small_cache(format, layouts[0]), small_cache(format, layouts[1], num_kv_heads=4)
    for layer in range(2):
        source.write(layer, torch.randn(20, 3, 32), torch.randn(20, 3, 32), torch.arange(20))
    blocks, places = (data.draw(st.permutations(range(5)))[:2] for _ in range(2))
    first, last = sorted(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True)))
    layers = data.draw(st.sampled_from([(0, 1), (1, 2), (0, 2)]))
    moved = bytearray(source.range_bytes(2, last - first, layers[1] - layers[0]))
    source.read_range(blocks, (first, last), layers, moved)
    target.write_range(places, (first + 1, last + 1), layers, bytes(moved))
    for layer in range(2):
        before, after = (cache.gather(layer, torch.arange(5), 20) for cache in (source, target))
        for x_KCD, found_KCD in zip(before, after, strict=True):
            expected = torch.zeros_like(found_KCD).view(4, 5, 4, 32)
            if layers[0] <= layer < layers[1]:
                expected[first + 1 : last + 1, places] = x_KCD.view(3, 5, 4, 32)[first:last, blocks]
            assert torch.equal(found_KCD, expected.flatten(1, 2))


@examples(30)
@given(format=FORMATS, blocks=st.permutations(range(5)))
def test_whole_blocks_move_unchanged(format: KvFormat, blocks: list[int]) -> None:
    source, target = small_cache(format), small_cache(format, transposed_keys=True)
    for layer in range(2):
        source.write(layer, torch.randn(20, 3, 32), torch.randn(20, 3, 32), torch.arange(20))
    moved = content(source)
    assert moved[0].nbytes == block_bytes(source.policy, format, 4, 32)[0]
    target.write_blocks(blocks, moved)
    assert torch.equal(content(target)[blocks], moved)


@pytest.mark.parametrize("format", [KvFormat("float32", "float32"), KvFormat("int8", "int4")])
def test_each_group_has_blocks_of_its_own(format: KvFormat) -> None:
    policy = resolve_policy("dense@0.1;window:8@*", 2, 3)
    cache = KVCache(2, (3, 7), 3, 4, 32, torch.float32, format=format, policy=policy)
    assert (cache.num_blocks, cache.group_blocks) == (3, (3, 7))
    places = [[(part.group, part.heads, len(part.keys)) for part in parts] for parts in cache.parts]
    assert places == [[(0, (0, 2), 3), (1, (1,), 7)], [(0, (0, 1, 2), 3)]]
    k_TKD, v_TKD = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    cache.write(0, k_TKD, v_TKD, torch.tensor([5, 6, 24, 27]))
    for part, block, slots in zip(cache.parts[0], (1, 6), ([1, 2], [0, 3]), strict=True):
        for x_KCD, x_TKD, kind in zip(
            cache.gather_part(part, torch.tensor([block]), 4), (k_TKD, v_TKD), format, strict=True
        ):
            assert torch.equal(x_KCD[:, slots].transpose(0, 1), kept(x_TKD[:, list(part.heads)], kind))
    assert cache.nbytes == sum(
        size * count for size, count in zip(block_bytes(policy, format, 4, 32), (3, 7), strict=True)
    )


def test_what_moves_blocks_refuses_several_groups() -> None:
    cache = small_cache(KvFormat("int8", "int8"), policy="dense@0;window:8@*")
    for use in (lambda: content(cache), lambda: cache.keys, lambda: cache.gather(0, torch.arange(1), 1)):
        with pytest.raises(InvalidValueError, match=r"^kv_policy='dense@0;window:8@1'"):
            use()


def test_a_policy_of_other_heads_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^kv_policy='window:8'"):
        KVCache(2, 5, 3, 4, 32, torch.float32, policy=resolve_policy("window:8", 2, 4))
