"""Jobs that move blocks: done when every rank is, in whatever order the ranks report."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.kv.ledger import Ledger, Outcome
from headwise.workers.kv.transfer import BlockKey, Op, Tier, TransferJob, TransferResult, encode_job
from tests.effort import examples

KEY = BlockKey(bytes(32), bytes(32), bytes(32), b"")


class Ranks:
    """So many ranks, which report when they are told to."""

    def __init__(self, number: int) -> None:
        self.jobs: list[TransferJob] = []
        self.results: deque[TransferResult] = deque()
        self.waited: list[float] = []
        self.ledger = Ledger(self.jobs.append, self.receive, number)

    def receive(self, timeout_s: float) -> TransferResult | None:
        self.waited.append(timeout_s)
        return self.results.popleft() if self.results else None


def test_a_job_is_done_when_every_rank_is_and_fails_where_any_does() -> None:
    ranks, outcomes = Ranks(3), list[Outcome]()
    ranks.ledger.start(Op.SAVE, Tier.HOST, [KEY], [7], outcomes.append)
    assert ranks.ledger.busy and ranks.jobs == [TransferJob(0, Op.SAVE, Tier.HOST, [KEY], [7])]
    ranks.results += [TransferResult(0, [], 0.5), TransferResult(0, [b"one"], 2.0)]
    ranks.ledger.poll()
    assert not outcomes and ranks.ledger.busy
    ranks.results.append(TransferResult(0, [b"two", b"one"], 1.0))
    ranks.ledger.poll()
    [outcome] = outcomes
    assert outcome.failed == {b"one", b"two"} and outcome.seconds == 2.0 and not outcome.void
    assert not ranks.ledger.busy


def test_a_void_job_is_done_all_the_same_and_later_ones_are_not_void() -> None:
    ranks, outcomes = Ranks(1), list[Outcome]()
    ranks.ledger.start(Op.LOAD, Tier.HOST, [KEY], [1], outcomes.append)
    ranks.ledger.void()
    ranks.ledger.start(Op.LOAD, Tier.HOST, [KEY], [2], outcomes.append)
    ranks.results += [TransferResult(0), TransferResult(1)]
    ranks.ledger.poll()
    assert [outcome.void for outcome in outcomes] == [True, False]


def test_only_the_first_result_is_waited_for() -> None:
    ranks = Ranks(1)
    ranks.ledger.poll()
    assert ranks.waited == [], "where no job is in flight, none is looked for"
    for _ in range(3):
        ranks.ledger.start(Op.DROP, Tier.DISK, [KEY])
    ranks.results += [TransferResult(0), TransferResult(1)]
    ranks.ledger.poll(5.0)
    assert ranks.waited == [5.0, 0.0, 0.0] and ranks.ledger.busy


def test_what_becomes_of_a_job_may_start_another() -> None:
    ranks = Ranks(1)
    ranks.ledger.start(Op.SAVE, Tier.HOST, [KEY], [1], lambda _: ranks.ledger.start(Op.DROP, Tier.HOST, [KEY]))
    ranks.results.append(TransferResult(0))
    ranks.ledger.poll()
    assert [job.id for job in ranks.jobs] == [0, 1] and ranks.ledger.busy


def test_a_job_larger_than_a_message_is_done_when_all_of_it_is() -> None:
    ranks, outcomes = Ranks(2), list[Outcome]()
    longest = bytes(4 * 1024)
    keys = [BlockKey(number.to_bytes(32, "big"), bytes(32), bytes(32), longest) for number in range(16_500)]
    ranks.ledger.start(Op.LOAD, Tier.DISK, keys, range(len(keys)), outcomes.append)
    for job in ranks.jobs:
        encode_job(job)
    assert [key for job in ranks.jobs for key in job.keys] == keys
    assert [block for job in ranks.jobs for block in job.blocks] == [*range(len(keys))]
    for job in ranks.jobs:
        assert not outcomes and ranks.ledger.busy
        ranks.results += [TransferResult(job.id, [job.keys[0].digest], 2.0), TransferResult(job.id, [], 1.0)]
        ranks.ledger.poll()
    [outcome] = outcomes
    assert outcome.failed == {job.keys[0].digest for job in ranks.jobs}
    assert outcome.seconds == 2.0 * len(ranks.jobs) and not ranks.ledger.busy


def test_drops_go_together_and_before_the_next_job_of_their_tier() -> None:
    ranks = Ranks(1)
    other = BlockKey(bytes(31) + b"1", bytes(32), bytes(32), b"")
    ranks.ledger.drop(Tier.HOST, [KEY])
    ranks.ledger.drop(Tier.DISK, [KEY])
    ranks.ledger.drop(Tier.DISK, [other])
    assert ranks.ledger.busy and not ranks.jobs
    ranks.ledger.start(Op.DEMOTE, Tier.DISK, [KEY])
    assert [(job.op, job.tier, job.keys) for job in ranks.jobs] == [
        (Op.DROP, Tier.DISK, [KEY, other]),
        (Op.DEMOTE, Tier.DISK, [KEY]),
    ]
    ranks.ledger.poll()
    assert [(job.op, job.tier) for job in ranks.jobs[2:]] == [(Op.DROP, Tier.HOST)]
    ranks.results += [TransferResult(number) for number in range(3)]
    ranks.ledger.poll()
    assert not ranks.ledger.busy


@examples(100)
@given(data=st.data(), num_ranks=st.integers(1, 4), num_jobs=st.integers(0, 6))
def test_every_job_is_done_once_in_any_order_of_reports(data: st.DataObject, num_ranks: int, num_jobs: int) -> None:
    ranks, done = Ranks(num_ranks), list[int]()
    for number in range(num_jobs):
        ranks.ledger.start(Op.SAVE, Tier.HOST, [KEY], [0], lambda _, number=number: done.append(number))
    reports = data.draw(st.permutations([number for number in range(num_jobs) for _ in range(num_ranks)]))
    for at, number in enumerate(reports):
        ranks.results.append(TransferResult(number))
        ranks.ledger.poll()
        complete = [job for job in range(num_jobs) if reports[: at + 1].count(job) == num_ranks]
        assert sorted(done) == complete
    assert not ranks.ledger.busy
