"""What of rails and followers needs no bridge: who may end what, once several broadcasts of a rail are under way."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from weightsync.config import parse_node_config
from weightsync.errors import LocalProtocolError, PushRefused, TransportClosed, TransportTimeout
from weightsync.nccl_bridge import commands
from weightsync.wire import messages as msg
from weightsyncd.context import PushContext
from weightsyncd.delivery import Deliveries
from weightsyncd.follower import Follower
from weightsyncd.held_push import HeldPush, Working
from weightsyncd.rails import Rails, leave


class Bridge:
    """One that leaves its communicator, or does not."""

    def __init__(self, problem="", restarts=False):
        self.problem, self.restarts = problem, restarts
        self.incarnation = "first"
        self.left = 0
        self.retired = ""

    async def call(self, command, *, deadline):
        assert isinstance(command, commands.Leave)
        self.left += 1
        if self.restarts:
            self.incarnation = "second"
        if self.problem:
            raise TransportTimeout(self.problem)
        return commands.Done()

    def retire(self, reason):
        self.retired = reason


@pytest.fixture
def rails():
    made = Rails(parse_node_config('[node]\nname = "n0"\n'), [], {})
    made.generation = 7
    made._members = (("n0/0", "a"), ("n1", "b"))
    return made


def test_what_breaks_the_standing_generation_ends_it(rails):
    bridge = Bridge()
    asyncio.run(rails.give_up(bridge, 7))
    rails.break_up(7)
    assert (bridge.left, rails._members) == (1, ())


def test_who_hears_late_of_a_broken_generation_leaves_its_successor_alone(rails):
    bridge = Bridge()
    asyncio.run(rails.give_up(bridge, 6))
    rails.break_up(6)
    assert bridge.left == 0
    assert rails._members


@pytest.mark.parametrize(
    ("problem", "restarts", "replaced"),
    [("", False, False), ("its kernels did not end", False, True), ("it is gone", True, False)],
)
def test_a_bridge_that_does_not_leave_is_replaced(problem, restarts, replaced):
    bridge: Any = Bridge(problem, restarts=restarts)
    asyncio.run(leave(bridge))
    assert (problem in bridge.retired and bool(bridge.retired)) == replaced


def test_a_change_of_members_ends_whichever_stands(rails):
    rails.break_up()
    assert rails._members == ()


def test_a_rail_with_two_broadcasts_is_at_work_until_both_are_done():
    async def main():
        held = HeldPush(b"identity", PushContext("p", "m", 1), time.monotonic())
        done, never = asyncio.Event(), asyncio.Event()

        async def work(until):
            with Working(held, 0):
                await until.wait()

        first, second = asyncio.create_task(work(done)), asyncio.create_task(work(never))
        await asyncio.sleep(0)
        done.set()
        await first
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        return {rail for rail, _ in held.rails}

    assert asyncio.run(main()) == {0}, "the one that was cancelled may still write"


def test_a_rail_whose_broadcasts_are_done_is_at_rest():
    async def main():
        held = HeldPush(b"identity", PushContext("p", "m", 1), time.monotonic())
        for _ in range(2):
            with Working(held, 0):
                pass
        return held.rails

    assert asyncio.run(main()) == set()


# --- a follower whose bridge joins another communicator --------------------------------------------------------------


class Recorder:
    """A bridge that leaves and joins."""

    name = "n1/0"
    incarnation = "first"

    def __init__(self, on_warm=lambda: None):
        self.commands = []
        self._on_warm = on_warm

    async def prompt(self, *, deadline):
        pass

    async def warm(self, *, longest, deadline):
        self.commands.append("Warm")
        self._on_warm()

    async def call(self, command, *, deadline):
        self.commands.append(type(command).__name__)
        return commands.Done()


JOIN = msg.JoinRail(rail=0, generation=8, rank=1, world=2, host="127.0.0.1", port=1, key="k", timeout=5.0)


class Leads:
    """A node that leads no push, but where it says that it is `busy`."""

    def __init__(self, busy):
        self._busy = busy

    @property
    def busy(self):
        return self._busy()

    def holder(self, claimant):
        return None

    def awaits(self, group):
        return False

    async def wind_up(self, until):
        pass

    def missed(self, call, ranks, error):
        pass

    def again(self, calls):
        pass


def following(bridge, *, busy=lambda: False, may=True):
    """A follower that a push holds, of whose broadcasts on rail 0 one has failed. `may`: others may take a bridge."""

    async def let_go(context, until):
        pass

    executor: Any = SimpleNamespace(engines=[], let_go=let_go, deliveries=Deliveries())
    follower = Follower(
        parse_node_config('[node]\nname = "n1"\n'),
        "incarnation",
        executor,
        [bridge],
        (),
        on_free=lambda: None,
        rails=SimpleNamespace(taken=lambda node, *, push: may, given_back=lambda node: None),
        send=lambda identity, message: True,
    )
    follower.leading = Leads(busy)
    held = follower._hold.take(b"identity", PushContext("p", "m", 1), "")
    held.rails.add((0, None))
    return follower


@pytest.mark.timeout(10)
def test_a_bridge_joins_once_the_last_push_has_left():
    """A `Leave` of what has ended, arriving after the `Join`, would end the communicator that was just formed."""

    async def main():
        bridge, begun, may_end = Recorder(), asyncio.Event(), asyncio.Event()
        follower = following(bridge)

        async def work():
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await may_end.wait()

        follower._hold.held.tasks.add(asyncio.create_task(work()))
        await begun.wait()
        ending = asyncio.create_task(follower.release(b"identity", "p", None))
        joining = asyncio.create_task(follower.at_rail(b"identity", JOIN))
        for _ in range(10):
            await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(ending, joining)
        return bridge.commands

    assert asyncio.run(main())[-1] == "Join"


@pytest.mark.timeout(10)
def test_a_delivery_that_cannot_be_prepared_breaks_no_communicator():
    """The coordinator believes that it stands, and would have a broadcast meet a bridge that has left."""

    async def main():
        bridge = Recorder()
        follower = following(bridge)
        follower._hold.held.rails.clear()
        prepare = msg.Prepare(
            push="p", rail=0, engines=("e",), ranks=(), token=1, parcel=256, turn=0, turns=1, timeout=5.0
        )
        with pytest.raises(LocalProtocolError, match="has not shown its places"):
            await follower.at_rail(b"identity", prepare)
        await follower.release(b"identity", "p", None)
        return bridge.commands

    assert "Leave" not in asyncio.run(main())


@pytest.mark.timeout(10)
def test_a_communicator_that_was_joined_since_is_not_left_for_what_was_done_in_the_last():
    async def main():
        bridge = Recorder()
        follower = following(bridge)
        await follower.at_rail(b"identity", JOIN)
        await follower.release(b"identity", "p", None)
        return bridge.commands

    assert asyncio.run(main())[-1] == "Join"


# --- two nodes that each form a communicator with the other -----------------------------------------------------------


@pytest.mark.parametrize(
    ("keeping", "push", "node", "may"),
    [
        (False, False, "n9", True),
        (True, False, "m9", True),  # it comes first
        (True, False, "n9", False),
        (True, True, "n9", True),  # a push does not wait
    ],
)
def test_of_two_that_form_between_pushes_the_first_by_name_goes_on(rails, keeping, push, node, may):
    rails._keeping = keeping
    assert rails.taken(node, push=push) is may
    assert rails._members == (() if may else (("n0/0", "a"), ("n1", "b")))


@pytest.mark.timeout(10)
def test_a_bridge_lets_go_of_what_it_waits_in_before_anything_else_is_asked_of_it():
    async def main():
        bridge = Recorder()
        await following(bridge).at_rail(b"identity", JOIN)
        return bridge.commands

    assert asyncio.run(main()) == ["Leave", "Warm", "Join"]


@pytest.mark.timeout(10)
def test_a_node_that_goes_on_with_its_own_says_so():
    async def main():
        bridge = Recorder()
        with pytest.raises(PushRefused, match="is forming communicators itself"):
            await following(bridge, may=False).at_rail(b"identity", JOIN)
        return bridge.commands

    assert asyncio.run(main()) == []


@pytest.mark.timeout(10)
def test_a_push_that_begins_meanwhile_keeps_the_bridge():
    async def main():
        pushes = []
        bridge = Recorder(on_warm=lambda: pushes.append("begun"))
        with pytest.raises(PushRefused, match="a push of its own"):
            await following(bridge, busy=lambda: bool(pushes)).at_rail(b"identity", JOIN)
        return bridge.commands

    assert asyncio.run(main()) == ["Leave", "Warm"]


class Forming(Recorder):
    """A bridge of a node that forms; somebody takes it while it gets ready."""

    async def call(self, command, *, deadline):
        await super().call(command, deadline=deadline)
        return commands.Hosted(port=1) if isinstance(command, commands.Host) else commands.Done()


@pytest.mark.timeout(10)
def test_who_was_taken_while_forming_does_not_join_its_own(rails):
    bridge = Forming(on_warm=lambda: rails.taken("m9", push=False))
    rails.bridges = [bridge]

    async def main():
        with pytest.raises(TransportClosed, match="joins a communicator of another node"):
            await rails._join_all(0, ["m9"], time.monotonic() + 5, push=False)

    asyncio.run(main())
    assert bridge.commands == ["Leave", "Warm", "Host"]


class Slow(Recorder):
    """The first time that it loads what communicators need, it waits until it is told to leave."""

    def __init__(self):
        super().__init__()
        self.begun, self._told = asyncio.Event(), asyncio.Event()

    async def warm(self, *, longest, deadline):
        await super().warm(longest=longest, deadline=deadline)
        self.begun.set()
        if self.commands.count("Warm") == 1:
            await self._told.wait()

    async def call(self, command, *, deadline):
        if isinstance(command, commands.Leave) and self.commands:
            self._told.set()
        return await super().call(command, deadline=deadline)


@pytest.mark.timeout(10)
def test_what_is_formed_for_a_push_waits_for_nothing_that_is_formed_beforehand():
    async def main():
        bridge = Slow()
        follower = following(bridge)
        follower._hold.held = None
        first = asyncio.create_task(follower.at_rail(b"a", msgspec.structs.replace(JOIN, push=False)))
        await bridge.begun.wait()
        await follower.at_rail(b"b", JOIN)
        with pytest.raises(PushRefused, match="takes part in a push"):
            await first
        return bridge.commands

    assert asyncio.run(main())[-2:] == ["Warm", "Join"]


@pytest.mark.timeout(10)
def test_what_is_formed_for_a_push_waits_for_none_in_line_either():
    """The next in line is formed for no push, too; it gets the bridge first, and gives it up at once."""

    async def main():
        bridge = Slow()
        follower = following(bridge)
        follower._hold.held = None
        before = msgspec.structs.replace(JOIN, push=False)
        first = asyncio.create_task(follower.at_rail(b"a", before))
        await bridge.begun.wait()
        second = asyncio.create_task(follower.at_rail(b"c", before))
        await asyncio.sleep(0)
        await follower.at_rail(b"b", JOIN)
        for joining in (first, second):
            with pytest.raises(PushRefused, match="takes part in a push"):
                await joining
        await follower.at_rail(b"c", before)  # when none waits any more, others may
        return bridge.commands

    assert asyncio.run(main()).count("Join") == 2


@pytest.mark.timeout(10)
def test_who_is_taken_while_it_looks_at_its_peers_forms_nothing(rails):
    async def refresh():
        assert rails.taken("m9", push=True)

    bridge = Recorder()
    info = SimpleNamespace(device=rails._config.arena.device, incarnation="x", slots=(1,), engines=(), peers=())
    rails.bridges = [bridge]
    rails._peers["n9"] = SimpleNamespace(refresh=refresh, info=info)

    async def main():
        return await rails.form(["n9"], time.monotonic() + 5, push=False)

    assert asyncio.run(main()).keys() == {"n9"}
    assert bridge.commands == []
    rails.given_back("m9")
    assert not rails._was_taken()


@pytest.mark.timeout(10)
def test_a_bridge_that_starts_while_it_is_waited_for_is_a_member_as_it_is_then(rails):
    """Else the next to look would form anew, and break what the first has just begun."""
    info = SimpleNamespace(device=rails._config.arena.device, incarnation="x:-", slots=(1,), engines=(), peers=())

    async def refresh():
        pass

    async def rendezvous(nodes, deadline, push):
        rails.generation += 1
        info.incarnation = "x:started"
        return {}

    rails.bridges = [Recorder()]
    rails._peers["n9"] = SimpleNamespace(refresh=refresh, info=info)
    rails._rendezvous = rendezvous

    async def main():
        for _ in range(2):
            assert not await rails.form(["n9"], time.monotonic() + 5)

    asyncio.run(main())
    assert rails.generation == 8, "formed once"
    assert rails.stands(["n9"])


# --- a push that begins while this node forms for none ----------------------------------------------------------------


class Waits(Forming):
    """A bridge whose joins wait for somebody who does not come, until it is told to leave."""

    def __init__(self):
        super().__init__()
        self.joins = asyncio.Event()
        self.comes = False
        self._left = asyncio.Event()

    async def call(self, command, *, deadline):
        reply = await super().call(command, deadline=deadline)
        if isinstance(command, commands.Leave):
            self._left.set()
        elif isinstance(command, commands.Join) and not self.comes:
            self._left.clear()
            self.joins.set()
            await self._left.wait()
            raise TransportClosed("it was told to leave")
        return reply


def peers_of(rails, *names):
    """Nodes that are there; what they are asked for is answered once their bridge has joined."""

    def peer(name):
        info = SimpleNamespace(device=rails._config.arena.device, incarnation="x", slots=(1,), engines=(1,), peers=())

        async def refresh():
            pass

        async def ask(question, deadline):
            if name == "slow":
                await asyncio.Event().wait()

        return SimpleNamespace(name=name, info=info, refresh=refresh, ask=ask)

    rails._peers.update({name: peer(name) for name in names})


@pytest.mark.timeout(10)
def test_a_push_waits_for_nothing_that_is_formed_for_none(rails):
    """Not for a node that does not come, above all where it does not need it."""

    async def main():
        bridge = Waits()
        rails.bridges = [bridge]
        rails._config = parse_node_config('[node]\nname = "n0"\n[timeouts]\nliveness = 0.1\n')
        peers_of(rails, "fast", "slow")
        busy: list[str] = []
        keeping = asyncio.create_task(rails.keep(lambda: bool(busy)))
        await bridge.joins.wait()
        busy.append("a push")
        bridge.comes = True
        assert not await rails.use(["fast"], time.monotonic() + 30)
        assert rails.stands(["fast"])
        for _ in range(10):  # who forms for none hears of it
            await asyncio.sleep(0)
        assert not keeping.done()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        return bridge.commands

    assert asyncio.run(main())[-2:] == ["Host", "Join"]


@pytest.mark.timeout(10)
def test_a_push_without_other_nodes_leaves_what_is_formed_for_none(rails):
    """A bridge that joins holds up its groups with engines: over gloo one joins at a time."""

    async def main():
        bridge = Waits()
        rails.bridges = [bridge]
        rails._config = parse_node_config('[node]\nname = "n0"\n[timeouts]\nliveness = 0.1\n')
        peers_of(rails, "slow")
        busy: list[str] = []
        keeping = asyncio.create_task(rails.keep(lambda: bool(busy)))
        await bridge.joins.wait()
        busy.append("a push")
        await rails.overrule()
        left = bridge.commands[-1]
        await rails.overrule()  # there is nothing any more
        assert bridge.commands[-1] == left
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        return left

    assert asyncio.run(main()) == "Leave"


@pytest.mark.timeout(10)
def test_what_stands_is_not_left_for_a_push_that_begins(rails):
    bridge = Bridge()
    rails.bridges = [bridge]
    asyncio.run(rails.overrule())
    assert (bridge.left, rails._members) == (0, (("n0/0", "a"), ("n1", "b")))


@pytest.mark.timeout(10)
def test_who_watches_does_not_wait_until_a_silent_coordinator_is_let_go_of():
    """This node's own ranks have to be watched meanwhile."""

    async def main():
        leaves = asyncio.Event()

        class Slow(Recorder):
            async def call(self, command, *, deadline):
                reply = await super().call(command, deadline=deadline)
                await leaves.wait()
                return reply

        bridge = Slow()
        follower = following(bridge)
        for _ in range(3):
            follower.check(-1.0)
            await asyncio.sleep(0.01)
        assert follower.following == "p"
        leaves.set()
        await follower._hold._free.wait()
        return bridge.commands

    assert asyncio.run(main()) == ["Leave"]
