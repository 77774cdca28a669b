"""In what forms keys and values are kept, and how many bytes they take."""

from __future__ import annotations

import pytest

from headwise.workers.errors import InvalidValueError
from headwise.workers.kv.format import KV_DTYPES, kv_format


@pytest.mark.parametrize(
    ("name", "token"),
    [
        *(("float32", 512), ("bfloat16", 256), ("float16", 256)),
        ("int8", 2 * (64 + 4)),
        ("int4", 2 * (32 + 8)),
        ("int8/int4", 64 + 4 + 32 + 8),
        ("int4/int8", 64 + 4 + 32 + 8),
    ],
)
def test_bytes_of_a_token_of_a_head_of_64(name: str, token: int) -> None:
    format = kv_format(name, 64)
    assert format.block_bytes(16, 64) == 16 * token
    assert str(format) == name and format.quantised == name.startswith("int")


def test_every_name_is_that_of_its_form() -> None:
    assert [str(kv_format(name, 64)) for name in KV_DTYPES] == list(KV_DTYPES)


@pytest.mark.parametrize(("name", "head_dim"), [("int4", 48), ("int8/int4", 33), ("int4/int8", 7)])
def test_heads_without_whole_groups_are_refused(name: str, head_dim: int) -> None:
    with pytest.raises(InvalidValueError, match=f"^kv_dtype='{name}'.*it is {head_dim} here"):
        kv_format(name, head_dim)
    kv_format("int8", head_dim)


@pytest.mark.parametrize("name", ["", "int2", "int8/float16", "int8/int8", "fp8", "float32/int8"])
def test_other_forms_are_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match=r"^kv_dtype=.*must be one of float32, .*int8/int4"):
        kv_format(name, 64)
