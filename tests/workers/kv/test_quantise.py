"""Keys and values as integers: how far off they may be, and that each lies where the format says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.kv.format import BITS, group_size, record_bytes
from headwise.workers.kv.quantise import (
    dequantise,
    quantise,
    read_keys,
    read_values,
    write_keys,
    write_values,
)
from tests.effort import examples

KINDS = pytest.mark.parametrize("kind", list(BITS))


@examples(100)
@given(
    kind=st.sampled_from(list(BITS)),
    head_dim=st.sampled_from([8, 32, 64]),
    size=st.floats(1e-3, 1e3),
    middle=st.floats(-1e3, 1e3),
    seed=st.integers(0, 1000),
)
def test_numbers_are_off_by_half_a_step(kind: str, head_dim: int, size: float, middle: float, seed: int) -> None:
    x_TKD = torch.randn(5, 2, head_dim, generator=torch.Generator().manual_seed(seed)) * size + middle
    coded = quantise(x_TKD, kind)
    off_TKGS = (dequantise(coded) - x_TKD).abs().view(5, 2, coded.scales.shape[-1], -1)
    # float16 keeps 11 bits of a zero and of a scale, or what is lost below its smallest number.
    rounding = coded.zeros.float().abs() * 2**-11 + coded.scales.float() * 255 * 2**-11 + 255 * 2.0**-25
    allowed_TKG = coded.scales.float() / 2 + rounding
    assert (off_TKGS <= allowed_TKG.unsqueeze(-1) + x_TKD.abs().max() * 2**-23).all()


@KINDS
def test_a_group_of_equal_numbers_is_its_zero(kind: str) -> None:
    x_KD = torch.tensor([[0.0], [-3.5], [1024.0]]).expand(3, 32)
    coded = quantise(x_KD, kind)
    assert not coded.codes.any() and not coded.scales.any()
    assert torch.equal(dequantise(coded), x_KD)


@KINDS
def test_the_ends_of_a_group_are_kept(kind: str) -> None:
    levels = 2 ** BITS[kind] - 1
    x_D = torch.arange(32) % 16 * levels / 15 * 0.5 - 2
    coded = quantise(x_D, kind)
    assert (coded.zeros.item(), coded.scales.item()) == (-2, 0.5)
    assert torch.equal(dequantise(coded), x_D)


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e9, -1e9])
def test_what_is_not_finite_stays_so(kind: str, bad: float) -> None:
    """Or the engine would not see that a computation has failed. 1e9 needs more than float16 holds."""
    x_KD = torch.randn(2, 64)
    x_KD[0, 3] = bad
    found_KGS = dequantise(quantise(x_KD, kind)).view(2, -1, group_size(kind, 64))
    assert not found_KGS[0, 0].isfinite().any() and found_KGS[1].isfinite().all()


def test_codes_lie_where_the_format_says() -> None:
    """A block of two tokens, and a head of 64: two groups of int4."""
    x_TD = torch.stack([torch.arange(64) % 32 % 16, torch.arange(64) // 8 % 16]).float()
    x_TD[:, ::32], x_TD[:, 31::32] = 0, 15
    for kind in BITS:
        coded = quantise(x_TD, kind)
        keys, values = (torch.zeros(1, 1, record_bytes(kind, 2, 64), dtype=torch.uint8) for _ in range(2))
        for records, write in ((keys, write_keys), (values, write_values)):
            write(records, kind, x_TD[:, None], torch.zeros(2, dtype=torch.int64), torch.arange(2))
        rows, groups = (64, 1) if kind == "int8" else (32, 2)
        codes_DS, codes_SD = keys[0, 0, : 2 * rows].view(rows, 2), values[0, 0, : 2 * rows].view(2, rows)
        for token in range(2):
            if kind == "int8":
                assert torch.equal(codes_DS[:, token], coded.codes[token])
                assert torch.equal(codes_SD[token], coded.codes[token])
            else:
                code = coded.codes[token].tolist()
                assert codes_DS[:, token].tolist() == [code[2 * i] | code[2 * i + 1] << 4 for i in range(32)]
                pairs = [(group + i, group + i + 16) for group in (0, 32) for i in range(16)]
                assert codes_SD[token].tolist() == [code[a] | code[b] << 4 for a, b in pairs]
        for start, x_SG in ((2 * rows, coded.scales), (2 * rows + 4 * groups, coded.zeros)):
            found = [records[0, 0, start : start + 4 * groups].view(torch.float16) for records in (keys, values)]
            assert torch.equal(found[0].view(groups, 2), x_SG.T) and torch.equal(found[1].view(2, groups), x_SG)


@examples(40)
@given(
    kind=st.sampled_from(list(BITS)),
    head_dim=st.sampled_from([2, 6, 16, 64]),
    block_size=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_records_give_back_what_was_written(kind: str, head_dim: int, block_size: int, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 4 * block_size - 1), min_size=1, max_size=20, unique=True))
    x_TKD, slots_T = torch.randn(len(slots), 3, head_dim), torch.tensor(slots)
    blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
    for write, read in ((write_keys, read_keys), (write_values, read_values)):
        records = torch.zeros(4, 3, record_bytes(kind, block_size, head_dim), dtype=torch.uint8)
        write(records, kind, x_TKD, blocks_T, offsets_T)
        found_NKSD = read(records, kind, head_dim)
        assert torch.equal(found_NKSD[blocks_T, :, offsets_T], dequantise(quantise(x_TKD, kind)))
        found_NKSD[blocks_T, :, offsets_T] = 0
        assert not found_NKSD.any()
