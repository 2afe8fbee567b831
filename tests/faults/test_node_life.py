"""The life of several nodes between pushes and in them: daemons that restart, leaders that die, engines that move."""

from __future__ import annotations

import signal

import pytest

from tests.faults.kit import TIMEOUTS, until
from tests.faults.leaders import call, daemons_of
from tests.marks import slow
from weightsync.engine_config import EngineConfig
from weightsync.errors import PushRefused
from weightsync.operator import change_engines, fetch_status

pytestmark = pytest.mark.faults


def outcomes(report):
    return {engine["engine"]: engine["outcome"] for engine in report["engines"]}


def spread(node, ranks, model="default", **terms):
    """Rank 0 on the first node, rank 1 on the second."""
    version = node.next_version()
    for number, (rank, daemon) in enumerate(zip(ranks, daemons_of(node), strict=True)):
        words = node.terms(number, 2, version=version, model=model, **terms)
        rank.push(**words | {"endpoint": daemon.endpoint})


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_the_daemon_of_a_rank_that_is_elsewhere_restarts_between_pushes(leaders, how):
    """The rank's process goes on, and pushes again by the new daemon."""
    ranks = leaders.start_ranks(2)
    spread(leaders, ranks)
    assert all(rank.report()["complete"] for rank in ranks)
    away = leaders.others[0]
    away.kill(how)
    away.wait(TIMEOUTS["stop"] + 5)
    leaders.fleet.restart_daemon(away)
    leaders.fleet.wait_daemon(away, engines=3, peers=1)
    leaders.wait_attached()
    spread(leaders, ranks)
    reports = [rank.report() for rank in ranks]
    assert all(report["complete"] for report in reports), reports


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("read", "first"), [slow(0, 0), (12, 0), slow(12, 1)])
def test_a_leader_is_killed_and_the_other_node_leads_the_next_push(leaders, read, first):
    """What lives is not started again; the leader's own engines are missed until its daemon is back."""
    daemons = daemons_of(leaders)
    dead, other = daemons[first], daemons[1 - first]
    one, two = leaders.start_ranks(2)
    call(leaders, one, dead, group="one", gate=["read", read])
    one.wait_at("read")
    dead.kill()
    call(leaders, two, other, group="two")
    report = two.report()
    names = ("x1", "x2")
    assert outcomes(report) == {names[first]: "lost", names[1 - first]: "committed"}
    one.go()
    assert one.error()["kind"] == "DaemonLost"
    leaders.fleet.restart_daemon(dead)
    leaders.fleet.wait_daemon(dead, engines=3, peers=1)
    leaders.fleet.wait_daemon(other, engines=3, peers=1)


@pytest.mark.timeout(120)
def test_an_engine_is_taken_away_while_a_push_from_elsewhere_is_loaded_by_it(leaders):
    """It stays until the push has ended."""
    away = leaders.others[0]
    (rank,) = leaders.start_ranks(1)
    call(leaders, rank, leaders.daemon, gate=["read", 12])
    rank.wait_at("read")
    with pytest.raises(PushRefused, match="a push has been under way"):
        change_engines(away.endpoint, remove=("x2",), timeout=0.2)
    rank.go()
    assert rank.report()["complete"]


def config_of(engine):
    return EngineConfig(name=engine.name, kind="reference", url=engine.url, model=engine.model)


@pytest.mark.timeout(120)
def test_an_engine_moves_to_the_other_node_and_back_at_once(leaders):
    """By commands, one after the other: what the other node had a moment ago is not what it has."""
    engine = next(e for e in leaders.engines if e.name == "x2")
    home, away = daemons_of(leaders)
    for before, after in ((away, home), (home, away)):
        change_engines(before.endpoint, remove=("x2",))
        change_engines(after.endpoint, add=(config_of(engine),))
        (rank,) = leaders.start_ranks(1)
        report = call(leaders, rank, leaders.daemon).report()
        assert report["complete"], report
        assert {e["engine"] for e in report["engines"]} == {"x1", "x2"}


def reload(node, daemon, text, since):
    daemon.config.write_text(text)
    daemon.kill(signal.SIGHUP)
    node.wait_log("reload.", daemon, since=since)


@pytest.mark.timeout(120)
def test_sighup_moves_an_engine_from_one_node_to_another(leaders):
    home, away = daemons_of(leaders)
    texts = {daemon.name: daemon.config.read_text() for daemon in (home, away)}
    head, *engines = texts[away.name].split("[[engines]]")
    (moving,) = [one for one in engines if '"x2"' in one]
    left = "[[engines]]".join([head, *(one for one in engines if one is not moving)])
    try:
        for daemon, text in ((away, left), (home, f"{texts[home.name]}\n[[engines]]{moving}")):
            since = leaders.log_length(daemon)
            reload(leaders, daemon, text, since)
            assert "reload.failed" not in daemon.log.read_text()[since:]
        (rank,) = leaders.start_ranks(1)
        report = call(leaders, rank, away).report()
        assert outcomes(report) == {"x1": "committed", "x2": "committed"}
    finally:
        for daemon in (home, away):
            reload(leaders, daemon, texts[daemon.name], leaders.log_length(daemon))
    until(
        lambda: (
            {e.name for e in fetch_status(away.endpoint, fresh=True).engines if e.node == away.name}
            == {"x2", "y2", "a2"}
        ),
        "it is back",
    )


@pytest.mark.timeout(120)
def test_an_engine_by_the_name_of_one_that_was_just_evicted(leaders):
    """Evicted by a push, taken away, and added again before the next: that one reaches it."""
    engine = next(e for e in leaders.engines if e.name == "x2")
    away = leaders.others[0]
    leaders.order(engine, fail={"endpoint": "/load", "after": 3})
    (rank,) = leaders.start_ranks(1)
    report = call(leaders, rank, leaders.daemon).report()
    assert outcomes(report) == {"x1": "committed", "x2": "torn"}
    change_engines(away.endpoint, remove=("x2",))
    change_engines(away.endpoint, add=(config_of(engine),))
    report = call(leaders, rank, leaders.daemon).report()
    assert report["complete"], report


@pytest.mark.timeout(120)
def test_a_push_whose_only_engine_is_elsewhere_and_refuses(leaders):
    """The engine serves on; the trainer hears which it was and why."""
    engine = next(e for e in leaders.engines if e.name == "a2")
    leaders.order(engine, fail={"endpoint": "/pause"})
    (rank,) = leaders.start_ranks(1)
    call(leaders, rank, leaders.daemon, "far")
    error = rank.error()
    assert error["engine"] == "a2", error
    assert not leaders.info(engine)["torn"]
    assert call(leaders, rank, leaders.daemon, "far").report()["complete"]
