"""Calls that wait for the node: in which order, how long, and what becomes of those whose rank is gone."""

from __future__ import annotations

import time

import pytest

from weightsync.wire import messages as msg
from weightsyncd.waiting import Call, Waiting


def call(name: str, *, since: float = 0.0, number: int = 1, timeout: float = 60.0) -> Call:
    message = msg.Open(
        id=number, group="g", rank=0, world=1, model="m", version=1, pause="keep", timeout=timeout, layout=bytes(16)
    )
    return Call(name.encode(), message, since)


@pytest.fixture
def waiting():
    return Waiting()


def test_calls_wait_in_their_order_and_are_taken_together(waiting):
    calls = [call(name) for name in "cab"]
    for one in calls:
        waiting.add(one)
    assert len(waiting) == 3
    assert waiting.take() == calls
    assert (len(waiting), waiting.take()) == (0, [])


def test_who_has_waited_for_as_long_as_it_would_is_late(waiting):
    soon, later = call("a", since=100.0, timeout=5.0), call("b", since=100.0, timeout=50.0)
    waiting.add(soon)
    waiting.add(later)
    assert waiting.late(104.0) == []
    assert waiting.late(105.0) == [soon]
    assert waiting.take() == [later]


def test_who_gives_up_is_known_by_line_and_number(waiting):
    first, second = call("a", number=1), call("a", number=2)
    waiting.add(first)
    waiting.add(second)
    assert waiting.given_up(b"b", 1) == []
    assert waiting.given_up(b"a", 2) == [second]
    assert waiting.take() == [first]


def test_who_is_not_heard_is_dropped_and_who_is_waits_on(waiting):
    now = time.monotonic()
    alive, gone = call("a", since=now - 9), call("b", since=now - 9)
    waiting.add(alive)
    waiting.add(gone)
    waiting.heard(b"a")
    waiting.heard(b"nobody")
    assert waiting.silent(now, 10.0) == []
    assert waiting.silent(now, 5.0) == [gone]
    assert waiting.take() == [alive]


def test_waiting_again_keeps_what_was_heard_and_a_later_call_begins_anew(waiting):
    now = time.monotonic()
    again = call("a", since=now - 9)
    waiting.add(again)
    waiting.heard(b"a")
    waiting.add(*waiting.take())  # the node was not free after all
    assert waiting.silent(now, 5.0) == []
    waiting.take()
    later = call("a", since=now + 20, number=2)
    waiting.add(later)
    assert waiting.silent(now + 24, 5.0) == []
    assert waiting.silent(now + 26, 5.0) == [later]
    assert waiting.silent(now + 26, 5.0) == []
    assert not waiting._heard, "nothing is kept of who does not wait"
