"""Two nodes, of which one breaks: the engines of the other go on, and the next push reaches both again."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.faults.kit import TIMEOUTS, until
from tests.marks import slow
from weightsync.operator import fetch_status

pytestmark = pytest.mark.faults

HOME, AWAY = {"home"}, {"away1", "away2"}


def start(pair, **terms):
    (rank,) = pair.start_ranks(1)
    rank.push(**pair.terms(0, 1, version=pair.next_version(), **terms))
    return rank


def outcomes(report):
    return {e["engine"]: e["outcome"] for e in report["engines"]}


def errors(report):
    return {e["engine"]: e["error"]["message"] for e in report["engines"] if e["error"]}


def engine(pair, name):
    return next(e for e in pair.engines if e.name == name)


def reach(pair, stage):
    """A push of one rank, brought to `stage`."""
    match stage:
        case "opening":
            pair.delay(engine(pair, "home"), "/info", times=1000)  # its daemon looks at it between pushes, too
            rank = start(pair)
            pair.wait_waiting_for("home (probe)")
        case "filling first":
            rank = start(pair, gate=["read", 0])
            rank.wait_at("read")
            for one in pair.engines:
                pair.wait_paused(one)
        case "filling later":
            rank = start(pair, gate=["read", 12])
            rank.wait_at("read")
            for one in pair.engines:
                pair.wait_torn(one)
        case "committing":
            pair.delay(engine(pair, "home"), "/finish")
            rank = start(pair)
            pair.wait_state("committing")
            pair.wait_waiting_for("engine home (finish)")
    return rank


def go_on(pair, rank, stage):
    pair.clear()
    if stage.startswith("filling"):
        rank.go()


def whole_or_torn(pair, report):
    """What the report says of each engine is what the engine says of itself."""
    for one in pair.engines:
        outcome = outcomes(report)[one.name]
        if outcome == "committed":
            pair.serves(one, "C")
        elif outcome == "skipped":
            pair.serves(one, pair.before)
        elif pair.info(one)["torn"]:
            pair.does_not_serve(one)


def test_a_push_that_meets_no_trouble_reaches_both_nodes(pair):
    ranks = pair.start_ranks(2)
    pair.push_all(ranks, pair.next_version())
    assert [rank.report()["complete"] for rank in ranks] == [True, True]
    for one in pair.engines:
        pair.serves(one, "C")


@pytest.mark.parametrize("endpoint", ["/pause", slow("/begin"), "/load", slow("/finish")])
def test_a_remote_engine_that_fails_is_out_alone(pair, endpoint):
    pair.order(engine(pair, "away1"), fail={"endpoint": endpoint, "after": 3 if endpoint == "/load" else 0})
    report = start(pair).report()
    assert outcomes(report) == {
        "home": "committed",
        "away1": "skipped" if endpoint == "/pause" else "torn",
        "away2": "committed",
    }
    error = next(e["error"] for e in report["engines"] if e["engine"] == "away1")
    assert (error["engine"], error["phase"]) == ("away1", endpoint.strip("/"))
    assert error.get("bucket") == (3 if endpoint == "/load" else None)


def test_a_remote_engine_that_is_slow_is_out_alone(pair):
    pair.delay(engine(pair, "away2"), "/load", after=2)
    report = start(pair).report()
    assert outcomes(report) == {"home": "committed", "away1": "committed", "away2": "lost"}
    pair.clear()
    pair.does_not_serve(engine(pair, "away2"))


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        slow("killed", "idle"),
        slow("killed", "opening"),
        ("killed", "filling first"),
        slow("killed", "filling later"),
        ("killed", "committing"),
        slow("stopped", "idle"),
        ("stopped", "filling later"),
        slow("stopped", "committing"),
    ],
)
def test_the_followers_bridge(pair, stage, how):
    """Engines of its node may miss the push; the engine at home never does."""
    away, number = pair.others[0], {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how]
    if stage == "idle":
        rank, (victim,) = None, pair.bridge_pids(away)
    else:
        rank, (victim,) = reach(pair, stage), pair.bridge_pids(away)
    os.kill(victim, number)
    if rank is None:
        rank = start(pair)
    else:
        go_on(pair, rank, stage)
    report = rank.report()
    assert outcomes(report)["home"] == "committed"
    if stage in ("idle", "committing"):
        assert report["complete"], errors(report)
    whole_or_torn(pair, report)
    if number == signal.SIGSTOP and stage == "committing":
        os.kill(victim, signal.SIGCONT)  # nobody needed it
    else:
        until(lambda: not psutil.pid_exists(victim), "it is gone")
    until(lambda: len(pair.bridge_pids(away)) == 1, "another bridge")


@pytest.mark.parametrize("stage", [slow("opening"), slow("filling first"), "filling later", "committing"])
def test_the_bridge_at_home_that_is_killed(pair, stage):
    rank = reach(pair, stage)
    (victim,) = pair.bridge_pids()
    os.kill(victim, signal.SIGKILL)
    pair.wait_log(f"lost: bridge {pair.daemon.name}/0")
    go_on(pair, rank, stage)
    if stage in ("opening", "committing"):
        report = rank.report()
        assert report["complete"], errors(report)
        return
    error = rank.error()
    assert (error["kind"], error["phase"]) == ("PushAborted", "wire")
    assert pair.torn_or_whole(pair.before) == (set() if stage == "filling first" else HOME | AWAY)


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        slow("killed", "opening"),
        slow("killed", "filling first"),
        ("killed", "filling later"),
        slow("killed", "committing"),
        ("stopped", "filling later"),
        slow("told to stop", "filling first"),
        ("told to stop", "committing"),
    ],
)
def test_the_followers_daemon(pair, stage, how):
    """Its engines are lost to the push, which goes on; they wait, or serve on, until their daemon is back."""
    away = pair.others[0]
    rank = reach(pair, stage)
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "told to stop": signal.SIGTERM}[how]
    away.kill(number)
    if how == "told to stop":
        away.wait(TIMEOUTS["stop"] + 5)
    pair.wait_log(f"[node={away.name}] lost")
    go_on(pair, rank, stage)
    report = rank.report()
    assert outcomes(report)["home"] == "committed"
    assert {outcomes(report)[name] for name in AWAY} == {"lost"}
    assert {e.state for e in pair.status().engines if e.name in AWAY} == {"lost"}
    for name in AWAY:
        one = engine(pair, name)
        if stage == "filling later":
            pair.does_not_serve(one)
        elif how == "told to stop" and stage != "committing":
            pair.serves(one, pair.before)
    missed = start(pair).report()
    assert outcomes(missed) == {"home": "committed", "away1": "lost", "away2": "lost"}
    if how == "stopped":
        away.kill(signal.SIGCONT)
    else:
        pair.fleet.restart_daemon(away)
    pair.wait_attached()


def test_a_follower_that_restarts_between_pushes_is_noticed(pair):
    """Before the next heartbeat would tell: a push looks at the other nodes as it begins."""
    away = pair.others[0]
    for _ in range(5):
        since = pair.log_length()
        away.kill()
        pair.fleet.restart_daemon(away)
        if "it has not been heard" not in pair.daemon.log.read_text()[since:]:
            report = start(pair).report()
            if not any("is still loading" in message for message in errors(report).values()):
                break
        pair.wait_attached()  # it was away, or its bridge loads, for too long: the machine is busy with something else
    else:
        pytest.fail("the machine is too busy: five times the follower came back too slowly to be looked at")
    assert report["complete"], errors(report)


@pytest.mark.parametrize(
    ("stage", "pause"),
    [slow("opening", "keep"), slow("filling first", "keep"), ("filling later", "keep"), slow("filling later", "none")],
)
def test_the_coordinator_that_is_killed(pair, stage, pause):
    """Its follower lets go of engines that were not touched; touched ones stay torn, and are paused."""
    away = pair.others[0]
    if pause == "none":
        rank = start(pair, gate=["read", 12], pause="none")
        rank.wait_at("read")
        for one in pair.engines:
            pair.wait_torn(one)
    else:
        rank = reach(pair, stage)
    pair.daemon.kill()
    pair.clear()
    pair.wait_log("is let go: its coordinator has not been heard", away)
    for name in AWAY:
        one = engine(pair, name)
        if stage == "filling later":
            pair.wait_paused(one)
            pair.does_not_serve(one)
        else:
            pair.wait_unpaused(one)
            pair.serves(one, pair.before)
    states = {e.name: e.state for e in fetch_status(away.endpoint).engines}
    assert set(states) == AWAY
    pair.fleet.restart_daemon(pair.daemon)
    pair.wait_attached()
    if stage.startswith("filling"):
        rank.go()
    assert rank.error()["kind"] == "DaemonLost"


def test_a_node_that_has_a_push_of_its_own_is_not_disturbed(pair):
    """Its trainer pushes to its own engines; a push that they are to take part in, too, is refused."""
    away = pair.others[0]
    own, other = pair.start_ranks(2)
    own.push(**pair.terms(0, 1, version=pair.next_version(), gate=["read", 5]) | {"endpoint": away.endpoint})
    own.wait_at("read")
    other.push(**pair.terms(0, 1, version=pair.next_version(), group="another"))
    error = other.error()
    assert error["kind"] == "PushRefused"
    assert f"by another trainer is under way, which node {away.name} leads" in error["message"]
    own.go()
    assert own.report()["complete"]


def test_a_trainer_of_the_follower_waits_for_the_push_from_elsewhere(pair):
    away = pair.others[0]
    first, second = pair.start_ranks(2)
    first.push(**pair.terms(0, 1, version=pair.next_version(), gate=["read", 5]))
    first.wait_at("read")
    second.push(**pair.terms(0, 1, version=pair.next_version(), group="another") | {"endpoint": away.endpoint})
    first.go()
    assert first.report()["complete"]
    report = second.report()
    assert outcomes(report) == {"away1": "committed", "away2": "committed"}


def test_a_trainer_that_has_waited_for_as_long_as_it_would_is_told_so(pair):
    away = pair.others[0]
    first, second = pair.start_ranks(2)
    first.push(**pair.terms(0, 1, version=pair.next_version(), gate=["read", 5]))
    first.wait_at("read")
    terms = pair.terms(0, 1, version=pair.next_version(), group="another", timeout=1.0)
    second.push(**terms | {"endpoint": away.endpoint})
    error = second.error()
    assert (error["kind"], error["phase"]) == ("PushTimeout", "open")
    assert f"it was waiting for push {pair.daemon.name}-" in error["message"]
    assert error["seconds"] < 1.0 + 2
    first.go()
    assert first.report()["complete"]
