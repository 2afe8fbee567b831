"""An exchange that fails: who is left out, who is blamed, and when it is given up."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from weightsync.errors import TransportBroken
from weightsync.nccl_bridge import commands
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsyncd.context import PushContext
from weightsyncd.exchanges import exchange
from weightsyncd.rails import leave
from weightsyncd.relays import relay

RUNS = {"home": b"h", "ranks": b"r"}  # what the ranks of each have written; "engines" and "more" have none


class Rails:
    """Nodes that fail as often as they are told to, and a communicator that stands until one does."""

    home = "home"
    generation = 7

    def __init__(self, *, unreachable=(), **failures):
        self.failures = failures
        self.unreachable = set(unreachable)
        self.members = []
        self.asked = []
        self.left = asyncio.Event()
        self.bridges = [
            SimpleNamespace(
                call=self._call, config=SimpleNamespace(gpu=""), incarnation="one", retire=lambda reason: None
            )
        ]

    def stands(self, nodes):
        return self.members == nodes

    async def form(self, nodes, deadline):
        failed = {node: TransportBroken(f"{node} is not there").record() for node in set(nodes) & self.unreachable}
        self.members = [node for node in nodes if node not in failed]
        return failed

    def break_up(self, generation):
        assert generation == self.generation
        self.members = []

    async def give_up(self, bridge, generation):
        assert generation == self.generation
        await leave(bridge)

    def peer(self, node):
        async def ask(question, deadline):
            self._take_part(node)
            self.asked.append((node, [part.root for part in question.parts], question.generation))
            return msg.Executed(event={})

        return SimpleNamespace(ask=ask)

    async def _call(self, command, deadline):
        if isinstance(command, commands.Leave):
            self.left.set()
            return commands.Done()
        if isinstance(command, commands.Export):
            return commands.Exported(tickets={}, peer_tickets={"far/0": b"t"}, algorithm="xxh3-64", checksum=1)
        await asyncio.sleep(0)  # others are first to fail
        if not self.members:
            raise TransportBroken("home has joined no communicator")
        self._take_part("home")
        return commands.Done()

    def _take_part(self, node):
        left = self.failures.get(node, 0)
        if left:
            self.failures[node] = left - 1
            raise TransportBroken(f"{node} has failed")


def run(rails, seconds=5.0, runs=RUNS):
    nodes = ("home", "ranks", "engines", "more")
    slots = tuple(do.Slot(node, 0, index) for index, node in enumerate(nodes))
    instruction = do.ExchangeBucket(bucket=3, slots=slots, deadline=time.monotonic() + seconds)
    event = asyncio.run(exchange(rails, PushContext("p", "m", 1), instruction, runs))
    assert event.bucket == 3
    return event.nodes, {node: error.message for node, error in event.failed}


def test_every_node_takes_part_under_the_same_ranks():
    rails = Rails()
    assert run(rails) == (("engines", "home", "more", "ranks"), {})
    assert sorted(rails.asked) == [(node, [0, 3], 7) for node in ("engines", "more", "ranks")]


@pytest.mark.parametrize("node", ["home", "ranks"])
def test_what_is_needed_is_tried_twice(node):
    assert run(Rails(**{node: 1})) == (("engines", "home", "more", "ranks"), {})
    assert run(Rails(**{node: 2})) == ((), {node: f"{node} has failed"})


def test_what_is_not_needed_is_left_out():
    assert run(Rails(engines=9)) == (("home", "more", "ranks"), {"engines": "engines has failed"})
    assert run(Rails(engines=9, more=9)) == (
        ("home", "ranks"),
        {"engines": "engines has failed", "more": "more has failed"},
    )
    assert run(Rails(engines=9, ranks=1)) == (("home", "more", "ranks"), {"engines": "engines has failed"})


def test_who_cannot_be_reached():
    assert run(Rails(unreachable=["more"])) == (("engines", "home", "ranks"), {"more": "more is not there"})
    assert run(Rails(unreachable=["ranks"])) == ((), {"ranks": "ranks is not there"})


def test_who_is_left_alone_with_what_it_has_written_has_the_bucket():
    """The next bucket, or the engines that are gone, decide what becomes of the push: nothing is wrong here."""
    alone = {"home": b"h"}
    why = {node: f"{node} has failed" for node in ("ranks", "engines", "more")}
    assert run(Rails(ranks=9, engines=9, more=9), runs=alone) == (("home",), why)
    why = {node: f"{node} is not there" for node in ("ranks", "engines", "more")}
    assert run(Rails(unreachable=["ranks", "engines", "more"]), runs=alone) == (("home",), why)


def test_when_time_is_up_it_is_given_up():
    error = "engines has failed"
    assert run(Rails(engines=9), seconds=0) == ((), {"engines": error, "home": error})


class Waiting(Rails):
    """Home fails with its communicator whole: the others wait in theirs until home leaves."""

    async def form(self, nodes, deadline):
        self.left.clear()
        return await super().form(nodes, deadline)

    def peer(self, node):
        async def ask(question, deadline):
            await self.left.wait()
            raise TransportBroken(f"{node}: home has left")

        return SimpleNamespace(ask=ask)


@pytest.mark.timeout(10)
def test_who_fails_at_home_ends_the_wait_of_the_others():
    rails = Waiting(home=9)
    assert run(rails, seconds=60.0) == ((), {"home": "home has failed"})


@pytest.mark.timeout(10)
def test_who_fails_to_send_ends_the_wait_of_the_others():
    rails: Any = Waiting(home=9)
    instruction = do.RelayBucket(
        bucket=3,
        slot=do.Slot("home", 0, 0),
        nbytes=8,
        targets=(do.Slot("far", 0, 0),),
        deadline=time.monotonic() + 60,
    )
    event = asyncio.run(relay(rails, PushContext("p", "m", 1), instruction, 1))
    assert (event.nodes, [node for node, _ in event.failed]) == ((), ["far"])
