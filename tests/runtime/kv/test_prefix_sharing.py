"""Sharing blocks on a group that checks every slot it reads: whatever is shared, evicted, restored, lost or withdrawn,
each request gets its own tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv.events import decode_snapshot
from headwise.runtime.output import FinishReason
from headwise.workers.errors import InvalidValueError
from tests.effort import examples
from tests.plain_group import POISON, Bench, PlainGroup, alone, make_request

PREFIXES = ([1] * 12, [1] * 6 + [2] * 6, [3] * 12)
"""Long enough for three blocks; the first two have one in common."""


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tiers", [(0, 0), (5, 0), (4, 9), (0, 6)])
@examples(100)
@given(data=st.data())
def test_every_request_gets_the_tokens_it_would_get_alone(
    depth: int, tiers: tuple[int, int], data: st.DataObject
) -> None:
    chance = random.Random(data.draw(st.integers(0, 2**32), "chance"))
    blocks = data.draw(st.integers(10, 20), "blocks")
    bench = Bench(
        blocks,
        chance.randint(1, 5),
        chance.randint(1, 30),
        depth,
        chance.randint(1, 30),
        tiers,
        PlainGroup(chance, chance.choice((0.0, 0.0, 0.2))),
        chance.choice((None, None, 0.3)),
        eviction=chance.choice(("lru", "cost_aware")),
    )
    todo = []
    for name in range(data.draw(st.integers(1, 9), "requests")):
        prompt = chance.choice(PREFIXES)[: chance.randint(1, 12)] + [chance.randrange(3)] * chance.randint(0, 3)
        prompt += [POISON] * (chance.random() < 0.1)
        todo.append(make_request(str(name), prompt, chance.randint(1, 12), salt=chance.choice(("", "", "b"))))
    requests, aborted = list(todo), set()
    for _ in range(5000):
        if todo and chance.random() < 0.4:
            bench.add(todo.pop())
        if bench.got and chance.random() < 0.03:
            aborted.add(chance.choice([key.split("#")[0] for key in bench.got]))
            bench.engine.abort(max(aborted))
        if chance.random() < 0.01:
            bench.engine.reset_prefix_cache()
        if chance.random() < 0.02 and requests:
            request = chance.choice(requests)
            assert request.token_blocks is not None
            try:
                bench.engine.pin(request.token_blocks, len(request.prompt_token_ids), chance.choice((0.0, 100.0)))
            except InvalidValueError:
                bench.engine.reset_prefix_cache()
        bench.check_books()
        bench.step()
        if not todo and not bench.engine.has_work:
            break
    else:
        raise AssertionError(f"still at work: {bench.engine.stats()}")
    bench.engine.reset_prefix_cache()
    bench.run()
    bench.check_idle()
    assert bench.pool.num_free == blocks
    assert not any(decode_snapshot(bench.events.snapshot()).blocks.values())
    for request in requests:
        tokens, reason = alone(request)
        if bench.ended[request.key] is FinishReason.ABORT:
            assert request.request_id in aborted
            assert bench.got[request.key] == tokens[: len(bench.got[request.key])]
        else:
            assert (bench.got[request.key], bench.ended[request.key]) == (tokens, reason)
