"""What becomes of requests: where they are computed, that each token comes once, and that nothing is left of them."""

from __future__ import annotations

import pytest

from headwise.runtime.deployment.blame import PAST_TOKENS
from headwise.runtime.deployment.messages import FirstToken, Output, RequestDelta
from headwise.runtime.kv.events import KvMessage
from headwise.runtime.kv.identity import KvIdentity
from headwise.runtime.output import FinishReason
from headwise.workers.plan import TokenLogprobs
from tests.runtime.deployment.script import BLOCK, Script


def test_a_request_is_told_with_all_that_decides_its_tokens() -> None:
    script = Script.serving(1)
    request = script.add("a", 7, tenant="t")
    [add] = script.replicas["replica-1"].requests.values()
    assert (add.prompt_token_ids, add.generated, add.max_tokens, add.tenant) == ([7, 8, 9], [], 7, "t")
    assert add.sampling is request.sampling and add.streamed and add.namespace is None


def test_requests_wait_until_there_is_a_replica() -> None:
    script = Script(2)
    request = script.add("a", 2)
    script.deployment.pause("a", True)
    assert script.deployment.num_waiting == 1 and script.deployment.status()["waiting"] == 1
    script.start("replica-1")
    assert script.where(request) == "replica-1" and script.replicas["replica-1"].paused
    assert script.deployment.num_waiting == 1, "no token is there"
    script.deployment.pause("a", False)
    script.follow()
    script.step()
    assert script.deployment.num_waiting == 0 and script.deployment.stats()["num_running"] == 1


def test_after_a_death_requests_go_on_from_their_tokens() -> None:
    script = Script.serving(2)
    requests = [script.add(f"r{number}", 6) for number in range(8)]
    for _ in range(3):
        script.step()
    [dead] = {script.where(requests[0])}
    script.die(dead)
    assert all(script.where(request) not in ("", dead) for request in requests)
    moved = [request for request in requests if request.metrics.num_recoveries]
    assert len(moved) == 4 and script.deployment.num_waiting == 4
    for _ in range(3):
        script.step()
    assert len(script.ended) == 8 and all(tokens == [*range(6)] for tokens in script.got.values())
    assert script.deployment.status()["routing"]["requests"] == 0


def test_what_comes_late_is_passed_over() -> None:
    script = Script.serving(2)
    request = script.add("a", 6)
    script.step()
    dead = script.where(request)
    late = script.replicas[dead].step()
    script.die(dead)
    script.say(dead, late)
    assert script.got[request.key] == [0]
    other = script.where(request)
    script.say(dead, Output([RequestDelta(number, [1]) for number in range(10)]))
    script.say(other, Output([RequestDelta(99, [1])]))  # a number that nobody has
    script.step()
    assert script.got[request.key] == [0, 1]


def test_a_replica_answers_only_for_what_it_was_sent() -> None:
    script = Script.serving(2)
    request = script.add("a", 6)
    [other] = script.replicas.keys() - {script.where(request)}
    [number] = script.replicas[script.where(request)].requests
    script.say(other, Output([RequestDelta(number, [0])]))
    assert script.got == {}


def test_a_request_goes_only_where_it_fits() -> None:
    """It was let in when all replicas had memory for it; one that came later has less."""
    script = Script(3)
    script.start("replica-1")
    script.start("replica-2")
    long = script.add("long", 300)
    script.start("replica-3", num_blocks=50)
    script.step()
    dead = script.where(long)
    [other] = {"replica-1", "replica-2"} - {dead}
    script.die(dead)
    assert script.where(long) == other, "replica-3 would refuse it"
    prompt_tokens, most = 3, 50 * BLOCK
    assert {script.where(script.add(f"long-{n}", most - prompt_tokens + 1)) for n in range(4)} == {other}
    assert script.where(script.add("short", most - prompt_tokens)) == "replica-3"
    script.die(other)
    assert script.where(long) == "replica-3", "which says why it cannot compute it"


def test_while_its_shards_are_replaced_requests_go_on_elsewhere_and_it_joins_again() -> None:
    script = Script.serving(2)
    requests = [script.add(f"r{number}", 6) for number in range(4)]
    script.step()
    ill = script.where(requests[0])
    numbers = [*script.replicas[ill].requests]
    script.report(ill, rebuilding=True)
    assert script.states()[ill] == "rebuilding"
    assert script.replicas[ill].aborted == numbers, "it must not go on with them"
    assert all(script.where(request) != ill for request in requests)
    assert script.where(script.add("new", 6)) != ill
    script.report(ill)
    assert script.states()[ill] == "serving"
    assert ill in [script.where(script.add(f"later-{number}", 6)) for number in range(8)]


def test_while_the_only_one_has_no_shards_requests_stay_and_wait() -> None:
    script = Script.serving(1)
    request = script.add("a", 3)
    script.step()
    script.report("replica-1", rebuilding=True)
    later = script.add("b", 3)
    assert script.where(request) == "replica-1" and script.where(later) == ""
    script.report("replica-1")
    assert script.where(later) == "replica-1"
    for _ in range(3):
        script.step()
    assert len(script.ended) == 2


def test_requests_of_one_without_shards_go_to_the_next_that_serves() -> None:
    script = Script(2)
    script.start("replica-1")
    request = script.add("a", 3)
    script.step()
    script.report("replica-1", rebuilding=True)
    script.start("replica-2")
    assert script.where(request) == "replica-2" and script.replicas["replica-1"].aborted


def test_aborts_reach_the_replica_and_end_each_sample() -> None:
    script = Script.serving(1)
    request, held = script.add("a"), Script(1).add("held")
    script.step()
    script.deployment.abort("a")
    script.deployment.abort("nobody")
    script.follow()
    assert request.finish_reason is FinishReason.ABORT and script.ended == {"a#0": request}
    assert script.replicas["replica-1"].aborted == [1] and held.finish_reason is None
    assert script.deployment.status()["routing"]["requests"] == 0


def test_one_that_is_held_can_be_aborted() -> None:
    script = Script(1)
    request = script.add("a")
    script.deployment.abort("a")
    script.follow()
    assert request.key in script.ended and script.deployment.num_waiting == 0
    script.start("replica-1")
    assert script.replicas["replica-1"].requests == {}


def test_waiting_requests_are_counted_by_tenant() -> None:
    script = Script.serving(1)
    for number in range(3):
        script.add(f"a{number}", tenant="a")
    script.add("b", tenant="b")
    counts = script.deployment.num_waiting, script.deployment.num_waiting_of("a"), script.deployment.num_waiting_of("b")
    assert counts == (4, 3, 1)
    script.step()
    script.deployment.abort("b")
    script.follow()
    assert script.deployment.num_waiting == script.deployment.num_waiting_of("a") == 0
    script.die("replica-1")
    assert script.deployment.num_waiting == script.deployment.num_waiting_of("a") == 3, "they wait again"


def test_an_error_of_a_replica_ends_the_request() -> None:
    script = Script.serving(1)
    request = script.add("a")
    script.say("replica-1", Output([RequestDelta(1, [], finish_reason=FinishReason.ERROR, error="no such token")]))
    assert (request.finish_reason, request.error) == (FinishReason.ERROR, "no such token")


def test_what_cannot_be_sent_ends_with_an_error() -> None:
    script = Script.serving(1)
    request = script.add("a")
    script.deployment.unsendable(1, "too large")
    script.follow()
    assert (request.finish_reason, request.error) == (FinishReason.ERROR, "too large")


def test_times_and_counts_come_with_the_first_token() -> None:
    script = Script.serving(2)
    request = script.add("a", 3)
    script.now += 2.0
    first = FirstToken(16, 4, 8, "peer:1", 0.5)
    name = script.where(request)
    script.say(name, Output([RequestDelta(1, [0], first=first)]))
    metrics = request.metrics
    assert (metrics.num_cached_tokens, metrics.num_restored_tokens, metrics.num_handoff_tokens) == (16, 4, 8)
    assert (metrics.prefilled_by, metrics.first_scheduled, metrics.replica) == ("peer:1", 100.5, name)
    script.die(name)
    script.now += 1.0
    script.say(script.where(request), Output([RequestDelta(2, [1], first=FirstToken(1, 1, 1, None, 9.0))]))
    assert metrics.num_cached_tokens == 16 and metrics.recoveries == ((102.0, 103.0),)


def test_logprobs_are_kept_for_whom_waits_for_the_whole() -> None:
    script = Script.serving(1)
    request = script.add("a", 2)
    request.streamed = False
    logprobs = [TokenLogprobs(-0.5, 1, (), ()), TokenLogprobs(-0.25, 2, (), ())]
    script.say("replica-1", Output([RequestDelta(1, [0, 1], logprobs, FinishReason.LENGTH)]))
    assert request.logprobs == logprobs and request.finish_reason is FinishReason.LENGTH


def test_equal_prompts_meet_and_a_resumed_one_counts_with_its_tokens() -> None:
    script = Script.serving(2)
    identity = KvIdentity("model", "float32", BLOCK)
    prompt = [*range(4 * BLOCK)]
    requests = []
    for number in range(2):
        params = script.add(f"plain-{number}").params
        del params
    for number in range(3):
        request = script.add(f"r{number}", prompt=prompt)
        requests.append(request)
    request = requests[0]
    request.token_blocks = identity.token_blocks(prompt)
    script.step()
    script.die(script.where(request))
    [add] = [a for r in script.replicas.values() for a in r.requests.values() if a.namespace is not None]
    assert add.namespace == identity.namespace() and add.generated == [0]
    assert len(request.token_blocks.digests) == 4, "its own blocks have not grown"


def test_a_gap_in_the_kv_events_is_closed_by_a_snapshot() -> None:
    script = Script.serving(1)
    assert script.replicas["replica-1"].snapshots == 1
    script.say("replica-1", KvMessage(1, 5, resnapshot=True))
    assert script.deployment.status()["routing"]["stale"] == 1


def test_the_cache_of_every_replica_is_emptied() -> None:
    script = Script.serving(2)
    script.deployment.reset_prefix_cache()
    script.follow()
    assert [replica.resets for replica in script.replicas.values()] == [1, 1]


class TestPoison:
    def test_the_third_replica_that_dies_of_one_tells(self) -> None:
        script = Script.serving(4)
        poison = script.add("poison")
        others = [script.add(f"r{number}", 40) for number in range(3)]
        for _ in range(3):
            assert poison.finish_reason is None
            script.die(script.where(poison))
            script.close_all()
        assert poison.finish_reason is FinishReason.ERROR and "replicas died" in str(poison.error)
        for _ in range(40):
            script.step()
        assert all(script.got[request.key] == [*range(40)] for request in others)
        assert script.deployment._dispatcher.num_blamed == 0

    def test_of_several_that_may_be_each_goes_on_alone(self) -> None:
        script = Script.serving(1)
        names = [f"r{number}" for number in range(4)]
        requests = {name: script.add(name, 30) for name in names}
        poison = requests["r2"]
        deaths = 0
        for _ in range(200):
            if len(script.ended) == 4:
                break
            if script.where(poison) if poison.key not in script.ended else "":
                script.die(script.where(poison))
                deaths += 1
                script.close_all()
                script.wait(3.0)
                script.start_all()
            else:
                script.step()
                script.wait(0.25)
        assert deaths == 3
        assert poison.finish_reason is FinishReason.ERROR
        assert all(script.got[r.key] == [*range(30)] for r in requests.values() if r is not poison)

    def test_who_is_past_the_death_is_free_of_blame(self) -> None:
        script = Script.serving(3)
        request = script.add("a", 100)
        for _ in range(3):
            script.die(script.where(request))
            script.close_all()
            for _ in range(PAST_TOKENS):
                script.step()
            script.wait(1.0)
            script.start_all()
        assert request.finish_reason is None and script.deployment._dispatcher.num_blamed == 0

    def test_shards_that_die_of_it_again_and_again_are_deaths_too(self) -> None:
        script = Script.serving(4)
        poison = script.add("poison")
        for _ in range(3):
            script.report(script.where(poison), rebuilding=True)
        assert poison.finish_reason is FinishReason.ERROR


@pytest.mark.parametrize("streams", [16])
def test_two_deaths_in_a_row_end_nobody(streams: int) -> None:
    script = Script.serving(3)
    requests = [script.add(f"r{number}", 30) for number in range(streams)]
    script.step()
    script.die(script.where(requests[0]))
    script.die(script.where(requests[0]))
    for _ in range(40 * streams):
        script.step()
        script.wait(0.25)
    assert len(script.ended) == streams
    assert {request.finish_reason for request in requests} == {FinishReason.LENGTH}
