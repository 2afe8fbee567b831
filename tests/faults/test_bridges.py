"""The bridge stopped, killed, or without room to come back, at every state of a push."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from tests.faults.kit import TIMEOUTS, segments, until

pytestmark = pytest.mark.faults


def start(node, **terms):
    (rank,) = node.start_ranks(1)
    rank.push(**node.terms(0, 1, version=node.next_version(), **terms))
    return rank


def reach(node, stage):
    """A push of one rank, brought to `stage`; the rank."""
    match stage:
        case "opening":
            node.delay(node.engines[0], "/info", times=1000)  # its daemon looks at it between pushes, too
            rank = start(node)
            node.wait_waiting_for(f"{node.engines[0].name} (probe)")
        case "filling first":
            rank = start(node, gate=["read", 0])
            rank.wait_at("read")
        case "filling later":
            rank = start(node, gate=["read", 9])
            rank.wait_at("read")
            for engine in node.engines:
                node.wait_torn(engine)
        case "loading":
            node.delay(node.engines[0], "/load", after=3)
            rank = start(node)
            node.wait_waiting_for("e1 (load, bucket 3)")
        case "committing":
            node.delay(node.engines[0], "/finish")
            rank = start(node)
            node.wait_state("committing")
    return rank


def replaced(node):
    """The bridge is killed, and another runs."""
    (pid,) = node.bridge_pids()
    arenas = segments(node.daemon.name)
    os.kill(pid, signal.SIGKILL)
    until(lambda: node.bridge_pids() not in ([pid], []), "another bridge")
    assert not arenas & segments(node.daemon.name), "the dead bridge's arena is left"
    node.clear()


@pytest.mark.parametrize("stage", ["opening", "committing"])
def test_a_push_does_without_a_bridge_that_is_killed(pair, stage):
    """Before the first lease its successor does, and after the last load it is not missed. Two nodes have the time for
    that: the engine which is held back meanwhile is not lost for it.
    """
    rank = reach(pair, stage)
    replaced(pair)
    assert rank.report()["complete"]


@pytest.mark.parametrize("stage", ["filling first", "filling later", "loading"])
def test_a_killed_bridge_is_replaced_and_the_push_is_over(node, stage):
    rank = reach(node, stage)
    replaced(node)
    if stage.startswith("filling"):
        rank.go()
    error = rank.error()
    assert (error["kind"], error["phase"]) == ("PushAborted", "transfer")
    assert f"bridge {node.daemon.name}/0" in error["message"]
    assert "killed by signal 9" in error["message"]
    torn = node.torn_or_whole(node.before)
    assert torn == (set() if stage == "filling first" else {"e1", "e2"})


@pytest.mark.parametrize("stage", ["filling first", "filling later", "loading"])
def test_a_stopped_bridge_is_found_out_killed_and_replaced(node, stage):
    rank = reach(node, stage)
    (pid,) = node.bridge_pids()
    os.kill(pid, signal.SIGSTOP)
    node.clear()
    if stage.startswith("filling"):
        rank.go()
    error = rank.error()
    assert (error["kind"], error["phase"]) == ("PushAborted", "transfer")
    assert f"bridge {node.daemon.name}/0" in error["message"]
    assert error["seconds"] < 2 * TIMEOUTS["operation"] + 3
    until(lambda: not psutil.pid_exists(pid), "it is killed")
    node.torn_or_whole(node.before)


def test_a_bridge_that_stopped_between_pushes_is_replaced_before_the_next(node):
    (pid,) = node.bridge_pids()
    os.kill(pid, signal.SIGSTOP)
    report = start(node, timeout=20).report()
    assert report["complete"]
    assert not psutil.pid_exists(pid)


def test_looking_at_the_status_condemns_no_bridge(node):
    """A bridge may be slow to show its ledger, for an operator who does not wait."""
    (pid,) = node.bridge_pids()
    os.kill(pid, signal.SIGSTOP)
    status = node.status()
    assert [b.outstanding for b in status.bridges] == [0]
    os.kill(pid, signal.SIGCONT)
    assert node.bridge_pids() == [pid]


def test_a_rank_that_was_lost_with_a_lease_cannot_write_into_the_next_push(node):
    """It is stopped, taken for lost, and goes on to write when its arena is long replaced."""
    ranks = node.start_ranks(2)
    node.push_all(ranks, node.next_version(), only={0: {"gate": ["read", 3]}})
    ranks[0].wait_at("read")
    arenas = segments(node.daemon.name)
    ranks[0].kill(signal.SIGSTOP)
    error = ranks[1].error()
    assert (error["kind"], error["rank"]) == ("PushAborted", 0)
    node.wait_idle()
    until(lambda: len(segments(node.daemon.name) - arenas) == 1, "another arena")
    rank = start(node, gate=["read", 3])
    rank.wait_at("read")
    ranks[0].go()
    ranks[0].kill(signal.SIGCONT)
    late = ranks[0].error()  # it learns that the push it was in is over
    assert late["kind"] in ("PushAborted", "DaemonLost")
    rank.go()
    assert rank.report()["complete"]
    for engine in node.engines:
        node.serves(engine, "C")
