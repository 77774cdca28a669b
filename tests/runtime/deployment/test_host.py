"""A replica computes what it is told, goes on exactly where another has stopped, and outlives what it does not
understand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from headwise.cluster.channel import Kind
from headwise.runtime.config import handoff_config
from headwise.runtime.deployment import host
from headwise.runtime.deployment.messages import (
    Abort,
    Add,
    KvEvents,
    KvSnapshot,
    Output,
    Pause,
    ReplicaMessage,
    RequestDelta,
    ResetPrefixCache,
    SnapshotWanted,
    encode,
)
from headwise.runtime.inputs.grammars import GrammarChecker
from headwise.runtime.kv.events import decode_events, decode_snapshot
from headwise.runtime.kv.identity import TokenBlocks
from headwise.runtime.output import FinishReason
from headwise.runtime.structured_outputs import StructuredOutputsParams
from headwise.workers.errors import InvalidValueError
from headwise.workers.plan import RowSampling, TokenLogprobs
from tests.byte_tokenizer import EOS, VOCAB, token_bytes, write_byte_tokenizer
from tests.checkpoints import write_checkpoint
from tests.local_replicas import LocalReplica
from tests.replica_talk import Talk

PROMPT = [5, 9, 200, 17, 33]
NAMESPACE = b"n" * 32
COUNT = 14

KINDS = {
    "greedy": {"sampling": RowSampling()},
    "seeded": {"sampling": RowSampling(temperature=0.9, top_k=50, top_p=0.95, seed=2**64 - 3)},
    "penalties": {
        "sampling": RowSampling(
            temperature=0.7,
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.4,
            seed=11,
            logit_bias=((7, 3.0), (9, -2.0)),
        )
    },
    "logprobs": {"sampling": RowSampling(temperature=0.8, seed=4, num_logprobs=3)},
    "cached": {"sampling": RowSampling(temperature=0.8, seed=5), "namespace": NAMESPACE, "owner": b"tenant"},
}


def joined(deltas: list[RequestDelta]) -> tuple[list[int], list[TokenLogprobs]]:
    tokens = [token for delta in deltas for token in delta.token_ids]
    return tokens, [one for delta in deltas for one in delta.logprobs or []]


def assert_goes_on(talk: Talk[LocalReplica], **fields: Any) -> list[RequestDelta]:
    """A request that is cut after any third token gets the tokens of one that was not; returns what that one got."""
    whole = talk.deltas(talk.add(PROMPT, COUNT, **fields))
    tokens, logprobs = joined(whole)
    for cut in range(1, len(tokens), 3):
        rest = talk.deltas(talk.add(PROMPT, COUNT, generated=tokens[:cut], **fields))
        again, logprobs_again = joined(rest)
        assert again == tokens[cut:]
        assert [one.rank for one in logprobs_again] == [one.rank for one in logprobs[cut:]]
        assert [one.top_ids for one in logprobs_again] == [one.top_ids for one in logprobs[cut:]]
        for one, other in zip(logprobs_again, logprobs[cut:], strict=True):
            assert one.top == pytest.approx(other.top, abs=1e-4)
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_goes_on_from_any_token(talk: Talk[LocalReplica], kind: str) -> None:
    whole = assert_goes_on(talk, **KINDS[kind])
    assert len(joined(whole)[0]) == COUNT and whole[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_it_and_not_before_min_tokens(talk: Talk[LocalReplica]) -> None:
    free = talk.tokens(talk.add(PROMPT, COUNT, RowSampling(temperature=1.0, seed=1)))
    stop = free[2]
    sampling = RowSampling(temperature=1.0, seed=1, stop_token_ids=(stop,))
    whole = assert_goes_on(talk, sampling=sampling, stop_token_ids=(stop,))
    assert joined(whole)[0] == free[: free.index(stop) + 1]
    assert (whole[-1].finish_reason, whole[-1].stop_reason) == (FinishReason.STOP, stop)
    sampling = replace(sampling, min_tokens=9)
    whole = assert_goes_on(talk, sampling=sampling, stop_token_ids=(stop,), min_tokens=9)
    assert len(joined(whole)[0]) > 9


def test_the_models_own_stop_token_is_no_stop_reason(talk: Talk[LocalReplica]) -> None:
    free = talk.tokens(talk.add(PROMPT, COUNT))
    last = talk.deltas(talk.add(PROMPT, COUNT, RowSampling(stop_token_ids=(free[1],))))[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are bytes."""
    path = write_checkpoint(tmp_path_factory.mktemp("spelling"), 8, 4, vocab_size=VOCAB)
    write_byte_tokenizer(path)
    return path


def test_a_grammar_goes_on_where_it_was(replica_settings: dict[str, Any], spelling: Path) -> None:
    checker = GrammarChecker(spelling, VOCAB, (EOS,))
    try:
        grammar = checker.grammar(StructuredOutputsParams(regex="[a-f]{3}-[0-9]{9}x*"))
    finally:
        checker.close()
    replica = LocalReplica("replica-1", replica_settings | {"model": str(spelling)}, lambda name, cause: None)
    try:
        sampling = RowSampling(temperature=1.0, seed=8, grammar=grammar, stop_token_ids=(EOS,))
        tokens, _ = joined(assert_goes_on(Talk(replica), sampling=sampling))
        text = b"".join(token_bytes()[token] for token in tokens if token != EOS).decode()
        assert re.match("[a-f]{3}-[0-9]{9}", text)
    finally:
        replica.close()


def test_an_aborted_request_ends_and_others_do_not(talk: Talk[LocalReplica]) -> None:
    one, other = talk.add(PROMPT, 400), talk.add(PROMPT, 30)
    talk.say(Abort(one))
    talk.say(Abort(99))
    assert talk.deltas(one)[-1].finish_reason is FinishReason.ABORT
    everything = [d for m in talk.seen if isinstance(m, Output) for d in m.deltas if d.number == other]
    if not everything or everything[-1].finish_reason is None:
        everything += talk.deltas(other)
    assert everything[-1].finish_reason is FinishReason.LENGTH


def test_a_paused_request_waits(talk: Talk[LocalReplica]) -> None:
    number = talk.add(PROMPT, 400)
    talk.say(Pause(number, True))
    short = talk.add(PROMPT, 20)
    talk.deltas(short)
    talk.report(lambda report: report.received == short and report.stats is not None)
    talk.say(Pause(number, False))
    assert talk.deltas(number)[-1].finish_reason is FinishReason.LENGTH


def test_the_first_token_tells_what_was_cached(talk: Talk[LocalReplica]) -> None:
    prompt = [3 + index % 50 for index in range(40)]
    for cached in (0, 32):
        deltas = talk.deltas(talk.add(prompt, 4, namespace=NAMESPACE))
        assert deltas[0].first is not None and deltas[0].first.num_cached_tokens == cached
        assert deltas[0].first.queued_s >= 0 and deltas[0].first.prefilled_by is None
        assert all(delta.first is None for delta in deltas[1:])
    assert talk.deltas(talk.add(prompt, 4, namespace=b"o" * 32))[0].first.num_cached_tokens == 0  # type: ignore[union-attr]
    talk.say(ResetPrefixCache())
    assert talk.deltas(talk.add(prompt, 4, namespace=NAMESPACE))[0].first.num_cached_tokens == 0  # type: ignore[union-attr]


def test_blocks_are_told_as_events_and_as_a_snapshot(talk: Talk[LocalReplica]) -> None:
    prompt = [3 + index % 50 for index in range(40)]
    digests = TokenBlocks(NAMESPACE, 16, prompt).digests
    talk.deltas(talk.add(prompt, 2, namespace=NAMESPACE))
    talk.say(SnapshotWanted())
    data = talk.wait_for(lambda m: m.data if isinstance(m, KvSnapshot) else None)
    assert set(digests) <= decode_snapshot(data).blocks["device"].keys()
    told = [decode_events(m.data) for m in talk.seen if isinstance(m, KvEvents)]
    assert any(event.digests[0] == digests[0] for m in told for event in m.events)  # type: ignore[union-attr]


def test_reports_come_while_nothing_runs_and_say_what_steps_took(talk: Talk[LocalReplica]) -> None:
    first = talk.report()
    assert (first.received, first.queued_tokens, first.running, first.waiting) == (0, 0, 0, 0)
    assert first.num_free_blocks == first.num_blocks == talk.replica.about["num_blocks"] and not first.rebuilding
    assert first.token_s is None and first.row_s is None
    last = talk.add([3 + index % 50 for index in range(40)], 10)
    talk.deltas(last)
    report = talk.report(lambda report: report.stats is not None and report.stats["num_generated_tokens"] == 10)
    assert report.received == last
    assert report.token_s is not None and report.row_s is not None
    assert 0 < report.token_s < 1 and 0 < report.row_s < 1
    assert report.stats is not None and report.stats["shards"] == talk.replica.about["shards"]


def test_about_says_what_the_front_must_know(talk: Talk[LocalReplica], replica_settings: dict[str, Any]) -> None:
    about = talk.replica.about
    assert (about["block_size"], about["tensor_parallel_size"], about["dtype"]) == (16, 1, "float32")
    assert about["max_model_len"] == 512 and about["fingerprint"] and about["handoff_address"] is None
    assert about["shards"] == [{"rank": 0, "node": "localhost", "pid": talk.replica.pid}]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": [256]},
        {"generated": [256]},
        {"generated": [5] * 20},
        {"max_tokens": 600},
        {"max_tokens": 0},
        {"stop_token_ids": (256,)},
        {"sampling": RowSampling(temperature=1e9)},
        {"sampling": RowSampling(stop_token_ids=(256,))},
        {"sampling": RowSampling(logit_bias=((256, 1.0),))},
        {"sampling": RowSampling(num_logprobs=500)},
        {"sampling": RowSampling(top_p=float("inf"))},
    ],
)
def test_what_cannot_be_computed_ends_with_an_error_and_nothing_else_does(
    talk: Talk[LocalReplica], changes: dict[str, Any]
) -> None:
    add = {"prompt_token_ids": PROMPT, "generated": [], "sampling": RowSampling(), "max_tokens": 20}
    talk.say(Add(7, **add | changes))  # type: ignore[arg-type]
    [delta] = talk.deltas(7)
    assert delta.finish_reason is FinishReason.ERROR and delta.error
    talk.say(Add(8, **add))  # type: ignore[arg-type]
    assert len(talk.tokens(8)) == 20
    assert talk.report(lambda report: report.received == 8)


def test_what_is_no_message_is_passed_over(talk: Talk[LocalReplica], caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"junk", msgpack.packb([1, 2]), msgpack.packb([77]), encode(Output([]))):
        talk.say_bytes(data)
    talk.say_bytes(b"", Kind.QUERY)
    number = talk.add(PROMPT, 3)
    talk.say(Add(number, PROMPT, [], RowSampling(), 3))
    assert len(talk.tokens(number)) == 3
    talk.report(lambda report: report.stats is not None and report.stats["num_generated_tokens"] in (3, 6))
    assert sum("passed over" in record.message for record in caplog.records) >= 6


@pytest.mark.parametrize("fields", [[], [PROMPT], [PROMPT, [], "of another version"], [[], [], None, 3]])
def test_a_request_that_is_not_understood_ends(talk: Talk[LocalReplica], fields: list[Any]) -> None:
    talk.say_bytes(msgpack.packb([1, 5, *fields]))
    [delta] = talk.deltas(5)
    assert delta.finish_reason is FinishReason.ERROR and "does not understand" in str(delta.error)
    assert talk.report(lambda report: report.received == 5)
    assert len(talk.tokens(talk.add(PROMPT, 3))) == 3


def test_tokens_that_cannot_be_told_end_the_replica(
    talk: Talk[LocalReplica], deaths: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the front would go on without them."""

    def refuse(message: ReplicaMessage) -> bytes:
        if isinstance(message, Output):
            raise ValueError("a message of 99 bytes is over the limit of 98")
        return encode(message)

    monkeypatch.setattr(host, "encode", refuse)
    talk.add(PROMPT, 3)
    talk.replica._thread.join(10.0)
    assert deaths == [
        (
            "replica-1",
            "what requests have got cannot be told to the front: a message of 99 bytes is over the limit of 98",
        )
    ]


def test_a_replica_without_a_model_says_why(replica_settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match="max_model_len"):
        LocalReplica("replica-1", replica_settings | {"max_model_len": 10**6}, lambda name, cause: None)


def test_handoff_settings_may_be_a_plain_dict(replica_settings: dict[str, Any]) -> None:
    handoff = handoff_config(role="decode").model_dump()
    replica = LocalReplica("replica-1", replica_settings | {"handoff": handoff}, lambda name, cause: None)
    try:
        assert replica.host._config.handoff == handoff_config(role="decode")
    finally:
        replica.close()


def test_an_engine_that_fails_ends_the_replica(talk: Talk[LocalReplica], deaths: list[tuple[str, str]]) -> None:
    def fail(engine: object) -> None:
        raise RuntimeError("an error that nobody thought of")

    talk.replica.host._loop.post(fail)
    talk.replica._thread.join(10.0)
    assert deaths == [("replica-1", "the engine has failed: RuntimeError")]


def test_a_replica_that_is_closed_is_no_death(talk: Talk[LocalReplica], deaths: list[tuple[str, str]]) -> None:
    talk.add(PROMPT, 400)
    talk.replica.close()
    assert deaths == [] and not talk.replica._thread.is_alive()
