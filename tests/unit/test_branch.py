"""Ranks of a push that another node coordinates, and pushes that have failed without some of their ranks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from weightsync.errors import CodecError, PushAborted, TransportBroken
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode
from weightsyncd.branch import Branch
from weightsyncd.failures import Failures
from weightsyncd.waiting import Call

CALL = msg.Gather(push="p", group="g", model="m", version=3)
ERROR = PushAborted("it has failed").record()


def opened(rank, number=7, **changes):
    terms = {"group": "g", "world": 4, "model": "m", "version": 3, "pause": "keep", "timeout": 9.0, "layout": bytes(16)}
    return msg.Open(id=number, rank=rank, **{**terms, **changes})


def called(identity, message):
    return Call(identity, message, time.monotonic())


class Bridge:
    """One that is there, until it is retired."""

    def __init__(self, index):
        self.name, self.offer, self.incarnation = f"n/{index}", b"offer%d" % index, f"first{index}"
        self.retired = False

    def retire(self, reason):
        assert "may still write" in reason
        self.retired = True


class World:
    """A branch with two bridges and one rank that has been given a lease."""

    def __init__(self):
        self.sent, self.said = [], []
        self.bridges: Any = [Bridge(0), Bridge(1)]
        self.branch = Branch(
            "n",
            CALL,
            self.bridges,
            send=self._send,
            forward=self._forward,
        )
        self.branch.open(called(b"one", opened(2)))
        self.tell(msg.Planned(plan=bytes(16), offers=()))
        self.tell(msg.Lease(bucket=0, bridge=1, slot=0))

    def _send(self, identity, message):
        self.sent.append((identity, message))
        return True

    def _forward(self, message):
        self.said.append(message)
        return True

    def tell(self, message):
        self.branch.tell(msg.TellRank(push="p", rank=2, body=encode(message)))

    def words(self):
        return [decode_untrusted(said.body) for said in self.said]

    def end(self, error=None, why="why"):
        return asyncio.run(self.branch.end(why, error, grace=0.01))


def test_what_is_said_and_told_passes_through_with_the_ranks_own_number_and_its_nodes_own_arenas():
    world = World()
    assert world.words() == [opened(2)]
    assert [message.id for _, message in world.sent] == [7, 7]
    assert world.sent[0][1].offers == (b"offer0", b"offer1")


@pytest.mark.parametrize("message", [msg.Lease(bucket=0, bridge=2, slot=0), msg.Heartbeat()])
def test_what_no_rank_can_be_told_is_refused(message):
    world = World()
    with pytest.raises(CodecError):
        world.tell(message)
    assert len(world.sent) == 2


def test_a_lease_before_any_arena_was_offered_is_refused():
    world = World()
    world.branch.open(called(b"two", opened(3)))
    world.branch._arenas = ()
    with pytest.raises(CodecError, match="bridge 0 of 0"):
        world.branch.tell(msg.TellRank(push="p", rank=3, body=encode(msg.Lease(bucket=0, bridge=0, slot=0))))


def test_a_rank_that_may_still_write_when_the_grace_is_over_costs_the_arena_it_writes_into():
    world = World()
    world.end()
    assert [bridge.retired for bridge in world.bridges] == [False, True]
    assert isinstance(world.sent[-1][1], msg.Ended)
    assert "why" in str(world.sent[-1][1].error)
    assert isinstance(world.words()[-1], msg.Failed), "the coordinator, should it live, hears of it"


@pytest.mark.parametrize("how", ["filled", "stopped", "replaced"])
def test_an_arena_that_nobody_writes_into_stays(how):
    world = World()
    if how == "filled":
        world.branch.route(b"one", msg.Filled(id=7, bucket=0, nbytes=1, tensors=b"", fingerprints=b""))
    elif how == "stopped":
        world.branch.route(b"one", msg.Failed(id=7, error=ERROR))
        world.tell(msg.Lease(bucket=1, bridge=0, slot=0))  # it was on its way
    else:
        world.bridges[1].incarnation = "second"
    start = time.monotonic()
    asyncio.run(world.branch.end("why", ERROR, grace=30.0))
    assert time.monotonic() - start < 10, "there was nothing to wait for"
    assert not any(bridge.retired for bridge in world.bridges)
    assert world.sent[-1][1].error == ERROR


def test_a_bridge_that_was_replaced_has_nothing_of_what_was_written():
    world = World()
    world.branch.check_arena(1)
    world.bridges[1].incarnation = "second"
    with pytest.raises(TransportBroken, match="n/1 was replaced"):
        world.branch.check_arena(1)
    world.branch.bridge_lost(TransportBroken("bridge n/1 is gone"))
    assert "bridge n/1 is gone" in str(world.words()[-1])


def test_a_rank_that_calls_again_wants_the_next_push():
    world = World()
    assert world.branch.takes(b"one", opened(2))
    assert not world.branch.takes(b"one", opened(2, number=8))
    assert world.branch.takes(b"two", opened(3))


def test_a_rank_that_came_too_late_for_a_push_that_went_well_is_there_for_the_next():
    """Its siblings were told of the end before this node was, by another daemon say."""
    world = World()
    world.tell(msg.Ended())
    late = called(b"two", opened(3))
    world.branch.open(late)
    world.sent.clear()
    assert world.end(why=None) == [late]
    assert world.sent == []
    assert not [words for words in world.words() if isinstance(words, msg.Failed)]


@pytest.mark.parametrize("how", ["failed", "silent", "taken"])
def test_a_rank_that_waits_for_a_push_that_is_let_go_is_told(how):
    world = World()
    world.branch.open(called(b"two", opened(3)))
    if how == "taken":
        world.branch.tell(msg.TellRank(push="p", rank=3, body=encode(msg.AskDescription())))
    late = world.end(ERROR if how == "failed" else None, why="it is silent" if how == "silent" else None)
    assert late == []
    identity, message = world.sent[-1]
    assert (identity, type(message)) == (b"two", msg.Ended)
    assert (message.error == ERROR) == (how == "failed")


# --- pushes that have failed ------------------------------------------------------------------------------------------


def test_each_rank_that_was_missing_is_told_once():
    failures = Failures()
    failures.note(CALL, {0}, ERROR, until=time.monotonic() + 60)
    assert failures.tell(opened(0)) is None
    assert failures.tell(opened(1, version=4)) is None
    assert failures.tell(opened(1, group="other")) is None
    assert [failures.tell(opened(1)), failures.tell(opened(1))] == [ERROR, None]
    failures.tries_again(opened(2))
    assert failures.tell(opened(2)) == ERROR
    failures.tries_again(opened(2))
    assert failures.tell(opened(3)) is None, "one that knew has called again: this is the next attempt"


def test_one_trainers_failure_does_not_hide_anothers():
    failures = Failures()
    late = msg.Gather(push="q", group="late", model="m", version=3)
    failures.note(CALL, {0}, ERROR, until=time.monotonic() + 60)
    failures.note(late, {0}, ERROR, until=time.monotonic() - 1)
    assert failures.tell(opened(1, group="late")) is None
    assert failures.tell(opened(1)) == ERROR
    failures.forget("g")
    assert failures.tell(opened(2)) is None
