"""The paged KV memory: what is written at a slot is what is read there, in either layout of the keys."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.cache import KVCache
from headwise.workers.kv.sizes import block_bytes
from tests.effort import examples

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = pytest.mark.parametrize("transposed_keys", [False, True])


def small_cache(transposed_keys: bool, dtype: torch.dtype = torch.float32, **sizes: int) -> KVCache:
    shape = {"num_layers": 2, "num_blocks": 5, "num_kv_heads": 3, "block_size": 4, "head_dim": 8, **sizes}
    return KVCache(**shape, dtype=dtype, device="cpu", transposed_keys=transposed_keys)


@examples(40)
@given(
    transposed_keys=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    slots=st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True),
    layer=st.integers(0, 1),
)
def test_a_token_is_read_where_it_was_written_and_nothing_else_changes(
    transposed_keys: bool, dtype: torch.dtype, slots: list[int], layer: int
) -> None:
    cache = small_cache(transposed_keys, dtype)
    kv_T2KD = torch.randn(len(slots), 2, 3, 8).to(dtype)
    cache.write(layer, kv_T2KD[:, 0], kv_T2KD[:, 1], torch.tensor(slots))
    everything = torch.arange(5, dtype=torch.int32)
    k_KCD, v_KCD = cache.gather(layer, everything, 20)
    for token, slot in enumerate(slots):
        assert torch.equal(k_KCD[:, slot], kv_T2KD[token, 0])
        assert torch.equal(v_KCD[:, slot], kv_T2KD[token, 1])
    untouched = [slot for slot in range(20) if slot not in slots]
    assert not k_KCD[:, untouched].any() and not v_KCD[:, untouched].any()
    assert not any(x.any() for x in cache.gather(1 - layer, everything, 20))


@LAYOUTS
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_gather_follows_the_block_table_and_stops_at_the_length(transposed_keys: bool, length: int) -> None:
    cache = small_cache(transposed_keys)
    k_TKD, v_TKD = torch.randn(8, 3, 8), torch.randn(8, 3, 8)
    cache.write(1, k_TKD, v_TKD, torch.tensor([12, 13, 14, 15, 4, 5, 6, 7]))
    k_KCD, v_KCD = cache.gather(1, torch.tensor([3, 1, 0], dtype=torch.int32), length)
    assert torch.equal(k_KCD, k_TKD[:length].transpose(0, 1))
    assert torch.equal(v_KCD, v_TKD[:length].transpose(0, 1))


@pytest.mark.parametrize("from_transposed", [False, True])
@pytest.mark.parametrize("into_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_move_in_bulk_with_every_layer_and_head(
    from_transposed: bool, into_transposed: bool, dtype: torch.dtype
) -> None:
    source, target = small_cache(from_transposed, dtype), small_cache(into_transposed, dtype)
    kv_LT2KD = torch.randn(2, 20, 2, 3, 8).to(dtype)
    for layer, kv_T2KD in enumerate(kv_LT2KD):
        source.write(layer, kv_T2KD[:, 0], kv_T2KD[:, 1], torch.arange(20))
    blocks_NL2KSD = kv_LT2KD.view(2, 5, 4, 2, 3, 8).permute(1, 0, 3, 4, 2, 5)
    moved = torch.full((2, *source.block_shape), 7.0, dtype=dtype)
    source.read_blocks([3, 1], moved)
    assert torch.equal(moved, blocks_NL2KSD[[3, 1]])
    apart = [torch.empty(source.block_shape, dtype=dtype) for _ in range(2)]
    source.read_blocks([3, 1], apart)
    assert torch.equal(torch.stack(apart), moved)
    target.write_blocks([0, 4], moved)
    written = torch.full((5, *target.block_shape), 7.0, dtype=dtype)
    target.read_blocks(range(5), written)
    assert torch.equal(written[[0, 4]], moved) and not written[1:4].any()


@examples(60)
@given(data=st.data(), layouts=st.tuples(st.booleans(), st.booleans()), dtype=st.sampled_from(DTYPES))
def test_a_range_of_heads_and_layers_moves_alone(
    data: st.DataObject, layouts: tuple[bool, bool], dtype: torch.dtype
) -> None:
    """From a rank's cache of heads 0 to 3 to that of another, whose heads are other ones."""
    source, target = small_cache(layouts[0], dtype), small_cache(layouts[1], dtype, num_kv_heads=4, num_layers=2)
    source.keys.normal_()
    source.values.normal_()
    blocks, places = (data.draw(st.permutations(range(5)))[:2] for _ in range(2))
    first, last = sorted(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True)))
    layers = data.draw(st.sampled_from([(0, 1), (1, 2), (0, 2)]))
    moved = bytearray(source.range_bytes(2, last - first, layers[1] - layers[0]))
    source.read_range(blocks, (first, last), layers, moved)
    target.write_range(places, (first + 1, last + 1), layers, bytes(moved))
    before, after = torch.empty(5, *source.block_shape, dtype=dtype), torch.empty(5, *target.block_shape, dtype=dtype)
    source.read_blocks(range(5), before)
    target.read_blocks(range(5), after)
    expected = torch.zeros_like(after)
    expected[places, slice(*layers), :, first + 1 : last + 1] = before[blocks, slice(*layers), :, first:last]
    assert torch.equal(after, expected)


@pytest.mark.parametrize(
    ("field", "blocks", "heads", "layers", "extra"),
    [
        ("block", [5], (0, 1), (0, 1), 0),
        ("heads", [0], (0, 4), (0, 1), 0),
        ("heads", [0], (-1, 1), (0, 1), 0),
        ("heads", [0], (1, 1), (0, 1), 0),
        ("layers", [0], (0, 1), (1, 3), 0),
        ("layers", [0], (0, 1), (1, 0), 0),
        ("data|out", [0], (0, 1), (0, 1), 4),
        ("data|out", [0, 1], (0, 1), (0, 1), -4),
    ],
)
def test_a_range_outside_the_cache_is_refused(
    field: str, blocks: list[int], heads: tuple[int, int], layers: tuple[int, int], extra: int
) -> None:
    cache = small_cache(False)
    data = bytearray(b"1" * (cache.range_bytes(len(blocks), 1, 1) + extra))
    for move in (cache.read_range, cache.write_range):
        with pytest.raises(InvalidValueError, match=rf"^({field})="):
            move(blocks, heads, layers, data)
    assert not cache.keys.any() and not cache.values.any() and set(data) == {ord("1")}


def test_copies_start_no_threads_of_torch() -> None:
    # Big enough that torch would split each copy; a second team of threads would slow every step.
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        cache = small_cache(True, num_layers=8, num_kv_heads=8, block_size=16, head_dim=64)
        held = torch.zeros(1, *cache.block_shape)
        seen: list[set[str]] = []

        def copy() -> None:
            before = set(os.listdir("/proc/self/task"))
            cache.read_blocks([0], held)
            cache.write_blocks([1], held)
            seen.append(set(os.listdir("/proc/self/task")) - before)

        thread = threading.Thread(target=copy)
        thread.start()
        thread.join(10)
    finally:
        torch.set_num_threads(threads)
    assert seen == [set()]


@LAYOUTS
def test_blocks_that_do_not_fit_are_refused(transposed_keys: bool) -> None:
    cache = small_cache(transposed_keys)
    data = torch.ones(1, *cache.block_shape)
    for move, field in ((cache.read_blocks, "out"), (cache.write_blocks, "data")):
        for block in (-1, 5):
            with pytest.raises(InvalidValueError, match=rf"^block={block}"):
                move([block], data)
        for wrong in (
            data[0],
            data.half(),
            data.expand(2, -1, -1, -1, -1, -1),
            data.transpose(-1, -2),
            data.to("meta"),
        ):
            with pytest.raises(InvalidValueError, match=rf"^{field}=.*\(1, 2, 2, 3, 4, 8\)"):
                move([0], wrong)
        for few in (data, [data[0]]):
            with pytest.raises(InvalidValueError, match=rf"^{field}="):
                move([0, 1], few)
    assert not cache.keys.any() and not cache.values.any()


def test_a_cache_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^num_blocks=0"):
        small_cache(False, num_blocks=0)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_allocated(transposed_keys: bool, dtype: torch.dtype) -> None:
    cache = small_cache(transposed_keys, dtype)
    (per_block,) = block_bytes(cache.policy, cache.format, 4, 8)
    assert (
        cache.nbytes == 5 * per_block == cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    )
