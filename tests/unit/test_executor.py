"""Instructions for engines, carried out: several buckets in one call, and which of them is to blame."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from tests.hand_push import manifest_of
from weightsync.adapters.base import EngineAdapter, EngineInfo
from weightsync.adapters.vllm.path_group import GroupPath
from weightsync.config import EngineConfig
from weightsync.errors import EngineError, EngineLost, TransportBroken
from weightsync.nccl_bridge import commands
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.transports.group import GroupTicket
from weightsyncd.context import PushContext
from weightsyncd.engines import Engine
from weightsyncd.executor import NodeExecutor


class Hand:
    """As much of an adapter as loads: one that is told of one bucket at a time."""

    load_several: Any = EngineAdapter.load_several

    def __init__(self, *, breaks_at: int = -1, names_it: bool = True) -> None:
        self.loaded: list[int] = []
        self._breaks_at, self._names_it = breaks_at, names_it

    async def load(self, bucket: int, tickets: Any, *, deadline: float) -> None:
        if bucket == self._breaks_at:
            raise EngineError("it broke", bucket=bucket if self._names_it else None)
        self.loaded.append(bucket)


class AtOnce(Hand):
    async def load_several(self, first: int, tickets: Any, *, deadline: float) -> None:
        if self._breaks_at in range(first, first + len(tickets)):
            raise EngineError("it broke")
        self.loaded += range(first, first + len(tickets))


def carried_out(hand: Hand, instruction: do.LoadBucket, exported: range) -> ev.Event | None:
    async def run() -> ev.Event | None:
        engine = Engine(EngineConfig(name="e", kind="reference", url="http://127.0.0.1:1"), cast("Any", hand))
        executor = NodeExecutor("n", "", cast("Any", {"e": engine}), [])
        context = PushContext(push="p", model="m", version=3)
        context.tickets = {("e", bucket): (b"ticket",) for bucket in exported}
        return await executor.execute(context, instruction)

    return asyncio.run(run())


def load(first: int, count: int) -> do.LoadBucket:
    return do.LoadBucket(engine="e", bucket=first, count=count, deadline=time.monotonic() + 20)


@pytest.mark.parametrize("kind", [Hand, AtOnce])
def test_several_buckets_are_loaded_in_their_order(kind):
    hand = kind()
    assert carried_out(hand, load(4, 3), range(2, 9)) == ev.BucketLoaded(engine="e", bucket=4, count=3)
    assert hand.loaded == [4, 5, 6]


def test_nothing_is_loaded_if_one_of_them_was_not_exported():
    hand = Hand()
    failed = carried_out(hand, load(4, 3), range(2, 6))
    assert isinstance(failed, ev.EngineFailed)
    assert failed.error.message.startswith("buckets 4 to 6 were not exported")
    assert hand.loaded == []


def test_the_bucket_that_broke_it_is_named():
    failed = carried_out(Hand(breaks_at=6), load(4, 3), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke", 6)


def test_where_nobody_knows_which_broke_it_all_are():
    failed = carried_out(Hand(breaks_at=6, names_it=False), load(4, 3), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke (buckets 4 to 6)", None)
    failed = carried_out(Hand(breaks_at=6, names_it=False), load(6, 1), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke", 6)


class Bridge:
    """That answers, or does not, what is asked for a group; and notes it."""

    name = "n/0"
    config = SimpleNamespace(gpu="")

    def __init__(self, *, breaks: str = "") -> None:
        self.asked: list[str] = []
        self._breaks = breaks

    async def call(self, command: Any, *, deadline: float) -> Any:
        kind = type(command).__name__
        self.asked.append(kind)
        if kind == self._breaks:
            raise TransportBroken("it broke there")
        if kind == "OfferGroup":
            return SimpleNamespace(offer=b"offer")
        return SimpleNamespace()


class Joins(Hand):
    """A stock engine: `breaks_at` -2 is when it is told to join."""

    offered = 0

    async def probe(self, *, deadline: float) -> EngineInfo:
        return INFO

    async def begin(self, version: int, manifest: Any, offers: Any, *, deadline: float) -> None:
        self.offered = len(offers[0])
        if self._breaks_at == -2:
            raise EngineError("it cannot join")


INFO = EngineInfo(
    software="",
    profile="",
    tp_size=2,
    version=1,
    paused=True,
    torn=False,
    transport=GroupPath.transport,
    incarnation="1",
)


class Stuck(Hand):
    async def probe(self, *, deadline: float) -> EngineInfo:
        await asyncio.Event().wait()
        return INFO


@pytest.mark.parametrize("begun", [True, False])
def test_a_silent_engine_that_an_update_was_begun_in_over_a_group_has_to_be_restarted(begun):
    async def run() -> ev.Event | None:
        engine = Engine(EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:1"), cast("Any", Stuck()))
        engine.learned(INFO)
        engine.begun = begun
        executor = NodeExecutor("n", "127.0.0.1", cast("Any", {"e": engine}), [])
        probe = do.ProbeEngine(engine="e", deadline=time.monotonic() + 0.05)
        return await executor.execute(PushContext(push="p", model="m", version=3), probe)

    failed = asyncio.run(run())
    assert isinstance(failed, ev.EngineFailed)
    assert failed.error.message == "engine e did not answer 'probe' before its deadline"
    assert ("restart it" in (failed.error.hint or "")) == begun


@pytest.mark.parametrize(
    ("hand", "breaks", "said", "asked"),
    [
        (Joins(), "", "", ["OfferGroup", "JoinGroup"]),
        (Joins(breaks_at=-2), "", "it cannot join", ["OfferGroup", "JoinGroup", "LeaveGroup"]),
        (Joins(), "JoinGroup", "it broke there", ["OfferGroup", "JoinGroup", "LeaveGroup"]),
    ],
)
def test_engine_and_bridge_join_together_or_not_at_all(hand, breaks, said, asked):
    """Of several bridges one, where the engine takes buckets from one alone."""

    async def run() -> tuple[ev.Event | None, list[list[str]], dict[Any, Any]]:
        bridges = [Bridge(breaks=breaks), Bridge()]
        engine = Engine(EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:1"), cast("Any", hand))
        engine.learned(INFO)
        engine.accepted[b"digest", False] = ()
        executor = NodeExecutor("n", "127.0.0.1", cast("Any", {"e": engine}), cast("Any", bridges))
        context = PushContext(push="p", model="m", version=3)
        context.manifest, context.incarnations = cast("Any", object()), {"e": "1"}
        event = await executor.execute(context, do.BeginEngine(engine="e", deadline=time.monotonic() + 20))
        await asyncio.sleep(0)  # what goes on behind has been asked
        return event, [bridge.asked for bridge in bridges], engine.accepted

    event, (one, other), accepted = asyncio.run(run())
    assert hand.offered in (0, 1)
    if said:
        assert isinstance(event, ev.EngineFailed)
        assert said in event.error.message
        assert accepted == {}, "it is asked anew what it takes"
    else:
        assert event == ev.EngineBegun(engine="e")
    assert one == asked
    assert [kind for kind in other if kind != "LeaveGroup"] == []


@pytest.mark.parametrize("refuses", [False, True])
def test_several_buckets_go_to_a_group_in_one_call(refuses):
    """Sent in their order while the engine takes them; no more are sent to one that does not."""
    hand = AtOnce(breaks_at=4 if refuses else -1)
    sent: list[tuple[int, str]] = []

    class Sends(Bridge):
        async def call(self, command: Any, *, deadline: float) -> Any:
            if isinstance(command, commands.SendGroup):
                sent.append((command.slot, command.group))
                if refuses:  # nobody takes it
                    await asyncio.Event().wait()
            return await super().call(command, deadline=deadline)

    async def run() -> tuple[ev.Event | None, list[str]]:
        bridge = Sends()
        engine = Engine(EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:1"), cast("Any", hand))
        engine.learned(INFO)
        executor = NodeExecutor("n", "127.0.0.1", cast("Any", {"e": engine}), cast("Any", [bridge]))
        executor.exports._grouped.add("e")
        context = PushContext(push="p", model="m", version=3)
        context.manifest = manifest_of({f"t{i}": ("uint8", (64,), bytes(64)) for i in range(8)}, slot_bytes=64)
        for bucket in range(8):
            context.tickets["e", bucket] = (GroupTicket(group="g", sequence=bucket).pack(),)
            context.slots[bucket] = (do.Slot("n", 0, 10 + bucket), bucket)
        event = await executor.execute(context, load(4, 3))
        await asyncio.sleep(0)  # what goes on behind has been asked
        return event, bridge.asked

    event, asked = asyncio.run(run())
    if refuses:
        assert isinstance(event, ev.EngineFailed)
        assert asked[-1] == "LeaveGroup"
        assert sent == [(14, "g")]
    else:
        assert event == ev.BucketLoaded(engine="e", bucket=4, count=3)
        assert hand.loaded == [4, 5, 6]
        assert sent == [(14, "g"), (15, "g"), (16, "g")]


class Accepts(Hand):
    """An engine that cannot tell what a push leaves as it is, and needs all while it is torn or asleep."""

    asked = 0

    async def accept(self, manifest: Any, *, deadline: float) -> tuple[str, ...]:
        self.asked += 1
        return ()

    def draws(self, manifest: Any) -> bool:
        return False


@pytest.mark.parametrize("changes", [{}, {"torn": True}, {"asleep": True}])
def test_what_an_engine_took_before_it_is_asked_anew_while_it_is_not_whole(changes):
    """A part of the model would be committed beside what a push has left that went no further."""
    hand = Accepts()

    async def run() -> None:
        engine = Engine(EngineConfig(name="e", kind="sglang", url="http://127.0.0.1:1"), cast("Any", hand))
        executor = NodeExecutor("n", "127.0.0.1", cast("Any", {"e": engine}), [])
        context = PushContext(push="p", model="m", version=3)
        context.manifest = manifest_of({"t": ("uint8", (64,), bytes(64))}, slot_bytes=64)
        plain = msgspec.structs.replace(INFO, transport="mapped")
        other = msgspec.structs.replace(plain, **changes)
        for info in (plain, plain, other, other):
            engine.learned(info)
            accepted = await executor.execute(context, do.AcceptEngine(engine="e", deadline=soon()))
            needs_all = info is not plain and bool(changes)
            assert accepted == ev.EngineAccepted(engine="e", not_pushed=0, needs_all=needs_all, draws=False)

    asyncio.run(run())
    assert hand.asked == (2 if changes else 1)


class Looked(Hand):
    """An engine that counts how often it is asked how it is, and is another one each time."""

    asked = 0

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self._fails = fails

    async def probe(self, *, deadline: float) -> EngineInfo:
        self.asked += 1
        if self.asked == 1 and self._fails:
            raise EngineLost("not yet")
        await asyncio.sleep(0)
        return msgspec.structs.replace(INFO, incarnation=str(self.asked))

    async def pause(self, mode: str, *, deadline: float) -> None: ...

    async def begin(self, *_: Any, deadline: float) -> None: ...


def alone(hand: Looked) -> tuple[Engine, NodeExecutor, PushContext]:
    engine = Engine(EngineConfig(name="e", kind="vllm", url="http://127.0.0.1:1"), cast("Any", hand))
    executor = NodeExecutor("n", "127.0.0.1", cast("Any", {"e": engine}), [])
    return engine, executor, PushContext(push="p", model="m", version=3, manifest=cast("Any", SimpleNamespace()))


def soon() -> float:
    return time.monotonic() + 20


async def done(engine: Engine) -> None:
    """What was begun ahead of a push has ended, well or not."""
    assert engine._ahead is not None
    await asyncio.wait([engine._ahead.work])


@pytest.mark.parametrize(
    "case", ["told", "begun", "not begun", "several ranks", "late", "failed", "done to", "being done to"]
)
def test_what_was_asked_ahead_of_a_push_is_not_asked_again(monkeypatch, case):
    """Unless that was long ago, came to nothing, or something was done to the engine since."""
    hand = Looked(fails=case == "failed")

    async def run() -> ev.Event | None:
        engine, executor, context = alone(hand)
        if case == "being done to":
            async with engine.lock:
                engine.look_ahead(soon())
            assert engine._ahead is None
        else:
            engine.look_ahead(soon())
        if case == "begun":
            await asyncio.sleep(0)
        elif case not in ("not begun", "being done to"):
            await done(engine)
        if case == "several ranks":
            engine.look_ahead(soon())
        if case == "late":
            monkeypatch.setattr("weightsyncd.engines.SOON", -1.0)
        if case == "done to":
            await executor.execute(context, do.PauseEngine(engine="e", mode="keep", deadline=soon()))
        return await executor.execute(context, do.ProbeEngine(engine="e", deadline=soon()))

    assert isinstance(asyncio.run(run()), ev.EngineProbed)
    assert hand.asked == (2 if case in ("late", "failed", "done to") else 1)


@pytest.mark.parametrize("late", [False, True])
def test_an_engine_that_was_just_asked_is_not_looked_at_again(monkeypatch, late):
    hand = Looked()

    async def run() -> ev.Event | None:
        _, executor, context = alone(hand)
        await executor.execute(context, do.ProbeEngine(engine="e", deadline=soon()))
        if late:
            monkeypatch.setattr("weightsyncd.executor.SOON", -1.0)
        return await executor.execute(context, do.BeginEngine(engine="e", deadline=soon()))

    begun = asyncio.run(run())
    if late:
        assert isinstance(begun, ev.EngineFailed)
        assert begun.error.message == "engine e was restarted during the push"
    else:
        assert begun == ev.EngineBegun(engine="e")
    assert hand.asked == (2 if late else 1)
