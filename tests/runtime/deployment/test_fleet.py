"""Which replicas there are: starts, deaths, back-off, scaling, drains and rolling restarts."""

from __future__ import annotations

import pytest

from headwise.cluster.supervisor import BACKOFF_S, MAX_BACKOFF_S, MAX_FAILURES
from headwise.runtime.deployment.fleet import SILENCE_S
from headwise.workers.errors import InvalidValueError
from tests.runtime.deployment.script import Script


def test_as_many_are_started_as_are_wanted() -> None:
    script = Script(3)
    assert script.names == ["replica-1", "replica-2", "replica-3"]
    assert [one.place for one in script.starting] == [1, 2, 3] and script.asked == [3]
    script.start_all()
    assert [*script.states().values()] == ["serving"] * 3 and script.deployment.status()["wanted"] == 3
    assert all(replica.snapshots == 1 for replica in script.replicas.values()), "what they hold is asked for"


def test_one_that_has_computed_something_is_replaced_at_once() -> None:
    script = Script.serving(2)
    for _ in range(3 * MAX_FAILURES):
        script.add("a", 1)
        script.add("b", 1)
        script.step()
        script.ended.clear(), script.got.clear()
        [name, _] = script.replicas
        script.die(name)
        assert script.names == [], "not before its process is gone"
        script.close_all()
        [started] = script.starting
        script.start(started.name)
    assert [*script.states().values()] == ["serving"] * 2


def test_one_that_dies_before_is_replaced_later_and_later_and_then_not_at_all() -> None:
    script, waits = Script.serving(2), list[float]()
    for _ in range(1, MAX_FAILURES):
        name = next(name for name in script.replicas if name != "replica-2")
        script.die(name)
        script.close_all()
        since = script.now
        while not script.names:
            script.wait(0.25)
        waits.append(script.now - since)
        script.start_all()
    expected = [min(MAX_BACKOFF_S, BACKOFF_S * 2**failure) for failure in range(MAX_FAILURES - 1)]
    assert waits == pytest.approx(expected, abs=0.25)
    name = next(name for name in script.replicas if name != "replica-2")
    script.die(name, "no luck")
    script.close_all()
    script.wait(10 * MAX_BACKOFF_S)
    assert script.names == []
    assert script.states() == {"replica-2": "serving", name: "ended"} and script.problems() == {name: "no luck"}
    assert script.over is None, "the other goes on"
    request = script.add("a", 1)
    script.step()
    assert script.ended == {request.key: request}


def test_starts_that_fail_are_tried_again_and_then_given_up() -> None:
    script = Script(1)
    request = script.add("waits")
    for _ in range(MAX_FAILURES):
        [started] = script.starting
        assert script.over is None and script.deployment.num_waiting == 1, "while one is started, requests wait"
        script.fail_start(started.name)
        script.wait(MAX_BACKOFF_S + 0.25)
    assert script.names == [] and script.over is not None and "no model" in script.over
    assert request.key not in script.ended


def test_an_operator_has_them_tried_again() -> None:
    script = Script.serving(2)
    script.die("replica-1")
    script.close_all()
    for _ in range(MAX_FAILURES - 1):
        script.wait(MAX_BACKOFF_S + 0.25)
        script.fail_start(script.names[0])
    script.wait(60)
    assert script.names == []
    script.deployment.scale(2)
    script.follow()
    assert len(script.names) == 1


def test_one_that_says_nothing_counts_as_dead() -> None:
    script = Script.serving(2)
    script.wait(5)
    for _ in range(int(SILENCE_S * 4) + 1):
        script.now += 0.25
        script.report("replica-2")
        script.deployment.tick()
        script.follow()
    assert [(one.name, one.ask) for one in script.ending] == [("replica-1", False)]


def test_nobody_is_to_blame_if_the_front_itself_was_stopped() -> None:
    script = Script.serving(2)
    script.wait(1)
    script.now += 100
    script.deployment.tick()
    script.follow()
    assert script.ending == []


def test_scaling_up_starts_more_and_asks_for_nodes() -> None:
    script = Script.serving(1)
    script.deployment.scale(3)
    script.follow()
    assert len(script.names) == 2 and script.asked == [1, 3]
    script.start_all()
    assert [*script.states().values()] == ["serving"] * 3


def test_scaling_down_drains_those_with_least_to_do() -> None:
    script = Script.serving(3)
    requests = [script.add(f"r{number}", 5) for number in range(5)]
    counts = {name: len(replica.requests) for name, replica in script.replicas.items()}
    script.deployment.scale(1)
    script.follow()
    [busiest] = [name for name, state in script.states().items() if state == "serving"]
    assert counts[busiest] == max(counts.values()) and [*script.states().values()].count("draining") == 2
    later = script.add("later", 5)
    assert script.where(later) == busiest, "nothing new comes"
    for _ in range(5):
        script.step()
    script.wait(0.25)
    assert {one.name: one.ask for one in script.ending} == {name: True for name in counts if name != busiest}
    script.close_all()
    assert script.states() == {busiest: "serving"} and script.ended.keys() == {r.key for r in [*requests, later]}
    assert script.asked[-1] == 1


def test_one_that_only_starts_is_scaled_down_first() -> None:
    script = Script.serving(1)
    script.deployment.scale(2)
    script.follow()
    script.deployment.scale(1)
    script.follow()
    [started] = script.starting
    assert script.cancelled == [started.name], "there may be no room for it, which takes minutes to be known"
    script.start(started.name)
    assert [one.name for one in script.ending] == [started.name], "it was faster"
    script.close_all()
    assert script.states() == {"replica-1": "serving"}


def test_one_that_was_cancelled_is_followed_by_none() -> None:
    script = Script.serving(1)
    script.deployment.scale(2)
    script.follow()
    script.deployment.scale(1)
    script.follow()
    script.fail_start(script.cancelled[0], "it was closed while it started")
    script.wait(60)
    assert script.names == [] and script.states() == {"replica-1": "serving"} and not script.problems()


def test_after_the_drain_timeout_the_rest_goes_on_elsewhere() -> None:
    script = Script.serving(2, drain_timeout_s=5.0)
    requests = [script.add(f"r{number}", 50) for number in range(4)]
    script.step()
    script.deployment.scale(1)
    script.follow()
    [draining] = [name for name, state in script.states().items() if state == "draining"]
    moved = [request for request in requests if script.where(request) == draining]
    script.wait(4.5)
    assert script.ending == []
    script.wait(0.75)
    assert [one.name for one in script.ending] == [draining]
    assert moved and all(script.where(request) != draining for request in requests)
    assert all(request.metrics.num_recoveries == 0 for request in moved)
    script.close_all()
    for _ in range(49):
        script.step()
    assert len(script.ended) == 4


def test_one_whose_shards_die_while_it_drains_is_waited_for_no_longer() -> None:
    script = Script.serving(2)
    requests = [script.add(f"r{number}", 50) for number in range(4)]
    script.step()
    script.deployment.scale(1)
    script.follow()
    [draining] = [name for name, state in script.states().items() if state == "draining"]
    script.report(draining, rebuilding=True)
    script.wait(0.25, reports=False)
    assert [one.name for one in script.ending] == [draining]
    assert all(script.where(request) != draining for request in requests)


def test_limits_of_scaling_are_named() -> None:
    script = Script.serving(2, least=2, most=4, autoscale=True)
    for wrong in (1, 5):
        with pytest.raises(InvalidValueError, match=f"replicas={wrong}: must be from 2 to 4"):
            script.deployment.scale(wrong)


def finish_restart(script: Script, limit: int = 20) -> None:
    for _ in range(limit):
        if not script.deployment.status()["restarting"]:
            return
        script.start_all()
        script.step()
        script.wait(0.25)
        assert [*script.states().values()].count("serving") >= script.deployment.status()["wanted"] - 1
        script.close_all()
    raise AssertionError(f"still restarting: {script.states()}")


def test_a_rolling_restart_replaces_one_after_another() -> None:
    script = Script.serving(3)
    requests = [script.add(f"r{number}", 6) for number in range(6)]
    script.deployment.restart()
    script.follow()
    assert script.names == ["replica-4"], "one is started first"
    assert [one.extra for one in script.starting] == [True]
    with pytest.raises(InvalidValueError, match="under way"):
        script.deployment.restart()
    finish_restart(script)
    assert script.states() == {f"replica-{number}": "serving" for number in (4, 5, 6)}
    for _ in range(6):
        script.step()
    assert script.ended.keys() == {request.key for request in requests}


@pytest.mark.parametrize("replicas", [1, 3])
def test_without_room_for_one_more_the_old_one_goes_first(replicas: int) -> None:
    script = Script.serving(replicas)
    requests = [script.add(f"r{number}", 3) for number in range(6)]
    script.deployment.restart()
    script.follow()
    for _ in range(replicas):
        [extra] = script.names
        script.fail_start(extra, "no room", no_room=True)
        assert [*script.states().values()].count("serving") == replicas - 1
        late = script.add(f"late-{extra}", 3)
        requests.append(late)
        assert script.names == [], "the room is not free yet"
        for _ in range(3):
            script.step()
        script.wait(0.25)
        script.close_all()
        [after] = script.starting
        assert not after.extra
        script.start(after.name)
        script.wait(0.25)
    for _ in range(3):
        script.step()
    assert not script.deployment.status()["restarting"]
    assert script.ended.keys() == {request.key for request in requests}
    assert [*script.states().values()] == ["serving"] * replicas


def test_a_restart_that_cannot_start_another_ends_nobody() -> None:
    script = Script.serving(2)
    script.deployment.restart()
    script.follow()
    script.fail_start(script.names[0], "no such model")
    assert not script.deployment.status()["restarting"] and script.ending == []
    assert [*script.states().values()] == ["serving"] * 2
    assert "no such model" in script.problems()["replica-1"]


def test_a_restart_without_room_ends_at_most_one() -> None:
    """The room of the old one is free, and still another cannot be started."""
    script = Script.serving(3)
    script.deployment.restart()
    script.follow()
    script.fail_start(script.names[0], "no room", no_room=True)
    script.wait(0.25)
    script.close_all()
    for _ in range(MAX_FAILURES):
        script.fail_start(script.names[0], "broken")
        script.wait(MAX_BACKOFF_S + 0.25)
    assert not script.deployment.status()["restarting"]
    assert [*script.states().values()].count("serving") == 2


def test_deaths_during_a_restart_are_replaced() -> None:
    script = Script.serving(2)
    for request in ("a", "b"):
        script.add(request, 1)
    script.step()
    script.deployment.restart()
    script.follow()
    assert script.names == ["replica-3"]
    script.die("replica-1")  # in whose place it starts
    script.close_all()
    assert script.names == ["replica-3"]
    script.start("replica-3")
    script.wait(0.25)
    assert script.names == ["replica-4"]
    script.die("replica-3")  # another one
    script.close_all()
    script.wait(1.0)
    finish_restart(script)
    assert len(script.states()) == 2 and "replica-2" not in script.states()


def test_the_next_may_die_before_it_is_known_that_it_has_started() -> None:
    script = Script.serving(2)
    script.deployment.restart()
    script.follow()
    script.die("replica-3")
    assert not script.deployment.started("replica-3", "here", 1, {}), "so that it is ended"
    script.close_all()
    assert script.states() == {"replica-1": "serving", "replica-2": "serving"}


def test_scaling_during_a_restart() -> None:
    script = Script.serving(2)
    script.deployment.restart()
    script.follow()
    script.deployment.scale(1)
    script.follow()
    finish_restart(script)
    script.wait(0.25)
    script.close_all()
    script.start_all()
    script.close_all()
    assert [*script.states().values()] == ["serving"]
