"""Trainer ranks that are killed, interrupted or broken, at every state of a push."""

from __future__ import annotations

import signal

import pytest

from tests.faults.kit import AT_ONCE

pytestmark = pytest.mark.faults


def test_ranks_that_meet_no_trouble_push_together(node):
    ranks = node.start_ranks(3)
    version = node.next_version()
    node.push_all(ranks, version)
    reports = [rank.report() for rank in ranks]
    for report in reports:
        report.pop("blocked_seconds")
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["complete"]
    for engine in node.engines:
        node.serves(engine, "C")


def test_a_rank_killed_before_the_others_call(node):
    first, second = node.start_ranks(2)
    version = node.next_version()
    first.push(**node.terms(0, 2, version=version))
    node.wait_state("opening")
    first.kill()
    node.wait_idle()
    second.push(**node.terms(1, 2, version=version))
    error = second.error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", 0, "open")
    assert "trainer rank 0 was lost" in error["message"]
    assert error["seconds"] < AT_ONCE, "its siblings have failed long ago: it must not wait for them"
    assert node.torn_or_whole(node.before) == set()


def test_a_rank_killed_while_the_layouts_are_asked_for(node):
    ranks = node.start_ranks(2)
    # another world than before, so that the daemon does not know the layout
    only = {1: {"gate": ["pack", 0], "change": {f"extra.{node.next_version()}": "add"}}}
    node.push_all(ranks, node.next_version(), only=only)
    ranks[1].wait_at("pack")
    ranks[1].kill()
    error = ranks[0].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", 1, "open")
    assert node.torn_or_whole(node.before) == set()


def test_a_rank_killed_while_engines_look_at_the_plan(node):
    ranks = node.start_ranks(2)
    node.delay(node.engines[1], "/manifest")
    node.push_all(ranks, node.next_version(), change={"model.layers.1.mlp.down_proj.weight": "drop"})  # new to them
    node.wait_waiting_for("e2 (accept)")
    ranks[0].kill()
    error = ranks[1].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", 0, "open")
    node.clear()
    assert node.torn_or_whole(node.before) == set()


@pytest.mark.parametrize("read", [0, 9])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_fills(node, read, victim):
    """Before rank 0's first read no engine is touched, since it fills the first bucket; at its tenth, both are."""
    ranks = node.start_ranks(2)
    node.push_all(ranks, node.next_version(), only={victim: {"gate": ["read", read]}})
    ranks[victim].wait_at("read")
    if read:
        for engine in node.engines:
            node.wait_torn(engine)
    ranks[victim].kill()
    error = ranks[1 - victim].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", victim, "fill")
    assert error["seconds"] < 10
    assert "bucket" in error
    torn = node.torn_or_whole(node.before)
    if (victim, read) == (0, 0):
        assert torn == set()
    if read:
        assert torn == {"e1", "e2"}
        assert "torn and paused: e1, e2" in error["message"]


def test_a_rank_killed_while_engines_finish_is_not_missed(node):
    ranks = node.start_ranks(2)
    node.delay(node.engines[0], "/finish")
    node.push_all(ranks, node.next_version())
    node.wait_state("committing")
    since = node.log_length()
    ranks[0].kill()
    node.wait_log("rank 0 has not been heard", since=since)
    node.clear()
    report = ranks[1].report()
    assert report["complete"]
    for engine in node.engines:
        node.serves(engine, "C")


def test_every_rank_killed_at_once(node):
    ranks = node.start_ranks(2)
    node.push_all(ranks, node.next_version(), gate=["read", 2])
    for rank in ranks:
        rank.wait_at("read")
    for rank in ranks:
        rank.kill()
    node.wait_idle()
    node.torn_or_whole(node.before)


@pytest.mark.parametrize("read", [0, 5])
def test_ctrl_c_in_one_rank_is_told_to_all(node, read):
    ranks = node.start_ranks(3)
    node.push_all(ranks, node.next_version(), only={2: {"gate": ["read", read]}})
    ranks[2].wait_at("read")
    ranks[2].kill(signal.SIGINT)
    assert ranks[2].result() == {"interrupted": True}
    errors = [rank.error() for rank in ranks[:2]]
    for error in errors:
        assert error.pop("seconds") < 5
        assert (error["kind"], error["rank"]) == ("PushAborted", 2)
        assert "rank 2 was interrupted" in error["message"]
    assert errors[0] == errors[1]
    node.torn_or_whole(node.before)
    # the interrupted rank lives, and so does its link: it takes part in the next push
    node.push_all(ranks, node.next_version())
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_rank_that_calls_while_the_push_that_failed_without_it_ends_is_told_at_once(node):
    """It waits for no engine that has still to answer."""
    ranks = node.start_ranks(2)
    version = node.next_version()
    node.delay(node.engines[0], "/info", times=1000)
    ranks[0].push(**node.terms(0, 2, version=version))
    node.wait_state("opening")
    ranks[0].kill(signal.SIGINT)
    assert ranks[0].result() == {"interrupted": True}
    ranks[1].push(**node.terms(1, 2, version=version))
    error = ranks[1].error()
    assert "rank 0 was interrupted" in error["message"]
    assert error["seconds"] < AT_ONCE
    node.clear()


def test_a_rank_that_is_slow_to_fill_is_named_when_time_is_up(node):
    ranks = node.start_ranks(2)
    node.push_once(ranks)
    node.push_all(ranks, node.next_version(), timeout=5.0, only={0: {"gate": ["read", 3]}})
    error = ranks[1].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushTimeout", 0, "fill")
    assert "rank 0 to fill bucket" in error["message"]
    ranks[0].wait_at("read")  # still there when rank 1 has long been told
    ranks[0].go()
    late = ranks[0].error()
    # not which is longer: each counts from its own call, and these begin some milliseconds apart
    assert min(rank.seconds for rank in ranks) > 4.9
    late.pop("seconds")
    error.pop("seconds")
    assert late == error
    node.torn_or_whole(node.before)
