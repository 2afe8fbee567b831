"""A trainer with ranks on two nodes: rank 0 at home, ranks 1 and 2 away. Whatever dies is named, and nothing waits."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.kit import AT_ONCE, TIMEOUTS, until
from tests.marks import slow

pytestmark = pytest.mark.faults
WORLD = 3
KILL, STOP, CONTINUE, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM


def away(pair):
    return pair.others[0]


def at(daemon):
    return {"endpoint": daemon.endpoint}


def call(pair, ranks, version, *, only=None, **more):
    """Those of `ranks` that are given call: the first at home, the others away."""
    for number, rank in enumerate(ranks):
        if rank is not None:
            where = {} if number == 0 else {"endpoint": away(pair).endpoint}
            rank.push(
                **pair.terms(number, len(ranks), version=version, **{**more, **where, **(only or {}).get(number, {})})
            )


def start(pair, **terms):
    ranks = pair.start_ranks(WORLD)
    call(pair, ranks, pair.next_version(), **terms)
    return ranks


def pushed_once(pair, count=WORLD):
    """Ranks that have pushed before, what engines hold: a fresh one's first may stand still for seconds, in what it has
    to load.
    """
    ranks = pair.start_ranks(count)
    call(pair, ranks, pair.next_version(), checkpoint=pair.checkpoint(pair.before))
    assert all(rank.report()["complete"] for rank in ranks)
    return ranks


def filling(pair, number, read):
    """A push in which rank `number` stops before a read."""
    ranks = start(pair, only={number: {"gate": ["read", read]}})
    ranks[number].wait_at("read")
    return ranks


def test_ranks_that_meet_no_trouble_push_together(pair):
    ranks = pair.start_ranks(WORLD)
    for _ in range(3):
        call(pair, ranks, pair.next_version())
        reports = [rank.report() for rank in ranks]
        for report in reports:
            report.pop("blocked_seconds")
        assert reports[0] == reports[1] == reports[2]
        assert reports[0]["complete"], reports[0]
    for one in pair.engines:
        pair.serves(one, "C")


@pytest.mark.parametrize("first", [0, 1])
def test_the_order_in_which_they_call_does_not_matter(pair, first):
    ranks = pair.start_ranks(WORLD)
    version = pair.next_version()
    call(pair, [rank if number == first else None for number, rank in enumerate(ranks)], version)
    if first == 0:
        pair.wait_waiting_for("ranks 1, 2 of 3 to call")
    call(pair, [rank if number != first else None for number, rank in enumerate(ranks)], version)
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_rank_away_that_never_calls_is_named(pair):
    ranks = pushed_once(pair)
    call(pair, [ranks[0], ranks[1], None], pair.next_version(), timeout=2.0)
    for rank in ranks[:2]:
        error = rank.error()
        assert (error["kind"], error["rank"]) == ("PushTimeout", 2)
        assert "rank 2 of 3 to call push_weights" in error["message"]
        assert error["seconds"] < 2 + 2


def test_a_rank_0_that_never_calls_is_named(pair):
    ranks = pushed_once(pair)
    call(pair, [None, ranks[1], ranks[2]], pair.next_version(), timeout=1.0)
    for rank in ranks[1:]:
        error = rank.error()
        assert error["kind"] == "PushTimeout"
        assert "waiting for rank 0 of its trainer" in error["message"]
        assert error["seconds"] < 1 + 2


def test_rank_0_on_the_node_that_knows_no_other(pair):
    """Its call does not reach the others', and both sides say for whom they waited."""
    ranks = pushed_once(pair, 2)
    version = pair.next_version()
    for number, rank in enumerate(ranks):
        where = {"endpoint": away(pair).endpoint} if number == 0 else {}
        rank.push(**pair.terms(number, 2, version=version, timeout=1.5) | where)
    assert "rank 1 of 2 to call push_weights" in ranks[0].error()["message"]
    assert "on one that has this one among its cluster.peers" in ranks[1].error()["message"]


def test_a_rank_that_calls_when_the_push_has_failed_is_told(pair):
    ranks = pushed_once(pair)
    version = pair.next_version()
    call(pair, [ranks[0], ranks[1], None], version, timeout=1.0)
    error = ranks[1].error()
    call(pair, [None, None, ranks[2]], version)
    late = ranks[2].error()
    assert late.pop("seconds") < 2
    error.pop("seconds")
    assert late == error


def test_a_rank_that_calls_on_two_nodes_is_refused_on_the_second(pair):
    ranks = filling(pair, 0, 0)
    (other,) = pair.start_ranks(1)
    other.push(**pair.terms(1, WORLD, version=9999))  # rank 1 takes part away
    error = other.error()
    assert error["kind"] == "PushRefused"
    assert f"rank 1 of this trainer takes part in the push already, from node {away(pair).name}" in error["message"]
    ranks[0].go()
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_push_that_is_refused_at_home_is_refused_everywhere(pair):
    ranks = start(pair, model="nobody's")
    for rank in ranks:
        error = rank.error()
        assert error["kind"] == "PushRefused"
        assert 'no engine serves model "nobody\'s"' in error["message"]
        assert error["seconds"] < AT_ONCE
    call(pair, ranks, pair.next_version())
    assert all(rank.report()["complete"] for rank in ranks)


def test_layouts_that_differ_are_refused_on_every_node(pair):
    ranks = start(pair, only={2: {"change": {"model.norm.weight": "double"}}})
    for error in [rank.error() for rank in ranks]:
        assert error["kind"] == "PushRefused"
        assert "model.norm.weight" in error["message"]
    assert pair.torn_or_whole(pair.before) == set()


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("victim", "read"), [(0, 4), (1, 0), slow(1, 4)])
def test_a_rank_that_is_killed_while_it_fills(pair, victim, read):
    ranks = filling(pair, victim, read)
    ranks[victim].kill()
    for number, rank in enumerate(ranks):
        if number != victim:
            error = rank.error()
            assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", victim, "fill")
            assert error["seconds"] < 10
    pair.torn_or_whole(pair.before)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_while_the_others_have_not_called(pair, victim):
    ranks = pair.start_ranks(WORLD)
    version = pair.next_version()
    call(pair, [rank if number in (0, victim) else None for number, rank in enumerate(ranks)], version)
    pair.wait_waiting_for("to call push_weights")
    until(lambda: str(victim) not in getattr(pair.status().push, "waiting_for", str(victim)), "it has called")
    ranks[victim].kill()
    if victim != 0:
        error = ranks[0].error()
        assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", victim, "open")
    pair.wait_idle()
    call(pair, [None, ranks[1], None], version)
    late = ranks[1].error()
    assert (late["kind"], late["rank"]) == ("PushAborted", victim)
    assert late["seconds"] < AT_ONCE, "the push has failed long ago"


def test_ctrl_c_in_a_rank_away_is_told_to_all(pair):
    ranks = filling(pair, 2, 1)
    ranks[2].kill(signal.SIGINT)
    assert ranks[2].result() == {"interrupted": True}
    for rank in ranks[:2]:
        error = rank.error()
        assert (error["kind"], error["rank"]) == ("PushAborted", 2)
        assert error["seconds"] < 5
    pair.torn_or_whole(pair.before)
    call(pair, ranks, pair.next_version())  # the interrupted rank lives, and so does its link
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_rank_that_gives_up_and_calls_again_at_once_takes_part_in_the_next_push(pair):
    ranks = filling(pair, 0, 0)
    version = pair.next_version()
    ranks[2].kill(signal.SIGINT)
    assert ranks[2].result() == {"interrupted": True}
    call(pair, [None, None, ranks[2]], version)
    ranks[0].go()
    for rank in ranks[:2]:
        assert rank.error()["rank"] == 2
    call(pair, [*ranks[:2], None], version)
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_rank_that_gives_up_before_rank_0_calls_is_told_to_it(pair):
    ranks = pair.start_ranks(2)
    version = pair.next_version()
    since = pair.log_length()
    ranks[1].push(**pair.terms(1, 2, version=version))
    pair.wait_log("rank 1 waits", since=since)
    ranks[1].kill(signal.SIGINT)
    assert ranks[1].result() == {"interrupted": True}
    ranks[0].push(**pair.terms(0, 2, version=version))
    error = ranks[0].error()
    assert "rank 1 was interrupted" in error["message"]
    assert error["seconds"] < AT_ONCE
    for number, rank in enumerate(ranks):
        rank.push(**pair.terms(number, 2, version=version))
    assert all(rank.report()["complete"] for rank in ranks)


def test_a_push_is_refused_while_the_node_of_one_of_its_ranks_has_one_of_its_own(pair):
    (own,) = pair.start_ranks(1)
    own.push(**pair.terms(0, 1, version=pair.next_version(), group="another", gate=["read", 5]) | at(away(pair)))
    own.wait_at("read")
    for rank in start(pair):
        error = rank.error()
        assert error["kind"] == "PushRefused"
        assert f"by another trainer is under way, which node {away(pair).name} leads" in error["message"]
    own.go()
    assert own.report()["complete"]


def test_a_rank_away_that_stands_still_loses_its_arena_and_not_its_push_the_next(pair):
    ranks = filling(pair, 1, 2)
    (bridge,) = pair.bridge_pids(away(pair))
    ranks[1].kill(STOP)
    error = ranks[0].error()
    assert (error["kind"], error["rank"]) == ("PushAborted", 1)
    until(lambda: pair.bridge_pids(away(pair)) not in ([], [bridge]), "its bridge is replaced")
    ranks[1].kill(CONTINUE)


# --- bridges and daemons --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "read", "number"), [("home", 0, KILL), slow("home", 4, STOP), slow("away", 0, STOP), ("away", 4, KILL)]
)
def test_a_bridge_that_is_lost(pair, where, read, number):
    ranks = filling(pair, 1, read)
    daemon = pair.daemon if where == "home" else away(pair)
    (bridge,) = pair.bridge_pids(daemon)
    os.kill(bridge, number)
    ranks[1].go()
    errors = [rank.error() for rank in ranks]
    for error in errors:
        assert error["kind"] == "PushAborted"
        assert f"bridge {daemon.name}/0" in error["message"], "not what follows from it"
        assert error["seconds"] < 15
    pair.torn_or_whole(pair.before)
    until(lambda: pair.bridge_pids(daemon) not in ([], [bridge]), "another bridge")


@pytest.mark.parametrize(("read", "number"), [(0, KILL), slow(4, STOP), (4, TERM)])
def test_the_daemon_away_that_is_lost(pair, read, number):
    ranks = filling(pair, 2, read)
    away(pair).kill(number)
    error = ranks[0].error()
    assert error["kind"] == "PushAborted"
    assert f"trainer ranks 1, 2 of node {away(pair).name} cannot go on" in error["message"] or number == TERM, error
    assert error["seconds"] < 15
    ranks[2].go()
    for rank in ranks[1:]:
        assert rank.error()["kind"] in ("DaemonLost", "PushAborted")
    pair.clear()
    if number == STOP:
        away(pair).kill(CONTINUE)
    else:
        away(pair).wait(TIMEOUTS["stop"] + 5)
        pair.fleet.restart_daemon(away(pair))
    pair.wait_attached()


@pytest.mark.parametrize(("read", "number"), [(4, KILL), slow(0, STOP)])
def test_the_daemon_at_home_that_is_lost(pair, read, number):
    ranks = filling(pair, 0, read)
    pair.daemon.kill(number)
    for rank in ranks[1:]:
        error = rank.error()
        assert error["kind"] == "PushAborted"
        assert "its coordinator has not been heard" in error["message"]
        assert error["seconds"] < 15
    if number == STOP:
        pair.daemon.kill(CONTINUE)
    else:
        pair.fleet.restart_daemon(pair.daemon)
    ranks[0].go()
    assert ranks[0].error()["kind"] in ("DaemonLost", "PushAborted")
    pair.wait_attached()
