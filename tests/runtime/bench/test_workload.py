"""What the benchmarks send."""

from __future__ import annotations

import pytest

from headwise.runtime import LLM
from headwise.runtime.bench.workload import prompts, steady_rows


def test_prompts_are_the_published_ones() -> None:
    """Numbers of different engines and versions are only worth comparing on the same tokens."""
    one, eight, last = prompts(1, 42, 49152), prompts(8, 42, 49152), prompts(32, 42, 49152)[-1]
    assert [len(one), len(eight)] == [1, 8] and {len(prompt) for prompt in (*one, *eight, last)} == {42}
    assert one[0][:4] == [48763, 7811, 7464, 42658]
    assert eight[0][:4] == [11495, 15516, 44495, 3287]
    assert last[:4] == [45349, 15505, 5875, 13056]


def test_steady_rows_all_decode_until_they_are_left(llm: LLM) -> None:
    with steady_rows(llm, prompts(3, 9, 256)) as streams:
        stats = llm.stats()
        assert (stats["num_running"], stats["num_waiting"]) == (3, 0)
        before = stats["num_generated_tokens"]
        for stream in streams:
            assert next(stream).finish_reason is None
        assert llm.stats()["num_generated_tokens"] > before
    assert llm.stats()["num_running"] == 0


def test_steady_rows_end_when_the_measurement_fails(llm: LLM) -> None:
    with pytest.raises(ZeroDivisionError), steady_rows(llm, prompts(2, 9, 256)):
        raise ZeroDivisionError
    assert llm.stats()["num_running"] == 0
