"""The daemon killed at every state of a push."""

from __future__ import annotations

import signal

import psutil
import pytest

from tests.faults.kit import AT_ONCE, TIMEOUTS, segments, until
from tests.faults.stopwatch import Stopwatch
from weightsync import push_weights
from weightsync.errors import DaemonLost

pytestmark = pytest.mark.faults


def kill_and_restart(node):
    """SIGKILL, and a successor; what the dead one leaves is gone when it answers."""
    bridges = [psutil.Process(pid) for pid in node.bridge_pids()]
    arenas = segments(node.daemon.name)
    node.daemon.kill()
    until(lambda: not any(b.is_running() for b in bridges), "bridges end with their daemon")
    node.fleet.restart_daemon(node.daemon)
    assert not arenas & segments(node.daemon.name), "arenas of the dead daemon are left"
    assert len(segments(node.daemon.name)) == 1
    until(lambda: all(e.state not in ("unknown", "lost") for e in node.status().engines), "engines are looked at")


@pytest.fixture(params=["idle", "opening", "filling first", "filling later", "committing"])
def stage(request, node):
    """A push by two ranks, brought to a stage where it stays. Gives the stage, the ranks and which engines it has
    touched.
    """
    ranks = node.start_ranks(2)
    touched: set[str] = set()
    version = node.next_version()
    match request.param:
        case "opening":
            ranks[0].push(**node.terms(0, 2, version=version))
            node.wait_state("opening")
        case "filling first":
            node.push_all(ranks, version, only={0: {"gate": ["read", 0]}})
            ranks[0].wait_at("read")
            for engine in node.engines:
                node.wait_paused(engine)
        case "filling later":
            node.push_all(ranks, version, only={0: {"gate": ["read", 9]}})
            ranks[0].wait_at("read")
            for engine in node.engines:
                node.wait_torn(engine)
            touched = {"e1", "e2"}
        case "committing":
            node.delay(node.engines[0], "/finish")
            node.push_all(ranks, version)
            node.wait_state("committing")
            until(lambda: node.info(node.engines[1])["weight_version"] == version, "e2 has finished")
            touched = {"e1", "e2"}  # finished is not found right: nobody has verified them
    calling = [] if request.param == "idle" else ranks[:1] if request.param == "opening" else ranks
    return request.param, calling, touched


def test_a_killed_daemon_is_told_to_every_rank_and_its_successor_cleans_up(node, stage):
    where, calling, touched = stage
    before = {e.name: node.info(e)["weight_version"] for e in node.engines}
    killed = Stopwatch()
    kill_and_restart(node)
    if where.startswith("filling"):
        calling[0].go()
    for rank in calling:
        error = rank.error()
        assert error["kind"] == "DaemonLost"
    assert killed.seconds < 10
    if where == "committing":
        node.clear()
        until(lambda: node.info(node.engines[0])["updating"] is None, "the late /finish has ended")
    states = {e.name: (e.state, e.version) for e in node.status().engines}
    for engine in node.engines:
        state, version = states[engine.name]
        if engine.name in touched:
            assert state == "torn"
            node.does_not_serve(engine)
        elif where == "idle":
            assert (state, version) == ("serving", before[engine.name])
        else:
            assert state in ("serving", "paused")


def test_a_rank_hears_of_a_killed_daemon_at_once(node):
    (rank,) = node.start_ranks(1)
    node.delay(node.engines[0], "/load")
    rank.push(**node.terms(0, 1, version=node.next_version()))
    node.wait_state("transferring")
    node.daemon.kill()
    watch = Stopwatch()
    error = rank.error()
    assert watch.seconds < AT_ONCE, "the broken connection says so; nobody waits for a silence"
    assert (error["kind"], "hung up" in error["message"]) == ("DaemonLost", True)
    rank.push(**node.terms(0, 1, version=node.next_version()))
    error = rank.error()
    assert error["kind"] == "DaemonLost"
    assert error["seconds"] < AT_ONCE
    assert "weightsyncd --node-config" in error["hint"]
    node.clear()
    node.fleet.restart_daemon(node.daemon)
    # the same process goes on with the restarted daemon: link, arenas and plans renew themselves
    rank.push(**node.terms(0, 1, version=node.next_version()))
    assert rank.report()["complete"]


def test_a_restarted_daemon_pauses_an_engine_that_serves_torn(node):
    """Killed in the middle of an in-flight update, which leaves the engine serving a mixture."""
    (rank,) = node.start_ranks(1)
    rank.push(**node.terms(0, 1, version=node.next_version(), pause="none", gate=["read", 12]))
    rank.wait_at("read")
    for engine in node.engines:
        node.wait_torn(engine)
        assert not node.info(engine)["paused"]
    kill_and_restart(node)
    for engine in node.engines:
        node.wait_paused(engine)
        node.does_not_serve(engine)
    rank.go()
    assert rank.error()["kind"] == "DaemonLost"


def test_a_daemon_stops_in_time_though_an_engine_does_not_answer(node):
    engine = node.engines[1]
    (rank,) = node.start_ranks(1)
    node.delay(engine, "/load", after=1)
    rank.push(**node.terms(0, 1, version=node.next_version(), pause="none"))
    node.wait_waiting_for("e2 (load, bucket 1)")
    node.daemon.kill(signal.SIGTERM)
    assert node.daemon.wait(TIMEOUTS["stop"] + 4) == 0, node.daemon.tail()
    assert not segments(node.daemon.name)
    error = rank.result()
    assert "error" in error or not error["report"]["complete"]
    node.clear()
    node.fleet.restart_daemon(node.daemon)
    node.wait_paused(engine)
    node.does_not_serve(engine)


def test_a_second_daemon_of_the_same_node_does_not_start(node):
    twin = node.fleet.spawn("twin", ["-m", "weightsyncd", "--node-config", str(node.daemon.config)])
    assert twin.wait(20) == 2
    assert f"another weightsyncd serves node '{node.daemon.name}'" in twin.tail()


def test_without_a_daemon_a_push_fails_at_once(tmp_path):
    watch = Stopwatch()
    with pytest.raises(DaemonLost, match="no weightsyncd listens"):
        push_weights({}, version=1, daemon=f"ipc://{tmp_path}/none.sock")
    assert watch.seconds < 1
