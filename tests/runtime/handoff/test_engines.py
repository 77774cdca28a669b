"""Two whole engines: whatever is lost, late or cut off between them, each request gets its own tokens, and both sides
have all their blocks back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.handoff import inbound as inbound_module
from headwise.runtime.handoff import outbound as outbound_module
from headwise.runtime.handoff.messages import Ask, State, TransferKey
from headwise.runtime.output import FinishReason
from headwise.workers.kv.handoff import KvEndpoint
from tests.effort import examples
from tests.plain_group import POISON, VOCAB, alone, make_request
from tests.runtime.handoff.engines import DECODE_EPOCH, PREFILL_EPOCH, Pair


@examples(400)
@given(data=st.data())
@pytest.mark.parametrize("faults", [0.0, 0.1])
def test_every_request_gets_the_tokens_it_would_get_alone(faults: float, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        blocks = data.draw(st.tuples(st.integers(12, 30), st.integers(7, 20)), "blocks")
        settings = {"rows": data.draw(st.integers(1, 4)), "budget": data.draw(st.integers(2, 20))}
        settings["depth"] = data.draw(st.integers(1, 2))
        pair = Pair(data.draw(st.integers(0, 1 << 30), "seed"), faults, blocks, **settings)
        patch.setattr(inbound_module, "time", pair.clock)
        patch.setattr(outbound_module, "time", pair.clock)
        start = st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]])  # what prompts share
        rest = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14) | st.just([1, POISON, 2, 3, 4])
        prompt = st.builds(lambda a, b: a + b, start, rest)
        drawn = st.tuples(prompt, st.integers(1, 6), st.just(()), st.integers(0, 1))
        todo = [make_request(str(i), *one) for i, one in enumerate(data.draw(st.lists(drawn, max_size=8), "requests"))]
        requests, aborted = list(todo), set()
        for _ in range(data.draw(st.integers(0, 120), "moves")):
            if todo and pair.chance.random() < 0.3:
                pair.decode.add(todo.pop())
            if pair.decode.got and pair.chance.random() < 0.03:
                name = pair.chance.choice([key.split("#")[0] for key in pair.decode.got])
                aborted.add(name)
                pair.decode.engine.abort(name)
            pair.move()
        while todo:
            pair.decode.add(todo.pop())
        pair.settle()
        pair.check_idle()
    for request in requests:
        tokens, reason = alone(request)
        got, ended = pair.decode.got[request.key], pair.decode.ended[request.key]
        if ended is FinishReason.ABORT:
            assert request.request_id in aborted and got == tokens[: len(got)]
        else:
            assert (got, ended) == (tokens, reason)


def test_prompts_are_computed_by_the_other_engine() -> None:
    pair = Pair(1, 0.0, (30, 30))
    requests = [make_request(str(i), [i] * 9, 3) for i in range(4)]
    for request in requests:
        pair.decode.add(request)
    pair.settle()
    assert [request.metrics.num_handoff_tokens for request in requests] == [8] * 4
    assert {request.metrics.prefilled_by for request in requests} == {"prefill"}
    assert pair.decode.inbound is not None and pair.decode.inbound.stats()["committed"] == 4
    assert pair.outbound.stats()["committed"] == 4


def test_two_engines_may_name_their_transfers_alike() -> None:
    """One of the requests would otherwise keep its row and its blocks for good."""
    pair, keys = Pair(1, 0.0, (30, 30)), []
    for epoch in (DECODE_EPOCH, DECODE_EPOCH + 1):
        pair.outbound.hello(epoch, [KvEndpoint((0, 1), "127.0.0.1:1")])
        keys.append(TransferKey(bytes(16), 1, epoch, PREFILL_EPOCH))
        pair.outbound.accept(Ask(keys[-1], 1, bytes(32), [epoch] * 8, 0, bytes(32), b"", "", 60.0, 30.0))
    pair.outbound.abort(keys[0], "no more")
    pair.settle()
    states = [status.state for status in pair.outbound.statuses(keys)]
    assert states == [State.FAILED, State.FAILED] and pair.outbound.stats()["in_flight"] == 0
    pair.check_idle()
