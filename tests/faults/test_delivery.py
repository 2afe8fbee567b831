"""What goes while weights are delivered: out of the trainer's memory on one node, into an engine of another."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress

import pytest

from tests.faults.conftest import tried, two_nodes
from tests.faults.kit import engine_processes
from tests.faults.test_two_nodes import engine, errors, outcomes, start

pytestmark = pytest.mark.faults

BOTH = {"home", "away"}


@pytest.fixture(scope="module")
def _couple():
    with two_nodes("fault3", "fault4", home=1, away=2) as node:
        yield node


@pytest.fixture
def couple(_couple):
    """Two nodes, an engine each: weights in place are drawn by `home`, and delivered to `away`."""
    yield from tried(_couple)


@contextmanager
def delivering(couple):
    """A push that delivers to `away`, whose bridge stands still as long as this lasts."""
    (held,) = couple.bridge_pids(couple.others[0])
    couple.delay(engine(couple, "away"), "/places")
    rank = start(couple, in_place=True)
    couple.wait_waiting_for("away (show)")
    os.kill(held, signal.SIGSTOP)
    try:
        couple.clear()
        couple.wait_waiting_for("away (deliver)")
        yield rank
    finally:
        with suppress(ProcessLookupError):  # it was the one to go
            os.kill(held, signal.SIGCONT)


def drawn(report):
    return {one["engine"]: one["drawn"] for one in report["engines"]}


def test_a_push_that_is_held_up_is_delivered_all_the_same(couple):
    with delivering(couple) as rank:
        pass
    report = rank.report()
    assert drawn(report) == dict.fromkeys(BOTH, True), errors(report)
    for one in couple.engines:
        couple.serves(one, "C")


def test_an_engine_that_cannot_show_its_places_is_out_alone(couple):
    couple.order(engine(couple, "away"), fail={"endpoint": "/places"})
    report = start(couple, in_place=True).report()
    assert outcomes(report) == {"home": "committed", "away": "torn"}
    error = next(e["error"] for e in report["engines"] if e["engine"] == "away")
    assert (error["engine"], error["phase"]) == ("away", "show")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_bridge_that_collects(couple, number):
    """The engine is given buckets, or misses the push; the engine at home never does."""
    (victim,) = couple.bridge_pids(couple.others[0])
    with delivering(couple) as rank:
        if number == signal.SIGKILL:
            os.kill(victim, number)
        report = rank.report()  # one that stands still is found out meanwhile, and replaced
    assert outcomes(report)["home"] == "committed"
    if outcomes(report)["away"] == "committed":
        assert drawn(report) == {"home": True, "away": False}
        couple.serves(engine(couple, "away"), "C")
    else:
        assert f"{couple.others[0].name}/0" in errors(report)["away"]
        couple.does_not_serve(engine(couple, "away"))


def test_the_bridge_that_delivers(couple):
    (victim,) = couple.bridge_pids()
    with delivering(couple) as rank:
        os.kill(victim, signal.SIGKILL)
        couple.wait_log(f"lost: bridge {couple.daemon.name}/0")
    error = rank.error()
    assert (error["kind"], error["phase"]) == ("PushAborted", "wire")
    assert couple.torn_or_whole(couple.before) == BOTH


def test_a_worker_of_the_engine_that_is_delivered_to(couple):
    one = engine(couple, "away")
    with delivering(couple) as rank:
        engine_processes(one)[2].kill()
        one.process.wait(10)  # an engine that is ending may still answer, and is torn then
    report = rank.report()
    assert outcomes(report) == {"home": "committed", "away": "lost"}
    couple.fleet.restart_engine(one)


def test_the_daemon_whose_engine_is_delivered_to(couple):
    other = couple.others[0]
    with delivering(couple) as rank:
        other.kill()
        couple.wait_log(f"[node={other.name}] lost")
    report = rank.report()
    assert outcomes(report) == {"home": "committed", "away": "lost"}
    couple.fleet.restart_daemon(other)
    couple.wait_attached()


def test_the_daemon_that_has_it_delivered(couple):
    """Its follower's bridge writes nothing more once the engine is let go of."""
    other = couple.others[0]
    with delivering(couple) as rank:
        couple.daemon.kill()
        couple.wait_log("is let go: its coordinator has not been heard", other)
    couple.wait_paused(engine(couple, "away"))
    couple.does_not_serve(engine(couple, "away"))
    couple.fleet.restart_daemon(couple.daemon)
    couple.wait_attached()
    assert rank.error()["kind"] == "DaemonLost"


def test_a_rank_whose_weights_are_delivered(couple):
    with delivering(couple) as rank:
        rank.kill()
        couple.wait_log("rank 0 has not been heard")
    couple.wait_idle()
    assert couple.torn_or_whole(couple.before) == BOTH
