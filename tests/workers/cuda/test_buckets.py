from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.workers.cuda.buckets import bucket_of, buckets_of


@pytest.mark.parametrize(
    ("max_rows", "buckets"), [(1, (1,)), (3, (1, 2, 4)), (8, (1, 2, 4, 8)), (20, (1, 2, 4, 8, 16, 24))]
)
def test_the_buckets_of_so_many_rows(max_rows: int, buckets: tuple[int, ...]) -> None:
    assert buckets_of(max_rows) == buckets


@given(st.integers(1, 600), st.integers(0, 100))
def test_a_bucket_is_the_smallest_that_holds_the_rows(num_rows: int, more: int) -> None:
    buckets = buckets_of(num_rows + more)
    assert bucket_of(num_rows) == min(size for size in buckets if size >= num_rows)
