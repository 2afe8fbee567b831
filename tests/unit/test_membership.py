"""What may change in a daemon that runs, and what becomes of a change that cannot be."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from weightsync.config import EngineConfig, parse_node_config
from weightsync.errors import ConfigError, LocalProtocolError, PushRefused
from weightsyncd.engines import Engines
from weightsyncd.membership import Membership, as_in, need_restart, with_engines

FILE = """
[node]
name = "n0"
[[engines]]
name = "e0"
kind = "reference"
url = "http://127.0.0.1:1"
"""


def engine(name: str, url: str = "http://127.0.0.1:2") -> EngineConfig:
    return EngineConfig(name=name, kind="reference", url=url)


async def turns() -> None:
    """Let every task that can go on do so."""
    for _ in range(8):
        await asyncio.sleep(0)


class Peer:
    """A node that is kept for as long as it is one."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name, self.endpoint, self.kept = name, endpoint, False

    async def keep(self) -> None:
        self.kept = True
        try:
            await asyncio.Event().wait()
        finally:
            self.kept = False


class World:
    def __init__(self) -> None:
        self.pushing = False
        self.config = parse_node_config(FILE)
        self.engines = Engines(self.config.engines, self.config.timeouts, busy=lambda: self.pushing)
        self.peers: dict[str, Any] = {}
        self.changes = 0
        self.gone: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.members = Membership(
            self.config,
            self.engines,
            self.peers,
            busy=lambda: self.pushing,
            make_peer=Peer,  # type: ignore[arg-type]
            spawn=lambda work: self.tasks.append(asyncio.ensure_future(work)),
            on_gone=self.gone.append,
            on_change=self.changed,
        )

    def changed(self) -> None:
        self.changes += 1

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.engines]


def test_engines_that_stay_are_the_same_ones():
    async def main() -> None:
        world = World()
        before = world.engines["e0"]
        await world.members.change(lambda c: with_engines(c, (engine("e1"),), ()), timeout=1)
        assert (world.names, world.engines["e0"]) == (["e0", "e1"], before)
        moved = msgspec.structs.replace(world.members.config.engines[0], url="http://127.0.0.1:3")
        await world.members.change(lambda c: with_engines(c, (moved,), ("e0",)), timeout=1)
        assert world.engines["e0"] is not before
        assert world.engines["e0"].config.url == "http://127.0.0.1:3"
        assert world.gone == ["e0"]
        await asyncio.gather(*world.tasks)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("add", "remove", "said"),
    [
        ((engine("e0"),), (), "has it already"),
        ((engine("e1"), engine("e1")), (), "has it already"),
        ((engine("e1", "ftp://x"),), (), "not an http"),
        ((msgspec.structs.replace(engine("e1"), kind="vlm"),), (), "one of reference, sglang, vllm"),
        ((), ("e0", "e9"), "no engine called 'e9'"),
    ],
)
def test_a_change_that_cannot_be_changes_nothing(add, remove, said):
    async def main() -> None:
        world = World()
        with pytest.raises(ConfigError, match=said):
            await world.members.change(lambda c: with_engines(c, add, remove), timeout=1)
        assert world.names == ["e0"]
        assert world.members.config == world.config

    asyncio.run(main())


def test_changes_wait_for_the_push_and_come_in_order():
    async def main() -> None:
        world = World()
        world.pushing = True
        first = asyncio.ensure_future(world.members.change(lambda c: with_engines(c, (engine("e1"),), ()), timeout=20))
        second = asyncio.ensure_future(world.members.change(lambda c: with_engines(c, (), ("e1",)), timeout=20))
        await asyncio.sleep(0)
        world.members.settle()
        assert (world.names, first.done()) == (["e0"], False)
        world.pushing = False
        world.members.settle()
        await asyncio.gather(first, second, *world.tasks)
        assert world.names == ["e0"]

    asyncio.run(main())


def test_an_adapter_is_closed_after_what_is_still_to_be_done_to_its_engine():
    async def main() -> None:
        world = World()
        gone = world.engines["e0"]
        done: list[str] = []

        async def close() -> None:
            done.append("closed")

        gone.adapter.close = close  # type: ignore[method-assign]

        async def resume() -> None:
            async with gone.lock:
                done.append("resumed")

        await gone.lock.acquire()
        resuming = asyncio.ensure_future(resume())
        await asyncio.sleep(0)
        await world.members.change(lambda c: with_engines(c, (), ("e0",)), timeout=1)
        await asyncio.sleep(0)
        assert (done, gone.gone) == ([], True)
        gone.lock.release()
        await asyncio.gather(resuming, *world.tasks)
        assert done == ["resumed", "closed"]

    asyncio.run(main())


def test_an_engine_whose_config_changes_is_still_owed_its_resume():
    async def main() -> None:
        world = World()
        world.engines["e0"].paused_by_us = True
        other = msgspec.structs.replace(world.config.engines[0], model="another")
        await world.members.change(lambda c: with_engines(c, (other,), ("e0",)), timeout=1)
        assert world.engines["e0"].paused_by_us
        await asyncio.gather(*world.tasks)

    asyncio.run(main())


def test_a_bug_in_a_change_reaches_who_asked_and_holds_up_nobody(caplog):
    async def main() -> None:
        world = World()

        def broken(config: Any) -> Any:
            raise RuntimeError("oh")

        with pytest.raises(LocalProtocolError, match="oh"):
            await world.members.change(broken, timeout=1)
        await world.members.change(lambda c: with_engines(c, (engine("e1"),), ()), timeout=1)
        assert world.names == ["e0", "e1"]

    asyncio.run(main())


def test_a_change_that_was_given_up_is_not_made_later():
    async def main() -> None:
        world = World()
        world.pushing = True
        with pytest.raises(PushRefused, match="a push has been under way"):
            await world.members.change(lambda c: with_engines(c, (), ("e0",)), timeout=0.01)
        world.pushing = False
        world.members.settle()
        assert world.names == ["e0"]

    asyncio.run(main())


def test_peers_are_kept_from_when_they_come_until_they_go():
    async def main() -> None:
        world = World()
        keeping = asyncio.ensure_future(world.members.keep())
        with_peer = parse_node_config(FILE + '[cluster.peers]\nn1 = "tcp://127.0.0.1:9"\n')
        await world.members.change(lambda c: as_in(c, with_peer), timeout=1)
        await turns()
        peer = world.peers["n1"]
        assert (peer.kept, world.changes) == (True, 1)
        await world.members.change(lambda c: as_in(c, with_peer), timeout=1)
        assert (world.peers["n1"], world.changes) == (peer, 1)
        await world.members.change(lambda c: as_in(c, parse_node_config(FILE)), timeout=1)
        await turns()
        assert (world.peers, peer.kept, world.changes) == ({}, False, 2)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    asyncio.run(main())


def test_what_needs_a_restart_is_named():
    before = parse_node_config(FILE)
    after = parse_node_config(
        FILE.replace('name = "n0"', 'name = "n1"').replace('name = "e0"', 'name = "e5"')
        + '[arena]\nslots = 5\n[cluster]\nlisten = "tcp://127.0.0.1:5"\npeers = {n2 = "tcp://127.0.0.1:9"}\n'
    )
    assert need_restart(before, before) == []
    assert need_restart(before, after) == ["node.name", "arena.slots", "cluster.listen"]
